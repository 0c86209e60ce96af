"""The reward model: the SFT model with a head that gives a whole conversation a number, learnt from pairs.

The whole model trains, from the SFT model's weights; the number is read at the conversation's last token, which has
seen all the others. What is minimised for a pair is

    -log sigmoid(r_chosen - r_rejected - margin) + centre (r_chosen + r_rejected)^2 - sft log p(chosen) / tokens

(Bradley and Terry 1952; the margin: Touvron et al. 2023, eq. 2; the centring: Eisenstein et al. 2023), as in TRL's
RewardTrainer, whose names the figures have; the last term, by the embedding as the language model's head: Yang et al.
2024 (arXiv:2406.10216).
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from oriole.errors import ConfigError
from oriole.log import say
from oriole.model.folder import save_model
from oriole.model.lm import LM
from oriole.text.tokenizer import Tokenizer
from oriole.train import dist
from oriole.train.batch import IGNORE, Batch
from oriole.train.dpo import places, side_sums
from oriole.train.objectives import Loss, of_units, token_log_probs
from oriole.train.pairs import PairPacker, Pairs, make_pairs, mixed, pair_batches
from oriole.train.recipe import Recipe
from oriole.train.rewardfigures import figures, rounded
from oriole.train.task import Task, identity, model_for

__all__ = ["RewardObjective", "ScoredPairs", "at_ends", "build", "measure", "reward_loss", "with_reward_head"]

MARGIN = "margin"
"""Under this name a batch holds how much better the chosen side is."""

ANSWER = "answer"
"""Under this name a batch holds the next token where it is one of a chosen answer, else IGNORE."""


# --- the loss --------------------------------------------------------------------------------------------------------


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, centre: float) -> Tensor:
    """The loss (P,) of pairs whose sides are scored `chosen` and `rejected` (P,), asked to differ by `margin` (P,)."""
    return -F.logsigmoid(chosen - rejected - margin) + centre * (chosen + rejected).square()


def scores(model: LM, h: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards of the chosen and the rejected sides, each (P,) fp32, from h (B, T, D) at the sides' ends `rows` (2 P,).

    In fp32 whatever the arithmetic of the model: two rewards may differ by less than bf16 can tell.
    """
    with torch.autocast(h.device.type, enabled=False):
        last = h.flatten(0, 1)[rows]
        rewards = model.head("reward", last.to(torch.promote_types(last.dtype, torch.float32)))
    return rewards[0::2], rewards[1::2]


class RewardObjective:
    """`reward_loss` over the pairs of a batch of `ScoredPairs`."""

    def __init__(self, centre: float, sft: float = 0.0) -> None:
        self.centre, self.sft = centre, sft

    def weight(self, batch: Batch) -> Tensor:
        """Pairs of the batch, 0-dim int64."""
        return (batch.targets != IGNORE).sum() // 2

    def __call__(self, model: LM, batch: Batch) -> Loss:
        """`min_reward` and `max_reward` come out as the means over the micro-batches of what was least and most in
        each, as TRL's do."""
        out = model(batch.tokens, batch.doc, batch.pos)
        chosen, rejected = scores(model, out.h, batch.rows)
        margin = batch.extra[MARGIN].flatten()[batch.rows][0::2]
        loss = reward_loss(chosen, rejected, margin, self.centre).sum()
        with torch.no_grad():
            pairs = len(chosen)
            metrics = {
                "accuracy": (chosen > rejected).float().sum(),
                "margin": (chosen - rejected).sum(),
                "min_reward": pairs * torch.minimum(chosen, rejected).min(),
                "mean_reward": (chosen + rejected).sum() / 2,
                "max_reward": pairs * torch.maximum(chosen, rejected).max(),
            }
        if self.sft:
            nll = answer_nll(model, out.h, batch)
            loss = loss + self.sft * nll
            metrics["nll_loss"] = nll.detach()
        return Loss(loss + out.aux * pairs, metrics | of_units(out.metrics, pairs))


