"""Schedules against their closed forms and torch's, and what must hold of all of them."""

import itertools
import math
import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from oriole.config import validate
from oriole.errors import ConfigError
from oriole.train.optim import OptimConfig
from oriole.train.recipe import TrainTable
from oriole.train.schedules import Schedule, lr_at


def config(**changes: Any) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 0.5, "warmup": 0.1, "min_lr": 0.2, "schedule": "cosine"} | changes)


def rates(total: int, **changes: Any) -> list[float]:
    return [lr_at(step, total, config(**changes)) for step in range(total)]


def test_cosine_is_its_closed_form() -> None:
    for n, rate in enumerate(rates(100), start=1):
        expected = n / 10 if n <= 10 else 0.2 + 0.8 * (1 + math.cos(math.pi * (n - 10) / 90)) / 2
        assert rate == pytest.approx(0.5 * expected, rel=1e-12)


def test_noam_is_the_rate_of_the_paper() -> None:
    dim, warmup = 512, 40
    found = rates(200, schedule="noam", warmup=warmup, lr=(dim * warmup) ** -0.5)
    assert found == pytest.approx([dim**-0.5 * min(n**-0.5, n * warmup**-1.5) for n in range(1, 201)])


def test_wsd_is_flat_and_then_a_line() -> None:
    found = rates(100, schedule="wsd", decay=0.4)
    assert found[:10] == pytest.approx([0.05 * n for n in range(1, 11)])
    assert found[10:60] == [0.5] * 50
    assert found[60:] == pytest.approx([0.5 * (1 - 0.8 * k / 40) for k in range(1, 41)])


@pytest.mark.parametrize(
    "warmup, peak_step", [(0, 0), (0.25, 24), (1, 0), (7, 6)], ids=["none", "share", "one step", "steps"]
)
def test_warmup_is_a_share_below_one_and_steps_above(warmup: float, peak_step: int) -> None:
    found = rates(100, schedule="constant", warmup=warmup)
    assert found.index(0.5) == peak_step
    assert found[peak_step:] == [0.5] * (100 - peak_step)


def torchs(make: Any, total: int) -> list[float]:
    """The rates that a scheduler of torch gives, made by make(optimizer), beginning before its first step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = make(optimizer)
    out = []
    for _ in range(total + 1):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


@pytest.mark.parametrize(
    ("changes", "make"),
    [
        ({"schedule": "cosine"}, lambda o: lr_scheduler.CosineAnnealingLR(o, 40, eta_min=0.1)),
        ({"schedule": "linear"}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=40)),
        ({"schedule": "exponential"}, lambda o: lr_scheduler.ExponentialLR(o, 0.2 ** (1 / 40))),
        ({"schedule": "constant"}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    ],
    ids=lambda value: value["schedule"] if isinstance(value, dict) else "",
)
def test_equals_torchs(changes: dict[str, Any], make: Any) -> None:
    assert rates(40, warmup=0, **changes) == pytest.approx(torchs(make, 40)[1:], rel=1e-9)


def test_sgdr_equals_torchs_but_ends_every_cycle_at_the_lowest_rate() -> None:
    """Cycles of 5, 10 and 20 steps; torch jumps up in the step in which ours arrives at the end."""
    ours = rates(35, schedule="sgdr", warmup=0, cycles=3, cycle_mult=2)
    theirs = torchs(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, 2, eta_min=0.1), 35)[1:]
    ends = [n for n in range(1, 36) if ours[n - 1] == pytest.approx(0.1)]
    assert ends == [5, 15, 35]
    for n in range(1, 36):
        if n not in ends:
            assert ours[n - 1] == pytest.approx(theirs[n - 1], rel=1e-9)


@pytest.mark.parametrize(("total", "rise"), [(40, 0.3), (17, 0.5)])
def test_onecycle_equals_torchs(total: int, rise: float) -> None:
    def make(o: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        top = round(rise * total)
        return lr_scheduler.OneCycleLR(
            o, 0.5, total, pct_start=top / total, div_factor=25, final_div_factor=1 / (25 * 0.2), cycle_momentum=False
        )

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = make(optimizer)
    for ours in rates(total, schedule="onecycle", rise=rise):
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        if scheduler.last_epoch < total - 1:
            scheduler.step()


any_config = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(get_args(Schedule)),
        "warmup": st.one_of(st.floats(0, 0.5), st.integers(1, 30).map(float)),
        "min_lr": st.floats(0.01, 1),
        "decay": st.floats(0.01, 1),
        "cycles": st.integers(1, 5),
        "cycle_mult": st.floats(1, 3),
        "rise": st.floats(0.01, 0.99),
    }
)


@given(changes=any_config, total=st.integers(1, 300))
def test_no_rate_leaves_its_bounds_and_the_last_is_the_lowest_since_the_warmup(
    changes: dict[str, Any], total: int
) -> None:
    c = config(**changes)
    all_rates = rates(total, **changes)
    assert all(0 < rate <= 0.5 * (1 + 1e-9) for rate in all_rates)
    warmup = round(c.warmup * total) if c.warmup < 1 else round(c.warmup)
    top = max(1, round(c.rise * total)) if c.schedule == "onecycle" else warmup
    if 0 < top <= total:
        assert all_rates[top - 1] == pytest.approx(0.5)  # the peak is where the warmup ends
        assert all_rates[:top] == sorted(all_rates[:top])
    if top < total:
        end = 0.5 if c.schedule in ("constant", "plateau") else 0.5 * c.min_lr
        if c.schedule == "noam":
            end = 0.5 * math.sqrt(max(1, warmup) / total)
        assert all_rates[-1] == pytest.approx(end)
        assert min(all_rates[top:]) == pytest.approx(end)
        if c.schedule != "sgdr":
            assert all_rates[top:] == sorted(all_rates[top:], reverse=True)


@pytest.mark.parametrize("schedule", [s for s in get_args(Schedule) if s != "sgdr"])
def test_no_schedule_jumps(schedule: str) -> None:
    """A jump keeps its height however many steps there are; a slope does not."""
    jumps = [abs(b - a) for a, b in itertools.pairwise(rates(20_000, schedule=schedule))]
    assert max(jumps) < 1e-3


def test_sgdr_jumps_up_where_a_cycle_begins_and_nowhere_else() -> None:
    all_rates = rates(20_000, schedule="sgdr", cycles=4, cycle_mult=1.5)
    jumps = [b - a for a, b in itertools.pairwise(all_rates) if abs(b - a) > 1e-2]
    assert jumps == pytest.approx([0.4] * 3, rel=1e-3)


def test_an_exponential_to_nothing_is_refused_in_config_and_recipe() -> None:
    for kind in (OptimConfig, TrainTable):
        with pytest.raises(ConfigError, match="never reaches 0"):
            validate(kind, {"schedule": "exponential", "min_lr": 0.0}, "test")


def test_the_recipes_schedules_are_read_without_torch() -> None:
    code = "import sys, oriole.train.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
