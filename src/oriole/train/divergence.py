"""How far a student is from its teacher, and from the data: in chunks, so that logits (N, V) of neither ever exist.

Of a row with logits z, let u = z / tau, q = softmax(u) and p the teacher's distribution at the same temperature tau:

    forward   KL(p || q) = sum p (log p - log q)      d / du = q - p                   (Hinton et al. 2015)
    reverse   KL(q || p) = sum q (log q - log p)      d / du = q (log q - log p - KL)  (Gu et al. 2024, eq. 1)
    loss      (1 - m) tau^2 KL + m CE                 CE = -log softmax(z)[target]

tau^2 keeps the gradient's size whatever the temperature (Hinton et al. 2015, section 2.1). Of a cached teacher the k
likeliest tokens are known and what all others have together: the divergence is that of k + 1 outcomes, never above the
whole one and equal to it where the student spreads the rest as the teacher does.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from oriole.train.batch import IGNORE
from oriole.train.objectives import CHUNK

__all__ = ["PLAIN", "Cached", "Chunks", "Live", "Mixed", "distillation"]


class Mixed(NamedTuple):
    """What is minimised."""

    reverse: bool
    """KL(student || teacher) instead of KL(teacher || student)."""
    temperature: float
    """tau."""
    lm_weight: float
    """m: the share of the cross-entropy on the data."""


class Live(NamedTuple):
    """A teacher that is asked now."""

    h: Tensor
    """Its hidden states (N, D')."""
    weight: Tensor
    """Its head (V, D')."""


class Cached(NamedTuple):
    """What a teacher once said."""

    top: Tensor
    """The likeliest tokens (N, k), int64."""
    log_probs: Tensor
    """Their log-probabilities at the temperature, and last that of all other tokens together (N, k + 1)."""


Sums = tuple[Tensor, Tensor, Tensor, Tensor]
"""KL and cross-entropy, 0-dim sums, and the loss's gradients by hidden states (n, D) and head (V, D)."""


class Chunks(NamedTuple):
    """The functions that are worth compiling, one for each kind of teacher."""

    live: Callable[..., Sums]
    cached: Callable[..., Sums]


def distillation(
    h: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, teacher: Live | Cached, mixed: Mixed, chunks: Chunks
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and what of it is KL and cross-entropy, each summed over `rows`; 0-dim fp32 (fp64 for fp64 inputs).

    h (N, D) are the student's hidden states, weight (V, D) its head, targets (N,) the data's tokens, rows (n,) int64
    those that count, each at most once. Only the loss has gradients.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Distillation.apply(h, weight, targets, rows, teacher, mixed, chunks)  # type: ignore[no-untyped-call]
    return result


def live_chunk(x: Tensor, w: Tensor, y: Tensor, by_weight: bool, mixed: Mixed, teacher: Live) -> Sums:
    """Sums over the rows x (n, D) with targets y (n,), those below 0 left out; the teacher's rows are the same."""
    exact = torch.promote_types(x.dtype, torch.float32)
    log_p = ((teacher.h @ teacher.weight.T).to(exact) / mixed.temperature).log_softmax(-1)
    return _sums(x, w, y, by_weight, mixed, functools.partial(_whole, log_p=log_p, reverse=mixed.reverse))


def cached_chunk(x: Tensor, w: Tensor, y: Tensor, by_weight: bool, mixed: Mixed, teacher: Cached) -> Sums:
    """As `live_chunk`. The log-probabilities are made to add up to one again, which rounding has moved."""
    exact = torch.promote_types(x.dtype, torch.float32)
    log_p = teacher.log_probs.to(exact).log_softmax(-1)
    coarse = functools.partial(_coarse, top=teacher.top, log_p=log_p, reverse=mixed.reverse)
    return _sums(x, w, y, by_weight, mixed, coarse)


PLAIN = Chunks(live_chunk, cached_chunk)

Divergence = Callable[[Tensor], tuple[Tensor, Tensor]]
"""log q (n, V) -> the divergence (n,) and its gradient by u (n, V)."""


def _sums(x: Tensor, w: Tensor, y: Tensor, by_weight: bool, mixed: Mixed, divergence: Divergence) -> Sums:
    exact = torch.promote_types(x.dtype, torch.float32)
    z = (x @ w.T).to(exact)  # (n, V)
    counts = (y >= 0)[:, None]
    log_s = z.log_softmax(-1)
    kl, by_u = divergence(log_s if mixed.temperature == 1 else (z / mixed.temperature).log_softmax(-1))
    lm = -log_s.gather(-1, y.clamp(min=0)[:, None]).squeeze(-1)
    at_target = torch.arange(w.shape[0], device=w.device) == y[:, None]
    by_z = (1 - mixed.lm_weight) * mixed.temperature * by_u + mixed.lm_weight * (log_s.exp() - at_target.to(exact))
    grad = (by_z * counts).to(x.dtype)
    real = counts.squeeze(-1)
    return (kl * real).sum(), (lm * real).sum(), grad @ w, grad.T @ x if by_weight else w.new_empty(0)


def _whole(log_q: Tensor, log_p: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Over all V tokens."""
    if not reverse:
        return (log_p.exp() * (log_p - log_q)).sum(-1), log_q.exp() - log_p.exp()
    q, ratio = log_q.exp(), log_q - log_p
    kl = (q * ratio).sum(-1)
    return kl, q * (ratio - kl[:, None])


def _coarse(log_q: Tensor, top: Tensor, log_p: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Over k tokens top (n, k) and the rest; log_p (n, k + 1)."""
    rest = log_q.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)  # exact, where 1 - sum would cancel
    log_c = torch.cat([log_q.gather(-1, top), rest], -1)
    if not reverse:
        # Within the rest the student is left as it is: each of its tokens is scaled to the teacher's sum.
        wanted = (log_q + (log_p[:, -1:] - rest)).exp().scatter(-1, top, log_p[:, :-1].exp())
        return (log_p.exp() * (log_p - log_c)).sum(-1), log_q.exp() - wanted
    ratio = log_c - log_p
    kl = (log_c.exp() * ratio).sum(-1)
    of_each = ratio[:, -1:].expand_as(log_q).scatter(-1, top, ratio[:, :-1])
    return kl, log_q.exp() * (of_each - kl[:, None])


class _Distillation(torch.autograd.Function):
    """The gradient is formed in the forward pass, where the logits are at hand, as in the fused cross-entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: Tensor,
        teacher: Live | Cached,
        mixed: Mixed,
        chunks: Chunks,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = h.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        w = weight.detach().to(low)
        teacher = teacher._replace(weight=teacher.weight.to(low)) if isinstance(teacher, Live) else teacher
        kl = torch.zeros((), dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
        lm = torch.zeros_like(kl)
        grad_h = torch.zeros_like(h)
        grad_w = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(rows), CHUNK):
                at = rows[start : start + CHUNK]
                missing = CHUNK - len(at)  # all chunks are of one size, so that a compiled one never recompiles
                x, y = h.detach()[at].to(low), F.pad(targets[at], (0, missing), value=IGNORE)
                x = F.pad(x, (0, 0, 0, missing))
                match teacher:
                    case Live(states, head):
                        own = Live(F.pad(states[at].to(low), (0, 0, 0, missing)), head)
                        sums = chunks.live(x, w, y, grad_w is not None, mixed, own)
                    case Cached(top, log_probs):
                        padded = (F.pad(t[at], (0, 0, 0, missing)) for t in (top, log_probs))
                        sums = chunks.cached(x, w, y, grad_w is not None, mixed, Cached(*padded))
                kl += sums[0]
                lm += sums[1]
                grad_h[at] = sums[2][: len(at)].to(h.dtype)
                if grad_w is not None:
                    grad_w += sums[3]
        ctx.save_for_backward(grad_h, grad_w)
        loss = (1 - mixed.lm_weight) * mixed.temperature**2 * kl + mixed.lm_weight * lm
        ctx.mark_non_differentiable(kl, lm)
        return loss, kl, lm

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_w = ctx.saved_tensors
        by_weight = None if grad_w is None else grad_w * upstream.to(grad_w.dtype)
        return grad_h * upstream.to(grad_h.dtype), by_weight, None, None, None, None, None
