"""GRPO and RLOO: losses equal slow ones, groups are each other's baseline, and a toy reward rises."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_rl import Toy, trainer

from oriole.train import rollout
from oriole.train.batch import Batch
from oriole.train.rewards import Answer


def answers_of(batch: Batch, model: Any, temperature: float) -> list[dict[str, Tensor]]:
    """Log-probabilities and columns (n,) of every answer, each conversation run alone."""
    out = []
    for row in range(len(batch.tokens)):
        for number in range(int(batch.doc[row].max()) + 1):
            here = batch.doc[row] == number
            ids, targets = batch.tokens[row][here][None], batch.targets[row][here]
            log_p = (model.head("logits", model(ids).h) / temperature).log_softmax(-1)[0]
            at = targets >= 0
            if not at.any():
                continue
            columns = {name: column[row][here][at].double() for name, column in batch.extra.items()}
            out.append({"log_probs": log_p[at].gather(-1, targets[at, None])[:, 0], **columns})
    return out


@pytest.mark.parametrize(
    "table",
    [
        {"loss": "dapo"},
        {"loss": "grpo", "clip_high": 0.15},
        {"loss": "dr_grpo", "scale_rewards": "none"},
        {"loss": "grpo", "scale_rewards": "batch", "mask_truncated": True},
        {"loss": "dapo", "beta": 0.2},
        {"method": "rloo", "beta": 0.1},
    ],
    ids=str,
)
def test_the_loss_equals_one_written_out_token_by_token_in_fp64(
    monkeypatch: pytest.MonkeyPatch, table: dict[str, Any]
) -> None:
    monkeypatch.setattr(rollout, "STOP", tuple(range(40)))  # so that some answers end
    how = {"method": "grpo", "temperature": 0.8, "clip": 0.1} | table
    toy = Toy(prompts=3, batch_size=12, new_tokens=8, **how)
    with torch.no_grad():  # away from the reference
        toy.policy.norm.weight.mul_(1.3)
    batch = next(toy.rollouts)
    model = toy.policy.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    made = toy.objective(model, batch)
    answers = answers_of(batch, model, 0.8)
    high = 1 + table.get("clip_high", 0.1)
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for one in answers:
        if how["method"] == "rloo":
            r, a = (one["log_probs"] - one["old_log_probs"]).sum().exp(), one["advantages"][0]
            total = total - torch.min(r * a, r.clamp(0.9, high) * a)
            continue
        own = torch.zeros((), dtype=torch.float64)
        for t in range(len(one["log_probs"])):
            r, a = (one["log_probs"][t] - one["old_log_probs"][t]).exp(), one["advantages"][t]
            own = own - torch.min(r * a, r.clamp(0.9, high) * a)
            if beta := table.get("beta"):
                d = one["ref_log_probs"][t] - one["log_probs"][t]
                own = own + beta * r * (d.exp() - d - 1)
        tokens += len(one["log_probs"])
        total = total + own / {"dapo": 1, "grpo": len(one["log_probs"]), "dr_grpo": 8}[table["loss"]]
    weight = toy.objective.weight(batch)
    assert weight == (tokens if table.get("loss") == "dapo" else len(answers))
    assert float(made.sum.detach()) == pytest.approx(float(total.detach()), rel=1e-6)
    parameters = list(model.parameters())
    for ours, slow in zip(
        torch.autograd.grad(made.sum, parameters), torch.autograd.grad(total, parameters), strict=True
    ):
        torch.testing.assert_close(ours, slow, rtol=1e-6, atol=1e-7)


def test_nothing_is_learnt_from_answers_that_were_cut_off_when_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "STOP", tuple(range(40)))
    toy = Toy("grpo", prompts=3, batch_size=12, new_tokens=8, mask_truncated=True)
    batch = next(toy.rollouts)
    made = toy.rollouts.rollout
    assert made is not None and 0 < int(made.ended.sum()) < 12
    assert toy.objective.weight(batch) == made.mask[made.ended].sum()


def test_a_group_whose_answers_are_worth_the_same_teaches_nothing_and_is_counted() -> None:
    def some(answers: Sequence[Answer]) -> list[float | None]:
        return [1.0 if i < 4 else float(i % 2) for i, _ in enumerate(answers)]

    toy = Toy("grpo", score=some, prompts=2, batch_size=8)
    next(toy.rollouts)
    made, gauges = toy.rollouts.rollout, toy.rollouts.gauges
    assert made is not None
    assert not made.columns["advantages"][:4].any() and made.columns["advantages"][4:].all()
    assert gauges["frac_reward_zero_std"] == 0.5
    assert gauges["reward"] == pytest.approx(0.75)
    assert gauges["reward_std"] == pytest.approx(torch.tensor([1.0] * 4 + [0.0, 1.0] * 2).std().item())


def test_answers_to_one_prompt_are_a_group() -> None:
    toy = Toy("grpo", prompts=3, batch_size=12)
    next(toy.rollouts)
    made = toy.rollouts.rollout
    assert made is not None
    for group in range(3):
        assert len({id(q) for q in made.questions[4 * group : 4 * group + 4]}) == 1
        assert float(made.columns["advantages"][4 * group : 4 * group + 4, 0].sum()) == pytest.approx(0, abs=1e-5)
    assert len({tuple(one.ids) for one in made.written}) > 6  # each drawn by itself


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_every_metric_has_trls_name(method: str) -> None:
    toy = Toy(method, beta=0.1)
    batch = next(toy.rollouts)
    metrics = toy.objective(toy.model, batch).metrics
    assert set(metrics) >= {
        "completions/mean_length", "completions/min_length", "completions/max_length",
        "completions/mean_terminated_length", "completions/min_terminated_length",
        "completions/max_terminated_length", "completions/clipped_ratio", "rewards/letters/mean",
        "rewards/letters/std", "reward", "reward_std", "frac_reward_zero_std", "entropy", "kl",
        "clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean", "num_tokens", "step_time",
    }  # fmt: skip


@pytest.mark.parametrize(
    "table", [{"method": "grpo"}, {"method": "grpo", "loss": "dr_grpo", "scale_rewards": "none"}, {"method": "rloo"}]
)
def test_a_toy_reward_rises(tmp_path: Path, table: dict[str, Any]) -> None:
    toy = Toy(prompts=8, batch_size=32, beta=0.005, **table)
    made = trainer(toy, tmp_path, steps=30, log_every=3, kind="adamw", lr=1e-2)
    made.fit()
    rewards = [r["reward"] for r in made.metrics.of("step")]  # type: ignore[attr-defined]
    assert rewards[0] < 0.4 and rewards[-1] > 0.8
