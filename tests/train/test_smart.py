"""The decisions by themselves: numbers in, decisions out."""

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oriole.train.smart import ENOUGH, Smart, SmartConfig, outlying

STATES = st.lists(st.floats(0.5, 12.0), min_size=ENOUGH, max_size=200)


def falling(n: int = 60, seed: int = 0) -> list[float]:
    """The losses of a healthy run: falling, with noise and now and then a hard batch."""
    rng = random.Random(seed)
    return [3 + 4 * math.exp(-i / 20) + rng.gauss(0, 0.05) + (1.0 if i % 25 == 24 else 0.0) for i in range(n)]


def smart(**config: object) -> Smart:
    return Smart(SmartConfig.model_validate(config))


def steps(losses: list[float], start: int = 1) -> list[tuple[int, float]]:
    return list(enumerate(losses, start))


# --- spikes ----------------------------------------------------------------------------------------------------------


def test_a_healthy_run_has_no_spike() -> None:
    for seed in range(20):
        assert smart().spike(steps(falling(400, seed))) is None


@pytest.mark.parametrize("height", [5.0, 40.0, math.inf, math.nan])
def test_losses_that_leave_the_others_are_a_spike_once_they_are_enough_in_a_row(height: float) -> None:
    made = smart()
    assert made.spike(steps(falling(80))) is None
    assert made.spike([(81, 3.0 + height), (82, 3.0 + height)]) is None
    found = made.spike([(83, 3.0 + height), (84, 3.0 + height)])
    assert found is not None and found.first == 81
    assert found.usual == pytest.approx(3.4, abs=0.4)
    assert ("is not finite" if not math.isfinite(height) else f"{3 + height:.3f} instead of 3.") in str(found)


def test_single_hard_batches_are_none_and_do_not_widen_the_window() -> None:
    made = smart(spike_window=ENOUGH)
    made.spike(steps(falling(80)))
    for step in range(100, 140, 2):
        assert made.spike([(step, 9.0), (step + 1, 3.0)]) is None
    assert set(made.watch.window[-20:]) == {3.0} and max(made.watch.window) < 9.0


def test_nothing_is_judged_by_too_few_losses_but_nan_is() -> None:
    assert smart().spike(steps([1.0] * (ENOUGH - 20) + [50.0] * 20)) is None
    assert smart().spike(steps([math.nan] * 3)) is not None


@given(STATES, st.floats(0, 1e3), st.floats(0.1, 10))
def test_outlying_grows_with_the_loss_and_not_with_the_unit(window: list[float], loss: float, unit: float) -> None:
    z = outlying(loss, window)
    assert outlying(loss + 1, window) > z
    assert outlying(loss * unit, [x * unit for x in window]) == pytest.approx(z, rel=1e-6, abs=1e-6)


def test_which_checkpoint_a_spike_goes_back_to() -> None:
    made = smart(rollback=True, max_rollbacks=3)
    made.spike(steps([3.0] * 50))
    spike = made.spike(steps([9.0] * 3, start=51))
    assert spike is not None and spike.first == 51
    state = made.state_dict()
    # The loss of step 51 was measured with the weights of step 50, which may be the cause.
    assert made.go_back_to(spike, [10, 30, 49, 50, 51]) == 49
    assert made.go_back_to(spike, [50, 60]) is None
    made.rolled_back(30, state, 1000)
    assert made.go_back_to(spike, [10, 20, 30]) == 20, "the newest did not help"
    assert made.go_back_to(spike, [30]) == 30, "there is no other"
    made.rolled_back(20, state, 500)
    made.rolled_back(10, state, 500)
    assert made.go_back_to(spike, [1]) is None, "three times were all that was allowed"
    assert made.wasted_tokens == 2000


def test_a_rollback_takes_the_judgements_of_the_branch_back() -> None:
    made = smart(rollback=True, cool=True, early_stop=True)
    made.validated(0, 2.0), made.spike(steps([3.0] * 40))
    state = made.state_dict()
    made.validated(40, 1.0), made.cool(60, "a spike")
    made.rolled_back(40, state, 10)
    assert (made.patience.best, made.patience.step) == (2.0, 0)
    assert made.cooling.spikes == 1 and made.lr_scale(60) == 0.5


