# ruff: noqa: E501
"""Hand-made cases for every rule, in both languages: what changes, what must not, what is dropped and why."""

import pytest

from oriole.text.records import Doc
from oriole.text.rules import Drop, RulesConfig, apply_rules, build_rules
from oriole.text.ruleslang import identify
from oriole.text.ruleslines import boilerplate, c4_lines
from oriole.text.rulesmask import mask_mail, mask_numbers, valid_id
from oriole.text.rulesmend import full_stop, markup, punctuation, simplify, width


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("<p>One</p><p>two<br>three</p>", "\nOne\n\ntwo\nthree\n"),
        ('<div class="x" id=y>春天</div>', "\n春天\n"),
        ("a <b>bold</b> and <i>italic</i> word", "a bold and italic word"),
        ('see <a href="http://x.org/a?b=1&amp;c=2">here</a>.', "see here."),
        ("A<!-- hidden\ncomment -->B<script type='x'>if (a<b) {}</script>C<style>p {}</style>D", "ABCD"),
        (
            "R&amp;D &quot;quoted&quot; it&#39;s 5&nbsp;km &copy; 2020 &#20013;&#x6587;",
            'R&D "quoted" it\'s 5 km © 2020 中文',
        ),
        ("a &lt; b and b &gt; c", "a < b and b > c"),
        ("|a<br>b|c|", "|a b|c|"),
        ("Tags <br> Elements <h2> Elements of style </h2> the <div> box </div>", None),
        ("<li>标签</li><li>a <b>tag</b></li>the<br>tag <p>tags</p>", None),
        ("<TABLE><TR><TD>x</TD><TD>y</TD></TR></TABLE>", "\n\n x  y \n\n"),
    ],
)
def test_html_remains_go(text: str, clean: str | None) -> None:
    assert markup(text) == clean if clean is not None else "<" not in markup(text)


@pytest.mark.parametrize(
    "text",
    [
        "the tag &lt;br&gt; makes a new line",
        "write &amp;lt; for a less-than sign",
        "#include <vector>\nstd::vector<int> v; list<b> w; map<a, b> m;",
        "if (a<b && c>d) x<<=1;",
        "oriole train <path> [<name>]",
        "```html\n<div><p>kept &amp; safe</p></div>\n```",
        "use `<br>` or `&nbsp;` there",
        "text\n\n    <b>indented</b> code &amp;\n",
        "AT&T, a&b; c&d",
        "1 < 2 > 0 <- x -> y <3",
        r"$a <b> c$ and \(x &amp; y\)",
        "Use the <p> tag for a paragraph, and a <div> where you need a box.",
        "Lists are made with the <ul>, <ol> and <li> elements.",
        "Close it with a </table> tag; tags <span> and <div> do nothing.",
        "A void element such as the <br> tag has no end.",
        "段落用<p>标签，表格用 <table> 元素；标签<div>没有意义。",
    ],
)
def test_what_only_looks_like_html_stays(text: str) -> None:
    assert markup(text) == text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (
            "'''黄鹂'''是[[鸟类|鸟]]的一种<ref>书</ref>，见于[[亚洲]]。\n\n== 分布 ==\n{{Infobox|name=x}}[[Category:鸟]]",
            "黄鹂是鸟的一种，见于亚洲。\n\n== 分布 ==\n",
        ),
        ("The '''oriole''' is a [[bird]] of [[Asia|the east]].", "The oriole is a bird of the east."),
        ("History [edit]\nThe town[citation needed] is old.", "History \nThe town is old."),
        ("历史[编辑]\n春天[來源請求]", "历史\n春天"),
    ],
)
def test_wiki_remains_go(text: str, clean: str) -> None:
    assert markup(text, html=False) == clean


@pytest.mark.parametrize(
    "text",
    [
        "if [[ -f x ]]; then echo ''; fi",
        "matrix = [[1, 2], [3, 4]]; s = '''doc'''",
        "x[[i]] <- y[[name]]",
        "{{ page.title }} {% if x %}{% endif %} {{{1}}}",
        "see note [1] and a[0]",
        r"\frac{{a}}{{b}} and ''quoted'' words",
    ],
)
def test_what_only_looks_like_a_wiki_stays(text: str) -> None:
    assert markup(text) == text


