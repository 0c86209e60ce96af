"""The loop: it learns, looks without touching, stops when asked, and goes on as if it had never stopped."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_training import SHAPE, Counting, Records, digest, model, trainer

from oriole.errors import CheckpointError, ConfigError, Interrupted, ResourceError
from oriole.log import Metrics
from oriole.model.lm import LM
from oriole.train import checkpoint, device
from oriole.train.batch import IGNORE, Batch, Packer
from oriole.train.objectives import LMObjective, Loss
from oriole.train.optim import OptimConfig


def noisy_evaluation(step: int) -> dict[str, Any]:
    """An evaluation that uses every generator, as sampling does."""
    random.random(), np.random.random(), torch.randn(7)
    return {"bpb": {"zh": 2.0 - step / 100}, "samples": []}


class OneBatch:
    """The same batch for ever."""

    def __init__(self) -> None:
        self.batch = next(Packer(Counting(), 4, 32))

    def __next__(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


# --- learning and recording ------------------------------------------------------------------------------------------


def test_overfits_one_batch(tmp_path: Path) -> None:
    made = trainer(tmp_path, dropout=0.0, steps=60, log_every=1, more={"data": OneBatch()})
    summary = made.fit()
    first = made.metrics.of("step")[0]["loss"]
    assert first == pytest.approx(math.log(64), rel=0.05)
    assert summary["loss"] < 0.1


def test_records_and_summary(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=10, log_every=4, eval_every=5, more={"evaluate": noisy_evaluation})
    summary = made.fit()
    records = made.metrics
    assert [r["step"] for r in records.of("step")] == [4, 8, 10]
    assert [r["tokens"] for r in records.of("step")] == [512, 1024, 1280]
    assert set(records.of("step")[0]) == {
        "event", "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "data_wait", "skipped",
    }  # fmt: skip
    assert [r["step"] for r in records.of("eval")] == [0, 5, 10]
    (start,) = records.of("start")
    assert (start["device"], start["dtype"], start["compile"]) == ("cpu", "fp32", False)
    assert set(summary) == {
        "seconds", "tokens", "bpb_before", "bpb", "loss", "skipped", "tokens_per_second", "device", "dtype",
    }  # fmt: skip
    assert summary["bpb_before"] == {"zh": 2.0} and summary["bpb"] == {"zh": 1.9}
    assert summary["tokens"] == 1280 and summary["skipped"] == 0
    assert summary["loss"] == records.of("step")[-1]["loss"]
    # Evaluations are not counted as training; `seconds` are rounded to hundredths.
    assert summary["tokens_per_second"] * (summary["seconds"] + 0.005) >= 1279


def test_the_loss_of_a_record_is_the_mean_of_its_steps(tmp_path: Path) -> None:
    one, four = trainer(tmp_path / "a", log_every=1), trainer(tmp_path / "b", log_every=4)
    one.fit(), four.fit()
    single = [r["loss"] for r in one.metrics.of("step")]
    assert four.metrics.of("step")[1]["loss"] == pytest.approx(sum(single[4:8]) / 4, rel=1e-6)


def test_an_objectives_metrics_are_logged_per_unit_and_observed(tmp_path: Path) -> None:
    seen: list[float] = []

    class Counted(LMObjective):
        def __call__(self, lm: LM, batch: Batch) -> Loss:
            return Loss(super().__call__(lm, batch).sum, {"twice": 2.0 * self.weight(batch)})

    class Watching(OneBatch):
        def observe(self, metrics: dict[str, torch.Tensor]) -> None:
            seen.append(float(metrics["twice"]))

    made = trainer(tmp_path, accumulate=2, steps=4, more={"objective": Counted(), "data": Watching()})
    made.fit()
    assert made.metrics.of("step")[0]["twice"] == pytest.approx(2.0)
    assert seen == pytest.approx([2.0] * 4)


def test_evaluation_leaves_no_trace(tmp_path: Path) -> None:
    lm = model(0.1)

    def evaluate(step: int) -> dict[str, Any]:
        lm.eval()
        lm.blocks[0].attention.train()
        return noisy_evaluation(step)

    watched = trainer(tmp_path / "a", eval_every=3, lm=lm, more={"evaluate": evaluate})
    watched.fit()
    assert all(module.training for module in lm.modules())
    plain = trainer(tmp_path / "b", lm=model(0.1).eval())  # fit() trains whatever mode it is given
    plain.fit()
    assert digest(watched.model) == digest(plain.model)


def test_a_step_without_a_trained_target_moves_nothing_but_the_count(tmp_path: Path) -> None:
    class Untrained(OneBatch):
        """Every target is ignored, as in a batch of nothing but a user's words."""

        def __init__(self) -> None:
            super().__init__()
            self.batch = replace(self.batch, targets=torch.full_like(self.batch.targets, IGNORE))

    lm = model()
    undecayed = {"data": Untrained(), "optim": OptimConfig(weight_decay=0)}
    made = trainer(tmp_path, lm=lm, steps=3, log_every=1, more=undecayed)
    before = digest(lm)
    summary = made.fit()
    assert summary["loss"] == 0.0 and summary["skipped"] == 0
    assert [r["grad_norm"] for r in made.metrics.of("step")] == [0.0, 0.0, 0.0]
    assert digest(lm) == before


