"""From logits to the next id, as pure functions on (B, V) logits; every setting may differ from row to row.

Order of the steps, as in transformers: repetition penalty, n-gram block, constraint, temperature, top-k, top-p, min-p,
draw. A setting that is off costs nothing, and rows that all are plain greedy cost one argmax.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oriole.errors import ConfigError

__all__ = [
    "Sampling",
    "allow",
    "draw",
    "min_p",
    "no_repeat_ngram",
    "repeated_ngram_ids",
    "repetition_penalty",
    "sample",
    "top_k",
    "top_p",
]


@dataclass(frozen=True)
class Sampling:
    """How one request is continued; `ConfigError` for a value out of its range."""

    max_new_tokens: int = 512
    """At most this many new ids, the end mark among them."""
    temperature: float = 0.8
    """Logits are divided by it; 0 is greedy."""
    top_k: int = 50
    """Only the k likeliest ids; 0 is off."""
    top_p: float = 0.95
    """Only the fewest likeliest ids that together have this probability (Holtzman et al. 2020); 1 is off."""
    min_p: float = 0.0
    """Only ids at least this likely relative to the likeliest (Nguyen et al. 2024); 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1, ids of the history become less likely (Keskar et al. 2019); 1 is off. Never applied to `stop_ids`."""
    no_repeat_ngram: int = 0
    """No n-gram of this length occurs twice in prompt and answer; 0 is off. Never keeps a `stop_ids` id from coming."""
    stop_ids: tuple[int, ...] = (0, 2)
    """Ids that end the answer."""
    seed: int | None = None
    """The same seed gives the same ids, alone or in a batch; None draws a new one."""

    def __post_init__(self) -> None:
        for name, value, fits, want in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 (off) and 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0"),
            ("no_repeat_ngram", self.no_repeat_ngram, self.no_repeat_ngram >= 0, "0 (off) or more"),
        ):  # fmt: skip
            if not fits:
                raise ConfigError(f"{name} = {value} cannot be used for sampling; give a number that is {want}")

    @property
    def plain(self) -> bool:
        """Greedy, and the history plays no part: the next id is the argmax of the logits."""
        return self.temperature == 0 and self.repetition_penalty == 1 and self.no_repeat_ngram == 0

    @property
    def narrows(self) -> bool:
        """Whether some ids are left out of the draw because they are unlikely."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


# --- what changes the scores -----------------------------------------------------------------------------------------


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float | Tensor) -> Tensor:
    """Logits (…, V) with those of `seen` (…, V) ids divided by the penalty where positive, multiplied where negative.

    `penalty` is a number or (…, 1). Both ways an id of the history becomes less likely (Keskar et al. 2019, arXiv:
    1909.05858, section 4.1, with the sign mended as transformers does: dividing a negative logit would reward it).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def repeated_ngram_ids(history: Sequence[int], n: int) -> list[int]:
    """The ids that would complete an n-gram which `history` already contains, ascending."""
    if n == 0 or len(history) < n:
        return []
    ids = np.asarray(history, np.int64)
    grams = np.lib.stride_tricks.sliding_window_view(ids, n)  # (len - n + 1, n)
    matches = (grams[:, :-1] == ids[len(ids) - n + 1 :]).all(1)
    return [int(i) for i in np.unique(grams[matches, -1])]


def no_repeat_ngram(logits: Tensor, history: Sequence[int], n: int, keep: Sequence[int] = ()) -> Tensor:
    """Logits (V,) in which an id that would repeat an n-gram of `history` is -inf, except for the ids in `keep`.

    Where that would leave no id at all, the logits stay as they are.
    """
    banned = [i for i in repeated_ngram_ids(history, n) if i not in keep]
    if not banned:
        return logits
    blocked = logits.index_fill(-1, torch.tensor(banned, device=logits.device), -math.inf)
    return blocked if bool((blocked > -math.inf).any()) else logits


def allow(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits (…, V) with every id outside the boolean `mask` (…, V) at -inf: how a constraint is enforced."""
    return logits.masked_fill(~mask, -math.inf)


