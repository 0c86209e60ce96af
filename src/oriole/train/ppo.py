"""PPO: what rollouts are worth token by token, the clipped losses of policy and value model, and the stage.

As TRL's PPOTrainer had it (removed in September 2026), with its names of metrics, and with Ziegler's adaptive KL
coefficient.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oriole.model.folder import load_reward_model
from oriole.model.lm import LM
from oriole.text.tokenizer import Tokenizer
from oriole.train import rltask
from oriole.train.advantages import (
    adapted,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    kl_estimate,
    masked_mean,
    token_rewards,
    whiten,
)
from oriole.train.batch import IGNORE, Batch
from oriole.train.objectives import Loss
from oriole.train.recipe import Recipe
from oriole.train.rollout import Forward, Rollout, action_log_probs, action_values
from oriole.train.tables import PPOTable
from oriole.train.task import Task, load_parent, model_for

__all__ = ["ActorCritic", "PPOEstimator", "PPOObjective", "build", "value_model"]


class ActorCritic(nn.Module):
    """The policy, and apart from it the model that says what a state is worth: trained together, saved apart."""

    def __init__(self, policy: LM, value: LM) -> None:
        super().__init__()
        self.policy, self.value = policy, value

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """As `LM.fused_rows`, for both."""
        return {f"{name}.{key}": rows for name, part in self._parts() for key, rows in part.fused_rows().items()}

    def sign_steps(self) -> dict[str, float]:
        """As `LM.sign_steps`, for both."""
        return {f"{name}.{key}": step for name, part in self._parts() for key, step in part.sign_steps().items()}

    def _parts(self) -> tuple[tuple[str, LM], ...]:
        return ("policy", self.policy), ("value", self.value)


def value_model(parent: Path, *, rewards: bool) -> LM:
    """A value model from a language model, with a head of zeros, or (`rewards`) from a reward model with its head."""
    source = load_reward_model(parent) if rewards else load_parent(parent)
    model = LM(source.config, heads=("value",))
    model.lm_head = None  # nothing asks for its logits, and a weight without a gradient is no weight to train
    weights = {name: w for name, w in source.state_dict().items() if not name.startswith(("lm_head", "scalar_heads"))}
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        head = model.scalar_heads["value"].get_parameter("weight")
        head.copy_(source.scalar_heads["reward"].get_parameter("weight") if rewards else torch.zeros_like(head))
    for name in model.sign_steps():  # the loss takes the policy's balance only
        model.get_parameter(name).requires_grad_(False)
    return model


# --- what a rollout is worth -----------------------------------------------------------------------------------------


class PPOEstimator:
    """Rewards token by token, values, advantages and returns; and the KL coefficient, which may move."""

    def __init__(self, reference: LM, value: LM, forward: Forward, table: PPOTable) -> None:
        self.reference, self.value, self.forward, self.table = reference, value, forward, table
        self.kl_coef = table.kl_coef

    def columns(
        self, rollout: Rollout, scores: Tensor, packed: Sequence[tuple[Batch, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """`old_values`, `advantages` and `returns`; the figures are TRL's objective/… ."""
        table, known = self.table, scores.isfinite()
        mask = rollout.mask & known[:, None]
        log_probs = rollout.columns["old_log_probs"]
        self.reference.to(self.forward.device)
        ref_log_probs = self.forward.log_probs(self.reference, packed, rollout.shape)
        values = self.forward.values(self.value, packed, rollout.shape)
        scores = torch.where(known, scores, 0.0).float() - table.missing_eos_penalty * ~rollout.ended
        kl = kl_estimate(log_probs, ref_log_probs, table.kl)
        rewards = token_rewards(scores, kl, mask, self.kl_coef)
        if table.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, values, mask, gamma=table.gamma, lam=table.lam)
        count = known.sum().clamp(min=1)

        def per_answer(x: Tensor) -> float:
            return float(torch.where(mask, x, 0.0).sum() / count)

        divergence, mean_score = per_answer(kl), float(scores[known].sum() / count)
        figures = {
            "objective/kl": divergence,
            "objective/entropy": per_answer(-log_probs),
            "objective/non_score_reward": -self.kl_coef * divergence,
            "objective/rlhf_reward": mean_score - self.kl_coef * divergence,
            "objective/scores": mean_score,
            "objective/kl_coef": self.kl_coef,
            "val/num_eos_tokens": float(rollout.ended.sum()),
            "val/explained_variance": _explained(values, returns, mask),
        }
        if table.kl_target is not None:
            self.kl_coef = adapted(self.kl_coef, divergence, table.kl_target, table.kl_horizon, int(count))
        return {"old_values": values, "advantages": whiten(advantages, mask), "returns": returns}, figures

    def observe(self, metrics: Mapping[str, Tensor]) -> bool:
        """Whether the policy has moved so far that the rest of the rollout is to be left."""
        return self.table.stop_kl is not None and float(metrics["policy/approxkl_avg"]) > self.table.stop_kl

    def state_dict(self) -> dict[str, Any]:
        """The coefficient."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with it."""
        self.kl_coef = state["kl_coef"]


