# ruff: noqa: E501
"""The list of rules as a whole: what must survive, that twice is once, that nothing is invented; configuration."""

import pickle
import unicodedata
from html import unescape
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opencc import OpenCC

from oriole.config import validate
from oriole.errors import ConfigError, DataError, OrioleError
from oriole.text.records import Doc
from oriole.text.rules import Drop, RulesConfig, apply_rules, build_rules

LIGHT = build_rules(RulesConfig(preset="light", languages=()))
FULL = build_rules(RulesConfig())
STRICT = build_rules(RulesConfig(c4_terminal=True, c4_line_words=3, c4_curly=True, languages=()))
T2S = OpenCC("t2s")
MARKS = ("<EMAIL>", "<PHONE>", "<ID>", "<IP>")

ENGLISH = (
    "The oriole came back to the old garden in the first week of May, and the children ran out to see it. "
    "It had built its nest in the same willow as last year, high above the river. "
    "Nobody knew where it had spent the winter, but everyone was glad that it sang again. "
    "My grandmother said that the bird brings good weather, and for once she was right. "
    "We sat by the water until the light was gone and the frogs began their own concert."
)
CHINESE = (
    "五月的第一个星期，黄鹂又回到了老花园，孩子们都跑出来看它。它把巢筑在去年那棵柳树上，高高地悬在河水上面。"
    "没有人知道它在哪里过的冬，可是大家听见它的歌声都很高兴。奶奶说这种鸟会带来好天气，这一次她说对了。"
    "我们坐在水边，一直到天色完全暗下来，青蛙开始了自己的音乐会。第二天早晨下起了小雨，院子里的石板路闪着光，"
    "邻居家的老人撑着伞站在门口，和来往的人打招呼。他说自己年轻的时候在北方工作，那里的春天来得很晚，"
    "要到六月才能看见树叶完全变绿，所以他一直很羡慕南方的朋友。"
)
CODE = "```python\ndef f(x):\n    if x!=1 and not x:\n\treturn {'a': [1, 2]}  # 注释，，全角！！\n```"
MARKDOWN = f"# Title\n\n- one\n- two\n\n{CODE}\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n**bold** and `a!!b`"
LATEX = (
    r"The sum is $\sum_{i=1}^n i = \frac{n(n+1)}{2}$, and \(a < b\), so $$x!!!! = y$$ holds; \[ \mathbf{A}x = b \] too."
)
URLS = "See https://example.com/a_b?x=1&amp=2!!#frag and http://[::1]:80/,, or ftp://host/～x for more."


def run(text: str, lang: str = "", rules: object = LIGHT) -> str:
    """The text after the rules; a drop fails the test."""
    result = apply_rules(Doc(text, lang), rules)  # type: ignore[arg-type]
    assert isinstance(result, Doc), result
    return result.text


# Text near the edges of the rules: markup, marks, runs of signs, widths, numbers that look personal.
PIECES = st.sampled_from(
    [
        "<b>", "</b>", "<p>", "</p>", "<br/>", "<div class=\"a\">", "<!--", "-->", "<script>", "</script>", "<", ">", "&lt;",
        "&amp;", "&nbsp;", "&#39;", "&quot;", "&#x4e2d;", "&", ";", "[[", "]]", "|", "'''", "''", "{{", "}}", "== a ==\n",
        "<ref>", "</ref>", "[edit]", "{|", "|}", "`", "```", "~~~", "\n```\n", "$", "$$", "\\(", "\\)", "://", "http://a.b/",
        "，，", "。", "！！！", "？？", "!!!", "???", "......", "…", "……", "——", "—", "～", "，", ",,", "\u3000", "\u3000\u3000",
        "\xa0", "Ａ", "１", "％", "ﬁ", "⼀", "｡", "＜", "ｂ", "＞", "\n", "\n\n", "\n\n\n\n", " ", "  ", "\t", "    ", "\r\n",
        "\x00", "\u0301", "e", "\ufeff", "\ud800", "a@b.com", "13800138000", "8.8.8.130", "11010519491231002X", "110105",
        "privacy policy", "Please enable JavaScript", "版权所有", "转载请注明出处", "lorem ipsum", "cookie", "x" * 1001,
        "頭髮", "乾隆", "後來發現", "の", "かな", "春天来了", "我们去公园看花，听鸟唱歌", "the oriole", "word", "- ", "# ", "1. ",
        "> ", "| a | b |", "a", "中", "문", "1", "(", ")", "[", "]", "{", "}", "*", "_", "\\",
        "（", "）", "；", "！", "：", "the ", " tag", "元素", "<div>", "<li>", " and ", "ssh ", "-p ", "q@k.view", "`ssh a@b.cn`", "\n    ",
    ]
)  # fmt: skip
MESSY = st.lists(st.one_of(PIECES, PIECES, st.text(max_size=3)), max_size=24).map("".join)
LANGS = st.sampled_from(["", "zh", "en", "ja"])


