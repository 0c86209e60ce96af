"""Going on: from what was saved by this very run and is whole, whatever state the run's objects are in; else not."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_stage
from toy_training import SHAPE, Counting, StopsInCall, digest, model, trainer

from oriole.errors import CheckpointError, ConfigError, Interrupted
from oriole.model.lm import LM
from oriole.train import checkpoint
from oriole.train.batch import Packer
from oriole.train.loop import Trainer
from oriole.train.optim import OptimConfig
from oriole.train.stage import run_stage

# --- exactly ---------------------------------------------------------------------------------------------------------


class Curriculum(Packer):
    """Chooses its next documents by the losses it has observed: an iterator with a memory of its own."""

    def __init__(self) -> None:
        super().__init__(Counting(), 4, 32)
        self.seen = 0.0

    def observe(self, metrics: dict[str, torch.Tensor]) -> None:
        self.seen += float(metrics["loss"])
        assert isinstance(self.stream, Counting)
        self.stream.seed = int(self.seen * 1e4)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.seen = state["seen"]
        assert isinstance(self.stream, Counting)
        self.stream.seed = int(self.seen * 1e4)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("call", [1, 18, 19, 20])  # first step; first, second and last micro-batch of the sixth
def test_a_signal_amid_accumulation_stops_after_the_step_and_nothing_is_lost(
    tmp_path: Path, kind: str, call: int
) -> None:
    def made(folder: str, **more: Any) -> Trainer:
        arguments = {"optim": OptimConfig(lr=1e-2, kind=kind), "data": Curriculum(), **more}  # type: ignore[arg-type]
        return trainer(tmp_path / folder, accumulate=3, lm=model(0.1), more=arguments)

    unbroken = made("a")
    unbroken.fit()
    step = (call + 2) // 3
    with pytest.raises(Interrupted, match=f"after step {step} of 12"):
        made("b", objective=StopsInCall(call)).fit()
    torch.manual_seed(99)
    second = made("b")
    second.fit()
    assert second.metrics.of("start")[0]["step"] == step  # type: ignore[attr-defined]
    assert digest(second.model) == digest(unbroken.model)


def test_heads_dropped_by_depth_are_the_same_after_a_resume(tmp_path: Path) -> None:
    def made(folder: str, **more: Any) -> Trainer:
        lm = model(pattern="GctrGgsz")
        lm.set_dropout(0.1, heads=0.3, depth="linear")
        return trainer(tmp_path / folder, lm=lm, more=more)

    unbroken = made("a")
    unbroken.fit()
    with pytest.raises(Interrupted, match="after step 5 of 12"):
        made("b", objective=StopsInCall(5)).fit()
    torch.manual_seed(99)
    second = made("b")
    second.fit()
    assert second.metrics.of("start")[0]["step"] == 5  # type: ignore[attr-defined]
    assert digest(second.model) == digest(unbroken.model)


# --- whole -----------------------------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 3),
    "emptied": lambda path: os.truncate(path, 0),
    "flipped": lambda path: path.write_bytes(_flipped(path.read_bytes())),
    "deleted": lambda path: path.unlink(),
    "torn": lambda path: path.write_bytes(
        path.read_bytes()[: path.stat().st_size // 2].ljust(path.stat().st_size, b"\0")
    ),
}


def _flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Checkpoints of steps 8 and 10 of a run of 12, and the digest that it ends with."""
    folder = tmp_path_factory.mktemp("broken")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = trainer(folder, checkpoint_every=2, keep=3)
    made.fit()
    torch.set_num_threads(threads)
    shutil.rmtree(folder / "checkpoints" / "step-12")
    return folder, digest(made.model)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"]
)
def test_every_damage_to_every_file_means_the_checkpoint_before(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], broken: tuple[Path, str], file: str, damage: str
) -> None:
    shutil.copytree(broken[0], tmp_path / "run")
    DAMAGES[damage](tmp_path / "run" / "checkpoints" / "step-10" / file)
    made = trainer(tmp_path / "run", checkpoint_every=2, keep=3)
    made.fit()
    said = capfd.readouterr().err
    assert "checkpoint step-10 is not used: " in said and "going on from step 8 of 12" in said
    assert digest(made.model) == broken[1]
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "step-10").step == 10  # made anew


def test_the_checkpoints_of_the_broken_run_have_no_other_files(broken: tuple[Path, str]) -> None:
    assert {p.name for p in (broken[0] / "checkpoints" / "step-10").iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json",
    }  # fmt: skip


