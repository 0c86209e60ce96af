"""Micro-batches: whatever fits in the memory, the step is the same."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_training import Counting, digest, model, trainer

from oriole.errors import ResourceError
from oriole.model.lm import LM
from oriole.train.batch import IGNORE, Batch, Packer
from oriole.train.loop import Trainer
from oriole.train.microbatch import MARGIN, MicroBatches, _cgroup_left, free_memory, memory_of, rows_that_fit
from oriole.train.objectives import LMObjective, Loss
from oriole.train.smart import SmartConfig

CPU = torch.device("cpu")


def batches(*sizes: int) -> list[Batch]:
    return [next(Packer(Counting(n), size, 16)) for n, size in enumerate(sizes)]


class Narrow(LMObjective):
    """Has memory for `rows` rows; one more fails as torch does, in the backward pass of a later piece."""

    def __init__(self, rows: int, error: type[Exception] = torch.OutOfMemoryError, calls_before: int = 0) -> None:
        super().__init__()
        self.rows, self.error, self.left = rows, error, calls_before
        self.sizes: list[int] = []

    def __call__(self, lm: LM, batch: Batch) -> Loss:
        self.sizes.append(len(batch.tokens))
        self.left -= 1
        if len(batch.tokens) > self.rows and self.left < 0:
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes")
        return super().__call__(lm, batch)


def losses(made: Trainer) -> list[float]:
    made.fit()
    return [r["loss"] for r in made.metrics.of("step")]


# --- pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 12])
def test_pieces_hold_every_row_once_and_in_order(rows: int) -> None:
    made = MicroBatches()
    micro = batches(6, 6)
    made.rows = rows
    pieces = made.split(micro)
    assert {len(p.tokens) for p in pieces} == {rows}
    for piece in pieces:
        assert torch.equal(piece.rows, (piece.targets != IGNORE).flatten().nonzero().squeeze(-1))
    for name in ("tokens", "targets", "doc", "pos"):
        whole = torch.cat([getattr(b, name) for b in micro])
        assert torch.equal(torch.cat([getattr(p, name) for p in pieces]), whole)


def test_without_a_limit_the_batches_stay_as_they_are() -> None:
    micro = batches(6, 6)
    assert all(a is b for a, b in zip(MicroBatches().split(micro), micro, strict=True))


def test_half_the_rows_again_and_again_down_to_one() -> None:
    made, micro, taken = MicroBatches(), batches(12, 12), []
    while (decision := made.back_off(micro)) is not None:
        taken.append(decision.numbers["rows"])
    assert taken == [6, 3, 1]
    assert decision is None and made.rows == 1


# --- backing off -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_out_of_memory_halves_the_rows_and_the_run_is_the_same(tmp_path: Path, error: type[Exception]) -> None:
    settings = {"steps": 6, "dropout": 0.0, "log_every": 1, "accumulate": 2}
    plain = trainer(tmp_path / "a", **settings)
    # The first piece of the first attempt succeeds: its gradients must not be counted twice.
    narrow = Narrow(1, error, calls_before=1)
    made = trainer(tmp_path / "b", **settings, more={"objective": narrow})
    assert losses(made) == pytest.approx(losses(plain), rel=1e-5)
    assert narrow.sizes == [4, 4, 2, *[1] * 48]
    assert [(r["what"], r["rows"], r["step"]) for r in made.metrics.of("smart")] == [
        ("back_off", 2, 0),
        ("back_off", 1, 0),
    ]
    assert made.metrics.of("smart")[0]["why"] == (
        "4 rows at a time are too many for the memory: a step's 8 rows go through in 4 x 2"
    )
    for ours, theirs in zip(made.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    class Broken(LMObjective):
        def __call__(self, lm: LM, batch: Batch) -> Loss:
            raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        trainer(tmp_path, more={"objective": Broken()}).fit()


def test_when_one_row_is_too_much_the_run_ends_with_advice(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"single rows does not help; lower train\.length"):
        trainer(tmp_path, more={"objective": Narrow(0)}).fit()


def test_a_resumed_run_keeps_its_pieces_bit_for_bit(tmp_path: Path) -> None:
    unbroken = trainer(tmp_path / "a", steps=8, more={"objective": Narrow(2)})
    unbroken.fit()
    first = trainer(tmp_path / "b", steps=8, checkpoint_every=4, more={"objective": Narrow(2), "data": Failing()})
    with pytest.raises(RuntimeError, match="power cut"):
        first.fit()
    roomy = Narrow(4)  # has memory for all: sums of other pieces would be rounded differently
    second = trainer(tmp_path / "b", steps=8, checkpoint_every=4, more={"objective": roomy})
    second.fit()
    assert set(roomy.sizes) == {2} and len(roomy.sizes) == 8
    assert digest(second.model) == digest(unbroken.model)


class Failing(Packer):
    """Fails while the batch of the seventh step is fetched."""

    def __init__(self) -> None:
        super().__init__(Counting(), 4, 32)
        self.left = 7

    def __next__(self) -> Batch:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("power cut")
        return super().__next__()


# --- choosing --------------------------------------------------------------------------------------------------------


def test_as_many_rows_as_fit_and_divide_the_batch() -> None:
    memory = memory_of(model(), "adamw", CPU, torch.float32, compiled=False)
    assert memory is not None and memory_of(torch.nn.Linear(2, 2), "adamw", CPU, torch.float32, compiled=False) is None
    for rows in (1, 2, 3, 4, 6, 12):
        parts = memory(rows, 32)
        free = math.ceil((sum(parts.values()) - parts["weights"]) / MARGIN)
        assert rows_that_fit(memory, 12, 12, 32, free) == rows
        assert rows_that_fit(memory, 12, 12, 32, free - 2) == max([r for r in (1, 2, 3, 4, 6) if r < rows], default=1)
    assert rows_that_fit(memory, 12, 6, 32, 10**12) == 6
    assert rows_that_fit(memory, 12, 12, 32, 0) == 1


def test_with_room_for_all_micro_batch_leaves_the_batch_alone(tmp_path: Path) -> None:
    made = trainer(tmp_path, more={"smart": SmartConfig(micro_batch=True), "objective": (narrow := Narrow(4))})
    made.fit()
    (record,) = made.metrics.of("smart")
    assert (record["what"], record["rows"]) == ("micro_batch", 4) and set(narrow.sizes) == {4}
    assert 0 < record["needed_bytes"] < record["free_bytes"]


def test_the_memory_of_a_control_group_counts(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("two/a/b/memory.max", "max\n"), write("two/a/b/memory.current", "10\n"), write("two/a/b/memory.stat", "")
    write("two/a/memory.max", "1000\n"), write("two/a/memory.current", "700\n")
    write("two/a/memory.stat", "anon 5\ninactive_file 200\n")
    write("groups2", "0::/a/b\n")
    assert _cgroup_left(tmp_path / "two", tmp_path / "groups2") == 500
    write("one/memory/c/memory.limit_in_bytes", "900"), write("one/memory/c/memory.usage_in_bytes", "500")
    write("one/memory/c/memory.stat", "cache 1\ntotal_inactive_file 50\n")
    write("groups1", "4:memory:/c\n3:cpuset:/\n0::/\n")
    assert _cgroup_left(tmp_path / "one", tmp_path / "groups1") == 450
    assert _cgroup_left(tmp_path / "none", tmp_path / "groups1") is None
    assert _cgroup_left(tmp_path, tmp_path / "no_file") is None


LIMITED = """
import json, os, resource, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from toy_training import Counting, trainer
from oriole.model.config import ModelConfig
from oriole.model.lm import LM
from oriole.train.batch import Packer
from oriole.train.smart import SmartConfig
torch.set_num_threads(1)
shape = ModelConfig(vocab_size=64, dim=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=256)
FREE = resource.RLIM_INFINITY

