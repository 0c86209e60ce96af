"""The engine against the model run without cache or batch: whatever the schedule, every request gets its own ids."""

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oriole.errors import ModelError
from oriole.infer import engine as engine_module
from oriole.infer.engine import Engine, Event
from oriole.infer.sample import Sampling
from oriole.model.lm import LM

Reference = Callable[[LM, Sequence[int], int], list[int]]
NEVER: tuple[int, ...] = ()


def greedy(n: int, stop_ids: tuple[int, ...] = NEVER) -> Sampling:
    return Sampling(max_new_tokens=n, temperature=0.0, stop_ids=stop_ids)


def prompts_of(lengths: Sequence[int], seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(97) for _ in range(n)] for n in lengths]


def drain(engine: Engine, into: dict[int, list[int]]) -> list[Event]:
    """Step until nothing is left; ids by request, and the last events."""
    last = []
    while engine:
        for event in engine.step():
            if event.finish != "stop":
                into.setdefault(event.request, []).append(event.token)
            if event.finish:
                last.append(event)
    return last


@pytest.mark.parametrize("max_batch", [1, 2, 3, 8])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "grouped"])
def test_batched_equals_single_equals_uncached(
    make_lm: Callable[..., LM], greedy_reference: Reference, max_batch: int, num_kv_heads: int, backend: str
) -> None:
    model = make_lm(num_kv_heads=num_kv_heads)
    prompts = prompts_of([1, 17, 5, 30, 2, 9, 9])
    want = [greedy_reference(model, p, 12) for p in prompts]
    assert len({tuple(w) for w in want}) == len(prompts) and len(set(want[3])) > 4, "the model must be worth testing"
    model.backend = backend
    assert Engine(model, max_batch=max_batch).run([(p, greedy(12)) for p in prompts]) == want
    assert [Engine(model).run([(p, greedy(12))])[0] for p in prompts] == want


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_any_schedule_of_joins_and_cancellations_gives_the_same_ids(
    lm: LM, greedy_reference: Reference, seed: int
) -> None:
    rng = random.Random(seed)
    engine = Engine(lm, max_batch=rng.randint(1, 4))
    prompts = prompts_of([rng.randint(1, 25) for _ in range(8)], seed)
    wanted = {}
    got: dict[int, list[int]] = {}
    cancelled = set()
    queue = list(prompts)
    while queue or engine:
        if queue and rng.random() < 0.4:
            prompt = queue.pop()
            n = rng.randint(1, 9)
            request = engine.submit(prompt, greedy(n))
            wanted[request] = (prompt, n)
        if wanted and rng.random() < 0.1:
            cancelled.add(victim := rng.choice(sorted(wanted)))
            engine.cancel(victim)
        for event in engine.step():
            assert event.request not in cancelled or len(got[event.request]) == wanted[event.request][1]
            got.setdefault(event.request, []).append(event.token)
    for request, (prompt, n) in wanted.items():
        want = greedy_reference(lm, prompt, n)
        ids = got.get(request, [])
        assert ids == (want[: len(ids)] if request in cancelled else want)


def test_a_row_that_moves_up_keeps_its_cache(lm: LM, greedy_reference: Reference) -> None:
    prompts = prompts_of([6, 20, 11])
    engine = Engine(lm, max_batch=3)
    requests = [engine.submit(p, greedy(n)) for p, n in zip(prompts, (2, 4, 12), strict=True)]
    got: dict[int, list[int]] = {}
    drain(engine, got)
    for request, prompt, n in zip(requests, prompts, (2, 4, 12), strict=True):
        assert got[request] == greedy_reference(lm, prompt, n)


def test_stop_id_ends_a_request_and_is_left_out_by_run(lm: LM, greedy_reference: Reference) -> None:
    [prompt] = prompts_of([8])
    free = greedy_reference(lm, prompt, 12)
    stop = free[5]
    sampling = greedy(12, stop_ids=(stop,))
    assert Engine(lm).run([(prompt, sampling)]) == [free[: free.index(stop)]]
    engine = Engine(lm)
    engine.submit(prompt, sampling)
    [last] = drain(engine, {})
    assert last == Event(0, stop, "stop") and not engine


def test_a_long_request_ends_at_the_context(lm: LM, greedy_reference: Reference) -> None:
    [prompt] = prompts_of([60])
    assert Engine(lm).run([(prompt, greedy(500))]) == [greedy_reference(lm, prompt, 4)]
    assert Engine(lm, context=62).run([(prompt, greedy(500))]) == [greedy_reference(lm, prompt, 2)]
    [done] = Engine(lm).complete([(prompt, greedy(500))])
    assert done.finish == "length"


def test_prompts_that_cannot_be_used_are_refused_by_name(lm: LM) -> None:
    engine = Engine(lm)
    with pytest.raises(ModelError, match=r"prompt has 64 tokens, the model's context is 64; shorten it or clear"):
        engine.submit([1] * 64, greedy(1))
    with pytest.raises(ModelError, match="prompt is empty"):
        engine.submit([], greedy(1))
    with pytest.raises(ModelError, match="outside the vocabulary of 97"):
        engine.submit([97], greedy(1))
    assert not engine and engine.step() == []