def test_too_little_memory_is_explained(tmp_path: Path) -> None:
    class Greedy(LMObjective):
        def __call__(self, lm: LM, batch: Batch) -> Loss:
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(ResourceError, match=r"cutting the step into single rows does not help"):
        trainer(tmp_path, more={"objective": Greedy()}).fit()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_learns_with_fp32_weights(tmp_path: Path, dtype: str) -> None:
    made = trainer(tmp_path, dropout=0.0, dtype=dtype, steps=30, more={"data": OneBatch()})
    summary = made.fit()
    assert summary["dtype"] == dtype and summary["loss"] < 1.5
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}


# --- resuming --------------------------------------------------------------------------------------------------------


class StopsAt(Packer):
    """Sends this process a signal while the batch of one step is fetched."""

    def __init__(self, step: int, signum: int = signal.SIGTERM) -> None:
        super().__init__(Counting(), 4, 32)
        self.left, self.signum = step, signum

    def __next__(self) -> Batch:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.signum)
        return super().__next__()


def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(tmp_path: Path) -> None:
    settings = {"steps": 15, "eval_every": 4, "checkpoint_every": 5}
    unbroken = trainer(tmp_path / "a", **settings, more={"evaluate": noisy_evaluation})
    whole = unbroken.fit()

    with pytest.raises(Interrupted, match=r"stopped by SIGTERM after step 7 of 15") as stopped:
        trainer(tmp_path / "b", **settings, more={"evaluate": noisy_evaluation, "data": StopsAt(7)}).fit()
    assert stopped.value.exit_code == 143
    assert (tmp_path / "b" / "checkpoints" / "step-7").is_dir()
    torch.manual_seed(99)  # nothing may depend on what the new process has drawn, nor on its fresh weights
    second = trainer(tmp_path / "b", **settings, lm=model(0.1, seed=5), more={"evaluate": noisy_evaluation})
    summary = second.fit()

    assert digest(second.model) == digest(unbroken.model)
    assert [r["step"] for r in second.metrics.of("eval")] == [8, 12, 15]  # step 0 is not evaluated again
    assert second.metrics.of("start")[0]["step"] == 7
    for key in ("tokens", "bpb_before", "bpb", "skipped"):
        assert summary[key] == whole[key]


class Crash(Packer):
    """Fails while the batch of the eighth step is fetched."""

    left = 8

    def __next__(self) -> Batch:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("power cut")
        return super().__next__()


def test_resumed_from_an_ordinary_checkpoint_after_a_crash(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tmp_path / "b", checkpoint_every=5, more={"data": Crash(Counting(), 4, 32)}).fit()
    second, unbroken = trainer(tmp_path / "b", checkpoint_every=5), trainer(tmp_path / "a")
    second.fit(), unbroken.fit()
    assert second.metrics.of("start")[0]["step"] == 5
    assert digest(second.model) == digest(unbroken.model)


def test_fp16_resumes_with_its_loss_scale(tmp_path: Path) -> None:
    settings = {"steps": 8, "dtype": "fp16"}
    unbroken = trainer(tmp_path / "a", **settings)
    unbroken.optimizer.scale.fill_(2.0**120)  # overflows some times, so that the scale has to move
    unbroken.fit()
    broken = trainer(tmp_path / "b", **settings, more={"data": StopsAt(3)})
    broken.optimizer.scale.fill_(2.0**120)
    with pytest.raises(Interrupted):
        broken.fit()
    second = trainer(tmp_path / "b", **settings)
    summary = second.fit()
    assert summary["skipped"] > 3
    assert digest(second.model) == digest(unbroken.model)


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    first = trainer(tmp_path, more={"evaluate": noisy_evaluation})
    done = first.fit()
    again = trainer(tmp_path, more={"evaluate": noisy_evaluation})
    summary = again.fit()
    assert not again.metrics.of("step") and not again.metrics.of("eval")
    assert digest(again.model) == digest(first.model)
    assert {k: summary[k] for k in ("tokens", "loss", "bpb", "bpb_before")} == {
        k: done[k] for k in ("tokens", "loss", "bpb", "bpb_before")
    }


