"""Reading files: every format of examples/data, every way of compressing them, and every way a file can be bad."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from oriole.errors import DataError
from oriole.text import files
from oriole.text.formats import Doc, Skipped, expand, read_chats, read_docs, read_feedback, read_preferences
from oriole.text.template import Chat, Message, ToolCall

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
PAIR = (Message("user", "几点？"), Message("assistant", "三点。"))


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def chat(tmp_path: Path, record: Any) -> Chat:
    (only,) = read_chats(jsonl(tmp_path / "c.jsonl", record))
    return only


# --- the examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "read", "counts"),
    [
        (
            "text",
            read_docs,
            {
                "array.json": 2,
                "articles.csv": 2,
                "encyclopedia.jsonl": 1,
                "garden.pdf": 1,
                "gb18030.txt": 1,
                "lamp.jsonl.zst": 2,
                "lines.jsonl": 3,
                "note.md": 1,
                "page.html": 1,
                "rendered.jsonl": 4,
                "separated.txt": 3,
                "story.txt": 1,
                "swallows.parquet": 2,
            },
        ),
        (
            "chat",
            read_chats,
            {
                "alpaca.json": 2,
                "answers.txt": 2,
                "answers_en.txt": 2,
                "belle.jsonl": 2,
                "conversations.jsonl": 2,
                "medical.csv": 2,
                "medical.tsv": 1,
                "messages.json": 2,
                "minimind.jsonl": 3,
                "minimind_old.csv": 2,
                "minimind_r1.jsonl": 1,
                "one_line.txt": 3,
                "openai_tools.jsonl": 2,
                "prompt_completion.jsonl": 2,
                "prompt_response.jsonl": 2,
                "query_response.jsonl": 2,
                "question_answer.jsonl": 2,
                "questions.tsv": 2,
                "rendered.jsonl": 4,
                "rendered.txt": 2,
                "sharegpt.json": 2,
                "sharegpt.parquet": 1,
                "tabbed.txt": 2,
                "tfchat.json": 2,
                "titled.jsonl": 3,
                "tool_call.jsonl": 2,
                "zhihu_kol.jsonl": 1,
                "zhihu_kol.parquet": 1,
            },
        ),
        (
            "preference",
            read_preferences,
            {"implicit.jsonl": 2, "messages.jsonl": 2, "ranked.json": 2, "strings.jsonl": 2},
        ),
        ("feedback", read_feedback, {"kto.json": 2, "labels.jsonl": 2}),
    ],
)
def test_every_example_is_read(folder: str, read: Callable[..., Any], counts: dict[str, int]) -> None:
    paths = expand([EXAMPLES / folder])
    assert {p.name: sum(1 for _ in read([p])) for p in paths} == counts
    assert sum(1 for _ in read(paths)) == sum(counts.values())
    assert all(item.source for item in read(paths))
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{folder}/{name}`" in listed for name in counts)


def test_running_text_keeps_every_character() -> None:
    lines = list(read_docs(EXAMPLES / "text" / "lines.jsonl"))
    assert lines[0].lang == "zh" and lines[0].source == "nature" and lines[0].text.startswith("清晨的柳树上")
    assert lines[2] == Doc('def sing(n):\n    return "la " * n  # 唱 n 次', source="lines")
    (story,) = read_docs(EXAMPLES / "text" / "story.txt")
    assert story.source == "text" and story.text.endswith('\n\n\t"You are late," said the cat.')
    separated = list(read_docs(EXAMPLES / "text" / "separated.txt"))
    assert [d.text.splitlines()[0] for d in separated] == [
        "春天，河里的冰化了。",
        "In autumn the boats come back as leaves.",
        "冬天，湖面像一面镜子。",
    ]


def test_tool_calls_come_out_alike_however_they_were_written() -> None:
    own = list(read_chats(EXAMPLES / "chat" / "tool_call.jsonl"))
    calls = tuple(ToolCall("multiply", {"a": a, "b": b}) for a, b in ((3, 7), (2, 2)))
    assert own[0].messages[1] == Message("assistant", "", calls)
    assert [m.role for m in own[0].messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert own[1].messages[1] == Message("assistant", "I will set the alarm.", (ToolCall("alarm", {"time": "07:00"}),))
    openai = list(read_chats(EXAMPLES / "chat" / "openai_tools.jsonl"))
    assert openai[0].messages[1] == Message("assistant", "", (ToolCall("distance", {"to": "lake"}),))
    assert openai[1].messages[1] == Message("assistant", "我看一下。", (ToolCall("clock", {}),))
    (sharegpt, _) = read_chats(EXAMPLES / "chat" / "sharegpt.json")
    assert [m.role for m in sharegpt.messages] == ["system", "user", "assistant", "tool", "assistant"]
    for one in (*own, *openai, sharegpt):
        assert [t["type"] for t in one.tools] == ["function"] and one.tools[0]["function"]["name"]


def test_calls_one_after_another_are_one_message(tmp_path: Path) -> None:
    calls = [{"role": "function_call", "content": {"name": "f", "arguments": {"n": n}}} for n in (1, 2)]
    messages = chat(tmp_path, {"messages": [{"role": "user", "content": "a"}, *calls]}).messages
    assert messages[1:] == (Message("assistant", "", (ToolCall("f", {"n": 1}), ToolCall("f", {"n": 2}))),)


def test_openais_older_function_call(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"n": 1}'}}
    messages = chat(tmp_path, {"messages": [{"role": "user", "content": "a"}, call]}).messages
    assert messages[1] == Message("assistant", "", (ToolCall("f", {"n": 1}),))


def test_minimind_reasoning_tools_and_calls() -> None:
    tool, thought, tagged = read_chats(EXAMPLES / "chat" / "minimind.jsonl")
    assert [m.role for m in tool.messages] == ["user", "assistant", "tool", "assistant"]  # the empty system is gone
    assert tool.messages[1] == Message("assistant", "", (ToolCall("add", {"a": 1, "b": 1}),), "用工具算。")
    assert tool.messages[3].reasoning is None and tool.tools[0]["function"]["name"] == "add"
    assert thought.messages[1].reasoning == "Seven is two times three and one more."
    assert tagged.messages[1] == Message("assistant", "是的。", (), "八能被二整除。")


def test_preferences_of_all_shapes() -> None:
    strings, _ = read_preferences(EXAMPLES / "preference" / "strings.jsonl")
    assert strings.prompt == (Message("user", "用一句话介绍黄鹂。"),) and strings.lang == "zh"
    assert strings.rejected == (Message("assistant", "鸟。"),)
    messages, system = read_preferences(EXAMPLES / "preference" / "messages.jsonl")
    assert [m.role for m in messages.prompt] == ["user", "assistant", "user"] and len(messages.chosen) == 1
    assert system.prompt[0] == Message("system", "Be brief.")
    for name in ("implicit.jsonl", "ranked.json"):
        for pair in read_preferences(EXAMPLES / "preference" / name):
            assert [m.role for m in (*pair.prompt, *pair.chosen, *pair.rejected)] == ["user", "assistant", "assistant"]
            assert pair.chosen != pair.rejected


# --- records ---------------------------------------------------------------------------------------------------------


def test_alpaca(tmp_path: Path) -> None:
    record = {"instruction": "翻译", "input": "河", "output": "river", "system": "简短", "history": [["a", "b"]]}
    assert [(m.role, m.content) for m in chat(tmp_path, record).messages] == [
        ("system", "简短"), ("user", "a"), ("assistant", "b"), ("user", "翻译\n河"), ("assistant", "river"),
    ]  # fmt: skip
    assert chat(tmp_path, {"instruction": "", "input": "河", "output": "x"}).messages[0].content == "河"


def test_a_prompt_may_be_repeated_before_both_answers(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "p.jsonl",
        {"prompt": "几点？", "chosen": turns("几点？", "三点。"), "rejected": turns("几点？", "？")},
    )
    (pair,) = read_preferences(path)
    assert pair.prompt + pair.chosen == PAIR and pair.rejected == (Message("assistant", "？"),)


def test_implicit_prompts_end_where_the_answers_differ(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "p.jsonl", {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b", "c", "e")}
    )  # fmt: skip
    (pair,) = read_preferences(path)
    assert [m.content for m in pair.prompt] == ["a", "b", "c"]
    assert (pair.chosen[0].content, pair.rejected[0].content) == ("d", "e")


BAD_CHATS = [
    ({"conversation": "x", "txt": 1}, "the conversation is a string that is not valid JSON: 'x'"),
    ({"instructions": "a", "output": "b"}, "did you mean 'instruction' for 'instructions'?"),
    ({"text": "a"}, "it looks like running text"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "it looks like a preference pair"),
    ({"conversations": turns("a"), "chosen": turns("", "b")[1], "rejected": turns("", "c")[1]}, "a preference pair"),
    ({}, "the record has no keys"),
    ([], "an empty list where an object with"),
    ("x", "a string where an object with"),
    ({"messages": []}, "the conversation is an empty list"),
    ({"messages": ["a"]}, "message 1 is a string"),
    ({"messages": [{"speaker": "a", "content": "b"}]}, "message 1 has no 'role' and no 'from' (its keys: 'speaker'"),
    ({"messages": [{"role": "assistent", "content": "b"}]}, "the role 'assistent'; did you mean 'assistant'?"),
    ({"messages": [{"role": "narrator9", "content": "b"}]}, "use system, user, assistant or tool"),
    ({"messages": [{"role": 3, "content": "b"}]}, "the role 3"),
    ({"messages": turns("a")}, "no turn is the assistant's"),
    ({"messages": turns("a", " ")}, "message 2, the assistant's, is empty"),
    ({"messages": [{"role": "user", "content": None}]}, "the content of message 1 is null"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text can be read"),
    ({"messages": [{"role": "user", "content": "a", "reasoning": "b"}]}, "only an assistant's can"),
    ({"messages": [{"role": "assistant", "content": "a", "reasoning": 1}]}, "the reasoning of message 1 is a number"),
    ({"messages": [{"role": "tool_call", "content": "{"}]}, "the tool call of message 1 is a string that is not valid"),
    ({"messages": [{"role": "tool_call", "content": "{}"}]}, "a tool call without a name"),
    ({"messages": [{"role": "tool_call", "content": '{"arguments": {}}'}]}, "has no 'name'"),
    ({"messages": [{"role": "tool_call", "content": '{"name": "f", "arguments": [1]}'}]}, "'f' in message 1 are no"),
    ({"messages": turns("a", "b"), "tools": "x"}, "'tools' is a string that is not valid JSON"),
    ({"messages": turns("a", "b"), "tools": {"f": 1}}, "'tools' must be a list"),
    ({"messages": [{"role": "system", "content": "a"}, *turns("a", "b")], "system": "c"}, "a system message too"),
    ({"instruction": "a", "output": ""}, "'output' is empty"),
    ({"instruction": "a", "output": 3}, "'output' is a number"),
    ({"instruction": "a", "output": "b", "history": "c"}, "'history' is a string"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "'history' must be a list of"),
]


@pytest.mark.parametrize(("record", "said"), BAD_CHATS)
def test_bad_chats_are_refused_by_name(tmp_path: Path, record: Any, said: str) -> None:
    path = jsonl(tmp_path / "c.jsonl", {"messages": turns("a", "b")}, record)
    with pytest.raises(DataError) as caught:
        list(read_chats(path))
    assert str(caught.value).startswith(f"{path}, line 2: ") and said in str(caught.value)


BAD_PREFERENCES = [
    ({"prompt": "a", "chosen": "b"}, "'prompt', 'chosen' and 'rejected', or"),
    ({"prompt": "a", "chosen": "b", "reject": "c"}, "did you mean 'rejected' for 'reject'?"),
    ({"messages": turns("a", "b")}, "it looks like a chat"),
    ({"chosen": "b", "rejected": "c"}, "'prompt' is missing"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
    ({"prompt": "a", "chosen": "b", "rejected": ""}, "'rejected' is empty"),
    ({"prompt": turns("a", "b"), "chosen": "b", "rejected": "c"}, "the prompt must end with"),
    ({"chosen": turns("a", "b"), "rejected": turns("c", "b")}, "the prompt must end with"),
    ({"chosen": turns("a"), "rejected": turns("a", "b")}, "'chosen' must go on from the prompt"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{"name": "f"}]}, "with 'tools' are not read yet"),
]


@pytest.mark.parametrize(("record", "said"), BAD_PREFERENCES)
def test_bad_preferences_are_refused_by_name(tmp_path: Path, record: Any, said: str) -> None:
    path = jsonl(tmp_path / "p.jsonl", record)
    with pytest.raises(DataError) as caught:
        list(read_preferences(path))
    assert str(caught.value).startswith(f"{path}, line 1: ") and said in str(caught.value)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"txt": "a"}, "the record has 'txt', but 'text' was expected; did you mean 'text' for 'txt'?"),
        ({"text": 3}, "'text' is a number; it must be a string"),
        ({"messages": turns("a", "b")}, "it looks like a chat"),
        (7, "a number where an object with 'text' was expected"),
    ],
)
def test_bad_documents_are_refused_by_name(tmp_path: Path, record: Any, said: str) -> None:
    path = jsonl(tmp_path / "d.jsonl", record)
    with pytest.raises(DataError) as caught:
        list(read_docs(path))
    assert str(caught.value).startswith(f"{path}, line 1: ") and said in str(caught.value)


def test_skip_bad_counts_and_lists(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + b'{"txt": "b"}\n' * 30 + b'{"text": "\xff"}\n{"text": \n\n{"text": "c"}\n')
    skipped = Skipped()
    assert [d.text for d in read_docs(path, skip_bad=skipped)] == ["a", "c"]
    assert skipped.total == skipped.files[str(path)] == 32 and len(skipped.examples) == 20
    assert skipped.examples[0].startswith(f"{path}, line 2: the record has 'txt'")
    (tmp_path / "only_bad.jsonl").write_text('{"txt": 1}\n')
    assert list(read_docs(tmp_path / "only_bad.jsonl", skip_bad=skipped)) == [] and skipped.total == 33


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["lines.jsonl", "array.json", "story.txt", "separated.txt"])
def test_compressed_files_read_alike(tmp_path: Path, name: str, suffix: str) -> None:
    plain = EXAMPLES / "text" / name
    packed = tmp_path / "text" / (name + suffix)
    packed.parent.mkdir()
    packed.write_bytes(COMPRESS[suffix](plain.read_bytes()))
    assert list(read_docs(packed)) == list(read_docs(plain))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.txt"])
def test_cut_and_false_archives(tmp_path: Path, name: str, suffix: str) -> None:
    data = "".join(json.dumps({"text": f"{i * 7919 % 1009} {i}"}) + "\n" for i in range(5000)).encode()
    path = tmp_path / (name + suffix)
    path.write_bytes(COMPRESS[suffix](data)[:-200])
    with pytest.raises(DataError, match=f"{name}{suffix} is cut short: its {suffix} data ends too early"):
        list(read_docs(path))
    skipped = Skipped()
    whole = tmp_path / "whole.jsonl"
    whole.write_bytes(data)
    found = list(read_docs([path, whole], skip_bad=skipped))
    assert skipped.total == 1 and "is cut short" in skipped.examples[0] and "rest of the file" in skipped.examples[0]
    assert len([d for d in found if d.source == "whole"]) == 5000
    assert len(found) > 6000 or suffix in (".bz2", ".zst") or name == "d.txt"  # those unpack in large blocks
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{name}{suffix} is no valid {suffix} file"):
        list(read_docs(path))
    spoilt = bytearray(COMPRESS[suffix](data))
    spoilt[len(spoilt) // 2] ^= 0xFF
    path.write_bytes(spoilt)
    with pytest.raises(DataError, match=r"no valid|cut short|not valid JSON|not UTF-8"):
        list(read_docs(path))


def test_bad_bytes_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff\xff"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl, line 2: not UTF-8; save"):
        list(read_docs(path))
    array = tmp_path / "d.json"
    array.write_bytes(b'[\n{"text": "a"},\n{"text": "\xff"}]\n')
    with pytest.raises(DataError, match=r"d\.json, line 3: not UTF-8"):
        list(read_docs(array))
    text = tmp_path / "d.txt"
    text.write_bytes(b"one\ntwo\nth\xffree\n")
    with pytest.raises(DataError, match=r"d\.txt, line 3: not UTF-8"):
        list(read_docs(text))


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert [d.text for d in read_docs(path)] == ["a", "b"]
    array = tmp_path / "d.json"
    array.write_bytes(b'\xef\xbb\xbf[{"text": "a"}]')
    assert [d.text for d in read_docs(array)] == ["a"]
    tsv = tmp_path / "d.tsv"
    tsv.write_bytes("\ufeff几点？\t三点。\r\n".encode())
    assert [c.messages for c in read_chats(tsv)] == [PAIR]


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"d\.jsonl, line 3: not valid JSON"):
        list(read_docs(path))
    path.write_text("[" * 100_000 + "]" * 100_000, encoding="utf-8")
    with pytest.raises(DataError, match=r"d\.jsonl"):
        list(read_docs(path))
    array = tmp_path / "d.json"
    array.write_text('[\n{"text": "a"},\n{"text" "b"}\n]', encoding="utf-8")
    with pytest.raises(DataError, match=r"d\.json, line 3: not valid JSON"):
        list(read_docs(array))
    skipped = Skipped()
    assert [d.text for d in read_docs(array, skip_bad=skipped)] == ["a"] and skipped.total == 1
    array.write_text('[\n{"text": "a"},\n{"text": "b"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"d\.json is cut short: its list is not closed"):
        list(read_docs(array))
    array.write_text('[\n{"text": "a"},\n{"txt": "b"}]', encoding="utf-8")
    with pytest.raises(DataError, match=r"d\.json, line 3, record 2: the record has 'txt'"):
        list(read_docs(array))
    array.write_text(json.dumps([{"text": "a"}, {"txt": "b"}], indent=1), encoding="utf-8")
    with pytest.raises(DataError, match=r"d\.json, line 5, record 2: the record has 'txt'"):
        list(read_docs(array))


def test_missing_empty_and_foreign_paths(tmp_path: Path) -> None:
    for read in (read_docs, read_chats, read_preferences, read_feedback):
        with pytest.raises(DataError, match=r"no file .*nowhere\.jsonl; check the path"):
            list(read(tmp_path / "nowhere.jsonl"))
        with pytest.raises(DataError, match="is a folder, not a file; name the files in it"):
            list(read([tmp_path]))
    for name, data in (("e.jsonl", b""), ("e.txt", b""), ("e.txt.xz", b""), ("e.tsv", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name} is empty"):
            list((read_chats if name == "e.tsv" else read_docs)(tmp_path / name))
    for name, text in (("b.jsonl", "\n\n"), ("b.json", "[]"), ("b.txt", " \n\n"), ("b.json", "\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=f"{name} holds nothing to read"):
            list(read_docs(tmp_path / name))
    for name, said in (
        ("a.docx", "of no kind that is read; give jsonl"),
        ("a.pkl", "is a pickle, which can run any program"),
        ("a.parquet.gz", "packed parquet file, which is read from its end; unpack it"),
        ("a.tsv", "questions and answers; running text is read"),
    ):
        (tmp_path / name).write_text("one\ttwo\n")
        with pytest.raises(DataError, match=said):
            list(read_docs(tmp_path / name))
    for name in ("a.txt", "a.html"):
        (tmp_path / name).write_text("It rained all day.\n")
        with pytest.raises(DataError, match="running text; chats are read from"):
            list(read_chats(tmp_path / name))
    with pytest.raises(DataError, match="holds no preference pairs"):
        list(read_preferences(tmp_path / "a.txt"))
    with pytest.raises(DataError, match="holds no feedback"):
        list(read_feedback(tmp_path / "a.txt"))


def test_tsv_rows_have_two_cells(tmp_path: Path) -> None:
    path = tmp_path / "d.tsv"
    for row, said in (("a\tb\tc", "3 cells"), ("a", "1 cells"), ("a\t ", "an empty cell")):
        path.write_text(f"How?\tSo.\n{row}\n")
        with pytest.raises(DataError, match=f"line 2: {said}; expected a question, one tab"):
            list(read_chats(path))


def test_objects_may_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"text": "a"}, indent=2) + "\n" + json.dumps({"text": "b"}, indent=2), encoding="utf-8")
    assert [d.text for d in read_docs(path)] == ["a", "b"]


@given(texts=st.lists(st.text(), min_size=1, max_size=8), chunk=st.integers(1, 40), indent=st.sampled_from([None, 1]))
def test_arrays_read_alike_wherever_the_chunks_end(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], chunk: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("a") / "d.json"
    path.write_text(json.dumps([{"text": t} for t in texts], indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CHUNK", chunk)
        assert [d.text for d in read_docs(path)] == texts


def test_long_text_files_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oriole.text.formats.LONGEST", 100)
    path = tmp_path / "book.txt"
    lines = [f"line {i} of the book" for i in range(50)]
    path.write_text("\n".join(lines), encoding="utf-8")
    docs = [d.text for d in read_docs(path)]
    assert len(docs) > 5 and all(len(d) < 150 for d in docs) and "\n".join(docs).split("\n") == lines


def test_reading_is_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n' * 3 + "broken\n")
    stream = read_docs(path)
    assert [next(stream).text for _ in range(3)] == ["a"] * 3
    with pytest.raises(DataError, match="line 4"):
        next(stream)


# --- names -----------------------------------------------------------------------------------------------------------


def test_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl.xz", "sub/c.txt", ".hidden/d.txt", "sub/.e.txt", "f.bin", "[x].md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(*patterns: str | Path, root: Path | None = tmp_path) -> list[str]:
        return [str(p.relative_to(tmp_path)) for p in expand(patterns, root)]

    assert names("*.jsonl*") == ["a.jsonl.xz", "b.jsonl"]
    assert names("b.jsonl", "*.jsonl*", "sub/../b.jsonl") == ["a.jsonl.xz", "b.jsonl"]
    assert names("**/*.txt") == ["sub/c.txt"]
    assert names(".") == ["[x].md", "a.jsonl.xz", "b.jsonl", "sub/c.txt"] == names(tmp_path, root=None)
    assert names("[x].md") == ["[x].md"] and names("s*") == ["sub/c.txt"]
    assert names(tmp_path / "b.jsonl", root=Path("/elsewhere")) == ["b.jsonl"]
    monkeypatch.chdir(tmp_path)
    assert expand("sub") == [Path("sub/c.txt")]


def test_expand_says_what_there_is_instead(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"pretrain_{i}.jsonl").write_text("x")
    with pytest.raises(DataError, match=r"nothing matches .*pretrian_\*.* holds pretrain_.* and 3 more\); check"):
        expand(["pretrian_*.jsonl"], tmp_path)
    with pytest.raises(DataError, match=r"no file or folder .*/pretrain_9\.jsonl \(.* holds pretrain_"):
        expand(["pretrain_9.jsonl"], tmp_path)
    with pytest.raises(DataError, match=r"no/such does not exist; check the path"):
        expand(["no/such/*.jsonl"], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no file that can be read .*is empty\); give jsonl"):
        expand(["empty"], tmp_path)
    with pytest.raises(DataError, match="no files were named"):
        expand([], tmp_path)


def test_a_cleaned_folder_means_its_documents_alone(tmp_path: Path) -> None:
    """Neither its report nor what was held out may be learnt from by naming the folder, or one around it."""
    corpus = tmp_path / "data" / "corpus"
    (corpus / "heldout").mkdir(parents=True)
    for path in (corpus / "a.jsonl", corpus / "report.json", corpus / "report.html", corpus / "heldout" / "a.jsonl"):
        path.write_text('{"text": "x"}\n', encoding="utf-8")
    assert len(expand(corpus)) == 4, "an ordinary folder: everything in it is data"
    (corpus / ".done").mkdir()
    assert expand(corpus) == expand(tmp_path) == [corpus / "a.jsonl"]
    assert expand(corpus / "heldout") == [corpus / "heldout" / "a.jsonl"]
