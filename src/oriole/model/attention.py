"""One function, `attend`: softmax(q k^T / sqrt(hd)) v with grouped key heads.

`eager` in fp32 defines it; the other backends must match it and are chosen explicitly.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from oriole.model.blockmask import block_mask
from oriole.model.config import KEPT, query_block

__all__ = [
    "Backend", "Band", "Mask", "attend", "attention_weights", "document_bias", "document_mask", "fastest", "mask_for",
    "pair_mask", "pair_mask_for", "window_bias",
]  # fmt: skip


class Band(NamedTuple):
    """What the queries of a layer with a window see, without the square of queries and keys."""

    window: int
    """Keys that a query sees, its own included."""
    allowed: Tensor | None = None
    """None: all of them. Else (B, 1, T, n + window - 1), True or 0 where a query may look: its columns are the keys
    that its block of n queries meets (`query_block`), from `window` - 1 before the block on."""


Mask = Tensor | BlockMask | Band

Backend = Literal["eager", "sdpa", "grouped", "flex"]
"""eager: the fp32 reference. sdpa: PyTorch's fused kernels. grouped: plain matrix products in the compute dtype,
without repeating the key heads; on a CPU three times as fast as sdpa. flex: FlexAttention (Dong et al. 2024), which
skips the blocks that no document fills; fast only when compiled for a GPU."""


def fastest(device: str) -> Backend:
    """The backend for that type of device."""
    match device:
        case "cpu":
            return "grouped"  # at every length (docs/log.md)
        case "cuda" if torch.compiler.is_compiling():
            return "flex"
        case _:
            return "sdpa"


LONG = 4096
"""Rows beyond it have no mask of T x T, not even where a layer sees everything: it is made block by block."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, *, backend: Backend, causal: bool = True) -> Tensor:
    """Attention output (B, H, T, hd) of q (B, H, T, hd) over k, v (B, Hkv, S, hd).

    `mask` (B or 1, 1, T, S) is True where a query may look, or a float that is added to the scores; None means causal,
    with T == S, or all that there is without `causal`. Integers (B, S) are documents, for sdpa and grouped; a `Band` is
    a window, which they attend to at a cost linear in T; flex takes a `BlockMask`. `mask_for` and `pair_mask_for` make
    what a backend wants. Every query must be allowed at least one key, and if `causal` none later than its own place:
    query t sees keys 0 … S - T + t at most. A float mask that is learned, (B or 1, H, T, S), is for eager and sdpa.
    """
    if isinstance(mask, BlockMask):
        return _flex(q, k, v, mask)
    if backend == "eager":
        return _eager(q, k, v, mask, causal)
    seen = _Seen(q.shape[2], k.shape[2], causal, mask.window if isinstance(mask, Band) else None)
    dense = mask.allowed if isinstance(mask, Band) else mask
    match backend:
        case "grouped":
            return _grouped(q, k, v, dense, seen)
        case "sdpa" | "flex":  # a dense mask, as with a cache, or none, is what sdpa is for
            if seen.window is not None or (dense is not None and dense.dim() == 2):
                return _sdpa_in_blocks(q, k, v, dense, seen)
            return _sdpa(q, k, v, dense, causal)


def mask_for(doc: Tensor, backend: Backend, window: int | None = None, queries: int | None = None) -> Mask:
    """The mask of documents doc (B, S) and of a window in the form that the backend reads fastest.

    The queries are the last of the S places, by default all of them.
    """
    s = doc.shape[1]
    t = s if queries is None else queries
    if window is not None and window >= s:
        window = None
    match backend:
        case "eager":
            return document_mask(doc, window)[:, :, s - t :]
        case "flex" if t == s:
            return block_mask(doc, window)
        case "grouped" if window is not None:
            bias: Tensor = window_bias(doc, t, window)
            return Band(window, bias)
        case "sdpa" | "flex" if window is not None:
            return Band(window, _window_mask(doc, t, window))
        case _ if s > LONG:
            return doc
        case "grouped":
            square: Tensor = document_bias(doc)
            return square[:, :, s - t :]
        case "sdpa" | "flex":
            return document_mask(doc)[:, :, s - t :]


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


def document_mask(doc: Tensor, window: int | None = None) -> Tensor:
    """Mask (B, 1, T, T) that is True where key and query share a document and the key is neither later nor as far back
    as the window.

    Padding (doc < 0) sees padding only, itself included, so that no row of the softmax is empty.
    """
    length = doc.shape[1]
    return ((doc[:, :, None] == doc[:, None, :]) & _causal(length, length, window, doc.device))[:, None]


