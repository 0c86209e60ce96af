"""One function, `attend`: softmax(q k^T / sqrt(hd)) v with grouped key heads.

`eager` in fp32 defines it; the other backends must match it and are chosen explicitly.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Backend", "attend", "document_mask"]

Backend = Literal["eager", "sdpa", "grouped"]
"""eager: the fp32 reference. sdpa: PyTorch's fused kernels. grouped: two plain matrix products in the compute dtype,
without repeating the key heads; the faster one for short rows on a CPU."""


BLOCKS, BLOCKED_FROM = 4, 256
"""grouped: blocks of queries in a row, and the length from which they pay (at 128 they cost what they save)."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, backend: Backend) -> Tensor:
    """Attention output (B, H, T, hd) of q (B, H, T, hd) over k, v (B, Hkv, S, hd).

    `mask` (B or 1, 1, T, S) is True where a query may look; None means causal, with T == S. Every query must be
    allowed at least one key, and none later than its own place: query t sees keys 0 … S - T + t at most.
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


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        k32 = k.float().repeat_interleave(groups, dim=1)
        v32 = v.float().repeat_interleave(groups, dim=1)
        scores = q.float() @ k32.transpose(-1, -2) / math.sqrt(q.shape[-1])
        allowed = _causal(q.shape[2], q.device) if mask is None else mask
        return (scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v32).to(v.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if q.device.type == "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1)
    if groups > 1:  # on a CPU enable_gqa falls to the slow math path: repeat the heads instead
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The query heads of one key head are stacked along T, so that keys are read once and never copied.

    Long rows are cut into blocks of queries, each of which meets only the keys that causality can allow it: four blocks
    leave five eighths of the scores.
    """
    b, h, t, d = q.shape
    kv, s = k.shape[1], k.shape[2]
    g = h // kv
    q = (q * d**-0.5).reshape(b, kv, g, t, d)
    allowed = (_causal(t, q.device)[None, None] if mask is None else mask)[:, :, None]
    size = t if t < BLOCKED_FROM else -(-t // BLOCKS)
    blocks = []
    for start in range(0, t, size):
        end = min(start + size, t)
        seen = s - t + end
        n = end - start
        scores = q[:, :, :, start:end].reshape(b, kv, g * n, d) @ k[:, :, :seen].transpose(-1, -2)
        masked = scores.view(b, kv, g, n, seen).float().masked_fill(~allowed[..., start:end, :seen], -math.inf)
        weights = masked.softmax(-1).to(v.dtype).view(b, kv, g * n, seen)
        blocks.append((weights @ v[:, :, :seen]).view(b, kv, g, n, d))
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=3)
    return out.view(b, h, t, d)
