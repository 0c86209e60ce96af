"""The probe: the real trainer in a process of its own, and figures that mean something."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_training import SHAPE

from oriole.config import validate
from oriole.errors import ResourceError
from oriole.model.config import LoraConfig, preset
from oriole.model.costs import training_memory
from oriole.train.probe import Probe, _rows, peak_rss, probe
from oriole.train.recipe import Recipe


def toy(run: Path, **train: object) -> Recipe:
    table = {
        "stage": "pretrain",
        "run": str(run),
        "model": SHAPE.model_dump() | {"context": 256},
        "parts": {"zh": {"files": ["zh"]}},
        "train": {"tokens": 1e5, "batch_size": 4, "length": 32, "accumulate": 3, "compile": False} | train,
        "eval": {"tokens": 256},
    }
    return validate(Recipe, table, "toy")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_probe_measures_and_leaves_nothing_behind(tmp_path: Path) -> None:
    made = probe(toy(tmp_path / "run"), SHAPE, 100, seconds=0.2)
    assert made.device == "cpu" and not made.device_is_gpu and not made.compiled
    assert made.steps >= 3 and made.micro_seconds > 0 and made.optimizer_seconds > 0
    assert min(made.eval_token_seconds, made.sample_seconds) > 0 and made.save_seconds >= 0
    assert made.save_bytes == pytest.approx(3 * 4 * SHAPE.num_params(), rel=0.02)
    assert 50e6 < made.base_bytes <= made.step_bytes <= made.peak_bytes == made.host_bytes < 2e9
    assert made.batch_gain is not None and made.batch_gain > 0.2
    assert list(tmp_path.iterdir()) == []


def test_with_adapters_what_is_saved_is_theirs(tmp_path: Path) -> None:
    made = toy(tmp_path / "run").model_copy(update={"lora": LoraConfig(rank=2)})
    measured = probe(made, SHAPE, 100, seconds=0.01)
    assert measured.save_bytes == pytest.approx(3 * 4 * LoraConfig(rank=2).num_params(SHAPE), rel=0.02)
    assert measured.save_bytes < 0.2 * 3 * 4 * SHAPE.num_params()
    assert measured.micro_seconds > 0 and measured.optimizer_seconds > 0


def test_the_memory_that_a_shape_is_said_to_need_is_what_it_needs(tmp_path: Path) -> None:
    """Without the libraries: activations of 16,384 tokens, mostly."""
    shape = SHAPE.model_copy(update={"dim": 64, "num_layers": 4, "head_dim": 16, "ffn_dim": 176, "context": 256})
    one = toy(tmp_path / "run", batch_size=64, length=256, dtype="fp32", accumulate=1)
    made = probe(one, shape, 100, seconds=0.01)
    parts = training_memory(shape, 64, 256, 4, whole_scores=True, compiled=False)
    assert sum(parts.values()) == pytest.approx(made.step_bytes - made.base_bytes, rel=0.2)


def test_with_fewer_rows_time_and_memory_are_reckoned_up(tmp_path: Path) -> None:
    shape = SHAPE.model_copy(update={"dim": 64, "num_layers": 4, "head_dim": 16, "ffn_dim": 176, "context": 256})
    one = toy(tmp_path / "run", batch_size=64, length=256, dtype="fp32", accumulate=1)
    whole = probe(one, shape, 100, seconds=0.01)
    task = {"recipe": one.model_dump(mode="json"), "shape": shape.model_dump(mode="json"), "steps": 100}
    done = subprocess.run(
        [sys.executable, "-c", "from oriole.train import probe as p; p._rows = lambda *_: 16; p.main()"],
        input=json.dumps(task | {"seconds": 0.01, "folder": str(tmp_path)}),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    part = Probe.model_validate_json(done.stdout.splitlines()[-1])
    assert (whole.rows, part.rows) == (64, 16)
    assert part.step_bytes == pytest.approx(whole.step_bytes, rel=0.2)
    # Four times the rows are four times the time; what else the machine does meanwhile may make much of that.
    assert whole.micro_seconds / 3 < part.micro_seconds + part.optimizer_seconds < 3 * whole.micro_seconds


def test_a_batch_that_takes_long_is_probed_in_part(tmp_path: Path) -> None:
    one = toy(tmp_path / "run", batch_size=32, length=32)
    assert _rows(one, SHAPE) == 32
    large = preset("1b")
    assert _rows(one, large) < 32
    assert _rows(toy(tmp_path / "run", batch_size=1, length=32), large.model_copy(update={"num_layers": 400})) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process in Linux's way")
def test_a_stage_that_does_not_fit_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, hard))  # inherited by the probe; the batch alone has 10 GB
    try:
        with pytest.raises(ResourceError, match="the probe failed: the device has not enough memory"):
            probe(toy(tmp_path / "run", batch_size=40_000_000), SHAPE, 100, seconds=0.2)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_the_peak_is_that_of_this_program_and_not_of_its_parent() -> None:
    ballast = bytearray(os.urandom(1 << 20)) * 300  # 300 MB here, and none of it there
    done = subprocess.run(
        [sys.executable, "-c", "from oriole.train.probe import peak_rss; print(peak_rss())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert peak_rss() > len(ballast)
    status = "print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024)"
    bare = subprocess.run([sys.executable, "-S", "-c", status], capture_output=True, text=True, check=True)
    assert int(bare.stdout) < 100e6 < int(done.stdout) < 1e9
