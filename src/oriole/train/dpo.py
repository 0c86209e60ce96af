"""DPO and its relatives: losses over preference pairs, reference log-probs that are computed once and kept, the stage.

A pair's log-probs are sums over the tokens of its answers, rendered by the same template as SFT. The loss is a sum over
pairs, the unit that the trainer divides by. Metrics have TRL's names; where TRL takes the mean over a batch's tokens,
here it is the mean over the pairs of each pair's mean.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from oriole.errors import ConfigError, ModelError
from oriole.log import say, track
from oriole.model.folder import save_model
from oriole.model.lm import LM
from oriole.text.tokenizer import Tokenizer
from oriole.train import dist
from oriole.train.batch import Batch
from oriole.train.device import DTYPE_NAMES, choose_device, choose_dtype
from oriole.train.lmtask import measure
from oriole.train.objectives import Loss, head_weight, of_units, token_stats
from oriole.train.pairs import PairPacker, Pairs, make_pairs, mixed, pair_batches
from oriole.train.prepare import measured
from oriole.train.recipe import Recipe
from oriole.train.tables import DPOTable
from oriole.train.task import Task, identity, load_parent, model_for

__all__ = ["DPOObjective", "Sides", "build", "count_pairs", "pair_loss", "rewards", "side_log_probs", "side_sums"]

REFERENCE = "reference"
"""In `Batch.extra`: the reference's log-prob of a side, at the side's last position."""


# --- pairs of a batch ------------------------------------------------------------------------------------------------


class Sides(NamedTuple):
    """What is known of pairs, each (..., 2): the better side first."""

    log_probs: Tensor
    """Sum of the answer's log-probs, with gradient."""
    lengths: Tensor
    """Tokens of the answer."""
    reference: Tensor
    """Sum of the answer's log-probs under the reference; zeros without one."""


def count_pairs(batch: Batch) -> Tensor:
    """Pairs of the batch, 0-dim int64."""
    return ((batch.doc.amax(1) + 1) // 2).sum()


def places(batch: Batch) -> Tensor:
    """(B, T) int64: which slot of (B, S, 2) a position's side has, S = ceil(T / 2); padding has the row's last slot."""
    length = batch.doc.shape[1]
    slots = length + length % 2
    row = torch.arange(len(batch.doc), device=batch.doc.device)[:, None]
    return row * slots + torch.where(batch.doc < 0, slots - 1, batch.doc.long())


def side_sums(batch: Batch, values: Tensor, at: Tensor) -> Tensor:
    """(B, S, 2): the sums of `values` (N,) over the sides of pairs, `at` (N,) being the places of each."""
    rows, length = batch.doc.shape
    slots = length + length % 2
    return values.new_zeros(rows * slots).index_add(0, at, values).view(rows, slots // 2, 2)


def has_pair(batch: Batch) -> Tensor:
    """(B, S) bool: whether there is a pair in the slot. No shape depends on the data, so that no GPU is waited for."""
    slots = (batch.doc.shape[1] + 1) // 2
    return torch.arange(slots, device=batch.doc.device) < (batch.doc.amax(1, keepdim=True) + 1) // 2


# --- losses ----------------------------------------------------------------------------------------------------------


def pair_loss(table: DPOTable, sides: Sides) -> Tensor:
    """The loss (...,) of pairs, sides (..., 2); in the arithmetic of `sides`, with gradient."""
    lengths = sides.lengths.clamp(min=1)
    ratios = sides.log_probs - sides.reference
    per_token = sides.log_probs / lengths  # (..., 2)
    match table.loss:
        case "sigmoid":  # equation 7
            loss = -F.logsigmoid(table.beta * _difference(ratios))
        case "sigmoid_norm":
            loss = -F.logsigmoid(table.beta * _difference(ratios / lengths))
        case "ipo":  # equation 17, of log-ratios per token, as its authors mean it
            loss = (_difference(ratios / lengths) - 1 / (2 * table.beta)).square()
        case "hinge":
            loss = F.relu(1 - table.beta * _difference(ratios))
        case "robust":  # equation 10
            margin, wrong = table.beta * _difference(ratios), table.label_smoothing
            loss = (-(1 - wrong) * F.logsigmoid(margin) + wrong * F.logsigmoid(-margin)) / (1 - 2 * wrong)
        case "simpo":  # equation 6
            loss = -F.logsigmoid(table.beta * _difference(per_token) - table.gamma)
        case "orpo":  # equation 6
            loss = -table.beta * F.logsigmoid(_log_odds_ratio(per_token)) - per_token[..., 0]
    return loss - table.sft * per_token[..., 0] if table.sft else loss


def rewards(table: DPOTable, sides: Sides) -> Tensor:
    """What a pair's sides are worth (..., 2), by the policy itself: beta times the log-ratio to the reference, or times
    the log-prob per token where the loss has no reference."""
    if table.free_of_reference:
        return table.beta * sides.log_probs / sides.lengths.clamp(min=1)
    return table.beta * (sides.log_probs - sides.reference)


def _difference(sides: Tensor) -> Tensor:
    return sides[..., 0] - sides[..., 1]


def _log_odds_ratio(log_probs: Tensor) -> Tensor:
    """log(odds(better) / odds(worse)), odds(p) = p / (1 - p), of log p (..., 2)."""
    log_p = log_probs.clamp(max=-1e-6)  # a certainty has no odds
    # log(1 - p) by whichever form keeps its digits (Mächler 2012).
    rest = torch.where(log_p > -math.log(2), torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p)))
    return _difference(log_p - rest)


