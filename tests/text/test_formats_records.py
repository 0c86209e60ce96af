"""Records as the earlier systems spell them, feedback, rendered text, pairs in plain text, tables, pages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oriole.errors import DataError
from oriole.text import pairs, rendered, tables
from oriole.text.chatrows import preference_row
from oriole.text.formats import (
    Doc,
    Feedback,
    Skipped,
    expand,
    read_chats,
    read_docs,
    read_feedback,
    read_preferences,
)
from oriole.text.pages import html_text
from oriole.text.records import KNOWN, dice
from oriole.text.template import Chat, Message, ToolCall, render
from oriole.text.tokenizer import Tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def said(chat: Chat) -> list[str]:
    return [message.content for message in chat.messages]


def one(tmp_path: Path, record: Any) -> list[str]:
    (chat,) = read_chats(jsonl(tmp_path / "c.jsonl", record))
    return said(chat)


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "desc", "asked"),
    [
        ("怎么养猫？", "", "怎么养猫？"),
        ("", "怎么养猫？", "怎么养猫？"),
        ("怎么养猫？", "怎么养猫？", "怎么养猫？"),
        ("怎么养猫", "请问怎么养猫？谢谢", "请问怎么养猫？谢谢"),  # one holds the other
        ("怎样煮好米饭呢", "怎样煮好饭米呢？", "怎样煮好饭米呢？"),  # Dice 0.93
        ("怎么养猫？", "家里刚领了一只。", "怎么养猫？\n家里刚领了一只。"),
    ],
)
def test_titles_and_descriptions(tmp_path: Path, title: str, desc: str, asked: str) -> None:
    answer = "先准备猫砂。"
    for record in (
        {"title": title, "desc": desc, "answer": answer},
        {"title": title, "ask": desc, "answer": answer, "department": "x"},
        {"title": title, "desc": desc, "content": answer, "star": 3, "answer_id": 9},
    ):
        assert one(tmp_path, record) == [asked, answer]


def test_dice_counts_sets_of_characters() -> None:
    assert dice("", "") == dice("ab", "ba") == 1.0 and dice("a", "b") == 0.0
    assert dice("abcd", "abef") == 0.5


def test_an_article_is_no_answer(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "c.jsonl", {"title": "新闻", "content": "今天下雨。", "source": "x"})
    with pytest.raises(DataError, match="'title', 'content', 'source', but"):
        list(read_chats(path))


@pytest.mark.parametrize("history", ["[]", "", '[["a", "b"]]', "[['a', 'b']]", "[('a', 'b')]"])
def test_history_as_text(tmp_path: Path, history: str) -> None:
    expected = ["a", "b", "q", "c"] if "a" in history else ["q", "c"]
    assert one(tmp_path, {"history": history, "q": "q", "a": "c"}) == expected


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"history": "__import__('os')", "q": "q", "a": "a"}, "'history' is a string that is no list"),
        ({"history": "[['a']]", "q": "q", "a": "a"}, "'history' must be a list of"),
        ({"instruction": "q", "output": ["a", "b"]}, "'output' holds 2 texts; give one"),
        ({"title": "", "desc": " ", "answer": "a"}, "title and its description are both empty"),
        ({"title": 3, "answer": "a"}, "'title' is a number"),
        ({"prompt": "q", "completion": "a", "label": True}, "it looks like feedback on single answers"),
        ({"messages": [], "kto_tag": False}, "it looks like feedback"),
        ({"text": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhel"}, "turn 2 of the rendered chat is not"),
        ({"text": "<|im_start|>narrator\nhi<|im_end|>"}, "message 1 has the role 'narrator'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, record: Any, why: str) -> None:
    with pytest.raises(DataError, match=r"c\.jsonl, line 1: ") as caught:
        list(read_chats(jsonl(tmp_path / "c.jsonl", record)))
    assert why in str(caught.value)


def test_belles_conversations(tmp_path: Path) -> None:
    text = "Human: 一\nAssistant: 二\n\n三\nHuman: 四\nAssistant:"
    assert one(tmp_path, {"instruction": text, "input": "", "output": "五"}) == ["一", "二\n\n三", "四", "五"]
    assert one(tmp_path, {"instruction": "什么是 Human: 标记？", "output": "一个词。"})[0] == "什么是 Human: 标记？"


def test_feedback(tmp_path: Path) -> None:
    ask, answer = Message("user", "q"), Message("assistant", "a")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    shapes: list[tuple[Any, bool]] = [
        ({"prompt": "q", "completion": "a", "label": True}, True),
        ({"prompt": turns[:1], "completion": turns[1:], "label": 0}, False),
        ({"completion": turns, "label": "False"}, False),
        ({"messages": turns, "kto_tag": True}, True),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "label": "1"}, True),
        ({"instruction": "q", "input": "", "output": "a", "kto_tag": False}, False),
    ]
    path = jsonl(tmp_path / "f.jsonl", *(record for record, _ in shapes))
    assert list(read_feedback(path)) == [Feedback((ask,), (answer,), good, "f") for _, good in shapes]
    system = {"prompt": "q", "completion": "a", "label": True, "system": "s", "lang": "en", "source": "x"}
    (only,) = read_feedback(jsonl(path, system))
    assert only == Feedback((Message("system", "s"), ask), (answer,), True, "x", "en")


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"prompt": "q", "completion": "a"}, "but 'prompt', 'completion' and 'label', or"),
        ({"prompt": "q", "completion": "a", "lable": True}, "it looks like a chat"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "it looks like a preference pair"),
        ({"prompt": "q", "completion": "a", "label": "good"}, "'label' is 'good'; it must be true or false"),
        ({"prompt": "q", "completion": "a", "label": 2}, "'label' is 2; it must be"),
        ({"completion": "a", "label": True}, "it must be a prompt and, after it, an answer"),
        ({"messages": [{"role": "user", "content": "q"}], "label": True}, "it must be a prompt and"),
    ],
)
def test_bad_feedback_is_named(tmp_path: Path, record: Any, why: str) -> None:
    with pytest.raises(DataError, match=r"f\.jsonl, line 1: ") as caught:
        list(read_feedback(jsonl(tmp_path / "f.jsonl", record)))
    assert why in str(caught.value)


# --- rendered text ---------------------------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc",), exclude_characters="<>[]"), min_size=1)
contents = words.map(lambda text: text.strip() or "x")


@given(exchanges=st.lists(st.tuples(contents, contents), min_size=1, max_size=4), system=contents | st.none())
def test_our_own_rendering_comes_back(
    tmp_path_factory: pytest.TempPathFactory, tok: Tokenizer, exchanges: list[tuple[str, str]], system: str | None
) -> None:
    messages = [Message("system", system)] if system else []
    for ask, answer in exchanges:
        messages += [Message("user", ask), Message("assistant", answer)]
    text = tok.decode(render(messages, tok)[0], skip_special=False)
    path = jsonl(tmp_path_factory.mktemp("r") / "c.jsonl", {"text": text})
    (chat,) = read_chats(path)
    assert list(chat.messages) == messages


def test_tools_and_thoughts_come_back(tmp_path: Path, tok: Tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    messages = [
        Message("system", "Be exact."),
        Message("user", "2 + 2, 3 + 3?"),
        Message("assistant", "One moment.", (ToolCall("add", {"a": 2}), ToolCall("add", {"a": 3})), "Two sums."),
        Message("tool", "4"),
        Message("tool", "6"),
        Message("assistant", "4 and 6."),
    ]
    text = tok.decode(render(messages, tok, tools=tools)[0], skip_special=False)
    (chat,) = read_chats(jsonl(tmp_path / "c.jsonl", {"text": text}))
    assert list(chat.messages) == messages and list(chat.tools) == tools


def test_a_rendered_prompt_is_taken_apart_too(tmp_path: Path) -> None:
    prompt = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert one(tmp_path, {"prompt": prompt, "response": "a"}) == ["s", "q", "a"]
    assert one(tmp_path, {"conversations": prompt + "a<|im_end|>"}) == ["s", "q", "a"]
    pair = {"prompt": prompt, "chosen": "a", "rejected": "b"}
    (preference,) = read_preferences(jsonl(tmp_path / "p.jsonl", pair))
    assert [m.content for m in preference.prompt] == ["s", "q"]


def test_a_pair_may_say_how_much_better_the_chosen_answer_is(tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected,margin\nq,a,b,1.5\nq,a,b,\n", encoding="utf-8")
    assert [p.margin for p in read_preferences(tmp_path / "p.csv")] == [1.5, 0]
    first, second = read_preferences(jsonl(tmp_path / "p.jsonl", pair, pair | {"margin": 2}))
    assert (first.margin, second.margin) == (0, 2)
    rows = [preference_row(first), preference_row(second)]
    assert "margin" not in rows[0] and list(read_preferences(jsonl(tmp_path / "q.jsonl", *rows))) == [first, second]
    for bad in ("much", -1, True, float("inf"), [1]):
        with pytest.raises(DataError, match=r"'margin' is .* it must be a number, 0 or more"):
            list(read_preferences(jsonl(tmp_path / "p.jsonl", pair | {"margin": bad})))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<|beginoftext|>one<|endoftext|>", ["one"]),
        ("<|beginoftext|>one<|endoftext|><|beginoftext|>two<|endoftext|>", ["one", "two"]),
        ("<s>one</s> <s>two</s>", ["one", "two"]),
        ("one[EOS]two[EOS]", ["one", "two"]),
        ("one<|endoftext|>", ["one"]),
        ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n", ["q\na"]),
        ("<s>old</s> price", ["<s>old</s> price"]),
        ("In ChatML, <|im_start|> opens a turn and <|im_end|> ends it.",) * 2,
        ("<p>new <s>old</s>",) * 2,
        ("BERT has [CLS] and [SEP], not [EOS] marks",) * 2,
    ],
)
def test_marks_are_taken_off_documents_that_are_wrapped_in_them(tmp_path: Path, text: str, found: Any) -> None:
    found = [found] if isinstance(found, str) else found
    assert [doc.text for doc in read_docs(jsonl(tmp_path / "d.jsonl", {"text": text}))] == found


def test_text_files_with_end_marks(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("<|beginoftext|>one\nmore<|endoftext|>\ntwo[EOS]\nthree, which names [EOS] in passing\n")
    texts = [doc.text for doc in read_docs(path)]
    assert texts == ["one\nmore", "two", "three, which names [EOS] in passing"]


@pytest.mark.parametrize(
    "text",
    [
        "##提问:\n甲\n##回答:\n乙[EOS]\n##提问:\n丙\n##回答:\n丁[EOS]\n",
        "##提问:\n甲\n##回答:\n乙\n##提问:\n丙\n##回答:\n丁\n",
        "<|im_start|>user\n甲<|im_end|>\n<|im_start|>assistant\n乙<|im_end|>\n<|endoftext|>\n<|im_start|>user\n丙<|im_end|>\n"
        "<|im_start|>assistant\n丁<|im_end|>\n<|endoftext|>\n",
        "<s>user\n甲</s>\n<s>assistant\n乙</s>\n\n<s>user\n丙</s>\n<s>assistant\n丁</s>\n",
        "<|user|> 甲 <|system|> <bos>乙<eos>\n\n<|user|> 丙 <|system|> <bos>丁<eos>\n",
        "<|user|>: 甲 <|system|>: <s> 乙 </s>\n\n<|user|>: 丙 <|system|>: <s> 丁 </s>\n",
    ],
)
def test_rendered_text_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.txt"
    path.write_text(text, encoding="utf-8")
    assert [said(chat) for chat in read_chats(path)] == [["甲", "乙"], ["丙", "丁"]]


@given(text=st.text())
def test_taking_apart_never_fails(text: str) -> None:
    for wrapped in (text, f"<|im_start|>{text}", f"<|user|>{text}<|system|>", f"##提问:{text}", f"Human:{text}"):
        rendered.documents(wrapped)
        rendered.belle_turns(wrapped)
        try:
            rendered.turns(wrapped)
        except ValueError as error:
            assert "is not closed" in str(error)


# --- plain text with questions and answers ---------------------------------------------------------------------------


def test_what_cannot_be_paired_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text(
        "常见问题\n\n问：一\n答：二\n答：又一个\n\n问：没有回答\n问：三\n（补充）\n答：四\n- 细节\n问题：五\n回答：\n",
        encoding="utf-8",
    )
    with pytest.raises(DataError, match=r"c\.txt, line 1: text before the first question"):
        list(read_chats(path))
    skipped = Skipped()
    found = [said(chat) for chat in read_chats(path, skip_bad=skipped)]
    assert found == [["一", "二"], ["三\n（补充）", "四\n- 细节"]]
    assert [reason.removeprefix(str(path)).split(":")[0] for reason in skipped.examples] == [
        ", line 1", ", line 5", ", line 7", ", line 12",
    ]  # fmt: skip


def test_choices_are_no_answers(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("问：哪个是鸟？\nA：桌子\nB：黄鹂\n答：B\n", encoding="utf-8")
    assert [said(chat) for chat in read_chats(path)] == [["哪个是鸟？\nA：桌子\nB：黄鹂", "B"]]


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("Q1: One?\nA1: Two.\nQ2: Three?\nA2: Four.\n", "labelled"),
        ("1. 问题：甲\n回答：乙\n", "labelled"),
        ("用户：甲\n助手：乙\n", "labelled"),
        ("Question: a\nAnswer: b\n", "labelled"),
        ("甲？乙。\n丙？丁。\n", "joined"),
        ("甲\t乙\n丙\t丁\n", "tabbed"),
        ('{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n', "json"),
        ('{"INSTRUCTION": "a", "RESPONSE": "b"}\n', "json"),
        ("It rained. Why? Nobody knows.\nThen it stopped.\nThe end.\n", "prose"),
        ('{"name": "some JSON", "version": 1}\n', "prose"),
        ("Question everything.\nAnswer nothing.\n", "prose"),
        ("", "prose"),
    ],
)
def test_styles_of_text_files(tmp_path: Path, text: str, style: str) -> None:
    path = tmp_path / "c.txt"
    path.write_text(text or "\n", encoding="utf-8")
    assert pairs.style(path) == style
    if style != "prose":
        assert all(len(chat.messages) == 2 for chat in read_chats(path))


def test_a_line_without_a_question_is_not_glued_to_its_neighbour(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text(
        "什么是茶？一种饮料。\n白酒是粮食酿的。\n什么是伞？\n挡雨的。\n也挡太阳。\n什么是碗？盛饭的。\n",
        encoding="utf-8",
    )
    skipped = Skipped()
    found = [said(chat) for chat in read_chats(path, skip_bad=skipped)]
    assert found == [["什么是茶？", "一种饮料。"], ["什么是伞？", "挡雨的。\n也挡太阳。"], ["什么是碗？", "盛饭的。"]]
    assert skipped.total == 1 and "line 2: no question was found" in skipped.examples[0]


def test_json_lines_that_are_called_txt(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "Zhihu.txt", {"INSTRUCTION": "甲", "RESPONSE": "乙"})
    (chat,) = read_chats(path)
    assert said(chat) == ["甲", "乙"] and chat.source == "Zhihu"
    (doc,) = read_docs(jsonl(tmp_path / "d.txt", {"text": "丙"}))
    assert doc == Doc("丙", source="d")


# --- tables ----------------------------------------------------------------------------------------------------------


def test_quoted_cells_of_a_tsv_may_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.tsv"
    path.write_text(
        'One?\t"first\n\nthen ""second"""\nTwo?\t"Yes" he said\nThree?\t"not closed\nFour?\tfive\n', encoding="utf-8"
    )
    assert [said(chat) for chat in read_chats(path)] == [
        ["One?", 'first\n\nthen "second"'],
        ["Two?", '"Yes" he said'],
        ["Three?", '"not closed'],
        ["Four?", "five"],
    ]


