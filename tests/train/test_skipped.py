"""A batch that gives NaN: skipped, counted, written down; and a run that gives up names it."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_training import Counting, trainer

from oriole.errors import OrioleError
from oriole.model.lm import LM
from oriole.train.batch import Batch, Packer
from oriole.train.loop import Trainer
from oriole.train.objectives import LMObjective, Loss


class NanAt(LMObjective):
    """Gives NaN for some of its calls, counted from 1, as a loss (`times` = nan) or only in the gradient (inf)."""

    def __init__(self, *calls: int, times: float = math.nan) -> None:
        super().__init__()
        self.bad, self.times, self.calls = calls, times, 0

    def __call__(self, lm: LM, batch: Batch) -> Loss:
        self.calls += 1
        loss = super().__call__(lm, batch)
        if self.calls not in self.bad:
            return loss
        if math.isnan(self.times):
            return loss._replace(sum=loss.sum * math.nan)
        # The value stays, the gradient overflows: d/dx of sqrt at 0 is infinite.
        return loss._replace(sum=loss.sum + (loss.sum - loss.sum.detach()).abs().sqrt())


class Recorded(Packer):
    """Remembers what it gave."""

    def __init__(self) -> None:
        super().__init__(Counting(), 4, 32)
        self.gave: list[Batch] = []

    def __next__(self) -> Batch:
        self.gave.append(super().__next__())
        return self.gave[-1]


def written(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "skipped").iterdir()) if (folder / "skipped").exists() else []


def test_a_nan_batch_is_skipped_counted_kept_out_of_the_loss_and_written_down(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = Recorded()
    made = trainer(tmp_path, steps=8, log_every=4, more={"objective": NanAt(3), "data": data})
    summary = made.fit()
    assert summary["skipped"] == 1
    assert all(bool(p.isfinite().all()) for p in made.model.parameters())
    assert all(math.isfinite(r["loss"]) and math.isfinite(r["grad_norm"]) for r in made.metrics.of("step"))
    assert float(made.optimizer.tensors()["norm.weight.step"]) == 7

    assert written(tmp_path) == ["step-3.json", "step-3.safetensors"]
    record = json.loads((tmp_path / "skipped" / "step-3.json").read_text())
    assert record == {"schema": 1, "step": 3, "tokens": 256, "loss": "nan", "losses": ["nan"], "grad_norm": "nan"}
    tensors = load_file(tmp_path / "skipped" / "step-3.safetensors")
    assert set(tensors) == {"tokens", "targets", "doc", "pos"}
    assert all(torch.equal(tensor, getattr(data.gave[2], name)) for name, tensor in tensors.items())
    assert "step 3 was skipped: loss nan, gradient norm nan; its batch is in" in capfd.readouterr().err


def test_of_several_micro_batches_each_has_its_loss(tmp_path: Path) -> None:
    data = Recorded()
    trainer(tmp_path, steps=4, accumulate=3, more={"objective": NanAt(5), "data": data}).fit()
    record = json.loads((tmp_path / "skipped" / "step-2.json").read_text())
    assert [isinstance(x, float) for x in record["losses"]] == [True, False, True]
    assert record["tokens"] == 3 * 128
    tensors = load_file(tmp_path / "skipped" / "step-2.safetensors")
    assert torch.equal(tensors["tokens.1"], data.gave[4].tokens) and len(tensors) == 12


def test_an_infinite_gradient_of_a_finite_loss_counts(tmp_path: Path) -> None:
    trainer(tmp_path, more={"objective": NanAt(6, times=math.inf)}).fit()
    record = json.loads((tmp_path / "skipped" / "step-6.json").read_text())
    assert isinstance(record["loss"], float) and isinstance(record["grad_norm"], str)


def test_only_the_first_few_are_written_down(tmp_path: Path) -> None:
    summary = trainer(tmp_path, steps=12, more={"objective": NanAt(*range(3, 11))}).fit()
    assert summary["skipped"] == 8
    assert [n for n in written(tmp_path) if n.endswith(".json")] == [f"step-{n}.json" for n in range(3, 8)]


def test_nothing_is_written_without_need(tmp_path: Path) -> None:
    trainer(tmp_path / "a").fit()
    overflowing = trainer(tmp_path / "b", steps=30, dtype="fp16")
    assert overflowing.optimizer.scale is not None
    overflowing.optimizer.scale.fill_(2.0**30)  # fp16 finds its scale by overflowing: no fault of the batches
    assert overflowing.fit()["skipped"] > 3
    assert written(tmp_path / "a") == written(tmp_path / "b") == []


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_gives_up_when_every_update_is_skipped_and_names_a_batch(tmp_path: Path, dtype: str) -> None:
    made: Trainer = trainer(tmp_path, steps=100, dtype=dtype, more={"objective": NanAt(*range(3, 100))})
    message = r"last 2\d updates up to step 2\d .* lower train\.lr.*skipped/step-\d+\.safetensors is such a batch"
    with pytest.raises(OrioleError, match=message):
        made.fit()


def test_memory_for_batches_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oriole.train.skipped.HELD_BYTES", 3 * 128 * 36)
    trainer(tmp_path, log_every=12, more={"objective": NanAt(2, 11)}).fit()
    assert written(tmp_path) == ["step-11.json", "step-11.safetensors"]  # step 2 was let go before anyone looked