@torch.library.custom_op("oriole::document_bias", mutates_args=())
def document_bias(doc: Tensor) -> Tensor:
    """`document_mask(doc)` as a bf16 tensor of 0 and -inf to be added to the scores.

    An operator of its own, so that a compiler cannot fold the comparison of documents into every pass over the scores
    of every layer: read from memory, attention takes a third less time on a CPU.
    """
    return _bias(document_mask(doc))


@document_bias.register_fake
def _(doc: Tensor) -> Tensor:
    b, t = doc.shape
    return doc.new_empty((b, 1, t, t), dtype=torch.bfloat16)


@torch.library.custom_op("oriole::window_bias", mutates_args=())
def window_bias(doc: Tensor, queries: int, window: int) -> Tensor:
    """The `allowed` of a `Band` for the last `queries` places of doc (B, S), as a bf16 tensor of 0 and -inf."""
    return _bias(_window_mask(doc, queries, window))


@window_bias.register_fake
def _(doc: Tensor, queries: int, window: int) -> Tensor:
    width = query_block(queries, window) + window - 1
    return doc.new_empty((doc.shape[0], 1, queries, width), dtype=torch.bfloat16)


def _bias(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.bfloat16, device=mask.device).masked_fill_(~mask, -math.inf)


def _window_mask(doc: Tensor, t: int, window: int) -> Tensor:
    """The `allowed` of a `Band` as booleans."""
    s = doc.shape[1]
    size = query_block(t, window)
    row = torch.arange(t, device=doc.device)
    query = (s - t + row)[:, None]
    key = (s - t + row // size * size - window + 1)[:, None] + torch.arange(size + window - 1, device=doc.device)
    near = (key >= 0) & (key <= query) & (key > query - window)
    return (near & (doc[:, key.clamp(0, s - 1)] == doc[:, s - t :, None]))[:, None]


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
    return _bias(pair_mask(doc, keys))


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


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    # Never the kernel for decoding, which "AUTO" would take below 128 tokens and which fails at some sizes of training.
    how: Any = {"BACKEND": "TRITON"}
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] > k.shape[1], kernel_options=how)
    assert isinstance(out, Tensor)
    return out


def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """True (queries, keys) where the key is not later than the query, nor out of its window; the last of both agree."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | Band | None, *, causal: bool = True) -> Tensor:
    """Weights (B, H, T, S) in fp32 of q (B, H, T, hd) over k (B, Hkv, S, hd): softmax(q k^T / sqrt(hd)), `mask` and
    `causal` as in `attend`. Each query's weights sum to 1 (Vaswani et al. 2017, eq. 1)."""
    seen = _Seen(q.shape[2], k.shape[2], causal, mask.window if isinstance(mask, Band) else None)
    if isinstance(mask, Band):
        assert mask.allowed is None  # `mask_for` makes a square of window and documents for whoever wants all weights
        mask = None
    with torch.autocast(q.device.type, enabled=False):
        k32 = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q.float() @ k32.transpose(-1, -2) / math.sqrt(q.shape[-1])
        allowed = seen.among(0, seen.queries, q.device) if mask is None else mask
        return _masked(scores, allowed).softmax(-1)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Band | None, causal: bool) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        v32 = v.float().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return (attention_weights(q, k, mask, causal=causal) @ v32).to(v.dtype)


