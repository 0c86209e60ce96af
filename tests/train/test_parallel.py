"""Several processes on loopback train as one does: DDP and FSDP2 with gloo."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_processes import OPTIONS, STEPS, experts, losses, make, option, plain_weights
from toy_rl import SHAPE, tokenizer

from oriole.config import validate
from oriole.errors import ConfigError
from oriole.model.folder import load_model, load_reward_model, save_model
from oriole.model.lm import LM
from oriole.train import dist
from oriole.train.batch import Batch
from oriole.train.recipe import Recipe
from oriole.train.stage import run_stage

pytestmark = pytest.mark.timeout(600)  # processes that import torch, on a machine that may be busy

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def program(scenario: str, folder: Path) -> list[str]:
    return [str(Path(__file__).parents[1] / "toy_processes.py"), scenario, str(folder)]


def found(scenario: str, folder: Path) -> list[dict[str, Any]]:
    """What both processes have found."""
    command = [*LAUNCH, *program(scenario, folder)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


def test_one_process_equals_two_of_either_kind_and_checkpoints_are_interchangeable(tmp_path: Path) -> None:
    one = make(tmp_path / "one", checkpoint_every=10)
    one.fit()
    normuon = make(tmp_path / "normuon", kind="normuon")
    normuon.fit()
    options = {name: option(name, tmp_path / name) for name in OPTIONS}
    for made in options.values():
        made.fit()
    mixture = experts(tmp_path / "experts")
    mixture.fit()

    first, second = found("trajectories", tmp_path)
    assert first == second
    for name, made in options.items():
        own = plain_weights(made)
        for kind in ("ddp", "fsdp"):
            assert first.pop(f"{name} {kind}") == pytest.approx(losses(made), abs=1e-5)
            theirs = load_file(tmp_path / f"{name}-{kind}.safetensors")
            assert theirs.keys() == own.keys()
            for parameter, tensor in own.items():
                torch.testing.assert_close(theirs[parameter], tensor, atol=1e-4, rtol=1e-3, msg=f"{kind} {parameter}")
    pairs = {"ddp+fsdp", "fsdp+ddp"}
    mixtures = {"experts ddp", "experts fsdp"}
    wanted = {"ddp", "fsdp", "one+ddp", "one+fsdp"} | pairs | mixtures
    assert set(first) == wanted | {f"normuon {pair}" for pair in pairs}
    for name, have in first.items():
        # Muon rounds to bf16, which makes a last bit a bigger one.
        want, tolerance = (losses(normuon), 1e-3) if "normuon" in name else (losses(one), 1e-5)
        if name in mixtures:
            want, tolerance = losses(mixture), 1e-3
        assert have == pytest.approx(want[-len(have) :], abs=tolerance), name
        assert len(have) == (10 if name.startswith("one+") else STEPS)

    # And back: a single process goes on from what two have saved, whole or cut.
    for kind in ("ddp", "fsdp"):
        saved = tmp_path / f"{kind}-half" / "checkpoints" / "step-10"
        assert (saved / "model-00002-of-00002.safetensors").exists() == (kind == "fsdp")
        alone = make(tmp_path / f"{kind}-alone", resume=str(saved))
        alone.fit()
        assert losses(alone) == pytest.approx(losses(one)[10:], abs=1e-5)
        assert alone.now.tokens == one.now.tokens


def test_dropout_is_resumed_signals_are_heeded_by_all_and_nan_is_skipped_by_all(tmp_path: Path) -> None:
    first, second = found("behaviour", tmp_path)
    for kind in ("ddp", "fsdp"):
        assert first.pop(f"{kind} drawn") != second.pop(f"{kind} drawn")  # to each process its own dropout
    assert first == second  # weights, losses and decisions are the same in both
    for kind in ("ddp", "fsdp"):
        assert first[f"{kind} stopped"] == 8
        whole, resumed = first[f"{kind} dropout"]
        assert whole == resumed  # bit for bit
        assert first[f"{kind} skipped"] == 1
        values = first[f"{kind} nan"]
        assert [value != value for value in values] == [False, True, False, False, False, False]
        assert values[-1] < values[0]
    assert "3 rows" in first["odd"] and "2 processes" in first["odd"] and "multiple of 2" in first["odd"]


@pytest.mark.parametrize(
    "scenario, message",
    [
        ("fails", "the disk of this machine is on fire"),
        ("crashes", "ValueError: a fault of our own"),
    ],
)
def test_a_process_that_fails_ends_the_others_with_its_message(tmp_path: Path, scenario: str, message: str) -> None:
    """Started by the standard environment variables alone, without torchrun, which would kill the others itself."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    standard = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    going = [
        subprocess.Popen(
            [sys.executable, *program(scenario, tmp_path)],
            env=ENV | standard | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    first, second = (process.communicate(timeout=300)[1] for process in going)
    assert [process.returncode for process in going] == [2, 2 if scenario == "fails" else 1]
    assert f"peer: process 1 failed: {message}" in first and "Traceback" not in first
    assert message in second and "peer" not in second


@pytest.mark.soak
def test_compiled_models_train_alike(tmp_path: Path) -> None:
    one = make(tmp_path / "one", steps=8)
    one.fit()
    first, second = found("compiled", tmp_path)
    assert first == second
    for kind in ("ddp", "fsdp"):
        assert first[f"{kind} compiled"]
        assert first[kind] == pytest.approx(losses(one), abs=1e-4)
    assert first["fsdp evaluations"] == pytest.approx(first["ddp evaluations"], rel=1e-4)
    assert len(set(first["fsdp evaluations"])) == 3


RECIPE = """
stage = "pretrain"
data = "DATA"
[model]
vocab_size = 290
dim = 32
num_layers = 2
num_heads = 4
num_kv_heads = 2
head_dim = 8
ffn_dim = 48
context = 64
[parts.en]
files = ["*.jsonl"]
[tokenizer]
vocab_size = 290
[train]
tokens = 32_000
batch_size = 4
accumulate = 2
length = 64
compile = false
dtype = "fp32"
parallel = "fsdp"
log_every = 1
[eval]
tokens = 2000
holdout = 0.1
"""


def test_the_command_under_torchrun_stops_by_sigterm_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    texts = [f"The bird number {i} sings in tree {i * 7 % 31} of row {i % 5}." for i in range(300)]
    (tmp_path / "data" / "birds.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "r.toml").write_text(RECIPE.replace("DATA", str(tmp_path / "data")))
    run = tmp_path / "run"
    command = [*LAUNCH, "-m", "oriole.cli", "train", str(tmp_path / "r.toml"), f"run={run}"]

    with subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True) as going:
        metrics = run / "pretrain" / "metrics.jsonl"
        while not (metrics.exists() and '"event": "step"' in metrics.read_text()):
            assert going.poll() is None, going.communicate()[1][-3000:]
            time.sleep(0.05)
        going.terminate()
        _, said = going.communicate(timeout=300)
    assert going.returncode != 0 and "stopped by SIGTERM after step" in said, said[-3000:]

    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from step" in done.stderr
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert records[-1]["event"] == "done" and records[-1]["tokens"] >= 32_000
    steps = [r["step"] for r in records if r["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1))  # written by one process, none twice, none lost
    assert [r["processes"] for r in records if r["event"] == "start"] == [2, 2]
    assert (run / "pretrain" / "model" / "model.safetensors").exists()
    assert records[-1]["bpb"]["en"] < records[-1]["bpb_before"]["en"]


# --- the stages of preferences ----------------------------------------------------------------------------------------


PARTS: dict[str, Any] = {
    "reward": {"pairs": {"files": ["pairs.jsonl"], "val": ["pairs.jsonl"]}},
    "dpo": {"pairs": {"files": ["pairs.jsonl"], "val": ["pairs.jsonl"]}},
    "grpo": {"sums": {"files": ["sums.jsonl"], "val": ["sums.jsonl"]}},
    "ppo": {"sums": {"files": ["sums.jsonl"], "val": ["sums.jsonl"]}},
}


def table(stage: str, home: Path, run: Path) -> dict[str, Any]:
    """A recipe of four steps or so."""
    return {
        "stage": stage, "run": str(run), "data": str(home), "init": str(home / "parent"), "parts": PARTS[stage],
        "rollout": {"prompts": 4, "max_new_tokens": 4, "rewards": {"format": 1.0, "language": 0.5}, "eval_prompts": 4},
        "grpo": {"group": 2, "epochs": 2, "beta": 0.1},
        "ppo": {"epochs": 2},
        "train": {"epochs": 0.4, "batch_size": 4, "length": 64, "device": "cpu", "dtype": "fp32", "lr": 1e-2,
                  "compile": False, "log_every": 1},
        "eval": {"tokens": 256, "prompts": []},
    }  # fmt: skip


def losses_of(run: Path, stage: str) -> list[float]:
    lines = (run / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["event"] == "step"]


def test_one_process_equals_two_in_every_stage(tmp_path: Path) -> None:
    torch.manual_seed(5)
    save_model(LM(SHAPE), tmp_path / "parent", chat=True)
    tokenizer().save(tmp_path / "parent", chat=True)
    sums = [{"prompt": f"{a}+{b}=?", "response": str(a + b)} for a in range(4) for b in range(5)]
    pairs = [{"prompt": s["prompt"], "chosen": s["response"], "rejected": f"{i} no"} for i, s in enumerate(sums * 2)]
    for name, records in (("sums", sums), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for stage in PARTS:
        (tmp_path / f"{stage}.json").write_text(json.dumps(table(stage, tmp_path, tmp_path / "two")))
        run_stage(validate(Recipe, table(stage, tmp_path, tmp_path / "one"), "toy"))

    first, second = found("preferences", tmp_path)
    assert first == second and set(first) == set(PARTS)
    for stage in PARTS:
        one, two = losses_of(tmp_path / "one", stage), losses_of(tmp_path / "two", stage)
        assert len(one) > 2 and two == pytest.approx(one, rel=1e-4, abs=1e-5), stage
        load = load_reward_model if stage == "reward" else load_model
        weights = [dict(load(tmp_path / run / stage / "model").named_parameters()) for run in ("one", "two")]
        moved = dict(load_model(tmp_path / "parent").named_parameters())
        for name, parameter in weights[0].items():
            torch.testing.assert_close(weights[1][name], parameter, rtol=1e-3, atol=1e-4)
            assert name not in moved or not torch.equal(moved[name], parameter), name


# --- one process -----------------------------------------------------------------------------------------------------


def batches(count: int, rows: int) -> list[Batch]:
    numbers = torch.arange(count * rows * 2).view(count, rows, 2)
    return [Batch(n, n, n.int(), n) for n in numbers]


@pytest.mark.parametrize("count, rows, world", [(4, 4, 2), (1, 12, 4), (3, 8, 2), (2, 8, 4), (1, 14, 2), (5, 2, 10)])
def test_the_shares_of_all_processes_are_the_step(
    monkeypatch: pytest.MonkeyPatch, count: int, rows: int, world: int
) -> None:
    monkeypatch.setattr(dist, "world", lambda: world)
    seen = []
    for rank in range(world):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        own = dist.share(batches(count, rows))
        assert all(len(b.tokens) <= rows for b in own)
        assert sum(len(b.tokens) for b in own) == count * rows // world
        seen += [row for b in own for row in b.tokens.tolist()]
    assert sorted(seen) == torch.arange(count * rows * 2).view(-1, 2).tolist()


def test_a_launcher_that_forgets_something_is_told_what(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in dist.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=r"LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set.*torchrun"), dist.started():
        pass


def test_a_single_process_answers_for_itself() -> None:
    with dist.started("cpu"), dist.first() as is_first:
        assert is_first and dist.world() == 1 and dist.rank() == 0
    assert dist.told(lambda: 3) == 3 and dist.agree(7) == 7
    x = torch.ones(2)
    assert dist.sum(x) is x