class DPOObjective:
    """The loss of `table` over the pairs of a batch; its `extra` has the log-probs of the reference if there is one."""

    def __init__(self, table: DPOTable) -> None:
        self.table = table

    def weight(self, batch: Batch) -> Tensor:
        """Pairs of the batch, 0-dim int64."""
        return count_pairs(batch)

    def __call__(self, model: LM, batch: Batch) -> Loss:
        out = model(batch.tokens, batch.doc, batch.pos)
        h = out.h.flatten(0, 1)[batch.rows]
        weight = head_weight(model)
        stats = token_stats(h, weight, batch.targets.flatten()[batch.rows])
        every = places(batch)
        at = every.flatten()[batch.rows]
        sums = partial(side_sums, batch, at=at)
        ones = torch.ones_like(stats.log_probs)
        log_probs = sums(stats.log_probs)
        if self.table.free_of_reference:
            reference = torch.zeros_like(log_probs)
        else:
            reference = side_sums(batch, batch.extra[REFERENCE].flatten().to(log_probs.dtype), every.flatten())
        sides = Sides(log_probs, sums(ones), reference)
        there = has_pair(batch)
        loss = torch.where(there, pair_loss(self.table, sides), 0.0).sum()
        with torch.no_grad():
            # The mean over the vocabulary of a token's logits is the product with the mean row of the head.
            logits = h.to(ones.dtype) @ weight.to(ones.dtype).mean(0)
            means = torch.stack([sums(x) for x in (stats.entropy, stats.hits, logits)]) / sides.lengths.clamp(min=1)
            metrics = _metrics(self.table, Sides(*(x.detach() for x in sides)), means)
        total = {name: torch.where(there, value, 0.0).sum() for name, value in metrics.items()}
        pairs = count_pairs(batch)
        return Loss(loss + out.aux * pairs, total | of_units(out.metrics, pairs))


def _metrics(table: DPOTable, sides: Sides, means: Tensor | None = None) -> dict[str, Tensor]:
    """TRL's metrics (...,) of pairs; `means` (3, ..., 2) are entropy, hits and logits of a side's tokens."""
    worth = rewards(table, sides)
    better, worse = sides.log_probs.unbind(-1)
    out = {
        "rewards/chosen": worth[..., 0],
        "rewards/rejected": worth[..., 1],
        "rewards/margins": _difference(worth),
        "rewards/accuracies": (worth[..., 0] > worth[..., 1]).to(worth.dtype),
        "logps/chosen": better,
        "logps/rejected": worse,
    }
    if table.loss == "orpo":
        odds = _log_odds_ratio(sides.log_probs / sides.lengths.clamp(min=1))
        out |= {"log_odds_chosen": odds, "log_odds_ratio": F.logsigmoid(odds)}
    if table.loss == "orpo" or table.sft:
        out["nll_loss"] = -better / sides.lengths[..., 0].clamp(min=1)
    if means is not None:
        entropy, hits, logits = means
        share = sides.lengths / sides.lengths.sum(-1, keepdim=True).clamp(min=1)
        out |= {
            "logits/chosen": logits[..., 0],
            "logits/rejected": logits[..., 1],
            "entropy": (entropy * share).sum(-1),
            "mean_token_accuracy": hits[..., 0],
        }
    return out