class _Seen(NamedTuple):
    """Which keys a query can see because of its place alone, block by block."""

    queries: int
    keys: int
    causal: bool
    window: int | None

    def blocks(self) -> list[tuple[int, int]]:
        """Queries start … end - 1 of each block."""
        size = query_block(self.queries, self.window)
        return [(start, min(start + size, self.queries)) for start in range(0, self.queries, size)]

    def met(self, start: int, end: int) -> slice:
        """The keys that some of these queries can see."""
        if not self.causal:
            return slice(0, self.keys)
        before = self.keys - self.queries
        first = 0 if self.window is None else max(0, before + start - self.window + 1)
        return slice(first, before + end)

    def among(self, start: int, end: int, device: torch.device) -> Tensor:
        """True (1, 1, queries, keys) where a query can see a key that the block meets."""
        met = self.met(start, end)
        n, m = end - start, met.stop - met.start
        if not self.causal:
            return torch.ones(1, 1, 1, m, dtype=torch.bool, device=device)
        return _causal(n, m, self.window, device)[None, None]

    def allowed(self, mask: Tensor | None, start: int, end: int, device: torch.device) -> Tensor:
        """What a mask lets these queries see of the keys that they meet: (B or 1, 1 or H, queries, keys)."""
        if mask is None:
            return self.among(start, end, device)
        met, before = self.met(start, end), self.keys - self.queries
        if mask.dim() == 2:  # documents
            same = mask[:, before + start : before + end, None] == mask[:, None, met]
            return same[:, None] & self.among(start, end, device)
        if self.window is None:
            return mask.expand(-1, -1, self.queries, self.keys)[:, :, start:end, met]
        column = before + start - self.window + 1  # the key of a band's first column; it may lie before the row
        return mask[:, :, start:end, met.start - column : met.stop - column]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    causal = causal and mask is None
    if q.device.type == "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups > 1)
    if groups > 1:  # on a CPU enable_gqa falls to the slow math path: repeat the heads instead
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _sdpa_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seen: _Seen) -> Tensor:
    outs = []
    for start, end in seen.blocks():
        met = seen.met(start, end)
        allowed = seen.allowed(mask, start, end, q.device)
        outs.append(_sdpa(q[:, :, start:end], k[:, :, met], v[:, :, met], allowed, causal=False))
    return torch.cat(outs, dim=2)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seen: _Seen) -> Tensor:
    out: Tensor = _Grouped.apply(q, k, v, mask, seen)  # type: ignore[no-untyped-call]
    return out


class _Grouped(torch.autograd.Function):
    """The query heads of one key head are stacked along T, so that keys are read once and never copied.

    Long rows are cut into blocks of queries, each of which meets only the keys that causality and the window can allow
    it: eight blocks leave nine sixteenths of the scores. The backward pass is written out, since what autograd derives
    gives the keys' gradient transposed, and reads the scores once more than it must (Dao et al. 2022, equation 4).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seen: _Seen) -> Tensor:
        outs, kept = [], []
        for start, end in seen.blocks():
            w = _weights(q, k, mask, seen, start, end)
            outs.append(_apart(w @ v[:, :, seen.met(start, end)], end - start))
            if seen.queries <= KEPT:
                kept.append(w)
        out = (outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)).flatten(1, 2)
        ctx.save_for_backward(q, k, v, out, mask, *kept)
        ctx.seen = seen
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, mask, *kept = ctx.saved_tensors
        seen: _Seen = ctx.seen
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)  # (B, H, T, 1): what softmax's sum to one takes back
        grad_q = []
        grad_k: Any = 0.0
        grad_v: Any = 0.0
        if seen.window is not None:
            grad_k, grad_v = (x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        for i, (start, end) in enumerate(seen.blocks()):
            met = seen.met(start, end)
            w = kept[i] if kept else _weights(q, k, mask, seen, start, end)
            upstream = _rows(grad, k, start, end)  # (B, Hkv, G n, hd)
            by_weight = (upstream @ v[:, :, met].mT).float() - _rows(delta, k, start, end)
            by_score = (w.float() * by_weight).to(q.dtype)
            by_query = (by_score @ k[:, :, met]) * q.shape[3] ** -0.5
            grad_q.append(_apart(by_query, end - start))
            by_key = by_score.mT @ (_rows(q, k, start, end) * q.shape[3] ** -0.5)
            if seen.window is None:
                grad_k = grad_k + _padded(by_key, seen.keys)
                grad_v = grad_v + _padded(w.mT @ upstream, seen.keys)
            else:  # in place: padding each block's share to the whole row would cost the square again
                grad_k[:, :, met] += by_key
                grad_v[:, :, met] += w.mT @ upstream
        by_q = (grad_q[0] if len(grad_q) == 1 else torch.cat(grad_q, dim=3)).flatten(1, 2)
        return by_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, seen: _Seen, start: int, end: int) -> Tensor:
    """Attention weights (B, Hkv, G n, met) of the n queries start … end - 1, in q's dtype."""
    scores = (_rows(q, k, start, end) * q.shape[3] ** -0.5) @ k[:, :, seen.met(start, end)].mT
    allowed = seen.allowed(mask, start, end, q.device)
    masked = _masked(_apart(scores, end - start), allowed[:, :, None])
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