@settings(max_examples=200, deadline=None)
@given(MESSY, LANGS)
@example("<<b>b>x</<b></b>b>", "en")
@example("&amp;lt;br&amp;gt;", "en")
@example("'&#39;a''", "en")
@example("ａ\u0301", "zh")
@example("[a@b.com]", "en")
@example("a@b.com<p>", "en")
@example("&lt;a@b.com", "")
@example("<b></p>13800138000", "en")
@example("privacy policy<br/>頭髮", "")
@example("privacy policy\n\n\n\nprivacy policy\n\n\n", "en")
@pytest.mark.parametrize("rules", [LIGHT, STRICT], ids=["light", "strict"])
def test_twice_is_once(rules: object, text: str, lang: str) -> None:
    once = apply_rules(Doc(text, lang), rules)  # type: ignore[arg-type]
    if isinstance(once, Doc):
        assert apply_rules(once, rules) == once  # type: ignore[arg-type]


@pytest.mark.soak
@settings(max_examples=20_000, deadline=None)
@given(MESSY, LANGS)
def test_twice_is_once_soak(text: str, lang: str) -> None:
    for rules in (LIGHT, STRICT):
        once = apply_rules(Doc(text, lang), rules)
        if isinstance(once, Doc):
            assert apply_rules(once, rules) == once


def folded(text: str) -> str:
    """What may differ taken away: width, script, blanks, entities' spelling."""
    text = unicodedata.normalize("NFKC", unescape(unescape(text)))
    text = "".join(c for c in text if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cs") and c != "\ufeff")
    for _ in range(3):
        text = T2S.convert(text)
    return text


def is_subsequence(part: str, whole: str) -> bool:
    rest = iter(whole)
    return all(c in rest for c in part)


@settings(max_examples=150, deadline=None)
@given(MESSY, LANGS)
def test_nothing_is_invented(text: str, lang: str) -> None:
    """Every kept character comes from the input, in its order; the mappings, marks and full stop apart."""
    result = apply_rules(Doc(text, lang), LIGHT)
    if isinstance(result, Drop):
        return
    clean = result.text
    for mark in MARKS:
        if mark not in text:
            clean = clean.replace(mark, "")
    if lang != "en" and clean.endswith("。"):
        clean = clean[:-1]
    clean = clean.replace("\ufffd", "")
    assert is_subsequence(folded(clean), folded(text.replace("\x00", "")))


PROSE = st.sampled_from(
    [ENGLISH, CHINESE, CODE, MARKDOWN, LATEX, URLS, "Chess is a glass board. cats, dogs", "it's 3.14, U.S. & R&D!", "a < b > c",
     "vector<int> v; list<b> w;", "Wait... what?!", "if (a && !!b) c++;", "C:\\dir\\file", "x = a[i][j]; y[1] = 2", "- item",
     "She said: “Yes.” — and left…", "他说：“好。”——然后走了……", "《书名》、（注）；１", "古诗：\n床前明月光，\n疑是地上霜。", "#include <vector>",
     "<path> of the $HOME", "{{ jinja }} and [[ -f x ]]", "e-mail, co-op; 50% off", "?? || ::", "---", "* * *", "a  b",
     "the <p> tag and a <div> element", "use the <ul>, <ol> and <li> tags", "ssh -p 22 me@web1.firm.com", "y = q@k.view(3)"]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(PROSE, min_size=1, max_size=6, unique=True), st.sampled_from(["\n", "\n\n"]))
def test_good_text_survives(pieces: list[str], between: str) -> None:
    text = between.join(pieces)
    lang = "en" if text.isascii() else "zh"
    expected = text.replace("１", "1") if lang == "zh" else text
    result = run(text, lang)
    assert result.removesuffix("。") == expected.removesuffix("。")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1), min_size=3))
