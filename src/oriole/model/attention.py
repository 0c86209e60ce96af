"""One function, `attend`: softmax(q k^T / sqrt(hd)) v with grouped key heads.

`eager` in fp32 defines it; the other backends must match it and are chosen explicitly.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from oriole.model.config import KEPT

__all__ = [
    "Backend", "Mask", "attend", "attention_weights", "document_bias", "document_mask", "mask_for", "pair_mask",
    "pair_mask_for",
]  # fmt: skip

Mask = Tensor | BlockMask

Backend = Literal["eager", "sdpa", "grouped", "flex"]
"""eager: the fp32 reference. sdpa: PyTorch's fused kernels. grouped: plain matrix products in the compute dtype,
without repeating the key heads; on a CPU three times as fast as sdpa. flex: FlexAttention (Dong et al. 2024), which
skips the blocks that no document fills; fast only when compiled for a GPU."""


BLOCK, BLOCKS, BLOCKED_FROM = 64, 8, 256
"""grouped: least queries in a block, most blocks in a row, and the length from which they pay (at 128 they cost what
they save)."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, *, backend: Backend, causal: bool = True) -> Tensor:
    """Attention output (B, H, T, hd) of q (B, H, T, hd) over k, v (B, Hkv, S, hd).

    `mask` (B or 1, 1, T, S) is True where a query may look, or a float that is added to the scores; None means causal,
    with T == S, or all that there is without `causal`. flex takes a `BlockMask`; `mask_for` and `pair_mask_for` make
    what a backend wants. Every query must be allowed at least one key, and if `causal` none later than its own place:
    query t sees keys 0 … S - T + t at most. A float mask that is learned, (B or 1, H, T, S), is for eager and sdpa.
    """
    if isinstance(mask, BlockMask):
        return _flex(q, k, v, mask)
    match backend:
        case "eager":
            return _eager(q, k, v, mask, causal)
        case "sdpa":
            return _sdpa(q, k, v, mask, causal)
        case "grouped":
            return _grouped(q, k, v, mask, causal)
        case "flex":  # a dense mask, as with a cache, or none, is what sdpa is for
            return _sdpa(q, k, v, mask, causal)


def mask_for(doc: Tensor, backend: Backend) -> Mask:
    """The mask of documents doc (B, T) in the form that the backend reads fastest."""
    match backend:
        case "eager" | "sdpa":
            return document_mask(doc)
        case "grouped":
            bias: Tensor = document_bias(doc)
            return bias
        case "flex":
            return _block_mask(doc)


def pair_mask_for(doc: Tensor, keys: Tensor, backend: Backend) -> Mask:
    """The mask of queries in documents doc (B, T) that see all of their own among keys (B, S), whatever its place: for
    an encoder, and for cross-attention."""
    match backend:
        case "eager" | "sdpa":
            return pair_mask(doc, keys)
        case "grouped":
            bias: Tensor = pair_bias(doc, keys)
            return bias
        case "flex":
            return _pair_blocks(doc, keys)


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


def pair_mask(doc: Tensor, keys: Tensor) -> Tensor:
    """Mask (B, 1, T, S) that is True where query and key share a document.

    Padding (doc < 0) sees the first key, so that no row of the softmax is empty; nobody sees padding.
    """
    own = (doc[:, :, None] == keys[:, None, :]) & (doc >= 0)[:, :, None]
    first = torch.arange(keys.shape[1], device=doc.device) == 0
    return (own | ((doc < 0)[:, :, None] & first))[:, None]


@torch.library.custom_op("oriole::pair_bias", mutates_args=())
def pair_bias(doc: Tensor, keys: Tensor) -> Tensor:
    """`pair_mask(doc, keys)` as a bf16 tensor of 0 and -inf, and an operator of its own, as `document_bias`."""
    mask = pair_mask(doc, keys)
    return torch.zeros(mask.shape, dtype=torch.bfloat16, device=doc.device).masked_fill_(~mask, -math.inf)


@pair_bias.register_fake
def _(doc: Tensor, keys: Tensor) -> Tensor:
    return doc.new_empty((doc.shape[0], 1, doc.shape[1], keys.shape[1]), dtype=torch.bfloat16)


def _pair_blocks(doc: Tensor, keys: Tensor) -> BlockMask:
    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = doc[row, query]
        return ((own == keys[row, key]) & (own >= 0)) | ((own < 0) & (key == 0))

    return create_block_mask(allowed, doc.shape[0], None, doc.shape[1], keys.shape[1], device=str(doc.device))


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """fp32 scores (…, T, S) without what the mask forbids."""
    return scores.float().masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores.float() + mask


