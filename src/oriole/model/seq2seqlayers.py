"""The parts of an encoder-decoder: attention to oneself or to a source, MLP, the block of either stack, positions."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oriole.model.attention import Backend, Mask, attend
from oriole.model.cache import LayerCache
from oriole.model.layers import RMSNorm
from oriole.model.rope import rotate
from oriole.model.seq2seqconfig import Seq2SeqConfig

__all__ = ["FeedForward", "Layer", "MultiHead", "Rotary", "Sight", "distance_bucket", "norm", "sinusoids"]

Rotary = tuple[Tensor, Tensor] | None
"""cos and sin of the positions, where they are rotary."""


def sinusoids(cos: Tensor, sin: Tensor) -> Tensor:
    """(…, D) of cos and sin (…, D / 2) of the angles pos / 10000^(2i / D): the sine at 2i, the cosine at 2i + 1
    (Vaswani et al. 2017, 3.5)."""
    return torch.stack((sin, cos), dim=-1).flatten(-2)


def distance_bucket(distance: Tensor, buckets: int, farthest: int, *, causal: bool) -> Tensor:
    """The bucket of each distance key - query, int64 (Raffel et al. 2020, 2.1).

    Half of the buckets are single distances, the others grow by a constant factor up to `farthest`. Without `causal`
    either direction has half of them all.
    """
    first = torch.zeros_like(distance)
    if not causal:
        buckets //= 2
        first = (distance > 0) * buckets
        distance = -distance.abs()
    near = -distance.clamp(max=0)
    exact = buckets // 2
    far = exact + (near.clamp(min=1) / exact).log() / math.log(farthest / exact) * (buckets - exact)
    return first + torch.where(near < exact, near, far.long().clamp(max=buckets - 1))


class MultiHead(nn.Module):
    """Attention of queries to keys and values made of the same states, or of others."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.q = nn.Linear(config.dim, config.dim, bias=config.biases)
        self.kv = nn.Linear(config.dim, 2 * config.dim, bias=config.biases)
        self.out = nn.Linear(config.dim, config.dim, bias=config.biases)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def queries(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Queries (B, H, T, hd) of states x (B, T, D), as they meet keys in `attend`; model.inside asks here, too."""
        q = self.q_norm(self.q(x).view(*x.shape[:2], self.num_heads, self.head_dim))
        return (q if rotary is None else rotate(q, *rotary)).transpose(1, 2)

    def keys_values(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, S, hd) of states x (B, S, D)."""
        k, v = self.kv(x).view(*x.shape[:2], 2 * self.num_heads, self.head_dim).chunk(2, dim=2)
        k = self.k_norm(k)
        return (k if rotary is None else rotate(k, *rotary)).transpose(1, 2), v.transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        kv: tuple[Tensor, Tensor],
        rotary: Rotary,
        mask: Mask | None,
        backend: Backend,
        *,
        causal: bool,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D), having looked at keys and values (B, H, S, hd)."""
        y = attend(self.queries(x, rotary), *kv, mask, backend=backend, causal=causal)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), or down(relu(up(x))); gate and up are one matrix in memory."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        wide = 2 * config.ffn_dim if self.gated else config.ffn_dim
        self.up = nn.Linear(config.dim, wide, bias=config.biases)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=config.biases)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        h = self.up(x)
        if self.gated:
            gate, up = h.chunk(2, dim=-1)
            h = F.silu(gate) * up
        else:
            h = F.relu(h)
        out: Tensor = self.down(h)
        return out


class Sight(NamedTuple):
    """What the blocks of one stack share in a forward pass."""

    rotary: Rotary
    mask: Mask | None
    """Of the stack's own attention."""
    cross: Mask | None
    """Of the decoder's attention to the source."""
    backend: Backend
    """Of the stack's own attention."""
    cross_backend: Backend


class Layer(nn.Module):
    """One block of either stack: attention, in a decoder cross-attention, and the MLP, each with a norm of its own."""

    def __init__(self, config: Seq2SeqConfig, *, decoder: bool) -> None:
        super().__init__()
        self.post = config.norm_at == "post"
        self.attention, self.attention_norm = MultiHead(config), norm(config)
        self.cross = MultiHead(config) if decoder else None
        self.cross_norm = norm(config) if decoder else None
        self.mlp, self.mlp_norm = FeedForward(config), norm(config)
        self.dropout = 0.0

    def forward(
        self,
        x: Tensor,
        sight: Sight,
        memory: Tensor | tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D).

        `memory` is what a decoder looks at: the encoder's states (B, S, D), or keys and values of them; `cache` holds
        the keys and values of what is written.
        """

        def attention(y: Tensor) -> Tensor:
            kv = self.attention.keys_values(y, sight.rotary)
            kv = kv if cache is None else cache.extended(*kv)
            out: Tensor = self.attention(y, kv, sight.rotary, sight.mask, sight.backend, causal=self.cross is not None)
            return out

        def cross(y: Tensor) -> Tensor:
            assert self.cross is not None and memory is not None
            kv = self.cross.keys_values(memory, None) if isinstance(memory, Tensor) else memory
            out: Tensor = self.cross(y, kv, None, sight.cross, sight.cross_backend, causal=False)
            return out

        x = self._add(x, attention, self.attention_norm)
        if self.cross_norm is not None:
            x = self._add(x, cross, self.cross_norm)
        return self._add(x, self.mlp, self.mlp_norm)

    def _add(self, x: Tensor, branch: Callable[[Tensor], Tensor], normed: nn.Module) -> Tensor:
        """x + branch(norm(x)), or norm(x + branch(x)) as in the paper; dropout on the branch while training."""
        y = F.dropout(branch(x if self.post else normed(x)), self.dropout, self.training)
        out: Tensor = normed(x + y) if self.post else x + y
        return out


def norm(config: Seq2SeqConfig) -> nn.Module:
    """A new norm of the configured kind."""
    if config.norm == "layer":
        return nn.LayerNorm(config.dim, config.norm_eps)
    return RMSNorm(config.dim, config.norm_eps)