@pytest.mark.parametrize(
    ("text", "lang", "clean"),
    [
        ("　　ＡＢＣ１２３，５０％。", "zh", "ABC123，50%。"),
        ("床前明月光　疑是地上霜", "zh", "床前明月光 疑是地上霜"),
        ("第一\xa0章｡⼀⻳", "zh", "第一 章。一龟"),
        ("（注）：“好！”；～……——①②㎡x²½™", "zh", "（注）：“好！”；～……——①②㎡x²½™"),
        ("ｆull，width！ ﬁne\u3000text\xa0here x² ½ …", "en", "full,width! fine text here x² ½ …"),
        ("＜b＞ stays", "en", "＜b＞ stays"),
        (
            "He read：“两个黄鹂鸣翠柳，一行白鹭上青天。” Then，silence！",
            "en",
            "He read：“两个黄鹂鸣翠柳，一行白鹭上青天。” Then,silence!",
        ),
        (
            "我喜欢Python，因为（如 list）它简单；真的！\nNext（line）",
            "en",
            "我喜欢Python，因为（如 list）它简单；真的！\nNext(line)",
        ),
        ("He said（see 春天）hi，３．５", "en", "He said（see 春天）hi,3.5"),
        ("Spring（春），１：２", "en", "Spring（春），1:2"),
        ("`ａ，ｂ` ａ\n```\nｘ = '１'\n```", "zh", "`ａ，ｂ` a\n```\nｘ = '１'\n```"),
        ("https://example.com/ａ ａ", "ja", "https://example.com/ａ ａ"),
    ],
)
def test_width(text: str, lang: str, clean: str) -> None:
    assert width(text, lang) == clean


@pytest.mark.parametrize(
    ("text", "lang", "clean"),
    [
        ("頭髮、發現、皇后、乾隆、後來、了解與瞭望", "zh", "头发、发现、皇后、乾隆、后来、了解与瞭望"),
        ("這是繁體字。\n日本語の漢字は變へない。", "zh", "这是繁体字。\n日本語の漢字は變へない。"),
        ("這是繁體字。", "en", "這是繁體字。"),
        ("日本語の漢字は變へない。", "ja", "日本語の漢字は變へない。"),
        ("《易经》的乾卦" + "是六十四卦的第一卦，讲的是天的道理，古人非常重视它。" * 4, "zh", None),
        ("简体字的文章，显著而著名。", "zh", None),
    ],
)
def test_simplify(text: str, lang: str, clean: str | None) -> None:
    assert simplify(text, lang) == (text if clean is None else clean)


@pytest.mark.parametrize(
    ("text", "lang", "clean"),
    [
        ("好，，，我们走吧。。真的！！！！是吗？？", "zh", "好，我们走吧。真的！是吗？"),
        ("等等…………然后————完", "zh", "等等……然后——完"),
        ("好!!! 是吗?? 嗯,,", "zh", "好! 是吗? 嗯,"),
        ("Great!!!! Really??? Chapter 1 ........ 5", "en", "Great! Really? Chapter 1 ... 5"),
        ("什么？！……——～", "zh", "什么？！……——～"),
        ("Wait... what?! i++; !!x; a ?? b; x::y; --- *** ,,, ...", "en", None),
        ("`a，，b` 和 $n!!!! + 1$ 与 http://a.b/??!!!", "zh", None),
        ("```\nx，，！！\n```", "zh", None),
        ("なに！！", "ja", None),
    ],
)
def test_punctuation(text: str, lang: str, clean: str | None) -> None:
    assert punctuation(text, lang) == (text if clean is None else clean)


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("春天来了，孩子们都跑到花园里去看那棵开花的树", True),
        ("他说自己老了。\n\n第二天早晨下起了小雨，院子里的石板路闪着光", True),
        ("春天来了，孩子们都跑到花园里去看那棵开花的树。", False),
        ("床前明月光，\n疑是地上霜，举头望明月，低头思故乡，又是一年春好处", False),
        ("- 列表里的一项，说明它的用途是什么样的东西", False),
        ("## 一个很长的标题，说的是这一章里面的所有事情", False),
        ("一个没有逗号的很长很长的标题说的是这一章的事情", False),
        ("短句，没有句号", False),
        ("```\n代码里的注释，这里不应该有句号出现在最后", False),
        ("Use the command 安装软件，然后运行 it with 参数", False),
    ],
)
def test_full_stop(text: str, stop: bool) -> None:
    assert full_stop(text, "zh") == text + "。" * stop
    assert full_stop(text, "en") == text