def _block_mask(doc: Tensor) -> BlockMask:
    b, t = doc.shape

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (doc[row, query] == doc[row, key])

    return create_block_mask(allowed, b, None, t, t, device=str(doc.device))


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] > k.shape[1])
    assert isinstance(out, Tensor)
    return out


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _all(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """What may be seen where there is no mask: (T, T), or without `causal` (1, S)."""
    return _causal(q.shape[2], q.device) if causal else torch.ones(1, k.shape[2], dtype=torch.bool, device=q.device)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, *, causal: bool = True) -> Tensor:
    """Weights (B, H, T, S) in fp32 of q (B, H, T, hd) over k (B, Hkv, S, hd): softmax(q k^T / sqrt(hd)), `mask` and
    `causal` as in `attend`. Each query's weights sum to 1 (Vaswani et al. 2017, eq. 1)."""
    with torch.autocast(q.device.type, enabled=False):
        k32 = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q.float() @ k32.transpose(-1, -2) / math.sqrt(q.shape[-1])
        allowed = _all(q, k, causal) if mask is None else mask
        return _masked(scores, allowed).softmax(-1)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        v32 = v.float().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return (attention_weights(q, k, mask, causal=causal) @ v32).to(v.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    causal = causal and mask is None
    if q.device.type == "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups > 1)
    if groups > 1:  # on a CPU enable_gqa falls to the slow math path: repeat the heads instead
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    out: Tensor = _Grouped.apply(q, k, v, mask, causal)  # type: ignore[no-untyped-call]
    return out


class _Grouped(torch.autograd.Function):
    """The query heads of one key head are stacked along T, so that keys are read once and never copied.

    Long rows are cut into blocks of queries, each of which meets only the keys that causality can allow it: eight
    blocks leave nine sixteenths of the scores. The backward pass is written out, since what autograd derives gives the
    keys' gradient transposed, and reads the scores once more than it must (Dao et al. 2022, equation 4).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        t, s = q.shape[2], k.shape[2]
        allowed = (_all(q, k, causal)[None, None] if mask is None else mask).expand(-1, -1, t, s)
        outs, kept = [], []
        for start, end in _blocks(t):
            seen = s - t + end if causal else s
            w = _weights(q, k, allowed, start, end, seen)
            outs.append(_apart(w @ v[:, :, :seen], end - start))
            if t <= KEPT:
                kept.append(w)
        out = (outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)).flatten(1, 2)
        ctx.save_for_backward(q, k, v, out, allowed, *kept)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, allowed, *kept = ctx.saved_tensors
        t, s = q.shape[2], k.shape[2]
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)  # (B, H, T, 1): what softmax's sum to one takes back
        grad_q = []
        grad_k: Any = 0.0
        grad_v: Any = 0.0
        for i, (start, end) in enumerate(_blocks(t)):
            seen = s - t + end if ctx.causal else s
            w = kept[i] if kept else _weights(q, k, allowed, start, end, seen)
            upstream = _rows(grad, k, start, end)  # (B, Hkv, G n, hd)
            by_weight = (upstream @ v[:, :, :seen].mT).float() - _rows(delta, k, start, end)
            by_score = (w.float() * by_weight).to(q.dtype)
            by_query = (by_score @ k[:, :, :seen]) * q.shape[3] ** -0.5
            grad_q.append(_apart(by_query, end - start))
            grad_k = grad_k + _padded(by_score.mT @ (_rows(q, k, start, end) * q.shape[3] ** -0.5), s)
            grad_v = grad_v + _padded(w.mT @ upstream, s)
        by_q = (grad_q[0] if len(grad_q) == 1 else torch.cat(grad_q, dim=3)).flatten(1, 2)
        return by_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _blocks(t: int) -> list[tuple[int, int]]:
    size = t if t < BLOCKED_FROM else max(BLOCK, -(-t // BLOCKS))
    return [(start, min(start + size, t)) for start in range(0, t, size)]


def _weights(q: Tensor, k: Tensor, allowed: Tensor, start: int, end: int, seen: int) -> Tensor:
    """Attention weights (B, Hkv, G n, seen) of the n queries start … end - 1, in q's dtype."""
    scores = (_rows(q, k, start, end) * q.shape[3] ** -0.5) @ k[:, :, :seen].mT
    masked = _masked(_apart(scores, end - start), allowed[:, :, None, start:end, :seen])
    return masked.softmax(-1).to(q.dtype).flatten(2, 3)


def _rows(x: Tensor, k: Tensor, start: int, end: int) -> Tensor:
    """Rows start … end - 1 of x (B, H, T, n), those of the heads that share a key below one another:
    (B, Hkv, G rows, n)."""
    b, h, t, n = x.shape
    return x.reshape(b, k.shape[1], h // k.shape[1], t, n)[:, :, :, start:end].flatten(2, 3)


def _apart(x: Tensor, rows: int) -> Tensor:
    """(B, Hkv, G rows, n) -> (B, Hkv, G, rows, n)."""
    b, kv, stacked, n = x.shape
    return x.reshape(b, kv, stacked // rows, rows, n)


def _padded(x: Tensor, length: int) -> Tensor:
    """x (B, Hkv, S', hd) in fp32 with zeros up to S."""
    padded: Tensor = F.pad(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 0, 0, length - x.shape[2]))
    return padded
