"""Each step of sampling against a slow reference that is plain to see, then all of them together."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oriole.errors import ConfigError
from oriole.infer.sample import (
    Sampling,
    allow,
    draw,
    min_p,
    no_repeat_ngram,
    repeated_ngram_ids,
    repetition_penalty,
    sample,
    top_k,
    top_p,
)

V = 12
scores = st.lists(st.floats(-8, 8, width=32), min_size=V, max_size=V, unique=True)
coarse = st.lists(st.integers(-60, 60).map(lambda i: i / 8), min_size=V, max_size=V)  # ties, as 16-bit logits have them
histories = st.lists(st.integers(0, V - 1), min_size=1, max_size=30)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept(logits: torch.Tensor) -> set[int]:
    return {i for i, x in enumerate(logits.tolist()) if x > -math.inf}


def softmax(row: list[float]) -> list[float]:
    weights = [math.exp(x - max(row)) for x in row]
    return [w / sum(weights) for w in weights]


@given(scores, histories, st.floats(1.0, 3.0))
def test_repetition_penalty_never_rewards(row: list[float], history: list[int], penalty: float) -> None:
    seen = torch.zeros(V, dtype=torch.bool)
    seen[history] = True
    out = repetition_penalty(torch.tensor(row), seen, penalty).tolist()
    for i, x in enumerate(row):
        want = x if i not in history else x / penalty if x > 0 else x * penalty
        assert out[i] == pytest.approx(want, rel=1e-5)
        assert out[i] <= x + 1e-6, "an id of the history became likelier"


@given(histories, st.integers(1, 5))
def test_ngram_block_matches_reference(history: list[int], n: int) -> None:
    seen = [tuple(history[i : i + n]) for i in range(len(history) - n + 1)]
    want = {i for i in range(V) if (*history[len(history) - n + 1 :], i) in seen and len(history) >= n}
    assert repeated_ngram_ids(history, n) == sorted(want)


@given(histories, st.integers(1, 4), st.sets(st.integers(0, V - 1)))
def test_ngram_block_keeps_what_it_must(history: list[int], n: int, keep: set[int]) -> None:
    logits = torch.linspace(-1, 1, V)
    banned = set(repeated_ngram_ids(history, n)) - keep
    want = set(range(V)) - banned or set(range(V))
    assert kept(no_repeat_ngram(logits, history, n, sorted(keep))) == want


@given(coarse, st.integers(0, V + 3))
def test_top_k_keeps_the_lower_of_tied_ids(row: list[float], k: int) -> None:
    want = sorted(range(V), key=lambda i: -row[i])[: k or V]
    assert kept(top_k(torch.tensor(row), k)) == set(want)


@given(scores, st.floats(0.001, 1.0))
def test_top_p_keeps_the_fewest_that_reach_p_and_at_least_one(row: list[float], p: float) -> None:
    probs = softmax(row)
    order = sorted(range(V), key=lambda i: -row[i])
    reached = [sum(probs[i] for i in order[: n + 1]) for n in range(V)]
    got = kept(top_p(torch.tensor(row), p))
    assert got == set(order[: len(got)]) and got
    if min(abs(r - p) for r in reached) > 1e-5:  # elsewhere rounding decides
        assert len(got) == 1 + sum(r < p for r in reached)


def test_top_p_one_is_off_and_a_certain_id_stays_alone() -> None:
    row = torch.tensor([0.0, -50.0, -90.0])
    assert kept(top_p(row, 1.0)) == {0, 1, 2}
    assert kept(top_p(row, 1e-9)) == {0}


@given(scores, st.floats(0.0, 1.0))
def test_min_p(row: list[float], p: float) -> None:
    probs = softmax(row)
    got = kept(min_p(torch.tensor(row), p))
    for i in range(V):
        if abs(probs[i] - p * max(probs)) > 1e-5:
            assert (i in got) == (probs[i] > p * max(probs))
    assert row.index(max(row)) in got


def test_settings_of_different_rows_do_not_mix() -> None:
    logits = torch.randn(4, V, generator=generator())
    ks, ps = torch.tensor([[1], [3], [0], [5]]), torch.tensor([[0.2], [0.5], [0.9], [1.0]])
    for b in range(4):
        assert torch.equal(top_k(logits, ks)[b], top_k(logits[b], int(ks[b])))
        assert torch.equal(top_p(logits, ps)[b], top_p(logits[b], float(ps[b])))
        assert torch.equal(min_p(logits, ps)[b], min_p(logits[b], float(ps[b])))


def test_draw_follows_the_cumulative_probability() -> None:
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25]).log()
    at = torch.tensor([0.0, 0.4999, 0.5001, 0.7499, 0.7501, 0.999999999], dtype=torch.float64)
    assert draw(logits.expand(6, 4), at).tolist() == [0, 0, 2, 2, 3, 3]


@given(scores, st.sets(st.integers(0, V - 1), min_size=1), st.floats(0, 1, exclude_max=True))
def test_draw_never_gives_an_excluded_id(row: list[float], allowed: set[int], at: float) -> None:
    mask = torch.zeros(V, dtype=torch.bool)
    mask[list(allowed)] = True
    uniform = torch.tensor(at, dtype=torch.float64)
    assert int(draw(allow(torch.tensor(row), mask), uniform)) in allowed


settings_of_a_row = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.integers(0, V + 2),
    top_p=st.sampled_from([0.1, 0.47, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.13, 0.91]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    no_repeat_ngram=st.integers(0, 3),
    seed=st.integers(0, 99),
)


@settings(max_examples=150)
@given(st.lists(st.tuples(coarse, histories, settings_of_a_row), min_size=1, max_size=5))
def test_a_row_alone_equals_a_row_in_a_batch_and_stays_among_the_candidates(
    rows: list[tuple[list[float], list[int], Sampling]],
) -> None:
    logits = torch.tensor([r[0] for r in rows])
    samplings = [r[2] for r in rows]
    together = sample(logits, samplings, [r[1] for r in rows], [generator(s.seed or 0) for s in samplings])
    for b, (_, history, s) in enumerate(rows):
        alone = sample(logits[b : b + 1], [s], [history], [generator(s.seed or 0)])
        assert int(alone) == int(together[b])
        assert int(alone) in _candidates(logits[b], history, s)


def _candidates(row: torch.Tensor, history: list[int], s: Sampling) -> set[int]:
    """The ids the documented order of steps leaves, one pure function after the other."""
    seen = torch.zeros(V, dtype=torch.bool)
    seen[history] = True
    seen[list(s.stop_ids)] = False
    row = repetition_penalty(row, seen, s.repetition_penalty)
    row = no_repeat_ngram(row, history, s.no_repeat_ngram, s.stop_ids)
    if s.temperature == 0:
        return {int(row.argmax())}
    row = top_k(row, s.top_k) / s.temperature
    return kept(min_p(top_p(row, s.top_p), s.min_p))


def test_distribution_of_draws() -> None:
    """10,000 draws against the exact probabilities: chi-square with 3 degrees of freedom, 99.9 % quantile 16.27."""
    probs = [0.5, 0.3, 0.15, 0.05]
    n = 10_000
    s = Sampling(temperature=1.0, top_k=0, top_p=1.0)
    logits = torch.tensor(probs).log().expand(n, 4)
    one = generator(5)
    counts = Counter(sample(logits, [s] * n, [[0]] * n, [one] * n).tolist())
    assert sum((counts[i] - n * p) ** 2 / (n * p) for i, p in enumerate(probs)) < 16.27


def test_temperature_sharpens() -> None:
    logits = torch.tensor([1.0, 0.0]).expand(4000, 2)

    def share(t: float) -> float:
        s = Sampling(temperature=t, top_k=0, top_p=1.0)
        one = generator(1)
        return float((sample(logits, [s] * 4000, [[0]] * 4000, [one] * 4000) == 0).float().mean())

    for t in (0.5, 1.0, 2.0):
        assert share(t) == pytest.approx(1 / (1 + math.exp(-1 / t)), abs=0.03)
    assert share(1e-300) == 1.0, "a temperature that underflows is greedy, not NaN"


def test_greedy_is_the_argmax_after_penalties() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.5, 0.1]])
    s = Sampling(temperature=0.0, stop_ids=())
    assert int(sample(logits, [s], [[1]], [generator()])) == 1
    s = Sampling(temperature=0.0, repetition_penalty=2.0, stop_ids=())
    assert int(sample(logits, [s], [[1]], [generator()])) == 2
    s = Sampling(temperature=0.0, no_repeat_ngram=2, stop_ids=())
    assert int(sample(logits, [s], [[3, 1, 3]], [generator()])) == 2


def test_the_end_mark_is_never_penalised_or_blocked() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.1]])
    s = Sampling(temperature=0.0, repetition_penalty=5.0, no_repeat_ngram=1, stop_ids=(2,))
    assert int(sample(logits, [s], [[0, 1, 2]], [generator()])) == 2


def test_a_constraint_outranks_everything() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0], [5.0, 1.0, 0.0]])
    only = torch.tensor([False, False, True])
    s = Sampling(temperature=0.0, no_repeat_ngram=1, stop_ids=())
    assert sample(logits, [s, s], [[2], [0]], [generator()] * 2, [only, None]).tolist() == [2, 1]
    with pytest.raises(ValueError, match="row 1 allows no id"):
        sample(logits, [s, s], [[2], [0]], [generator()] * 2, [None, torch.zeros(3, dtype=torch.bool)])


@pytest.mark.parametrize(
    "field, value",
    [("max_new_tokens", 0), ("temperature", -0.1), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0),
     ("top_p", 1.1), ("min_p", 2.0), ("repetition_penalty", 0.0), ("no_repeat_ngram", -1)],
)  # fmt: skip
def test_values_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} = "):
        Sampling(**{field: value})  # type: ignore[arg-type]