def test_boilerplate() -> None:
    text = "The text.\nPlease enable JavaScript to view this page.\nBy using it you accept our Privacy Policy.\nLorem ipsum dolor.\nMore."
    assert boilerplate(text) == "The text.\nMore."
    text = "正文。\n转载请注明出处\n责任编辑：小王\n上一篇：春天\n关注微信公众号，获取更多\n京ICP备12345678号\n版权所有 某某网\n正文二。"
    assert boilerplate(text) == "正文。\n正文二。"


@pytest.mark.parametrize(
    "text",
    [
        "JavaScript is a language that browsers run, and it was made in ten days by one man. " * 3,
        "JavaScript is a language.",
        "The court held that the privacy policy of the company was part of the contract between the parties. " * 4,
        "```\n// All rights reserved.\n// enable javascript\n```",
        "未经批准的公众号运营者，依照本条例第十二条的规定处罚；情节严重的，由公安机关依法处理。",
        "上一篇文章里说过，二维码是一种图形。",
        "网络运营者应当公开隐私政策，明示收集使用信息的目的、方式和范围，并经被收集者同意后方可收集使用个人信息。",
        "第三十条 未经许可，任何人不得转载本办法规定的材料。",
        "（三）未经授权复制、使用他人专利的。",
    ],
)
def test_what_speaks_of_boilerplate_stays(text: str) -> None:
    assert boilerplate(text) == text


def test_c4_lines() -> None:
    text = f"# Title\n\nA good sentence ends here.\nno end mark here at all\nToo short.\n\n```\ncode\n```\n{'x' * 1200} y z."
    assert c4_lines(text, terminal=True, words=3) == "\nA good sentence ends here.\n\n```\ncode\n```"
    assert c4_lines(text, terminal=False, words=0) == text[: text.rindex("\n")]
    assert c4_lines(text, terminal=False, words=0, word=2000) == text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Mail john.doe+x@mail.company.co.uk or 联系zhang_san@qq.com。", "Mail <EMAIL> or 联系<EMAIL>。"),
        ("clone git@github.com:me/x.git or a@example.com, user@contoso.com", None),
        ("@property def f(a, b): return a@b", None),
        ("https://user@host.com/x and ssh://git@host.org:22", None),
        ("```\n$ ssh -i key.pem -p 22 root@web1.mycompany.com\nscp a.txt me@web1.mycompany.com:/tmp\n```", None),
        ("Type `ssh-copy-id deploy@build.mycompany.cn` first, then sftp me@files.mycompany.com", None),
        ("```python\n@app.route\ny = q@k.transpose(1, 2) + x@w.weight\n```", None),
        ("y = q@k.transpose(1, 2)", None),
        ("```\n# by zhang.san@qq.com\nmail = 'me@firm.cn'\n```", "```\n# by <EMAIL>\nmail = '<EMAIL>'\n```"),
        (
            "联系zhang@qq.com(张三)；we use ssh, so write to admin@firm.com",
            "联系<EMAIL>(张三)；we use ssh, so write to <EMAIL>",
        ),
    ],
)
def test_mail(text: str, clean: str | None) -> None:
    assert mask_mail(text) == (text if clean is None else clean)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("电话13812345678，或138-1234-5678、+86 13812345678。", "电话<PHONE>，或<PHONE>、<PHONE>。"),
        ("办公室 010-62345678，（021）62345678", "办公室 <PHONE>，<PHONE>"),
        ("Call (212) 555-0123 or +44 20 7946 0958 or 415-555-2671.", "Call <PHONE> or <PHONE> or <PHONE>."),
        ("身份证11010519491231002X和11010519491231002x", "身份证<ID>和<ID>"),
        ("not an id: 110105194912310021", None),
        ("从 114.114.114.114 到 8.8.130.8", "从 <IP> 到 <IP>"),
        ("2606:4700:4700:0:0:0:0:1111", "<IP>"),
        ("192.168.1.200 127.0.0.1 10.0.0.255 version 91.0.4472.124 v1.2.3.99 见5.1.2.3条 1.2.3.4", None),
        ("2019-12-31 12:30:45, 1234567890, 3.14159265358979, 0x13812345678, 20200101123000", None),
        ("订单号20231113812345678，ISBN 978-7-111-21382-6，1381234567", None),
        ("x = 13812345678901", None),
        ("Multicast uses 224.0.0.0 to 239.255.255.255.", None),
    ],
)
def test_numbers(text: str, clean: str | None) -> None:
    assert mask_numbers(text) == (text if clean is None else clean)