def test_english_words_survive(words: list[str]) -> None:
    text = " ".join(words)
    kept = run(text, "en")
    assert [w for w in kept.split() if w != "<PHONE>" and w != "<ID>"] == [w for w in words if w in kept.split()]
    assert all(w in kept.split() for w in words if not w.isdigit() and len(w) < 15)


HAN_PIECES = st.lists(
    st.sampled_from("春 天来了 ，柳 ；鸟 （花） ：看 ！听 Python，学 １２ x".split()), min_size=1, max_size=12
)


@settings(max_examples=150, deadline=None)
@given(
    HAN_PIECES, st.sampled_from(["He wrote %s, and left.", "%s", "A line.\n\n%s\n\nThe end", "（%s）", '"%s" he said'])
)
def test_chinese_sentences_keep_their_signs_in_english_documents(pieces: list[str], around: str) -> None:
    sentence = f"春{''.join(pieces)}天"
    wanted = sentence.translate({0xFF11: "1", 0xFF12: "2"})
    assert wanted in run(around % sentence, "en")


TAG = st.sampled_from("p div span li ul table h1 br td section img b".split())


@settings(max_examples=150, deadline=None)
@given(
    TAG,
    TAG,
    st.sampled_from(
        ["Use the <%s> tag.", "见 <%s> 标签。", "Both <%s> and </%s> tags", "with <%s>, <%s> and <hr> elements"]
    ),
)
def test_tags_that_prose_speaks_of_stay(one: str, two: str, form: str) -> None:
    text = form % ((one, two) if form.count("%s") == 2 else one)
    assert run(text, "en") == text


@settings(max_examples=150, deadline=None)
@given(
    st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True), st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True),
    st.sampled_from(["weight", "transpose(1)", "to(device)", "T", "view(2, 3)", "data[0]"]),
    st.sampled_from(["ssh %s", "sftp -P 22 %s", "ssh -i k.pem -o X=y %s"]),
)  # fmt: skip
def test_products_and_logins_are_no_mail(user: str, host: str, attribute: str, command: str) -> None:
    for text in (f"```\ny = {user}@{host}.{attribute}\n```", f"Run `{command % f'{user}@{host}.firm.com'}` now."):
        assert run(text, "en") == text
    assert run(f"Write to {user}@{host}.firm.com today.", "en") == "Write to <EMAIL> today."


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, f"{ENGLISH}\n\n{CODE}\n\nThe end.", f"{CHINESE}\n\n{CODE}"])
def test_good_documents_pass_every_rule(text: str) -> None:
    result = apply_rules(Doc(text), FULL)
    assert isinstance(result, Doc) and result.text == text
    assert result.lang == ("en" if text.startswith("The") else "zh")


JAPANESE = st.lists(
    st.sampled_from(
        ["東京大学の学生です", "國語を學ぶ", "これは", "新聞を讀む", "カタカナ", "後で會ふ", "。", "、", "\n"]
    ),
    min_size=4,
).map("".join)


@settings(max_examples=60, deadline=None)
@given(JAPANESE)
def test_t2s_never_touches_japanese(text: str) -> None:
    rules = build_rules(RulesConfig(preset="light", languages=()))
    kana = [line for line in text.split("\n") if any("\u3041" <= c <= "\u30fa" for c in line)]
    kept = run(text, "", rules).split("\n") if text.strip() else []
    assert all(line in "\n".join(kept) for line in kana)
    assert run("国" + text, "ja", rules).replace("\n", "") == ("国" + text).replace("\n", "")


