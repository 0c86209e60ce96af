"""Rollouts: the engine's answers as batches of the loop, the same for the same seed, saved and taken up anywhere."""

import json
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_rl import Toy, batches, letters, policy, questions, tokenizer, trainer
from toy_training import digest

from oriole.errors import DataError, Interrupted
from oriole.infer.sample import Sampling
from oriole.train.batch import IGNORE, Batch
from oriole.train.objectives import Loss
from oriole.train.prompts import PromptStream
from oriole.train.rewards import Answer
from oriole.train.rollout import STOP, generate, pack

METHODS = ["ppo", "grpo", "rloo"]


def same(one: Batch, other: Batch) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- what a batch holds ----------------------------------------------------------------------------------------------


def test_every_token_of_every_answer_is_trained_once_and_nothing_else() -> None:
    toy = Toy("ppo", prompts=12, batch_size=4, epochs=1)
    made = batches(toy, 3)
    rollout = toy.rollouts.rollout
    assert rollout is not None
    left = [[*question.ids, *one.ids] for question, one in zip(rollout.questions, rollout.written, strict=True)]
    for batch in made:
        for row in range(len(batch.tokens)):
            for number in batch.doc[row].unique().tolist():
                here = batch.doc[row] == number
                if number < 0:
                    assert (batch.targets[row][here] == IGNORE).all()
                    continue
                tokens, targets = batch.tokens[row][here], batch.targets[row][here]
                assert batch.pos[row][here].tolist() == list(range(len(tokens)))
                answer = targets[targets != IGNORE].tolist()
                whole = [*tokens[: len(tokens) - len(answer) + 1].tolist(), *answer]
                assert targets.tolist() == [IGNORE] * (len(tokens) - len(answer)) + answer
                assert tokens.tolist() == whole[:-1]
                left.remove(whole)  # ValueError for a document that is none, or comes twice
    assert left == []


def test_columns_stand_at_the_tokens_they_belong_to() -> None:
    toy = Toy("ppo", prompts=8, batch_size=8, epochs=1)
    (batch,) = batches(toy, 1)
    rollout = toy.rollouts.rollout
    assert rollout is not None
    _, place = pack(rollout, range(8), 48)
    at = place[place >= 0]
    for name, column in batch.extra.items():
        assert torch.equal(column[place >= 0], rollout.columns[name].flatten()[at])
        assert not column[place < 0].any()
    ids = torch.zeros(rollout.shape, dtype=torch.int64)
    for row, one in enumerate(rollout.written):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
    assert torch.equal(batch.targets[place >= 0], ids.flatten()[at])


def test_old_log_probs_are_those_of_each_conversation_alone() -> None:
    toy = Toy("ppo", prompts=8, batch_size=4, epochs=1, temperature=0.7)
    batches(toy, 1)
    rollout = toy.rollouts.rollout
    assert rollout is not None
    for row, (question, one) in enumerate(zip(rollout.questions, rollout.written, strict=True)):
        ids = torch.tensor([[*question.ids, *one.ids]])
        with torch.no_grad():
            logits = toy.policy.head("logits", toy.policy(ids).h) / 0.7
        log_probs = logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        ours = rollout.columns["old_log_probs"][row, : len(one.ids)]
        torch.testing.assert_close(ours, log_probs[len(question.ids) - 1 :], atol=1e-5, rtol=1e-5)


def test_answers_end_at_the_first_end_mark_or_the_limit() -> None:
    asked, stop = [q.ids for q in questions()], tuple(range(20))
    how = [Sampling(max_new_tokens=12, temperature=3.0, top_k=0, top_p=1.0, stop_ids=stop, seed=i) for i in range(12)]
    written = generate(policy(), asked, how, max_batch=5, vocab_size=280)
    for one in written:
        assert one.ended == (one.ids[-1] in stop) and not set(one.ids[:-1]) & set(stop)
        assert one.ended or len(one.ids) == 12
    assert any(one.ended for one in written) and any(not one.ended for one in written)
    for ids, one, together in zip(asked, how, written, strict=True):
        assert generate(policy(), [ids], [one], max_batch=1, vocab_size=280) == [together]