# --- the learning rate -----------------------------------------------------------------------------------------------


def test_the_rate_cools_down_and_warms_up_again() -> None:
    made = smart(cool=True, cool_factor=0.5, cool_steps=10)
    assert made.lr_scale(99) == 1.0
    decision = made.cool(100, "why")
    assert (decision.what, decision.numbers) == ("cool", {"lr_scale": 0.5, "back_to": 1.0})
    assert decision.why == "why: learning rate times 0.5, back to 1 within 10 steps"
    assert [made.lr_scale(s) for s in (100, 105, 110, 500)] == [0.5, 0.75, 1.0, 1.0]


def test_a_second_spike_lowers_what_the_rate_comes_back_to() -> None:
    made = smart(cool=True, cool_factor=0.5, cool_steps=10)
    made.cool(100, ""), made.cool(105, "")
    assert [made.lr_scale(s) for s in (105, 110, 115, 500)] == [0.375, 0.4375, 0.5, 0.5]


def test_a_plateau_lowers_the_rate_down_to_the_minimum() -> None:
    made = smart(plateau=True, plateau_patience=2, plateau_factor=0.5, plateau_min=0.3)
    given = [2.0, 1.5, 1.5, 1.4999, 1.6, 1.7, 1.8, 1.9, 1.2]
    scales = []
    for n, bpb in enumerate(given):
        decisions = made.validated(10 * n, bpb)
        assert [d.what for d in decisions] == (["lower_lr"] if n in (3, 5) else [])
        scales.append(made.lr_scale(10 * n))
    assert scales == [1, 1, 1, 0.5, 0.5, 0.3, 0.3, 0.3, 0.3]
    assert not made.stopped


# --- early stopping --------------------------------------------------------------------------------------------------


def test_stops_when_validation_stops_improving() -> None:
    made = smart(early_stop=True, early_stop_patience=3, min_delta=0.01)
    for n, bpb in enumerate([2.0, 1.5, 1.495, math.nan]):
        assert made.validated(n, bpb) == []
    (decision,) = made.validated(4, 1.6)
    assert decision.what == "early_stop" and made.stopped
    assert (
        decision.why == "no evaluation was better than step 1's 1.5000 bits per byte 3 times in a row: the stage ends"
    )
    assert decision.record(4) == {
        "event": "smart", "step": 4, "what": "early_stop", "why": decision.why, "best_step": 1, "best": 1.5, "bpb": 1.6,
    }  # fmt: skip
    assert made.summary(4)["smart"] == {
        "lr_scale": 1.0, "spikes": 0, "rollbacks": 0, "wasted_tokens": 0, "best_step": 1, "stopped_early": True,
    }  # fmt: skip


def test_nothing_is_decided_by_default() -> None:
    made = smart()
    for n in range(50):
        assert made.validated(n, 2.0 + n) == []
    assert not made.stopped and made.summary(50) == {} and made.config.identity() == {}
    assert made.config.watches is made.config.compares is False
    assert smart(micro_batch=True).config.identity() == {}


# --- state -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.randoms(use_true_random=False))
def test_a_restored_state_decides_as_the_first_would_have(cut: int, rng: random.Random) -> None:
    """Whatever the history, after a round trip through JSON the same follows."""
    config = {"plateau": True, "early_stop": True, "cool": True, "rollback": True, "early_stop_patience": 6}
    losses = [rng.choice([3.0, 3.1, 2.9, 3.05, 9.0, math.nan]) if i > 60 else 3 + 0.01 * (i % 7) for i in range(260)]
    bpb = [rng.random() + 1 for _ in losses]

    def live(made: Smart, start: int, end: int) -> list[object]:
        out: list[object] = []
        for step in range(start, end):
            if spike := made.spike([(step + 1, losses[step])]):
                out += [str(spike), made.go_back_to(spike, range(0, step, 10)), made.cool(step + 1, "x")]
                made.stayed()
            if step % 20 == 0:
                out += made.validated(step, bpb[step])
            out.append(made.lr_scale(step))
        return [*out, made.stopped, made.summary(end)]

    unbroken, first = smart(**config), smart(**config)
    live(unbroken, 0, cut), live(first, 0, cut)
    second = smart(**config)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert live(second, cut, 260) == live(unbroken, cut, 260)