@given(st.text(st.sampled_from("頭髮發現後來 word,.\n")))
def test_t2s_never_touches_english(text: str) -> None:
    result = apply_rules(Doc("word " + text, "en"), LIGHT)
    assert isinstance(result, Doc)
    assert [c for c in result.text if c in "頭髮發現後來"] == [c for c in text if c in "頭髮發現後來"]


# --- configuration ---------------------------------------------------------------------------------------------------


def test_every_rule_has_a_switch() -> None:
    names = {rule.name for rule in FULL}
    off = {
        name: (0, 0)
        if name in ("gopher_words", "gopher_word_length", "fineweb2_word_length")
        else type(field.default)()
        for name, field in RulesConfig.model_fields.items()
        if name not in ("preset", "languages")
    }
    assert {rule.name for rule in build_rules(RulesConfig(**off, languages=()))} == {"identify", "length"}
    for name in names - {"identify", "length", "tidy", "markup", "mask_numbers", "c4_lines"}:
        less = {
            rule.name for rule in build_rules(RulesConfig(**{name: off[name]} if name in off else {"languages": ()}))
        }
        assert name not in less and names - less <= {name, "tidy"}


def test_light_has_no_quality_rules_but_given_keys_win() -> None:
    assert not any(
        r.name.startswith(("gopher", "c4", "fineweb", "evalweb")) for r in build_rules(RulesConfig(preset="light"))
    )
    rules = build_rules(RulesConfig(preset="light", c4_sentences=3))
    assert [r.name for r in rules if r.name.startswith(("gopher", "c4", "fineweb", "evalweb"))] == ["c4_sentences"]


def test_published_defaults() -> None:
    c = RulesConfig()
    assert c.gopher_words == (50, 100_000) and c.gopher_top_ngrams == (0.2, 0.18, 0.16)
    assert c.gopher_dup_ngrams == (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    assert c.fineweb2_dup_ngrams == (0.198, 0.182, 0.167, 0.154, 0.14, 0.127)
    assert c.fineweb2_line_ends == 0.106 and c.fineweb2_new_lines == 0.178 and c.fineweb2_alpha == 0.735
    assert c.evalweb_han == 0.3 and c.evalweb_characters == 200 and c.evalweb_repeats == 0.5


def test_rules_travel_to_other_processes() -> None:
    rules = pickle.loads(pickle.dumps(FULL))
    assert apply_rules(Doc(CHINESE), rules) == apply_rules(Doc(CHINESE), FULL)


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="gopher_words"):
        validate(RulesConfig, {"gopher_word": 3}, "here")


def test_length_and_language() -> None:
    assert apply_rules(Doc(" \n "), LIGHT) == Drop("min_characters", "1 characters")
    assert isinstance(apply_rules(Doc("x" * 50), build_rules(RulesConfig(preset="light", max_characters=40))), Drop)
    french = "Le chat est assis sur la table et regarde les oiseaux dans le jardin, parce que la maison est trop petite pour lui."
    result = apply_rules(Doc(french), FULL)
    assert isinstance(result, Drop) and result.reason == "languages" and result.detail == "fr"
    assert isinstance(apply_rules(Doc(french, "en"), FULL), Drop)
    assert isinstance(apply_rules(Doc("これは日本語の文章です。" * 20), FULL), Drop)
    assert isinstance(apply_rules(Doc(french), build_rules(RulesConfig(preset="light", languages=("fr",)))), Doc)


def test_a_list_of_unwanted_words(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("黄鹂\n石板路\n\n", encoding="utf-8")
    result = apply_rules(Doc(CHINESE), build_rules(RulesConfig(evalweb_words=str(path))))
    assert isinstance(result, Drop) and result.reason == "evalweb_words"
    with pytest.raises(OrioleError, match="words"):
        build_rules(RulesConfig(evalweb_words=str(tmp_path / "none.txt")))
    path.write_text("\n", encoding="utf-8")
    with pytest.raises((ConfigError, DataError), match="empty"):
        build_rules(RulesConfig(evalweb_words=str(path)))