def test_resume_no_starts_afresh_and_a_path_is_taken(tmp_path: Path) -> None:
    first = trainer(tmp_path / "a", checkpoint_every=5)
    first.fit()
    afresh = trainer(tmp_path / "a", checkpoint_every=5, resume="no")
    afresh.fit()
    assert afresh.metrics.of("start")[0]["step"] == 0
    trainer(tmp_path / "c").fit()
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tmp_path / "c", resume="no", more={"data": Crash(Counting(), 4, 32)}).fit()
    assert checkpoint.latest_valid(tmp_path / "c" / "checkpoints") is None  # nothing of the old run is found later

    chosen = trainer(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoints" / "step-10"))
    chosen.fit()
    assert chosen.metrics.of("start")[0]["step"] == 10
    assert digest(chosen.model) == digest(first.model)
    assert (tmp_path / "b" / "checkpoints" / "step-12").is_dir()
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        trainer(tmp_path / "d", resume=str(tmp_path / "nowhere")).fit()


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    trainer(tmp_path, more={"fingerprint": {"data": {"zh": "1f"}, "train": {"batch_size": 4}}}).fit()
    with pytest.raises(CheckpointError, match=r"train\.batch_size was 4, is 8.*train\.resume=no"):
        trainer(tmp_path, more={"fingerprint": {"data": {"zh": "1f"}, "train": {"batch_size": 8}}}).fit()
    with pytest.raises(CheckpointError, match=r"data\.zh was 1f, is 2e"):
        trainer(tmp_path, more={"fingerprint": {"data": {"zh": "2e"}, "train": {"batch_size": 4}}}).fit()
    with pytest.raises(CheckpointError, match=r"train\.lr was 0\.01, is 0\.5"):
        trainer(tmp_path, lr=0.5, more={"fingerprint": {"data": {"zh": "1f"}, "train": {"batch_size": 4}}}).fit()


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).fit()
    other = LM(SHAPE.model_copy(update={"ffn_dim": 64}))
    with pytest.raises(CheckpointError, match=r"model of another shape \(size mismatch for blocks"):
        trainer(tmp_path, lm=other).fit()


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_handlers_are_put_back(tmp_path: Path, signum: int, code: int) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped:
        trainer(tmp_path, more={"data": StopsAt(2, signum)}).fit()
    assert stopped.value.exit_code == code
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_signal_acts_at_once(tmp_path: Path) -> None:
    class Twice(StopsAt):
        def __next__(self) -> Batch:
            batch = super().__next__()
            if self.left == 0:
                os.kill(os.getpid(), self.signum)
            return batch

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, more={"data": Twice(2, signal.SIGINT)}).fit()


def test_a_signal_breaks_an_evaluation_off_and_it_is_done_after_the_resume(tmp_path: Path) -> None:
    def slow(step: int) -> dict[str, Any]:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)
        return noisy_evaluation(step)

    start = time.monotonic()
    with pytest.raises(Interrupted, match="after step 4"):
        trainer(tmp_path / "b", eval_every=4, more={"evaluate": slow}).fit()
    assert time.monotonic() - start < 15
    second = trainer(tmp_path / "b", eval_every=4, more={"evaluate": noisy_evaluation})
    second.fit()
    assert [r["step"] for r in second.metrics.of("eval")] == [4, 8, 12]
    unbroken = trainer(tmp_path / "a", eval_every=4, more={"evaluate": noisy_evaluation})
    unbroken.fit()
    assert digest(second.model) == digest(unbroken.model)


def test_outside_of_the_main_thread_it_trains_without_handlers(tmp_path: Path) -> None:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(trainer(tmp_path).fit()))
    thread.start()
    thread.join(60)
    assert result[0]["tokens"] == 12 * 128