def _explained(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 where the value model knows all, 0 where it knows nothing."""
    spread = masked_mean((returns - masked_mean(returns, mask)).square(), mask)
    error = returns - values
    left = masked_mean((error - masked_mean(error, mask)).square(), mask)
    return float(1 - left / spread) if spread > 0 else 0.0


# --- the objective ---------------------------------------------------------------------------------------------------


class PPOObjective:
    """The clipped policy loss and `value_coef` times the clipped value loss, summed over the answers' tokens."""

    def __init__(self, table: PPOTable, temperature: float, gauges: Callable[[], Mapping[str, float]]) -> None:
        """`gauges`: figures of the present rollout, shown beside the step's own."""
        self.table, self.temperature, self.gauges = table, temperature, gauges

    def weight(self, batch: Batch) -> Tensor:
        """Tokens of answers, 0-dim int64."""
        return (batch.targets != IGNORE).sum()

    def __call__(self, model: ActorCritic, batch: Batch) -> Loss:
        table, count = self.table, len(batch.rows)
        old_log_probs, advantages, old_values, returns = (
            batch.extra[name].flatten()[batch.rows] for name in ("old_log_probs", "advantages", "old_values", "returns")
        )
        log_probs, entropy, aux = action_log_probs(model.policy, batch, self.temperature)
        values = action_values(model.value, batch)
        log_ratio = log_probs - old_log_probs
        policy = clipped_policy_loss(log_ratio, advantages, clip=table.clip, clip_high=table.clip)
        value, value_clipped = clipped_value_loss(values, old_values, returns, table.value_clip)
        loss = policy.loss.sum() + table.value_coef * value.sum() + aux * count
        ratio = log_ratio.detach().exp()
        metrics = {
            "policy/approxkl_avg": 0.5 * log_ratio.detach().square().sum(),
            "policy/clipfrac_avg": (policy.low | policy.high).float().sum(),
            "policy/entropy_avg": entropy.detach().sum(),
            "loss/policy_avg": policy.loss.detach().sum(),
            "loss/value_avg": value.detach().sum(),
            "val/clipfrac_avg": value_clipped.float().sum(),
            "val/ratio": ratio.sum(),
            # About 1, which is what it scatters around.
            "val/ratio_var": (ratio - 1).square().sum(),
        }
        metrics |= {name: torch.full_like(loss.detach(), figure * count) for name, figure in self.gauges().items()}
        return Loss(loss, metrics)


# --- the stage -------------------------------------------------------------------------------------------------------


def build(recipe: Recipe, tokenizer: Tokenizer, init: Path | None) -> Task:
    """The stage: policy and value model start from `init`, which stays the reference."""
    table, parent = recipe.ppo, rltask.parent(recipe, init)
    policy = model_for(recipe, tokenizer, parent)
    from_rewards = table.value_init == "reward"
    value = value_model(rltask.reward_folder(recipe) if from_rewards else parent, rewards=from_rewards)
    value.recompute = recipe.train.recompute
    reference = load_parent(parent).requires_grad_(False)
    return rltask.task(
        recipe,
        tokenizer,
        parent,
        policy,
        ActorCritic(policy, value),
        estimator=lambda forward: PPOEstimator(reference, value, forward, table),
        objective=lambda rollouts: PPOObjective(table, recipe.rollout.temperature, lambda: rollouts.gauges),
        samples=1,
        epochs=table.epochs,
    )
