"""Ways to run that must follow one trajectory: accumulated or not, compiled or not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import Counting, model, trainer

from oriole.train.batch import IGNORE, Batch, Packer
from oriole.train.device import choose_compile


class Rows:
    """Rows whose masks differ widely, given out `size` at a time."""

    def __init__(self, size: int) -> None:
        packer = Packer(Counting(3), 40, 32)
        batch = next(packer)
        for row in range(40):
            batch.targets[row, 4 + 3 * (row % 8) :] = IGNORE  # 1 … 24 trained tokens
        self.batch, self.size, self.at = batch, size, 0

    def __next__(self) -> Batch:
        start = self.at
        self.at += self.size
        return self.batch.cut(start, self.at)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def losses(folder: Path, **options: Any) -> list[float]:
    made = trainer(folder, dropout=0.0, log_every=1, **options)
    made.fit()
    return [record["loss"] for record in made.metrics.of("step")]


def gradient(accumulate: int) -> torch.Tensor:
    """The gradient of the first step over eight rows, as AdamW's first moment holds it."""
    lm = model()
    made = trainer(
        Path("unused"), lm=lm, steps=1, accumulate=accumulate, more={"data": Rows(8 // accumulate)}
    )  # fmt: skip
    micro, _ = made._fetch()
    total = torch.stack([made.objective.weight(b) for b in micro]).sum()
    lm.eval()
    for batch in micro:
        made.gradients._backward(batch, total, None, last=True)
    return torch.cat([p.grad.flatten() for p in lm.parameters()])


def test_rows_have_unequal_masks() -> None:
    counts = (next(Rows(8)).targets != IGNORE).sum(1)
    assert counts.max() > 3 * counts.min() > 0


def test_accumulated_gradients_equal_those_of_one_batch() -> None:
    one, eight = gradient(1), gradient(8)
    assert float((one - eight).norm() / one.norm()) < 1e-6


def test_one_times_eight_follows_eight_times_one(tmp_path: Path) -> None:
    one = losses(tmp_path / "a", steps=5, accumulate=1, more={"data": Rows(8)})
    eight = losses(tmp_path / "b", steps=5, accumulate=8, more={"data": Rows(1)})
    assert eight == pytest.approx(one, rel=1e-6)
    assert one[-1] < one[0] - 0.1


def test_activations_computed_again_follow_kept_ones(tmp_path: Path) -> None:
    kept = losses(tmp_path / "a", steps=6, lm=model(dropout=0.1))
    lm = model(dropout=0.1)
    lm.recompute = True
    again = losses(tmp_path / "b", steps=6, lm=lm)
    assert again == kept


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_follows_eager(tmp_path: Path) -> None:
    if not choose_compile(torch.device("cpu"), "auto", 10_000)[0]:
        pytest.skip("no C++ compiler")
    eager = losses(tmp_path / "a", steps=6)
    torch._dynamo.reset()
    compiled = trainer(tmp_path / "b", dropout=0.0, log_every=1, steps=6, compile=True)
    compiled.fit()
    assert compiled.gradients.compiled, "compiling failed and the run went on without it"
    assert [r["loss"] for r in compiled.metrics.of("step")] == pytest.approx(eager, rel=1e-5)