@pytest.mark.parametrize("comma", [",", ";", "\t"])
def test_csv_dialects(tmp_path: Path, comma: str) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(f'\ufeffPrompt{comma}Response\r\n"a{comma}\r\nb"{comma}c\r\n\r\n'.encode())
    assert [said(chat) for chat in read_chats(path)] == [[f"a{comma}\r\nb", "c"]]


def test_arrow_files_and_streams(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"document {n}" for n in range(300)], "other": list(range(300))})
    for name, new in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
        assert [doc.text for doc in read_docs(tmp_path / name)] == table["text"].to_pylist()


def test_only_known_columns_are_read_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.parquet"
    rows = [{"TEXT": f"document {n}", "embedding": [0.5] * 8, "Lang": "en"} for n in range(1000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1000)
    where, first = next(tables.rows(path, KNOWN))
    assert (where, first) == ("row 1", {"text": "document 0", "lang": "en"})
    assert sum(1 for doc in read_docs(path) if doc.lang == "en") == 1000
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"body": "a", "n": 1}]), path)
    with pytest.raises(DataError, match=r"d\.parquet, row 1: the record has 'body', 'n', but 'text' was expected"):
        list(read_docs(path))


def test_bad_rows_are_counted_by_row(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": None}, {"prompt": "c", "response": "d"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    skipped = Skipped()
    assert len(list(read_chats(path, skip_bad=skipped))) == 2 and "row 2" in skipped.examples[0]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_every_table_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    rows = [{"question": "一 加 一？", "answer": "二"}, {"question": 'a "b", c', "answer": "d; e"}]
    path = tmp_path / f"d.{kind}"
    match kind:
        case "jsonl":
            jsonl(path, *rows)
        case "csv":
            path.write_text('question,answer\n一 加 一？,二\n"a ""b"", c",d; e\n', encoding="utf-8")
        case "tsv":
            path.write_text('question\tanswer\n一 加 一？\t二\na "b", c\td; e\n', encoding="utf-8")
        case _:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [said(chat) for chat in read_chats(path)] == [list(row.values()) for row in rows]


# --- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("<p>one</p><p>two</p>", "one\n\ntwo"),
        ("<p>一行\n  接一行，</p><p>a\n b</p>", "一行接一行，\n\na b"),
        ("<ul><li>a<li>b</ul>", "a\nb"),
        ("<pre>if x:\n    y\n</pre>", "if x:\n    y"),
        ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>", "a\tb\nc"),
        ("a<br>b<script>if (1 < 2) { x }</script>c", "a\nbc"),
        ("<head><title>t</title><body>x", "x"),
        ("<style>p</style>&lt;b&gt; &amp; &#40644;<!-- no -->", "<b> & 黄"),
        ("<div><div><b>bold</b>, not</div></div>  end", "bold, not\nend"),
        ("plain", "plain"),
        ("<p>unclosed <b>tags", "unclosed tags"),
    ],
)
def test_html_as_it_is_seen(source: str, text: str) -> None:
    assert html_text(source) == text