# --- whole sets of pairs ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def side_log_probs(
    model: LM, pairs: Pairs, *, batch_size: int, length: int, dtype: torch.dtype = torch.float32, together: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(2 pairs,) the sum of every side's answer log-probs and its tokens, in evaluation mode.

    With `together` all processes must call: each takes its share of the batches, and all get the whole.
    """
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    found = torch.zeros(2, len(pairs), 2, dtype=torch.float64)
    batches = enumerate(pair_batches(pairs, batch_size, length))
    with track("log-probs", total=len(pairs), unit="pairs") as bar:
        for number, (batch, rows) in batches:
            bar.update(sum(map(len, rows)))
            if together and number % dist.world() != dist.rank():
                continue
            batch = batch.to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                h = model(batch.tokens, batch.doc, batch.pos).h.flatten(0, 1)[batch.rows]
                values = token_stats(h, head_weight(model), batch.targets.flatten()[batch.rows]).log_probs
            at = places(batch).flatten()[batch.rows]
            sums = torch.stack([side_sums(batch, x, at) for x in (values, torch.ones_like(values))]).double().cpu()
            for row, ks in enumerate(rows):
                found[:, ks] = sums[:, row, : len(ks)]
    model.train(was_training)
    if together:
        found = dist.sum(found.to(device)).cpu()
    log_probs, lengths = found.flatten(1).numpy()
    return log_probs, lengths


def referenced(recipe: Recipe, model: LM, pairs: Pairs, dtype: torch.dtype) -> None:
    """Give the pairs the log-probs of `model`: those that the run has kept for this model, data and arithmetic, or
    computed now and kept."""
    table = recipe.train
    device = model.embedding.weight.device
    made_from = [weights_fingerprint(model), pairs.fingerprint, DTYPE_NAMES[dtype], device.type]
    key = xxhash.xxh3_64_hexdigest("\0".join(made_from).encode())
    path = recipe.run / "shards" / f"reference-{key}.safetensors"
    if path.exists():
        pairs.values[REFERENCE] = load_file(path)["log_probs"]
        return
    say(f"reference log-probs of {len(pairs):,} pairs")
    log_probs, _ = side_log_probs(model, pairs, batch_size=table.batch_size, length=table.length, dtype=dtype)
    if not np.isfinite(log_probs).all():
        bad = int(np.flatnonzero(~np.isfinite(log_probs))[0]) // 2
        raise ModelError(
            f"the reference model gives pair {bad + 1} of {len(pairs)} a log-prob that is not finite; its weights are "
            "broken, or train.dtype is too narrow for them: use train.dtype=fp32"
        )
    half_done = path.with_name(f".{path.name}.part")
    save_file({"log_probs": log_probs}, half_done)
    half_done.replace(path)
    pairs.values[REFERENCE] = log_probs


def weights_fingerprint(model: LM) -> str:
    """32 hex digits of all weights and the shape."""
    digest = xxhash.xxh3_128(model.config.model_dump_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- the stage -------------------------------------------------------------------------------------------------------


def build(recipe: Recipe, tokenizer: Tokenizer, init: Path | None) -> Task:
    """The stage: pairs made and reference log-probs computed where they are missing."""
    if init is None:
        raise ConfigError("dpo has nothing to prefer with random weights; name a chat model: init=FOLDER")
    table, settings = recipe.train, recipe.dpo
    model = model_for(recipe, tokenizer, init)
    train, val = make_pairs(recipe, tokenizer, context=model.config.context, cut=settings.long == "cut")
    text = measured(recipe, tokenizer)
    parts, shares = mixed(recipe, train)
    held = {name: Pairs(shards) for name, shards in val.items()}
    origin = _reference(recipe, settings, model, tokenizer, parts, held)
    steps = _steps(recipe, parts, shares)

    def save(folder: Path) -> None:
        save_model(model, folder, chat=True)
        tokenizer.save(folder, chat=True)

    def evaluate(step: int) -> dict[str, Any]:
        return measure(recipe, model, tokenizer, text, chat=True) | judge(recipe, settings, model, held)

    return Task(
        lm=model,
        model=model,
        objective=DPOObjective(settings),
        data=PairPacker(parts, shares, table.seed, table.batch_size, table.length),
        steps=steps,
        evaluate=evaluate,
        save=save,
        fingerprint=identity(recipe, model, tokenizer, {name: s.fingerprint for name, s in train.items()})
        | {"dpo": settings.model_dump(mode="json"), "reference": origin},
        validation={name: s.fingerprint for name, s in (val | text).items()},
        have=", ".join(f"{name} {len(s) // 2:,} pairs" for name, s in train.items()),
    )


def _reference(
    recipe: Recipe, settings: DPOTable, model: LM, tokenizer: Tokenizer, parts: list[Pairs], held: Mapping[str, Pairs]
) -> str:
    """Give all pairs their reference log-probs; the fingerprint of the reference, "" where the loss has none."""
    if settings.free_of_reference:
        return ""
    reference = model
    if settings.reference:
        theirs = Tokenizer.load(settings.reference)
        if theirs.fingerprint() != tokenizer.fingerprint():
            raise ModelError(f"dpo.reference={settings.reference} has another tokenizer than the stage's parent")
        reference = load_parent(Path(settings.reference))
    device = choose_device(recipe.train.device)
    reference.to(device)
    dtype, _ = choose_dtype(device, recipe.train.dtype)
    for pairs in parts:
        referenced(recipe, reference, pairs, dtype)
    for pairs in held.values():
        referenced(recipe, reference, pairs, torch.float32)  # as they are measured
    return weights_fingerprint(reference)


def _steps(recipe: Recipe, parts: list[Pairs], shares: Mapping[str, float]) -> int:
    """Optimizer steps: by positions, or so many that `epochs` times the number of pairs go through."""
    table = recipe.train
    if table.tokens is not None:
        rows = table.tokens / table.length
    else:
        packer = PairPacker(parts, shares, table.seed, table.batch_size, table.length)
        rows = packer.rows_for((table.epochs or 0) * sum(map(len, parts)))
    return max(1, math.ceil(rows / (table.batch_size * table.accumulate)))


def judge(recipe: Recipe, settings: DPOTable, model: LM, held: Mapping[str, Pairs]) -> dict[str, Any]:
    """The held-out pairs of all parts as TRL names it, eval_…, and besides `eval_logps/accuracies`, the share in which
    the model finds the better side likelier than the worse one, and that for each source."""
    found: list[Tensor] = []
    sources: list[str] = []
    for pairs in held.values():
        sources += [pairs.shards.sources[i] for i in pairs.shards.source_ids[::2]]
        log_probs, lengths = side_log_probs(
            model, pairs, batch_size=recipe.train.batch_size, length=recipe.train.length, together=True
        )
        reference = pairs.values.get(REFERENCE, np.zeros_like(log_probs))
        found.append(torch.from_numpy(np.stack([log_probs, lengths, reference])).view(3, -1, 2))
    whole = Sides(*torch.cat(found, dim=1))
    figures = {"loss": pair_loss(settings, whole)} | _metrics(settings, whole)
    likelier = (whole.log_probs[:, 0] > whole.log_probs[:, 1]).double()
    figures["logps/accuracies"] = likelier
    means = {f"eval_{name}": round(float(value.mean()), 6) for name, value in figures.items()}
    say(
        f"held-out pairs: the better side is the likelier one in {means['eval_logps/accuracies']:.1%} and has the "
        f"higher reward in {means['eval_rewards/accuracies']:.1%} of {len(whole.log_probs):,}"
    )
    return {
        **means,
        "pairs": len(whole.log_probs),
        "accuracy_by_source": {
            name: round(float(likelier[[source == name for source in sources]].mean()), 4)
            for name in sorted(set(sources))
        },
    }
