"""Prompts come from whatever asks something: prompts alone, questions with answers, chats, pairs, text files."""

import json
from pathlib import Path
from typing import Any

import pytest

from oriole.errors import DataError
from oriole.text.formats import Skipped, read_prompts
from oriole.text.template import Message, Prompt

ASKED = (Message("user", "谁？"),)
FIRST = (Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
PLAIN = [{"role": m.role, "content": m.content} for m in FIRST]


def read(folder: Path, *records: Any, **more: Any) -> list[Prompt]:
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return list(read_prompts(path, **more))


@pytest.mark.parametrize(
    ("record", "messages", "answers"),
    [
        ({"prompt": "谁？"}, ASKED, ()),
        ({"prompt": [{"role": "user", "content": "谁？"}]}, ASKED, ()),
        ({"prompt": "c", "system": "s"}, (Message("system", "s"), Message("user", "c")), ()),
        ({"messages": PLAIN}, FIRST, ()),
        ({"messages": PLAIN, "answers": ["d", "e"]}, FIRST, ("d", "e")),
        ({"messages": [*PLAIN, {"role": "assistant", "content": "d"}]}, FIRST, ("d",)),
        ({"conversations": [{"from": "human", "value": "谁？"}, {"from": "gpt", "value": "黄鹂"}]}, ASKED, ("黄鹂",)),
        ({"prompt": "谁？", "response": "黄鹂"}, ASKED, ("黄鹂",)),
        ({"instruction": "谁？", "output": "黄鹂", "answers": ["鹂"]}, ASKED, ("鹂",)),
        ({"prompt": "谁？", "chosen": "黄鹂", "rejected": "柳树"}, ASKED, ("黄鹂",)),
    ],
)
def test_what_is_asked_and_what_is_right(
    tmp_path: Path, record: dict[str, Any], messages: tuple[Message, ...], answers: tuple[str, ...]
) -> None:
    (found,) = read(tmp_path, record)
    assert (found.messages, found.answers, found.source) == (messages, answers, "asked")


def test_source_kind_and_language_are_kept(tmp_path: Path) -> None:
    one, two = read(tmp_path, {"prompt": "?", "kind": "sum", "lang": "zh"}, {"prompt": "?", "source": "s", "kind": "k"})
    assert (one.source, one.lang, two.source) == ("sum", "zh", "s")


def test_text_files_of_questions_and_answers(tmp_path: Path) -> None:
    (tmp_path / "qa.txt").write_text("问：谁？\n答：黄鹂\n问：哪里？\n答：柳树上\n", encoding="utf-8")
    found = list(read_prompts(tmp_path / "qa.txt"))
    assert [(p.messages[-1].content, p.answers) for p in found] == [("谁？", ("黄鹂",)), ("哪里？", ("柳树上",))]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "once upon a time"}, "'prompt' or 'messages', a chat, or a preference pair was expected"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "no message asks anything"),
        ({"prompt": "?", "answers": []}, "'answers' must be a list of texts"),
        ({"prompt": "?", "answers": [1]}, "'answers' must be a list of texts"),
        ({"prompt": "?", "tools": [{"name": "f"}]}, "prompts with 'tools' are not read yet"),
        ({"prompt": " "}, "'prompt' is empty"),
    ],
)
def test_what_does_not_fit_is_refused_by_line_or_counted(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=rf"asked.jsonl, line 2: .*{said}"):
        read(tmp_path, {"prompt": "?"}, record)
    skipped = Skipped()
    assert len(read(tmp_path, {"prompt": "?"}, record, skip_bad=skipped)) == 1 and skipped.total == 1