def answer_nll(model: LM, h: Tensor, batch: Batch) -> Tensor:
    """The sum over pairs of minus the log-prob per token of the chosen answer, of h (B, T, D)."""
    answer = batch.extra[ANSWER].flatten()
    there = answer != IGNORE
    # All positions, as asking a GPU how many there are would wait for it.
    log_probs, _ = token_log_probs(h.flatten(0, 1), model.embedding.weight, answer.clamp(min=0))
    at = places(batch).flatten()
    total, tokens = (side_sums(batch, x, at) for x in (torch.where(there, log_probs, 0.0), there.to(log_probs.dtype)))
    return -(total / tokens.clamp(min=1)).sum()


# --- the data --------------------------------------------------------------------------------------------------------


def at_ends(batch: Batch, *, answers: bool = False) -> Batch:
    """The batch with a target at the last token of each document and nowhere else: 0 for a chosen side, 1 for a
    rejected one. `Batch.rows` are then the ends of the sides, pair by pair. With `answers` it remembers what the chosen
    sides' targets were, as extra `ANSWER`."""
    following = F.pad(batch.doc[:, 1:], (0, 1), value=-1)
    ends = (batch.doc >= 0) & (following != batch.doc)
    kept = {ANSWER: torch.where(batch.doc % 2 == 0, batch.targets, IGNORE)} if answers else {}
    targets = torch.where(ends, batch.doc.long() % 2, IGNORE)
    return Batch(batch.tokens, targets, batch.doc, batch.pos, extra={**batch.extra, **kept})


@final
class ScoredPairs:
    """The batches of a `PairPacker`, with targets where a reward is read."""

    def __init__(self, packer: PairPacker, *, answers: bool = False) -> None:
        """`answers` as in `at_ends`."""
        self.packer, self.answers = packer, answers

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return at_ends(next(self.packer), answers=self.answers)

    def state_dict(self) -> dict[str, Any]:
        """The packer's."""
        return self.packer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self.packer.load_state_dict(state)


# --- the stage -------------------------------------------------------------------------------------------------------


def with_reward_head(lm: LM) -> LM:
    """A copy of the model's body with a new head of N(0, init_std), and without its head for logits."""
    config = lm.config.model_copy(update={"tie_embeddings": True})
    model = LM(config, heads=("reward",), backend=lm.backend)
    body = {name: tensor for name, tensor in lm.state_dict().items() if name in model.state_dict()}
    missing, _ = model.load_state_dict(body, strict=False)
    assert missing == ["scalar_heads.reward.weight"], "all but the head is the language model's"
    model.recompute = lm.recompute
    return model


def build(recipe: Recipe, tokenizer: Tokenizer, init: Path | None) -> Task:
    """The stage, with its pairs encoded where they are not yet."""
    _refuse(recipe)
    parent = model_for(recipe, tokenizer, init)
    if recipe.reward.sft and not parent.config.tie_embeddings:
        raise ConfigError(
            "reward.sft needs the language model's head, which a reward model has only where it is tied to the "
            "embedding; the parent's is not: leave reward.sft out"
        )
    model = with_reward_head(parent)
    model.set_dropout(**recipe.train.dropouts)
    train, val = make_pairs(recipe, tokenizer, context=model.config.context, cut=False, whole=True)
    parts, shares = mixed(recipe, train, whole=True)
    for part in parts:
        part.values[MARGIN] = np.repeat(part.margins, 2)
    held_out = [Pairs(shards, whole=True) for shards in val.values()]

    def packer() -> PairPacker:
        return PairPacker(parts, shares, recipe.train.seed, recipe.train.batch_size, recipe.train.length)

    def save(folder: Path) -> None:
        save_model(model, folder, chat=True)
        tokenizer.save(folder, chat=True, context=model.config.context)

    fingerprints = {name: shards.fingerprint for name, shards in train.items()}
    margins = [round(float(part.values[MARGIN].sum()), 6) for part in parts]
    return Task(
        lm=model,
        model=model,
        objective=RewardObjective(recipe.reward.centre, recipe.reward.sft),
        data=ScoredPairs(packer(), answers=recipe.reward.sft > 0),
        steps=_steps(recipe, packer(), sum(map(len, parts))),
        evaluate=lambda step: measure(recipe, model, held_out, step),
        save=save,
        fingerprint=identity(recipe, model, tokenizer, fingerprints)
        | {"reward": recipe.reward.model_dump(mode="json"), "margins": margins},
        validation={name: shards.fingerprint for name, shards in val.items()},
        have=", ".join(f"{name} {len(shards) // 2:,} pairs" for name, shards in train.items()),
    )


