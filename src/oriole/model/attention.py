"""One function, `attend`: softmax(q k^T / sqrt(hd)) v with grouped key heads.

`eager` in fp32 defines it; the other backends must match it and are chosen explicitly.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Backend", "attend", "document_bias", "document_mask"]

Backend = Literal["eager", "sdpa", "grouped"]
"""eager: the fp32 reference. sdpa: PyTorch's fused kernels. grouped: two plain matrix products in the compute dtype,
without repeating the key heads; the faster one for short rows on a CPU."""


BLOCK, BLOCKED_FROM = 64, 256
"""grouped: queries in a block, and the length from which blocks pay (at 128 they cost what they save)."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, backend: Backend) -> Tensor:
    """Attention output (B, H, T, hd) of q (B, H, T, hd) over k, v (B, Hkv, S, hd).

    `mask` (B or 1, 1, T, S) is True where a query may look, or a float that is added to the scores; None means causal,
    with T == S. Every query must be allowed at least one key, and none later than its own place: query t sees keys
    0 … S - T + t at most.
    """
    match backend:
        case "eager":
            return _eager(q, k, v, mask)
        case "sdpa":
            return _sdpa(q, k, v, mask)
        case "grouped":
            return _grouped(q, k, v, mask)


def document_mask(doc: Tensor) -> Tensor:
    """Mask (B, 1, T, T) that is True where key and query share a document and the key is not later.

    Padding (doc < 0) sees padding only, itself included, so that no row of the softmax is empty.
    """
    length = doc.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=doc.device).tril()
    return ((doc[:, :, None] == doc[:, None, :]) & causal)[:, None]


@torch.library.custom_op("oriole::document_bias", mutates_args=())
def document_bias(doc: Tensor) -> Tensor:
    """`document_mask(doc)` as a bf16 tensor of 0 and -inf to be added to the scores.

    An operator of its own, so that a compiler cannot fold the comparison of documents into every pass over the scores
    of every layer: read from memory, attention takes a third less time on a CPU.
    """
    mask = document_mask(doc)
    return torch.zeros(mask.shape, dtype=torch.bfloat16, device=doc.device).masked_fill_(~mask, -math.inf)


@document_bias.register_fake
def _(doc: Tensor) -> Tensor:
    b, t = doc.shape
    return doc.new_empty((b, 1, t, t), dtype=torch.bfloat16)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """fp32 scores (…, T, S) without what the mask forbids."""
    return scores.float().masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores.float() + mask


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        k32 = k.float().repeat_interleave(groups, dim=1)
        v32 = v.float().repeat_interleave(groups, dim=1)
        scores = q.float() @ k32.transpose(-1, -2) / math.sqrt(q.shape[-1])
        allowed = _causal(q.shape[2], q.device) if mask is None else mask
        return (_masked(scores, allowed).softmax(-1) @ v32).to(v.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if q.device.type == "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1)
    if groups > 1:  # on a CPU enable_gqa falls to the slow math path: repeat the heads instead
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out: Tensor = _Grouped.apply(q, k, v, mask)  # type: ignore[no-untyped-call]
    return out


class _Grouped(torch.autograd.Function):
    """The query heads of one key head are stacked along T, so that keys are read once and never copied.

    Long rows are cut into blocks of queries, each of which meets only the keys that causality can allow it: eight
    blocks leave nine sixteenths of the scores. The backward pass is written out, since what autograd derives gives the
    keys' gradient transposed, and reads the scores once more than it must (Dao et al. 2022, equation 4).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        t, s = q.shape[2], k.shape[2]
        allowed = (_causal(t, q.device)[None, None] if mask is None else mask)[:, :, None]
        outs, weights = [], []
        for start, end in _blocks(t):
            seen = s - t + end
            scores = _stacked(q, k, start, end) @ k[:, :, :seen].mT  # (B, Hkv, G n, seen)
            masked = _masked(scores.unflatten(2, (-1, end - start)), allowed[..., start:end, :seen])
            weights.append(masked.softmax(-1).to(v.dtype).flatten(2, 3))
            outs.append((weights[-1] @ v[:, :, :seen]).unflatten(2, (-1, end - start)))
        out = (outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)).flatten(1, 2)
        ctx.save_for_backward(q, k, v, out, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, *weights = ctx.saved_tensors
        t, s = q.shape[2], k.shape[2]
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)  # (B, H, T, 1): softmax's own correction
        grad_q = []
        grad_k: Any = 0.0
        grad_v: Any = 0.0
        for (start, end), w in zip(_blocks(t), weights, strict=True):
            seen = s - t + end
            upstream = _rows(grad, k, start, end)  # (B, Hkv, G n, hd)
            by_weight = (upstream @ v[:, :, :seen].mT).float() - _rows(delta, k, start, end)
            by_score = (w.float() * by_weight).to(q.dtype)
            by_query = (by_score @ k[:, :, :seen]) * q.shape[3] ** -0.5
            grad_q.append(by_query.unflatten(2, (-1, end - start)))
            grad_k = grad_k + _padded(by_score.mT @ _stacked(q, k, start, end), s)
            grad_v = grad_v + _padded(w.mT @ upstream, s)
        by_q = (grad_q[0] if len(grad_q) == 1 else torch.cat(grad_q, dim=3)).flatten(1, 2)
        return by_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None


def _blocks(t: int) -> list[tuple[int, int]]:
    size = t if t < BLOCKED_FROM else BLOCK
    return [(start, min(start + size, t)) for start in range(0, t, size)]


def _rows(x: Tensor, k: Tensor, start: int, end: int) -> Tensor:
    """Rows start … end - 1 of x (B, H, T, n), those of the heads that share a key below one another:
    (B, Hkv, G rows, n)."""
    return x.unflatten(1, (k.shape[1], -1))[:, :, :, start:end].flatten(2, 3)


def _stacked(q: Tensor, k: Tensor, start: int, end: int) -> Tensor:
    return _rows(q, k, start, end) * q.shape[3] ** -0.5


def _padded(x: Tensor, length: int) -> Tensor:
    """x (B, Hkv, S', hd) in fp32 with zeros up to S."""
    return F.pad(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 0, 0, length - x.shape[2]))