def test_switches_of_the_masks() -> None:
    text = "13812345678 11010519491231002X 114.114.114.114 a@b.com"
    assert mask_numbers(text, phones=False) == "13812345678 <ID> <IP> a@b.com"
    assert mask_numbers(text, ids=False, ips=False) == "<PHONE> 11010519491231002X 114.114.114.114 a@b.com"
    assert valid_id("11010519491231002X") and not valid_id("110105194912310020")


@pytest.mark.parametrize(
    ("text", "lang"),
    [
        ("两个黄鹂鸣翠柳，一行白鹭上青天。", "zh"),
        ("黃鸝鳴翠柳，白鷺上青天", "zh"),
        ("これは日本語の文章です。漢字もあります。", "ja"),
        ("이것은 한국어 문장입니다", "ko"),
        ("The quick brown fox jumps over the lazy dog, and that is all there is to it.", "en"),
        ("Der schnelle braune Fuchs springt über den faulen Hund und läuft dann in den Wald.", "de"),
        ("El perro corre por la calle y la gente lo mira con mucha sorpresa desde las ventanas.", "es"),
        ("使用 `SHOW CONFIG` 语句查看 TiDB 集群的配置，并且修改它。", "zh"),
        (
            "日语里说「ありがとう」，意思是谢谢，这是中文的文章，讲的是怎样学习外语，每天坚持练习最为重要，先听后说。",
            "zh",
        ),
        ("12 + 34", ""),
        ("", ""),
    ],
)
def test_identify(text: str, lang: str) -> None:
    assert identify(text) == lang


# --- documents that are dropped ----------------------------------------------------------------------------------------

WORDS = [
    f"{a}{b}" for a in ("light", "storm", "summer", "north", "river") for b in ("house", "side", "land", "folk", "gate")
]
NOUNS = (
    "村口 河岸 雪山 灯火 山脚 茶馆 粮仓 城墙 院里 炉火 春汛 渡口 街角 柳树 战马 家乡 码头 渔船 雨水 海岸 庙前 石阶 稻田 车站"
).split()
GOOD_EN = (
    "The oriole came back to the old garden in the first week of May, and the children ran out to see it. "
    "It had built its nest in the same willow as last year, high above the river. "
    "Nobody knew where it had spent the winter, but everyone was glad that it sang again. "
    "My grandmother said that the bird brings good weather, and for once she was right. "
    "We sat by the water until the light was gone and the frogs began their own concert."
)
GOOD_ZH = (
    "五月的第一个星期，黄鹂又回到了老花园，孩子们都跑出来看它。它把巢筑在去年那棵柳树上，高高地悬在河水上面。"
    "没有人知道它在哪里过的冬，可是大家听见它的歌声都很高兴。奶奶说这种鸟会带来好天气，这一次她说对了。"
    "我们坐在水边，一直到天色完全暗下来，青蛙开始了自己的音乐会。第二天早晨下起了小雨，院子里的石板路闪着光，"
    "邻居家的老人撑着伞站在门口，和来往的人打招呼。他说自己年轻的时候在北方工作，那里的春天来得很晚，"
    "要到六月才能看见树叶完全变绿，所以他一直很羡慕南方的朋友。"
)