# --- what narrows the choice -----------------------------------------------------------------------------------------


def top_k(logits: Tensor, k: int | Tensor) -> Tensor:
    """Logits (…, V) with all but the k likeliest ids at -inf, of ties the lower ids. `k` may be (…, 1); 0 is off."""
    kept, order = _candidates(logits, torch.as_tensor(k, device=logits.device))
    return torch.full_like(logits, -math.inf).scatter_(-1, order, kept)


def top_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """Logits (…, V) with all but the fewest likeliest ids that reach probability p at -inf; at least one stays.

    `p` may be (…, 1). Of tied ids at the border the lower ones stay.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    kept = _top_p_sorted(ordered, torch.as_tensor(p, device=logits.device))
    return torch.empty_like(logits).scatter_(-1, order, kept)


def min_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """Logits (…, V) with every id less likely than p times the likeliest at -inf. `p` may be (…, 1); 0 is off."""
    floor = logits.amax(-1, keepdim=True) + torch.as_tensor(p, device=logits.device, dtype=logits.dtype).log()
    return logits.masked_fill(logits < floor, -math.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The ids (…,) at which the cumulative probability of logits (…, V) passes `uniform` (…,) in [0, 1).

    Inverse transform sampling: one random number decides an id, so a request's draws depend on nothing but its own
    generator. An id at -inf is never drawn.
    """
    probs, uniform = logits.to(_wide(logits)).softmax(-1), uniform.to(_wide(logits))
    total = probs.cumsum(-1)
    found = (total <= uniform[..., None] * total[..., -1:]).sum(-1)
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(-1)  # rounding must not carry the draw past it
    return torch.minimum(found, last)


# --- all of it -------------------------------------------------------------------------------------------------------


