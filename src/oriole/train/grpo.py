"""GRPO and RLOO: several answers to each prompt are each other's baseline, so that no value model is needed.

Metrics by TRL's names.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oriole.model.lm import LM
from oriole.text.tokenizer import Tokenizer
from oriole.train import rltask
from oriole.train.advantages import (
    clipped_policy_loss,
    group_advantages,
    group_deviations,
    kl_estimate,
    leave_one_out,
)
from oriole.train.batch import IGNORE, Batch
from oriole.train.objectives import Loss
from oriole.train.recipe import Recipe
from oriole.train.rollout import LEFT_OUT, Forward, Rollout, action_log_probs
from oriole.train.tables import GRPOTable
from oriole.train.task import Task, load_parent, model_for

__all__ = ["GRPOEstimator", "GRPOObjective", "build"]


class GRPOEstimator:
    """One advantage for all tokens of an answer, from the rewards of its group."""

    def __init__(self, reference: LM | None, forward: Forward, table: GRPOTable) -> None:
        """`reference` is the parent, needed where `beta` is not 0."""
        self.reference, self.forward, self.table = reference, forward, table

    def columns(
        self, rollout: Rollout, scores: Tensor, packed: Sequence[tuple[Batch, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """`advantages`, `share` (1 / length of the answer), with `beta` also `ref_log_probs`; and who is left out."""
        table, mask = self.table, rollout.mask
        out: dict[str, Tensor] = {}
        figures: dict[str, float] = {}
        if self.reference is not None:
            self.reference.to(self.forward.device)
            out["ref_log_probs"] = self.forward.log_probs(self.reference, packed, rollout.shape)
        rewards = scores
        if table.method == "rloo" and self.reference is not None:
            log_ratio = kl_estimate(rollout.columns["old_log_probs"], out["ref_log_probs"], "k1")
            divergence = torch.where(mask, log_ratio, 0.0).sum(1).double()
            figures["kl"] = float(divergence.mean())
            rewards = scores - table.beta * divergence
        groups = rewards.view(-1, table.group)
        match table.method:
            case "grpo":
                advantages = group_advantages(groups, table.scale_rewards)
            case "rloo":
                advantages = leave_one_out(groups)
        deviations = group_deviations(groups)
        left_out = scores.isnan()
        if table.mask_truncated:
            left_out = left_out | ~rollout.ended
        known = rewards[rewards.isfinite()]
        figures |= {
            "reward": float(known.mean()) if len(known) else 0.0,
            "reward_std": float(known.std()) if len(known) > 1 else 0.0,
            "frac_reward_zero_std": float((deviations < 1e-8).double().mean()),
        }
        wide = torch.ones(rollout.shape)
        out["advantages"] = advantages.view(-1, 1).float() * wide
        out["share"] = wide / mask.sum(1, keepdim=True)
        out[LEFT_OUT] = left_out.float()[:, None] * wide
        return out, figures

    def observe(self, metrics: Mapping[str, Tensor]) -> bool:
        """A rollout is always used to its end."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


class GRPOObjective:
    """The clipped loss of GRPO, by token, or of RLOO, by answer."""

    def __init__(
        self, table: GRPOTable, max_new_tokens: int, temperature: float, gauges: Callable[[], Mapping[str, float]]
    ) -> None:
        """`gauges`: figures of the present rollout, shown beside the step's own."""
        self.table, self.max_new_tokens, self.temperature, self.gauges = table, max_new_tokens, temperature, gauges

    def weight(self, batch: Batch) -> Tensor:
        """Tokens of answers (`loss = "dapo"`) or answers (all others), 0-dim int64."""
        trained = batch.targets != IGNORE
        if self.table.method == "grpo" and self.table.loss == "dapo":
            return trained.sum()
        # Between two answers of a row stands the question of the second.
        return trained.sum() - (trained[:, 1:] & trained[:, :-1]).sum()

    def __call__(self, model: LM, batch: Batch) -> Loss:
        table, count = self.table, len(batch.rows)
        old_log_probs, advantages, share = (
            batch.extra[name].flatten()[batch.rows] for name in ("old_log_probs", "advantages", "share")
        )
        log_probs, entropy, aux = action_log_probs(model, batch, self.temperature)
        log_ratio = log_probs - old_log_probs
        clip_high = table.clip if table.clip_high is None else table.clip_high
        weight = self.weight(batch)
        # What is a mean over tokens in the log, whatever the loss is divided by.
        per_token = weight / max(1, count)
        metrics: dict[str, Tensor] = {"entropy": entropy.detach().sum() * per_token}
        match table.method:
            case "rloo":
                # Room for as many answers as tokens, since asking the device for their number would wait for it.
                numbers = _answers(batch)
                total = torch.zeros_like(log_ratio).index_add(0, numbers, log_ratio)
                own = torch.zeros_like(log_ratio).index_copy(0, numbers, advantages.to(log_ratio.dtype))
                clipped = clipped_policy_loss(total, own, clip=table.clip, clip_high=clip_high)
                loss = clipped.loss.sum()
                clips, ratio = (torch.arange(count, device=total.device) < weight).float(), total
            case "grpo":
                clipped = clipped_policy_loss(log_ratio, advantages, clip=table.clip, clip_high=clip_high)
                per_position = clipped.loss
                if table.beta > 0:
                    reference = batch.extra["ref_log_probs"].flatten()[batch.rows]
                    # Times the ratio its gradient is that of the KL itself (DeepSeek-V3.2, arXiv:2512.02556, 3.1).
                    kl = log_ratio.exp() * kl_estimate(log_probs, reference, "k3")
                    per_position = per_position + table.beta * kl
                    metrics["kl"] = kl.detach().sum() * per_token
                match table.loss:
                    case "dapo":
                        loss = per_position.sum()
                    case "grpo":
                        loss = (per_position * share).sum()
                    case "dr_grpo":
                        loss = per_position.sum() / self.max_new_tokens
                clips, ratio = per_token.expand(count), log_ratio
        metrics |= {
            "clip_ratio/low_mean": (clipped.low * clips).sum(),
            "clip_ratio/high_mean": (clipped.high * clips).sum(),
            "clip_ratio/region_mean": ((clipped.low | clipped.high) * clips).sum(),
            "ratio": (ratio.detach().exp() * clips).sum(),
        }
        loss = loss + aux * weight
        metrics |= {name: weight * torch.full_like(loss.detach(), one) for name, one in self.gauges().items()}
        return Loss(loss, metrics)


def _answers(batch: Batch) -> Tensor:
    """The number of the answer that each target of the batch belongs to (n,), counted from 0."""
    trained = batch.targets != IGNORE
    begins = trained.clone()
    begins[:, 1:] &= ~trained[:, :-1]
    return begins.flatten().cumsum(0)[batch.rows] - 1


def build(recipe: Recipe, tokenizer: Tokenizer, init: Path | None) -> Task:
    """The stage: the policy starts from `init`, which stays the reference where `beta` asks for one."""
    table, parent = recipe.grpo, rltask.parent(recipe, init)
    policy = model_for(recipe, tokenizer, parent)
    reference = load_parent(parent).requires_grad_(False) if table.beta > 0 else None
    rollout = recipe.rollout
    return rltask.task(
        recipe,
        tokenizer,
        parent,
        policy,
        policy,
        estimator=lambda forward: GRPOEstimator(reference, forward, table),
        objective=lambda rollouts: GRPOObjective(
            table, rollout.max_new_tokens, rollout.temperature, lambda: rollouts.gauges
        ),
        samples=table.group,
        epochs=table.epochs,
    )