def dropped(text: str, lang: str, only: str) -> str:
    """The detail of the drop by the rule `only`, "" where it keeps the document."""
    rules = [r for r in build_rules(RulesConfig(c4_curly=True)) if r.name == only]
    assert len(rules) == 1
    result = apply_rules(Doc(text, lang), rules)
    assert result == Doc(text, lang) or (isinstance(result, Drop) and result.reason == only)
    return result.detail if isinstance(result, Drop) else ""


def test_the_good_documents_are_kept() -> None:
    for text in (GOOD_EN, GOOD_ZH):
        result = apply_rules(Doc(text), build_rules(RulesConfig(c4_curly=True)))
        assert isinstance(result, Doc) and result.text == text


LINES = [f"A line about {w} that ends well." for w in WORDS]


@pytest.mark.parametrize(
    ("rule", "lang", "text", "detail"),
    [
        ("gopher_words", "en", "Too few words here.", "4 words"),
        ("gopher_words", "zh", "太短了。", "2 words"),
        ("gopher_word_length", "en", "a b c d e f g " * 20, "1.00"),
        ("gopher_symbols", "en", "#tag word " * 60, "# to words"),
        ("gopher_symbols", "zh", "我们走吧…" * 60, "ellipses"),
        ("gopher_bullets", "en", "\n".join(f"- {line}" for line in LINES), "bullet"),
        ("gopher_ellipses", "en", "\n".join(f"{line[:-1]}..." for line in LINES), "…"),
        ("gopher_alpha", "en", "12 34 56 word " * 30, "letter"),
        ("gopher_stop_words", "en", "cheap watches buy now best price online shop " * 10, "0 of"),
        ("gopher_dup_lines", "en", "\n".join(LINES[:10] + LINES[:10]), "repeated lines"),
        ("gopher_dup_line_characters", "en", "\n".join(LINES[:10] + LINES[:6]), "characters in repeated"),
        ("gopher_dup_paragraphs", "en", "\n\n".join(LINES[:10] + LINES[:6]), "repeated paragraphs"),
        ("gopher_dup_paragraph_characters", "en", "\n\n".join(LINES[:10] + LINES[:6]), "characters in repeated"),
        ("gopher_top_ngrams", "en", "buy shoes " * 30 + GOOD_EN[:300], "2-gram"),
        ("gopher_dup_ngrams", "en", GOOD_EN + " " + GOOD_EN.replace("May", "June"), "repeated 10-grams"),
        ("c4_sentences", "en", "One. Two! Three? Four", "3 sentences"),
        ("c4_curly", "en", "function f() { return 1 }", "curly"),
        ("fineweb_line_ends", "en", "\n".join(f"Menu item {w}" for w in WORDS), "punctuation"),
        ("fineweb_short_lines", "en", "\n".join(WORDS), "short lines"),
        ("fineweb_dup_characters", "en", "\n".join(LINES[:10] + LINES[:3]), "characters in repeated"),
        ("fineweb_new_lines", "en", "\n".join(WORDS), "line breaks"),
        ("fineweb2_word_length", "zh", "abcdefgh ijklmnop " * 20, "8.00"),
        ("fineweb2_alpha", "zh", "★ ☆ 1 2 3 春天 " * 20, "letter"),
        ("fineweb2_stop_words", "zh", "特价热卖 手机 批发 电脑 零售 " * 20, "0 of"),
        ("fineweb2_dup_lines", "zh", "\n".join(["春天来得很晚。", "他们都很高兴。"] * 8), "repeated lines"),
        ("fineweb2_top_ngrams", "zh", "优惠价格，" * 40 + GOOD_ZH[:100], "gram"),
        ("fineweb2_dup_ngrams", "zh", GOOD_ZH[:200] + GOOD_ZH[:200].replace("，", "、", 1), "repeated"),
        ("fineweb2_line_ends", "zh", "\n".join(f"{a}{b}首页" for a in NOUNS[:5] for b in NOUNS[5:9]), "punctuation"),
        ("fineweb2_dup_characters", "zh", "\n".join([GOOD_ZH[:60]] * 2 + [GOOD_ZH[60:]]), "characters"),
        ("fineweb2_new_lines", "zh", "\n".join(NOUNS), "line breaks"),
        ("evalweb_characters", "zh", GOOD_ZH[:190], "190 characters"),
        ("evalweb_line_characters", "zh", "\n".join(NOUNS), "mean characters"),
        ("evalweb_han", "zh", "abc 春 " * 30, "Han share"),
        ("evalweb_repeats", "zh", GOOD_ZH[:150] * 4, "13-grams"),
    ],
)
def test_what_each_rule_drops(rule: str, lang: str, text: str, detail: str) -> None:
    assert detail in dropped(text, lang, rule)
    good = GOOD_EN if lang == "en" else GOOD_ZH
    assert dropped(good, lang, rule) == ""
    assert dropped(text, "en" if lang == "zh" else "zh", rule) == "" or rule in (
        "gopher_words", "gopher_symbols", "gopher_bullets", "gopher_ellipses"
    )  # fmt: skip