def run(folder, smart, room):
    torch.manual_seed(1)
    made = trainer(Path(folder), lm=LM(shape), steps=2, log_every=1,
                   more={"data": Packer(Counting(), 32, 256), "smart": SmartConfig(micro_batch=smart)})
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + room if room else FREE, FREE))
    made.fit()
    resource.setrlimit(resource.RLIMIT_AS, (FREE, FREE))
    return {"smart": made.metrics.of("smart"), "loss": [r["loss"] for r in made.metrics.of("step")]}

small = 128 << 20
for name, smart, room in (("backed_off", False, small), ("chosen", True, small), ("plain", False, 0)):
    print(json.dumps(run(sys.argv[2] + name, smart, room)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and RLIMIT_AS")
def test_under_a_real_limit_it_backs_off_or_chooses_fewer_rows_at_once(tmp_path: Path) -> None:
    """A process that may take only so many more bytes than it has when training begins."""
    words = [sys.executable, "-c", LIMITED, str(Path(__file__).parents[1]), f"{tmp_path}/"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    backed_off, chosen, plain = map(json.loads, done.stdout.splitlines())
    assert plain["smart"] == []
    assert {r["what"] for r in backed_off["smart"]} == {"back_off"}
    assert chosen["smart"][0]["what"] == "micro_batch" and chosen["smart"][0]["rows"] < 32
    for made in (backed_off, chosen):
        assert made["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert free_memory(CPU)