# --- one's own -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and a `run` whose pretraining lacks nothing but its last word."""
    folder = tmp_path_factory.mktemp("unfinished")
    run_stage(toy_stage.recipe("pretrain", toy_stage.write_data(folder / "data"), folder / "run"))
    shutil.rmtree(folder / "run" / "pretrain" / "model")
    return folder


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"model": {"dim": 48}}, r"model\.dim was 32, is 48"),
        ({"optimizer": "muon"}, r"train\.optimizer was adamw, is muon"),
        ({"batch_size": 4, "accumulate": 1}, r"train\.accumulate was 2, is 1; train\.batch_size was 2, is 4"),
        ({"length": 64, "batch_size": 1}, r"train\.batch_size was 2, is 1; train\.length was 32, is 64"),
        ({"lr": 0.5}, r"train\.lr was 0\.001, is 0\.5"),
        ({"seed": 1}, r"train\.seed was 1337, is 1"),
        ({"dropout": 0.0}, r"train\.dropout was 0\.1, is 0\.0"),
        ({"head_dropout": 0.2}, r"train\.head_dropout was 0\.0, is 0\.2"),
        ({"dropout_depth": "linear"}, r"train\.dropout_depth was constant, is linear"),
        ({"tokens": 10_000}, r"train\.steps was 20, is \d+"),
        ({"parts": {"zh": {"files": ["zh.txt"], "val": ["zh.txt"], "weight": 3}}}, r"zh\.weight was 1\.0, is 3\.0"),
        ("data", r"data\.zh was [0-9a-f]+, is [0-9a-f]+"),
        ("tokenizer", r"tokenizer was [0-9a-f]+, is [0-9a-f]+"),
    ],
)  # fmt: skip
def test_another_run_is_refused_with_the_reason_and_leaves_no_trace(
    tmp_path: Path, unfinished: Path, change: Any, reason: str
) -> None:
    shutil.copytree(unfinished, tmp_path, dirs_exist_ok=True)
    settings = change if isinstance(change, dict) else {}
    if change == "data":
        (tmp_path / "data" / "zh.txt").write_text(toy_stage.ZH * 50, encoding="utf-8")
    if change == "tokenizer":
        shutil.rmtree(tmp_path / "run" / "tokenizer")
        settings = {"tokenizer": {"vocab_size": 290}}
    before = [(tmp_path / "run" / "pretrain" / name).read_bytes() for name in ("recipe.toml", "env.json")]
    with pytest.raises(CheckpointError, match=rf"step-20 belongs to another run \(.*{reason}.*train\.resume=no"):
        run_stage(toy_stage.recipe("pretrain", tmp_path / "data", tmp_path / "run", **settings))
    assert [(tmp_path / "run" / "pretrain" / name).read_bytes() for name in ("recipe.toml", "env.json")] == before


def test_what_changes_nothing_about_a_run_may_change(tmp_path: Path, unfinished: Path) -> None:
    shutil.copytree(unfinished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "moved").mkdir()
    (tmp_path / "data").rename(tmp_path / "moved" / "data")
    settings = {"log_every": 3, "checkpoint": {"every": 5, "keep": 7}, "eval": {"every": 3, "tokens": 300}}
    done = run_stage(toy_stage.recipe("pretrain", tmp_path / "moved" / "data", tmp_path / "run", **settings))
    assert done["tokens"] == 20 * 2 * 2 * 32


def test_a_finished_run_is_left_alone_and_refused_to_another_recipe(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = toy_stage.write_data(tmp_path / "data")
    done = run_stage(toy_stage.recipe("pretrain", data, tmp_path / "run"))
    folder = tmp_path / "run" / "pretrain"
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"event": "questions", "n": 3}\n')
    text = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(text.replace("clip = 1.0\n", ""))
    capfd.readouterr()
    assert "clip = " in text and run_stage(toy_stage.recipe("pretrain", data, tmp_path / "run")) == done
    assert "is finished; nothing to do" in capfd.readouterr().err
    with pytest.raises(ConfigError, match=r"was finished with another recipe \(train differ"):
        run_stage(toy_stage.recipe("pretrain", data, tmp_path / "run", lr=0.5))


# --- of yesterday ----------------------------------------------------------------------------------------------------

YESTERDAY = Path(__file__).parents[1] / "golden" / "checkpoint-1"
"""Step 6 of 12, saved by Oriole at commit 286251c, before checkpoints had a score and schedules their many keys."""


def yesterdays(folder: Path, **optim: Any) -> Trainer:
    small = SHAPE.model_copy(
        update={"dim": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "ffn_dim": 16}
    )
    torch.manual_seed(1)
    lm = LM(small)
    lm.set_dropout(0.1)
    told = {"stage": "pretrain", "model": small.model_dump(mode="json"), "train": {"batch_size": 2}}
    arguments = {"data": Packer(Counting(), 2, 16), "optim": OptimConfig(lr=1e-2, **optim), "fingerprint": told}
    return trainer(folder, lm=lm, more=arguments)


def test_a_checkpoint_of_an_earlier_version_loads(tmp_path: Path) -> None:
    shutil.copytree(YESTERDAY, tmp_path / "b" / "checkpoints")
    resumed, unbroken = yesterdays(tmp_path / "b"), yesterdays(tmp_path / "a")
    resumed.fit(), unbroken.fit()
    assert resumed.metrics.of("start")[0]["step"] == 6  # type: ignore[attr-defined]
    for ours, theirs in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)  # another version of torch may sum in another order


def test_a_key_that_it_did_not_know_must_stand_at_its_default(tmp_path: Path) -> None:
    shutil.copytree(YESTERDAY, tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"train\.rise was nothing, is 0\.1"):
        yesterdays(tmp_path, rise=0.1).fit()
