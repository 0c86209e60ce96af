"""The README's commands work: both languages show the same ones, and each is run, cut short where it is long."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from oriole.demo.corpus import write_corpus

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh.md")
ENV = os.environ | {"COLUMNS": "200", "TERM": "dumb"}

QUICK = ["train.compile=false", "eval.tokens=512"]
STAGES = [
    "pretrain.train.tokens=8000", "sft.train.tokens=8000", "dpo.train.tokens=8000", "eval.pairs=20",
    "gate.prompts=20", "gate.max_new_tokens=16", "rollout.eval_prompts=20", *QUICK,
]  # fmt: skip
SHORT = {
    "oriole demo": STAGES,
    "oriole run demo": [*STAGES, "reward.train.tokens=8000", "ppo.train.epochs=0.005", "grpo.train.epochs=0.01"],
    "oriole data prefer": ["max_new_tokens=16"],
    "oriole train demo/pretrain": ["train.tokens=8000", *QUICK],
    "oriole plan demo": ["probe=1", "train.batch_size=2", *QUICK],
    "oriole run cpu-25min": [
        "model=demo", "tokenizer.vocab_size=340", "train.tokens=2000", "train.batch_size=2", "train.length=128",
        "train.compile=false", "eval.tokens=512", "eval.holdout=0.2",
    ],
    "oriole run 26m": [
        "model=demo", "tokenizer.vocab_size=340", "pretrain.train.tokens=2000", "sft.train.tokens=2000",
        "train.batch_size=2", "train.length=128", "train.accumulate=1", "train.compile=false", "eval.tokens=512",
        "eval.holdout=0.2",
    ],
}  # fmt: skip
"""What is appended to a command so that the test need not train for minutes: sizes only, every step is taken."""


def blocks(readme: str, language: str) -> list[str]:
    text = (ROOT / readme).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def commands(readme: str) -> list[str]:
    """The lines of the bash blocks without their comments."""
    lines = "".join(blocks(readme, "bash")).splitlines()
    return [re.sub(r"\s+#.*", "", line).removeprefix(".venv/bin/").strip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with what the README says a user has: questions, and DATA with their own text."""
    folder = tmp_path_factory.mktemp("readme")
    questions = [{"question": q} for q in ("你好！", "What is 12 + 7?")]
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(q) for q in questions), encoding="utf-8")
    # The demo's own corpus, with every 18th question only: a hardly trained model answers each at full length.
    write_corpus(folder / "runs" / "demo" / "data")
    exam = folder / "runs" / "demo" / "data" / "eval.jsonl"
    exam.write_text("".join(exam.read_text("utf-8").splitlines(keepends=True)[::18]), encoding="utf-8")
    pairs = exam.with_name("preference.jsonl")
    pairs.write_text("".join(pairs.read_text("utf-8").splitlines(keepends=True)[:300]), encoding="utf-8")
    data = folder / "DATA"
    data.mkdir()
    zh, en = "河边的柳树上有两只黄鹂，它们一起唱歌。", "Two orioles sing in the willow by the river."
    for lang, sentence in (("zh", zh), ("en", en)):
        with (folder / "runs" / "demo" / "data" / f"pretrain_{lang}.jsonl").open(encoding="utf-8") as file:
            texts = [json.loads(line) for line in itertools.islice(file, 4000)]
        told = [text["text"] for text in texts if text["source"] in ("people", "places", "definitions")]
        docs = [{"text": " ".join(told[i : i + 12])} for i in range(0, 1440, 12)]  # long enough for the rules
        chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": sentence}] for i in range(120)]
        for name, rows in ((f"pretrain_{lang}_00", docs), (f"sft_{lang}", [{"conversations": c} for c in chats])):
            text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            (data / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_both_languages_show_the_same_commands_and_code() -> None:
    assert commands(READMES[0]) == commands(READMES[1])
    assert blocks(READMES[0], "python") == blocks(READMES[1], "python")


def test_links_lead_somewhere() -> None:
    for page in [*READMES, *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")), "CONTRIBUTING.md"]:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)", text):
            if not target.startswith("http"):
                assert ((ROOT / page).parent / target).exists(), f"{page} -> {target}"


def test_make_targets_exist() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    for command in (c for c in commands("README.md") if c.startswith("make ")):
        done = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.timeout(600)
def test_the_commands_run_in_order(place: Path) -> None:
    own = [c for c in commands("README.md") if c.startswith("oriole ")]
    assert len(own) >= 9
    # The demo first, then what uses it; the chat is shown before the list of commands.
    order = sorted(own, key=lambda c: not c.startswith("oriole demo"))
    for command in order:
        extra = next((more for start, more in SHORT.items() if command.startswith(start)), [])
        words = command.removeprefix("oriole ").replace("/tmp/x", str(place / "x")).split()
        done = subprocess.run(
            [sys.executable, "-m", "oriole.cli", *words, *extra], cwd=place, env=ENV, capture_output=True, text=True,
            input="你好\n/quit\n", encoding="utf-8", timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    report = json.loads((place / "runs" / "demo" / "report.json").read_text(encoding="utf-8"))
    assert report["schema"] == 1 and len(report["samples"]) == 6
    assert set(report["stages"]["pretrain"]["bpb"]) == set(report["stages"]["sft"]["bpb"]) == {"zh", "en"}
    assert set(report["stages"]["sft"]["exact_match"]) == {"zh", "en", "by_kind"}
    answers = (place / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(a)["question"] for a in answers] == ["你好！", "What is 12 + 7?"]

    # The Python block, on the model that the commands have trained.
    for block in blocks("README.md", "python"):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=place, env=ENV, capture_output=True, text=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