def sample(
    logits: Tensor,
    samplings: Sequence[Sampling],
    histories: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
    masks: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """The next ids (B,) for logits (B, V), row b by `samplings[b]`.

    `histories[b]` are the prompt and the ids so far; `generators[b]` is on the CPU, whatever the logits' device, and
    moves on by one number where the row is not greedy; `masks[b]` (V,) is True for the ids a constraint allows.
    `ValueError` for a constraint that allows none.
    """
    if masks is None and all(s.plain for s in samplings):
        return logits.argmax(-1)
    logits = logits.float()
    if masks is not None:
        logits = _constrained(logits, masks)
    logits = _penalised(logits, samplings, histories)
    drawn = [b for b, s in enumerate(samplings) if s.temperature > 0]
    if not drawn:
        return logits.argmax(-1)

    uniform = {b: torch.rand((), generator=generators[b], dtype=torch.float32) for b in drawn}
    out = logits.argmax(-1) if len(drawn) < len(samplings) else logits.new_empty(len(samplings), dtype=torch.int64)
    # Sorting costs more than all the rest, so that rows which narrow nothing go without; each row by its own setting,
    # since what it draws must not depend on the rows beside it.
    for narrows, pick in ((False, _drawn_from_all), (True, _drawn_from_best)):
        places = [b for b in drawn if samplings[b].narrows == narrows]
        if places:
            rows = logits if len(places) == len(samplings) else logits[places]
            chance = torch.stack([uniform[b] for b in places]).to(logits.device)
            picked = pick(rows, [samplings[b] for b in places], chance)
            out = out.index_copy(0, torch.tensor(places, device=logits.device), picked)
    return out


def _drawn_from_all(logits: Tensor, samplings: Sequence[Sampling], uniform: Tensor) -> Tensor:
    """The ids (B,) that rows draw which narrow nothing."""
    return draw((logits - logits.amax(-1, keepdim=True)) / _temperatures(logits, samplings), uniform)


def _drawn_from_best(logits: Tensor, samplings: Sequence[Sampling], uniform: Tensor) -> Tensor:
    """The ids (B,) that rows draw from their likeliest ids."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    rows, order = _candidates(logits, column([s.top_k for s in samplings]))
    rows = (rows - rows[:, :1]) / _temperatures(logits, samplings)
    if any(s.top_p < 1 for s in samplings):
        rows = _top_p_sorted(rows, column([s.top_p for s in samplings]))
    if any(s.min_p > 0 for s in samplings):
        rows = min_p(rows, column([s.min_p for s in samplings]))
    return order.gather(-1, draw(rows, uniform)[:, None])[:, 0]


def _temperatures(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    return torch.tensor([max(s.temperature, 1e-10) for s in samplings], device=logits.device)[:, None]


def _constrained(logits: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    for b, mask in enumerate(masks):
        if mask is not None and not bool(mask.any()):
            raise ValueError(f"the constraint of row {b} allows no id at all")
    full = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    return allow(logits, torch.stack([full if m is None else m.to(logits.device) for m in masks]))


def _penalised(logits: Tensor, samplings: Sequence[Sampling], histories: Sequence[Sequence[int]]) -> Tensor:
    """Repetition penalty and n-gram block where a row asks for them."""
    rows = [b for b, s in enumerate(samplings) if s.repetition_penalty != 1]
    if rows:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for b in rows:
            seen[b, torch.as_tensor(histories[b], dtype=torch.int64, device=logits.device)] = True
            # The end mark stands in the prompt after every earlier turn; penalised, answers would never end.
            seen[b, [i for i in samplings[b].stop_ids if i < logits.shape[-1]]] = False
        penalties = torch.tensor([s.repetition_penalty for s in samplings], device=logits.device)[:, None]
        logits = repetition_penalty(logits, seen, penalties)
    for b, s in enumerate(samplings):
        if s.no_repeat_ngram:
            blocked = no_repeat_ngram(logits[b], histories[b], s.no_repeat_ngram, keep=s.stop_ids)
            logits = logits.index_copy(0, torch.tensor([b], device=logits.device), blocked[None])
    return logits


def _candidates(logits: Tensor, ks: Tensor) -> tuple[Tensor, Tensor]:
    """The scores (…, K) that top-k (…, 1) leaves, best first, and their ids; K is the widest row's k.

    Rows that keep fewer have -inf at the end. Among tied scores the lower id comes first, so that a row's candidates do
    not depend on the rows beside it; 16-bit logits tie often, and `topk` breaks ties as it likes.
    """
    size = logits.shape[-1]
    ks = torch.where(ks == 0, size, ks).clamp(max=size).expand(*logits.shape[:-1], 1)
    widest = int(ks.max())
    if widest == size:
        best, order = logits.sort(dim=-1, descending=True, stable=True)
        return best.masked_fill(torch.arange(widest, device=logits.device) >= ks, -math.inf), order
    best, order = logits.topk(widest, dim=-1)
    border = best.gather(-1, ks - 1)
    if bool(((logits >= border).sum(-1, keepdim=True) > ks).any()):
        above, tied = logits > border, logits == border
        kept = above | (tied & (tied.cumsum(-1) <= ks - above.sum(-1, keepdim=True)))
        best, order = logits.masked_fill(~kept, -math.inf).topk(widest, dim=-1)
    order, at = order.sort(dim=-1)
    best, rank = best.gather(-1, at).sort(dim=-1, descending=True, stable=True)
    return best.masked_fill(torch.arange(widest, device=logits.device) >= ks, -math.inf), order.gather(-1, rank)


def _top_p_sorted(ordered: Tensor, p: Tensor) -> Tensor:
    """`top_p` for scores (…, K) that are sorted already."""
    probs = ordered.to(_wide(ordered)).softmax(-1)  # 32 bits would let rounding decide at the border
    drop = (probs.cumsum(-1) - probs >= p) & (p < 1)
    drop[..., 0] = False
    return ordered.masked_fill(drop, -math.inf)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # Metal has no 64-bit floats