# --- the ratio -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_ratio_is_exactly_1_until_the_first_update(method: str, dtype: torch.dtype) -> None:
    toy = Toy(method, dtype=dtype, temperature=0.9, prompts=8)
    toy.model.train()
    count = toy.rollouts.micro_batches
    assert count >= 2
    for batch in batches(toy, count):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = toy.objective(toy.model, batch)
        weight = toy.objective.weight(batch)
        name = "val/ratio" if method == "ppo" else "ratio"
        assert float(loss.metrics[name] / weight) == 1.0
        if method == "ppo":
            assert float(loss.metrics["val/ratio_var"]) == float(loss.metrics["policy/approxkl_avg"]) == 0.0


def test_the_ratio_moves_with_the_policy() -> None:
    toy = Toy("ppo")
    batch = next(toy.rollouts)
    with torch.no_grad():
        toy.policy.norm.weight.mul_(1.1)
    metrics = toy.objective(toy.model, batch).metrics
    assert metrics["val/ratio_var"] > 0 and metrics["policy/approxkl_avg"] > 0


# --- determinism -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_batches_and_another_seed_others(method: str) -> None:
    one, two, other = Toy(method), Toy(method), Toy(method, seed=8)
    torch.manual_seed(99)  # global random numbers play no part
    mine = batches(one, 7)
    torch.manual_seed(3)
    assert all(same(a, b) for a, b in zip(mine, batches(two, 7), strict=True))
    assert not any(same(a, b) for a, b in zip(mine, batches(other, 7), strict=True))


def test_later_epochs_hold_the_same_answers_in_another_order() -> None:
    toy = Toy("ppo", prompts=12, batch_size=4, epochs=3)
    epochs = [batches(toy, 3) for _ in range(3)]

    def documents(made: Sequence[Batch]) -> list[list[int]]:
        """Targets and advantages of every answer, in the order in which they come."""
        out = []
        for batch in made:
            for row in range(len(batch.tokens)):
                for number in range(int(batch.doc[row].max()) + 1):
                    here = (batch.doc[row] == number) & (batch.targets[row] != IGNORE)
                    out.append(batch.targets[row][here].tolist() + batch.extra["advantages"][row][here].tolist())
        return out

    orders = [documents(made) for made in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2]
    assert toy.rollouts.gauges["episode"] == 12
    batches(toy, 1)
    assert toy.rollouts.gauges["episode"] == 24


def test_the_stream_gives_parts_by_weight_and_every_prompt_once_a_pass() -> None:
    stream = PromptStream({"zh": questions(12), "en": questions(6)}, {"zh": 2.0, "en": 1.0}, 3)
    given = [next(stream) for _ in range(18)]
    assert sorted(given) == sorted([("zh", i) for i in range(12)] + [("en", i) for i in range(6)])
    assert sum(name == "zh" for name, _ in given[:9]) == 6
    again = PromptStream({"zh": questions(12), "en": questions(6)}, {"zh": 2.0, "en": 1.0}, 3)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    following = [next(stream) for _ in range(18)]
    assert following == [next(again) for _ in range(18)] and following != given


# --- saving and going on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("done", [0, 1, 2, 3, 5])
def test_a_state_taken_anywhere_goes_on_with_the_same_batches(method: str, done: int) -> None:
    toy, fresh = Toy(method, epochs=2, prompts=8), Toy(method, epochs=2, prompts=8)
    batches(toy, done)
    fresh.rollouts.load_state_dict(json.loads(json.dumps(toy.rollouts.state_dict())))
    assert all(same(a, b) for a, b in zip(batches(toy, 6), batches(fresh, 6), strict=True))


