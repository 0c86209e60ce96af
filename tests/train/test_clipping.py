"""The adaptive clip against NumPy, its window, and an optimizer that a spike does not throw."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from oriole.train.clipping import ENOUGH, FIRST, WINDOW, NormWindow
from oriole.train.optim import OptimConfig, Optimizer
from tests import toy_training as toy

CPU = torch.device("cpu")
GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)


def filled(norms: list[float]) -> NormWindow:
    window = NormWindow(CPU)
    for norm in norms:
        window.add(torch.tensor(norm), GOOD if math.isfinite(norm) else BAD)
    return window


@pytest.mark.parametrize("count", [ENOUGH, 50, WINDOW, 3 * WINDOW])
def test_the_threshold_is_the_quantile_of_the_last_norms(count: int) -> None:
    norms = np.random.default_rng(count).lognormal(size=count)
    wanted = np.quantile(norms[-WINDOW:], 0.9, method="inverted_cdf")
    assert float(filled(norms.tolist()).threshold()) == pytest.approx(wanted, rel=1e-6)


def test_until_it_knows_enough_the_threshold_is_fixed() -> None:
    assert float(NormWindow(CPU).threshold()) == FIRST
    assert float(filled([7.0] * (ENOUGH - 1)).threshold()) == FIRST
    assert float(filled([7.0] * ENOUGH).threshold()) == 7


def test_norms_that_are_not_finite_stay_outside() -> None:
    window = filled([3.0] * 20 + [math.nan, math.inf] * 40)
    assert int(window.norms.isfinite().sum()) == 20
    assert float(window.threshold()) == 3


@pytest.mark.parametrize("clip", ["auto", 1e9])
def test_a_spike_is_judged_by_the_norms_before_it_and_scaled_down_to_them(clip: Any) -> None:
    model = nn.Module()
    weight = model.weight = nn.Parameter(torch.zeros(4, 4))
    # With an eps this large, the length of AdamW's step follows that of the gradient.
    config = OptimConfig(clip=clip, eps=1.0, betas=(0.0, 0.0), warmup=0, schedule="constant")
    optimizer = Optimizer(model, config, 99)

    def move(norm: float) -> float:
        before = weight.detach().clone()
        weight.grad = torch.full((4, 4), norm / 4)
        optimizer.step(0, torch.tensor(0.0))
        return float((weight.detach() - before).norm())

    for _ in range(30):
        usual = move(0.5)
    spike = move(100.0)
    if clip == "auto":
        assert float(optimizer.clip) == 0.5 and spike == pytest.approx(usual, rel=1e-2)
    else:
        assert spike > 2 * usual


def test_lr_scale_moves_both_learning_rates_and_is_saved() -> None:
    def change(scale: float) -> dict[str, float]:
        model = toy.model()
        optimizer = Optimizer(model, OptimConfig(kind="muon", warmup=0, weight_decay=0), 10)
        optimizer.lr_scale = scale
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss = model(torch.arange(16)[None]).h.square().mean()
        loss.backward()
        optimizer.step(0, loss)
        other = Optimizer(model, OptimConfig(kind="muon"), 10)
        other.load(optimizer.tensors())
        assert other.lr_scale == scale and other.rate(3) == scale * Optimizer(model, OptimConfig(), 10).rate(3)
        return {n: float((p.detach() - before[n]).norm()) for n, p in model.named_parameters()}

    whole, third = change(1.0), change(1 / 3)
    for name, moved in whole.items():
        assert moved > 0
        assert third[name] == pytest.approx(moved / 3, rel=2e-3)


def test_a_resumed_run_goes_on_with_the_same_window(tmp_path: Path) -> None:
    more = {"optim": OptimConfig(lr=1e-2, clip="auto")}
    straight = toy.trainer(tmp_path / "a", more=more, steps=24)
    straight.fit()
    toy.trainer(tmp_path / "b", more=more, steps=24, checkpoint_every=18).fit()
    resumed = toy.trainer(tmp_path / "c", more=more, steps=24, resume=str(tmp_path / "b" / "checkpoints" / "step-18"))
    resumed.fit()
    assert toy.digest(resumed.model) == toy.digest(straight.model)
    assert float(straight.optimizer.clip) != FIRST and straight.metrics.of("step")[-1]["clip"] != FIRST