@given(
    st.text()
    | st.lists(st.sampled_from(["<p>", "</p>", "<script>", "</", "<!--", "&#", "a", "<pre>", "]]>"])).map("".join)
)
def test_html_never_fails(source: str) -> None:
    html_text(source)


def test_folders_of_every_kind_of_text(tmp_path: Path) -> None:
    for name in ("page.html", "garden.pdf", "note.md", "story.txt", "gb18030.txt"):
        (tmp_path / name).write_bytes((EXAMPLES / "text" / name).read_bytes())
    docs = list(read_docs(expand(tmp_path)))
    assert len(docs) == 5 and all(doc.source == tmp_path.name and doc.text.strip() for doc in docs)


# --- LLaMA-Factory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "sources"),
    [
        (read_docs, ["pages"]),
        (read_chats, ["tea", "birds"]),
        (read_preferences, ["better"]),
        (read_feedback, ["marks"]),
    ],
)
def test_described_sets(read: Callable[..., Any], sources: list[str]) -> None:
    path = EXAMPLES / "described" / "dataset_info.json"
    assert [item.source for item in read(path)] == sources
    assert [item.source for item in read(expand([f"{path}#{sources[-1]}"]))] == sources[-1:]


def test_what_a_description_lacks_is_said(tmp_path: Path) -> None:
    path = EXAMPLES / "described" / "dataset_info.json"
    for name, why in (
        ("none", "describes no data set 'none'; it has tea, birds"),
        ("elsewhere", "has no file beside it"),
    ):
        with pytest.raises(DataError, match=why):
            list(read_chats(expand([f"{path}#{name}"])))
    with pytest.raises(DataError, match=r"describes no feedback data; it has 'tea' \(chat\)"):
        list(read_feedback(f"{path}#tea"))
    with pytest.raises(DataError, match=r"better\.json, line 1, record 1: the record has"):
        list(read_chats(expand([EXAMPLES / "described"])))  # without the description nobody knows the names
    (tmp_path / "dataset_info.json").write_text("[1]")
    with pytest.raises(DataError, match="must be an object of data sets"):
        list(read_chats(tmp_path / "dataset_info.json"))


def test_roles_of_llama_factory(tmp_path: Path) -> None:
    info = {
        "d": {"file_name": "d.json", "formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "t"}}
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    call = {"name": "f", "arguments": {"n": 1}}
    turns = [("human", "q"), ("function_call", json.dumps(call)), ("observation", "r"), ("gpt", "a")]
    record = {"conversations": [{"from": who, "value": what} for who, what in turns], "t": json.dumps([{"name": "f"}])}
    (tmp_path / "d.json").write_text(json.dumps([record]))
    (chat,) = read_chats(tmp_path / "dataset_info.json")
    assert [m.role for m in chat.messages] == ["user", "assistant", "tool", "assistant"] and chat.tools
    assert chat.messages[1].tool_calls == (ToolCall("f", {"n": 1}),)