def _refuse(recipe: Recipe) -> None:
    """`ConfigError` for what a model without logits cannot do."""
    for name, part in recipe.parts.items():
        if recipe.format_of(part) != "preference":
            raise ConfigError(
                f"parts.{name}: a reward model writes nothing that could be measured on text; leave it out"
            )
    if recipe.checkpoint.keep_best or recipe.smart.compares:
        raise ConfigError(
            "checkpoint.keep_best, smart.plateau and smart.early_stop go by bits per byte, which a reward model does "
            "not have; turn them off in the reward stage"
        )


def _steps(recipe: Recipe, packer: PairPacker, pairs: int) -> int:
    """Optimizer steps of the stage; `packer` is used up."""
    table = recipe.train
    each = table.batch_size * table.accumulate
    if table.tokens is not None:
        return max(1, math.ceil(table.tokens / (each * table.length)))
    return max(1, math.ceil(packer.rows_for((table.epochs or 0) * pairs) / each))


@torch.inference_mode()
def measure(recipe: Recipe, model: LM, parts: Sequence[Pairs], step: int) -> dict[str, Any]:
    """The figures of all held-out pairs (rewardfigures), their number, and the accuracy for each source.

    Of several processes each scores its share of the batches; all must call, and all get the same.
    """
    scored = np.concatenate([_scored(model, part, recipe.train.batch_size, recipe.train.length) for part in parts])
    margin = np.concatenate([part.margins for part in parts])
    tokens = np.array([[int(side[1].sum()) for side in part.pair(k)] for part in parts for k in range(len(part))])
    (chosen, rejected), lengths = scored.T, tokens.T.astype(np.float64)
    found = figures(chosen, rejected, margin, lengths[0], lengths[1], recipe.reward.centre)
    say(
        f"step {step}: {len(scored):,} held-out pairs: accuracy {found['accuracy']:.3f}, AUC {found['auc']:.3f}, "
        f"margin {found['margin']:.2f}, ECE {found['ece']:.3f}, correlation with length "
        f"{found['length_correlation']:+.2f}"
    )
    sources = np.array([part.shards.sources[i] for part in parts for i in part.shards.source_ids[0::2]])
    right = chosen > rejected
    by_source = {str(name): round(float(right[sources == name].mean()), 4) for name in np.unique(sources)}
    return {"pairs": len(scored), **rounded(found), "accuracy_by_source": by_source}


def _scored(model: LM, pairs: Pairs, batch_size: int, length: int) -> NDArray[np.float64]:
    """The rewards (P, 2) of a part's pairs: chosen, rejected."""
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    found = torch.zeros(len(pairs), 2, dtype=torch.float64, device=device)
    batches = itertools.islice(pair_batches(pairs, batch_size, length), dist.rank(), None, dist.world())
    for batch, rows in batches:
        ends = at_ends(batch).to(device)
        h = model(ends.tokens, ends.doc, ends.pos).h
        places = torch.tensor([k for row in rows for k in row], device=device)
        found[places] = torch.stack(scores(model, h, ends.rows), 1).double()
    model.train(was_training)
    return dist.sum(found).cpu().numpy()