@pytest.mark.parametrize(
    "rule", ["gopher_dup_lines", "gopher_dup_ngrams", "fineweb_line_ends", "gopher_alpha", "c4_curly"]
)
def test_code_tables_and_latex_are_not_judged(rule: str) -> None:
    noise = (
        "```\n"
        + "x = {1: 2}\n" * 200
        + "```\n\n"
        + "| a | 1 |\n" * 30
        + "\n$$\n"
        + "1 + 1 = 2 \\\\\n" * 30
        + "$$\n\n====\n"
    )
    assert dropped(f"{GOOD_EN}\n\n{noise}", "en", rule) == ""


def test_verse_and_statutes_are_kept() -> None:
    """Kinds of good text that the rules dropped before they were mended."""
    verse = """静夜思
床前明月光，疑是地上霜
举头望明月，低头思故乡

登鹳雀楼
白日依山尽，黄河入海流
欲穷千里目，更上一层楼

鹿柴
空山不见人，但闻人语响
返景入深林，复照青苔上

江雪
千山鸟飞绝，万径人踪灭
孤舟蓑笠翁，独钓寒江雪

绝句
两个黄鹂鸣翠柳，一行白鹭上青天
窗含西岭千秋雪，门泊东吴万里船

山行
远上寒山石径斜，白云生处有人家
停车坐爱枫林晚，霜叶红于二月花

枫桥夜泊
月落乌啼霜满天，江枫渔火对愁眠
姑苏城外寒山寺，夜半钟声到客船

寻隐者不遇
松下问童子，言师采药去
只在此山中，云深不知处

清明
清明时节雨纷纷，路上行人欲断魂
借问酒家何处有，牧童遥指杏花村"""
    law = """第一条　为了加强城市绿地的管理，保护和改善生态环境，根据有关法律，制定本条例。

第二条　本市行政区域内绿地的规划、建设、保护和监督管理，适用本条例。

第三条　市人民政府绿化主管部门负责全市绿地的监督管理工作；县级人民政府绿化主管部门负责本行政区域内绿地的监督管理工作。

第四条　任何单位和个人都有保护绿地的义务，有权对破坏绿地的行为进行劝阻和举报。

第五条　建设单位应当自工程竣工之日起三十日内，向绿化主管部门报送验收材料；逾期不报送的，由绿化主管部门责令限期改正，处以一万元以上三万元以下罚款。

第六条　擅自占用绿地的，由绿化主管部门责令限期改正，恢复原状，处以五千元以上二万元以下罚款；造成损失的，依法承担赔偿责任。

第七条　绿化主管部门的工作人员玩忽职守、滥用职权、徇私舞弊的，依法给予处分；构成犯罪的，依法追究刑事责任。

第八条　本条例自公布之日起施行。"""
    for text in (verse, law):
        result = apply_rules(Doc(text), build_rules(RulesConfig()))
        assert isinstance(result, Doc), result