def test_ids_beyond_the_tokenizer_never_come(lm: LM) -> None:
    prompts = [[i % 20 for i in p] for p in prompts_of([5, 9, 12])]
    assert max(max(ids) for ids in Engine(lm).run([(p, greedy(20)) for p in prompts])) >= 20
    assert max(max(ids) for ids in Engine(lm, vocab_size=20).run([(p, greedy(20)) for p in prompts])) < 20


def test_prefill_is_cut_into_bounded_pieces(
    lm: LM, greedy_reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 40)
    prompts = prompts_of([30, 15, 15, 8, 50])
    want = [greedy_reference(lm, p, 5) for p in prompts]
    engine = Engine(lm, max_batch=8)
    for p in prompts:
        engine.submit(p, greedy(5))
    assert len(engine.step()) == 1  # 30 + 15 would be padded to 60
    assert len(engine.step()) == 2
    assert Engine(lm, max_batch=8).run([(p, greedy(5)) for p in prompts]) == want


def test_the_cache_grows_without_losing_what_it_holds(make_lm: Callable[..., LM], greedy_reference: Reference) -> None:
    model = make_lm(context=300)
    short, long = prompts_of([3, 150])
    engine = Engine(model, max_batch=5)
    first = engine.submit(short, greedy(40))
    got: dict[int, list[int]] = {}
    for _ in range(10):
        for event in engine.step():
            got.setdefault(event.request, []).append(event.token)
    others = [engine.submit(long, greedy(8)) for _ in range(3)]
    drain(engine, got)
    assert got[first] == greedy_reference(model, short, 40)
    assert all(got[o] == greedy_reference(model, long, 8) for o in others)


def test_a_seed_gives_the_same_ids_alone_and_in_a_batch(lm: LM) -> None:
    prompts = prompts_of([4, 12, 7, 7])
    requests = [(p, Sampling(max_new_tokens=15, seed=i, stop_ids=NEVER)) for i, p in enumerate(prompts)]
    together = Engine(lm, max_batch=4).run(requests)
    assert [Engine(lm).run([r])[0] for r in requests] == together
    assert Engine(lm, max_batch=2).run(list(reversed(requests)))[::-1] == together
    other = [(p, Sampling(max_new_tokens=15, seed=i + 50, stop_ids=NEVER)) for i, p in enumerate(prompts)]
    assert Engine(lm, max_batch=4).run(other) != together


def test_without_a_seed_answers_differ(lm: LM) -> None:
    [prompt] = prompts_of([5])
    sampling = Sampling(max_new_tokens=20, temperature=1.5, top_k=0, top_p=1.0, stop_ids=NEVER)
    assert len({tuple(ids) for ids in Engine(lm, max_batch=4).run([(prompt, sampling)] * 4)}) == 4


def test_history_settings_see_prompt_and_answer(lm: LM) -> None:
    [prompt] = prompts_of([10])
    sampling = Sampling(max_new_tokens=40, temperature=0.0, no_repeat_ngram=2, stop_ids=NEVER)
    ids = prompt + Engine(lm).run([(prompt, sampling)])[0]
    pairs = list(itertools.pairwise(ids))
    generated = pairs[len(prompt) - 1 :]
    assert len(set(generated)) == len(generated) and not set(generated) & set(pairs[: len(prompt) - 1])


def test_a_constraint_decides_what_may_come(lm: LM) -> None:
    def even_then_odd(new: Sequence[int]) -> torch.Tensor:
        return torch.arange(97) % 2 == len(new) % 2

    engine = Engine(lm, max_batch=2)
    bound = engine.submit([5, 6, 7], greedy(9), even_then_odd)
    free = engine.submit([5, 6, 7], greedy(9))
    got: dict[int, list[int]] = {}
    drain(engine, got)
    assert [i % 2 for i in got[bound]] == [n % 2 for n in range(9)]
    assert [[got[free]]] == [Engine(lm).run([([5, 6, 7], greedy(9))])]


def test_dropout_is_off_while_generating_and_the_mode_is_kept(make_lm: Callable[..., LM]) -> None:
    model = make_lm()
    request = ([1, 2, 3], greedy(10))
    want = Engine(model).run([request])
    model.set_dropout(0.5)
    model.train()
    assert Engine(model).run([request]) == want and model.training


def test_bfloat16_runs_and_mostly_agrees(make_lm: Callable[..., LM]) -> None:
    prompts = prompts_of([4, 20, 11, 33])
    first = [ids[0] for ids in Engine(make_lm()).run([(p, greedy(10)) for p in prompts])]
    half = Engine(make_lm().to(torch.bfloat16)).run([(p, greedy(10)) for p in prompts])
    assert sum(a == ids[0] for a, ids in zip(first, half, strict=True)) >= 3  # where no two logits are close
    assert all(len(ids) == 10 for ids in half)


def test_leaving_complete_early_frees_the_rows(lm: LM) -> None:
    engine = Engine(lm, max_batch=2)
    results = engine.complete([([i], greedy(3 + i)) for i in range(6)])
    next(results)
    assert engine
    results.close()
    assert not engine