IN_A_PROCESS = """
import sys, time
from pathlib import Path
from oriole.errors import OrioleError
from toy_training import Counting, Packer, digest, trainer

class Held(Packer):
    "Fetching the batch of step 7 takes until a signal comes."
    left = int(sys.argv[2])
    def __next__(self):
        self.left -= 1
        if self.left == 0:
            print("held", flush=True)
            while made._stop.signum is None:
                time.sleep(0.01)
        return super().__next__()

made = trainer(Path(sys.argv[1]), checkpoint_every=5, more={"data": Held(Counting(), 4, 32)})
try:
    made.fit()
except OrioleError as error:
    print(error, file=sys.stderr)
    raise SystemExit(error.exit_code)
print(digest(made.model))
"""


def process(folder: Path, hold_at: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", IN_A_PROCESS, str(folder), str(hold_at)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[1])]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(600)  # two processes that import torch, on a machine that may be busy
def test_a_stopped_process_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    with process(tmp_path, hold_at=7) as stopped:
        assert stopped.stdout is not None and stopped.stdout.readline() == "held\n"
        stopped.send_signal(signal.SIGTERM)
        _, said = stopped.communicate()
    assert stopped.returncode == 143
    assert "stopped by SIGTERM after step 7 of 12" in said and "the same command goes on from there" in said

    with process(tmp_path, hold_at=-1) as second:
        out, said = second.communicate()
    assert second.returncode == 0 and "going on from step 7" in said
    unbroken = trainer(tmp_path / "unbroken")
    unbroken.fit()
    assert out.strip() == digest(unbroken.model)


# --- device, compiler, disk ------------------------------------------------------------------------------------------


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullAt8(Packer):
        given = 0

        def __next__(self) -> Batch:
            self.given += 1
            if self.given == 8:
                made.saver.wait()
                monkeypatch.setattr(os, "fsync", self.full)
            return super().__next__()

        def full(self, fd: int) -> None:
            raise OSError(28, "No space left on device")

    made = trainer(tmp_path, checkpoint_every=5, more={"data": FullAt8(Counting(), 4, 32)})
    with pytest.raises(ResourceError, match="disk is full"):
        made.fit()
    monkeypatch.undo()
    found = checkpoint.latest_valid(tmp_path / "checkpoints")
    assert found is not None and found.step == 5


def test_a_broken_compiler_means_eager_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from torch._dynamo.exc import Unsupported

    def broken(fn: Any, **options: Any) -> Any:
        def call(*args: Any) -> Any:
            raise Unsupported("no such compiler", "")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    made = trainer(tmp_path, compile=True)
    made.fit()
    said = capfd.readouterr().err
    assert said.count("torch.compile failed") == 1 and "going on without it" in said
    monkeypatch.undo()
    plain = trainer(tmp_path / "plain")
    plain.fit()
    assert digest(made.model) == digest(plain.model)


def test_an_error_that_is_not_the_compilers_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fn: Any, **options: Any) -> Any:
        def call(*args: Any) -> Any:
            raise ValueError("a fault of our own")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match="a fault of our own"):
        trainer(tmp_path, compile=True).fit()


def test_compile_is_chosen_with_a_compiler_and_enough_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr(device.shutil, "which", lambda name: f"/bin/{name}" if name == "clang++" else None)
    assert device.choose_compile(cpu, "auto", 150) == (True, "clang++ is there")
    assert device.choose_compile(cpu, "auto", 149)[0] is False
    assert device.choose_compile(cpu, True, 1)[0] is True
    assert device.choose_compile(cpu, False, 10_000)[0] is False
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert device.choose_compile(cpu, "auto", 150)[0] is False


@pytest.mark.parametrize(
    "features, dtype, why",
    [
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16, "has amx_bf16"),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16, "no AMX"),
        ({"avx2": True}, torch.float32, "neither AMX nor AVX512-BF16"),
    ],
)
def test_bf16_only_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], dtype: torch.dtype, why: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    chosen, reason = device.choose_dtype(torch.device("cpu"), "auto")
    assert chosen == dtype and why in reason
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert device.choose_dtype(torch.device("cpu"), "auto")[0] == torch.float32


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.device=gpu is no device"):
        trainer(tmp_path, device="gpu")
    with pytest.raises(ResourceError, match=r"train\.device=cuda:97"):
        trainer(tmp_path, device="cuda:97")


def test_the_metrics_file_is_json_line_by_line(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    trainer(tmp_path, more={"metrics": metrics, "evaluate": noisy_evaluation}).fit()
    metrics.close()
    events = [json.loads(line)["event"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert events == ["start", "eval", "step", "step", "step", "eval", "save"]
    assert isinstance(trainer(tmp_path).metrics, Records)
