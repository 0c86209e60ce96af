"""Answering a file: order, resuming, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oriole.apps.api import Oriole
from oriole.apps.generate import GenerateSettings, answer_file, generate_file
from oriole.errors import ConfigError, DataError, ModelError

RECORDS: list[dict[str, Any]] = [
    {"question": "two golden orioles", "id": 1},
    {"query": "白鹭上青天"},
    {"prompt": "sing " * 12, "note": ["kept", {"as": "it is"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                  {"role": "user", "content": "窗"}]},
    {"question": "two golden orioles", "id": 5},
    {"question": "船"},
    {"question": "blue sky"},
]  # fmt: skip


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def how(tmp_path: Path) -> GenerateSettings:
    return GenerateSettings(
        input=write(tmp_path / "in.jsonl", RECORDS),
        output=tmp_path / "made" / "out.jsonl",
        temperature=0.0,
        max_new_tokens=12,
        batch_size=3,
    )


def test_every_record_gets_its_own_answer_in_order(oriole: Oriole, how: GenerateSettings) -> None:
    assert answer_file(oriole, how) == len(RECORDS)
    out = read(how.output)
    assert [{k: v for k, v in r.items() if k != "answer"} for r in out] == RECORDS
    asked = ["two golden orioles", "白鹭上青天", "sing " * 12, None, "two golden orioles", "船", "blue sky"]
    for record, query in zip(out, asked, strict=True):
        history = [("a", "b")] if query is None else None
        assert record["answer"] == oriole.generate(query or "窗", history, temperature=0.0, max_new_tokens=12)
    assert len({r["answer"] for r in out}) == len(RECORDS) - 1


@pytest.mark.parametrize("cut", ["line", "torn", "torn early", "torn in a character", "all"])
def test_a_second_call_goes_on_after_the_last_whole_line(oriole: Oriole, how: GenerateSettings, cut: str) -> None:
    answer_file(oriole, how)
    whole = how.output.read_bytes()
    lines = whole.splitlines(keepends=True)
    torn = {
        "line": b"",
        "torn": lines[3][:-5],
        "torn early": lines[3][:9],
        "torn in a character": lines[3][: lines[3].index("窗".encode()) + 1],
        "all": b"".join(lines[3:]),
    }[cut]
    how.output.write_bytes(b"".join(lines[:3]) + torn)
    assert answer_file(oriole, how) == (0 if cut == "all" else len(RECORDS) - 3)
    assert how.output.read_bytes() == whole


def test_an_interrupted_run_keeps_whole_lines(
    oriole: Oriole, how: GenerateSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Oriole.answers

    def interrupted(*args: Any) -> Any:
        for n, event in enumerate(real(*args)):
            if n == 40:
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(Oriole, "answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer_file(oriole, how)
    kept = read(how.output)
    assert 0 < len(kept) < len(RECORDS)
    monkeypatch.undo()
    assert answer_file(oriole, how) == len(RECORDS) - len(kept)
    assert read(how.output)[: len(kept)] == kept and len(read(how.output)) == len(RECORDS)


def test_an_output_of_another_input_is_refused_and_left_alone(oriole: Oriole, how: GenerateSettings) -> None:
    answer_file(oriole, how)
    before = how.output.read_bytes()
    for records in (RECORDS[1:], [*RECORDS[:2], {"question": "other"}, *RECORDS[3:]], RECORDS[:-1]):
        write(how.input, records)
        with pytest.raises(DataError, match=r"out\.jsonl, line \d, does not answer record \d of .*in\.jsonl"):
            answer_file(oriole, how)
        assert how.output.read_bytes() == before
    write(how.input, RECORDS)
    for foreign in (b"my notes, one line", b"my notes\n", b'{"question": "two golden orioles", "id": 1}\n'):
        how.output.write_bytes(foreign)
        with pytest.raises(DataError, match="does not answer record 1"):
            answer_file(oriole, how)
        assert how.output.read_bytes() == foreign


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"question": ', "not valid JSON"),
        ('{"text": "a"}', r"none of messages, question, query, prompt is among its keys \(text\).*question_key="),
        ('{"question": ""}', "'question' must be a question"),
        ('{"question": 3}', "'question' must be a question"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}', "ends with the user"),
        ('{"messages": [{"role": "bird", "content": "a"}]}', "is no message"),
        ('{"question": "a", "answer": "b"}', "has 'answer' already; choose another key with answer_key="),
        ("[1]", "not a JSON object"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_before_anything_is_answered(
    oriole: Oriole, how: GenerateSettings, line: str, complaint: str
) -> None:
    write(how.input, RECORDS[:2])
    with how.input.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=rf"in\.jsonl, line 3: .*{complaint}"):
        answer_file(oriole, how)
    assert not how.output.exists()


def test_a_question_that_is_too_long_is_named(oriole: Oriole, how: GenerateSettings) -> None:
    write(how.input, [RECORDS[0], {"question": "窗" * 500}])
    with pytest.raises(ModelError, match=r"in\.jsonl, line 2: the question has .* tokens"):
        answer_file(oriole, how)


def test_generate_file_takes_the_commands_keys(model_folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"ask": "sing", "answer": "reference"}])
    target = tmp_path / "out.jsonl"
    words = [f"input={source}", f"output={target}", "question_key=ask", "answer_key=said", "temperature=0", "stop=e",
             "max_new_tokens=9", "device=cpu", "system=唱"]  # fmt: skip
    assert generate_file(model_folder, words) == 1
    want = Oriole(model_folder).generate("sing", system="唱", temperature=0.0, max_new_tokens=9, stop="e")
    assert read(target) == [{"ask": "sing", "answer": "reference", "said": want}]
    with pytest.raises(ConfigError, match="oriole generate: 'output' is missing"):
        generate_file(model_folder, words[:1])
    with pytest.raises(ConfigError, match="did you mean 'question_key'"):
        generate_file(model_folder, [*words, "question_kye=x"])
    with pytest.raises(ConfigError, match="give the output another name"):
        generate_file(model_folder, [*words, f"output={source}"])
    source.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no questions"):
        generate_file(model_folder, words)


def test_a_pretrained_model_is_refused(how: GenerateSettings, tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="cannot chat yet"):
        answer_file(Oriole(save_tiny(tmp_path / "base", chat=False)), how)
