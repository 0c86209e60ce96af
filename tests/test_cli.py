"""The command line from outside: real processes, exit codes, one-sentence errors."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from oriole import cli
from oriole.config import to_toml
from oriole.errors import ConfigError

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"COLUMNS": "200", "TERM": "dumb"}


def oriole(*words: str, cwd: Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "oriole.cli", *words], cwd=cwd, env=ENV, input=stdin, capture_output=True, text=True,
        encoding="utf-8", timeout=280,
    )  # fmt: skip


TINY = [
    "run=./out", "data=.", "model={vocab_size=300, dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, "
    "ffn_dim=48, context=64}", "tokenizer.vocab_size=300", "parts={zh={files=['zh.txt'], val=['zh.txt']}, "
    "en={files=['en.txt'], val=['en.txt']}}", "train.tokens=512", "train.batch_size=2", "train.length=32",
    "train.compile=false", "eval.tokens=256",
]  # fmt: skip
"""Settings that make of demo/pretrain a run of seconds on two little files."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a few kilobytes of text in both languages."""
    zh = "春天来了，柳树发芽，两只黄鹂在枝头唱歌。小河的冰化了，孩子们在河边放风筝。"
    en = "Spring has come. Two orioles sing in the willow, and the children fly kites by the river. "
    (tmp_path / "zh.txt").write_text("\n".join(f"{i}：{zh[i % 9 :]}" for i in range(80)), encoding="utf-8")
    (tmp_path / "en.txt").write_text("\n".join(f"{i}. {en[i % 13 :]}" for i in range(80)), encoding="utf-8")
    return tmp_path


def test_help_is_quick_and_free_of_torch(tmp_path: Path) -> None:
    code = "import sys, oriole, oriole.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_verb_has_an_example_in_its_help(tmp_path: Path) -> None:
    verbs = [c.name or (c.callback.__name__ if c.callback else "") for c in cli.app.registered_commands]
    assert len(verbs) >= 7
    for verb in verbs:
        done = oriole(verb, "--help", cwd=tmp_path)
        assert done.returncode == 0 and f"Example: oriole {verb}" in done.stdout, verb


@pytest.mark.parametrize("name", cli.builtin_recipes())
def test_every_recipe_parses_and_survives_toml(name: str, tmp_path: Path) -> None:
    recipe = cli.load_recipe(name, [])
    assert recipe.run == Path("runs") / name.partition("/")[0]
    (tmp_path / "again.toml").write_text(to_toml(recipe), encoding="utf-8")
    assert cli.load_recipe(str(tmp_path / "again.toml"), []) == recipe


def test_settings_reach_the_stage_they_are_meant_for() -> None:
    pretrain, sft, *later = cli.load_recipes("demo", ["train.seed=5", "sft.train.lr=1e-5", "pretrain.train.tokens=1e4"])
    assert [recipe.stage for recipe in later] == ["reward", "dpo", "ppo", "grpo"]
    assert all(recipe.train.seed == 5 for recipe in (pretrain, sft, *later))
    assert sft.train.lr == 1e-5 != pretrain.train.lr
    assert pretrain.train.tokens == 1e4


def test_run_leaves_out_an_optional_stage_without_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(cli, "_run", lambda recipes: taken.extend(recipe.stage for recipe in recipes))
    for name in ("pretrain_zh", "pretrain_en", "sft_zh", "sft_en", "preference_zh"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n", encoding="utf-8")
    cli.run("26m", [f"data={tmp_path}"])
    assert taken == ["pretrain", "sft"]
    said = "".join(capsys.readouterr().err.split("\n"))
    assert "reward is left out: nothing matches" in said and "preference_en*.jsonl*" in said
    (tmp_path / "preference_en.jsonl").write_text("{}\n", encoding="utf-8")
    taken.clear()
    cli.run("26m", [f"data={tmp_path}"])
    assert taken == ["pretrain", "sft", "reward", "dpo"]


def test_a_length_in_the_other_unit_replaces_the_recipes() -> None:
    recipe = cli.load_recipe("demo/sft", ["train.tokens=1000"])
    assert (recipe.train.tokens, recipe.train.epochs) == (1000, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.lrr=1"], "did you mean 'lr'"),
        (["trian.lr=1"], "did you mean 'train'"),
        (["model=demoo"], "did you mean 'demo'"),
        (["train.lr=-1"], "train.lr = -1"),
        (["train.tokens=5", "train.epochs=1"], "exactly one of"),
        (["parts={}"], "at least one part"),
    ],
)
def test_a_wrong_key_is_one_sentence(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        cli.load_recipe("demo/pretrain", settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data=nowhere"], "data=nowhere is not a folder"),
        (["parts.zh.files=['nothing*.txt']"], "nothing*.txt"),
        (["parts.zh.files=['empty.txt']"], "empty"),
        (["parts.zh.files=['broken.jsonl']"], "broken.jsonl"),
        (["tokenizer.vocab_size=30000"], "vocab_size"),
        (["init=missing"], "missing"),
    ],
)
def test_bad_input_exits_with_2_and_one_sentence(folder: Path, settings: list[str], message: str) -> None:
    (folder / "empty.txt").write_text("")
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    done = oriole("train", "demo/pretrain", *TINY, *settings, cwd=folder)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("oriole: ") and message in last
    assert "Traceback" not in done.stderr