class StopsInCall:
    """A signal comes during one of the forward passes, counted from 1."""

    def __init__(self, objective: Any, call: int) -> None:
        self.objective, self.left, self.weight = objective, call, objective.weight

    def __call__(self, model: Any, batch: Batch) -> Loss:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        made: Loss = self.objective(model, batch)
        return made


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", [1, 3, 4, 6])  # a rollout has 2 micro-batches, 2 epochs
def test_a_run_that_was_stopped_inside_a_rollouts_epochs_ends_with_the_same_bits(
    tmp_path: Path, method: str, call: int
) -> None:
    table: dict[str, Any] = {"epochs": 2, "prompts": 2 if method != "ppo" else 8}
    if method == "ppo":
        table |= {"kl_target": 0.5, "kl_horizon": 50.0}
    unbroken = Toy(method, **table)
    trainer(unbroken, tmp_path / "a").fit()
    first = Toy(method, **table)
    with pytest.raises(Interrupted, match=f"after step {call} of 10"):
        trainer(first, tmp_path / "b", StopsInCall(first.objective, call)).fit()
    torch.manual_seed(99)
    second = Toy(method, **table)
    trainer(second, tmp_path / "b").fit()
    assert digest(second.model) == digest(unbroken.model) != digest(Toy(method, **table).model)
    assert second.rollouts.state_dict() == {**unbroken.rollouts.state_dict(), "gauges": second.rollouts.gauges}


# --- what is refused or counted --------------------------------------------------------------------------------------


def broken(answers: Sequence[Answer]) -> list[float | None]:
    return [math.nan if i % 4 == 1 else score for i, score in enumerate(letters(answers))]


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_that_is_no_number_is_refused_by_name(method: str) -> None:
    with pytest.raises(DataError, match="the reward 'letters' gave nan for 2 of 8 answers"):
        next(Toy(method, score=broken, prompts=2 if method != "ppo" else 8).rollouts)


@pytest.mark.parametrize("method", METHODS)
def test_or_counted_and_nothing_is_learnt_from_those_answers(method: str) -> None:
    toy = Toy(method, score=broken, skip_bad=True, prompts=2 if method != "ppo" else 8, batch_size=8)
    batch = next(toy.rollouts)
    rollout = toy.rollouts.rollout
    assert rollout is not None and toy.rollouts.gauges["rewards/left_out"] == 2
    _, place = pack(rollout, range(8), 48)
    answer = torch.where(place >= 0, place // rollout.shape[1], -1)
    assert set(answer[batch.targets != IGNORE].tolist()) == {0, 2, 3, 4, 6, 7}
    loss = toy.objective(toy.model, batch)
    assert loss.sum.isfinite() and all(value.isfinite() for value in loss.metrics.values())


def test_a_score_that_does_not_apply_is_no_reward_and_no_fault() -> None:
    def some(answers: Sequence[Answer]) -> list[float | None]:
        return [None if i == 2 else 1.0 for i, _ in enumerate(answers)]

    toy = Toy("ppo", score=some, prompts=4)
    next(toy.rollouts)
    assert toy.rollouts.gauges["rewards/left_out"] == 1 and toy.rollouts.gauges["rewards/letters/mean"] == 1.0


def test_texts_are_the_answers_without_end_marks() -> None:
    toy = Toy("ppo", prompts=12, batch_size=12, new_tokens=20)
    seen: list[Answer] = []

    def keep(answers: Sequence[Answer]) -> list[float | None]:
        seen.extend(answers)
        return letters(answers)

    toy.rollouts.rewards.scores["letters"] = keep, 1.0
    next(toy.rollouts)
    rollout = toy.rollouts.rollout
    assert rollout is not None
    for answer, question, one in zip(seen, rollout.questions, rollout.written, strict=True):
        assert answer.prompt is question.prompt and answer.ended == one.ended
        assert answer.text == tokenizer().decode([i for i in one.ids if i not in STOP])