def test_bad_records_are_skipped_and_counted_when_asked(folder: Path) -> None:
    rows = [json.dumps({"text": f"第{i}天，两只黄鹂在唱歌。"}, ensure_ascii=False) for i in range(60)]
    (folder / "mixed.jsonl").write_text("\n".join([*rows[:30], '{"text": ', *rows[30:]]), encoding="utf-8")
    words = ["train", "demo/pretrain", *TINY, "parts.zh.files=['zh.txt', 'mixed.jsonl']"]
    assert oriole(*words, cwd=folder).returncode == 2
    done = oriole(*words, "skip_bad=true", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert re.search(r"1 bad records skipped, for example: .*mixed\.jsonl, line 31", done.stderr), done.stderr


def test_train_writes_the_run_folder_and_a_second_call_has_nothing_to_do(folder: Path) -> None:
    done = oriole("train", "demo/pretrain", *TINY, cwd=folder)
    assert done.returncode == 0, done.stderr
    stage = folder / "out" / "pretrain"
    events = [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    closing = events[-1]
    assert closing["event"] == "done" and closing["tokens"] == 512 and set(closing["bpb"]) == {"zh", "en"}
    evaluations = [e for e in events if e["event"] == "eval"]
    assert all(len(e["samples"]) == 4 for e in evaluations) and len(evaluations) >= 2
    env = json.loads((stage / "env.json").read_text())
    assert env["tokenizer"] and set(env["data"]) == {"zh", "en"} and env["parent"] == ""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (stage / "model" / name).exists(), name
    assert (stage / "recipe.toml").exists()

    weights = (stage / "model" / "model.safetensors").stat().st_mtime_ns
    again = oriole("train", "demo/pretrain", *TINY, cwd=folder)
    assert again.returncode == 0 and "nothing to do" in again.stderr
    assert (stage / "model" / "model.safetensors").stat().st_mtime_ns == weights

    other = oriole("train", "demo/pretrain", *TINY, "train.lr=5e-4", cwd=folder)
    assert other.returncode == 2 and "another recipe (train differ" in other.stderr

    chatless = oriole("chat", "out", cwd=folder, stdin="hello\n")
    assert chatless.returncode == 2 and "Traceback" not in chatless.stderr


def test_sigterm_saves_and_the_same_command_goes_on_to_the_same_weights(folder: Path) -> None:
    longer = [*TINY, "train.tokens=6400", "train.log_every=1"]
    assert oriole("train", "demo/pretrain", *longer, "run=./whole", cwd=folder).returncode == 0

    process = subprocess.Popen(
        [sys.executable, "-m", "oriole.cli", "train", "demo/pretrain", *longer, "run=./broken"], cwd=folder, env=ENV,
        stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip
    metrics = folder / "broken" / "pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and '"event": "step"' in metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "Traceback" not in err

    again = oriole("train", "demo/pretrain", *longer, "run=./broken", cwd=folder)
    assert again.returncode == 0, again.stderr
    weights = [(folder / run / "pretrain" / "model" / "model.safetensors").read_bytes() for run in ("whole", "broken")]
    assert weights[0] == weights[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 600 kB: room for a tokenizer and shards, none for a second checkpoint."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_sentence_and_what_was_saved_is_there(folder: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    longer = [*TINY, "train.tokens=640", "checkpoint.every=1", f"run={run}"]
    done = oriole("train", "demo/pretrain", *longer, cwd=folder)
    assert done.returncode == 2 and "the disk is full" in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr
    assert not [p for p in run.rglob("*.safetensors") if p.stat().st_size == 0]

    # A bigger disk, and the same command goes on from the last whole checkpoint.
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    again = oriole("train", "demo/pretrain", *longer, cwd=folder)
    assert again.returncode == 0 and "going on from step" in again.stderr, again.stderr


def test_a_run_goes_on_only_with_its_own_data(folder: Path) -> None:
    longer = [*TINY, "train.tokens=6400", "checkpoint.every=10"]
    assert oriole("train", "demo/pretrain", *longer, cwd=folder).returncode == 0
    (folder / "out" / "pretrain" / "model" / "model.safetensors").unlink()  # as if it had been killed at the end
    (folder / "zh.txt").write_text("别的文字。" * 300, encoding="utf-8")
    other = oriole("train", "demo/pretrain", *longer, cwd=folder)
    assert other.returncode == 2 and "data.zh" in other.stderr and "train.resume=no" in other.stderr
    fresh = oriole("train", "demo/pretrain", *longer, "train.resume=no", cwd=folder)
    assert fresh.returncode == 0, fresh.stderr
