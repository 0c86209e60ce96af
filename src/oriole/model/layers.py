"""The parts of a block: RMSNorm, rotary positions, attention with its cache, SwiGLU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oriole.model.attention import Backend, Mask, attend
from oriole.model.config import Layer, ModelConfig

__all__ = ["Attention", "Block", "RMSNorm", "SwiGLU", "rope_table", "rotary_rows", "rotate"]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, the division in fp32 (Zhang & Sennrich 2019, as in Qwen3)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) -> (…, D) in x's dtype."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed.to(x.dtype)).to(x.dtype)


def rope_table(head_dim: int, length: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (length, hd / 2) in fp32 of the rotary angles (Su et al. 2021)."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


@torch.library.custom_op("oriole::rotary_rows", mutates_args=())
def rotary_rows(table: Tensor, pos: Tensor) -> Tensor:
    """Rows of a rotary table (length, hd / 2) at the positions pos (B, T): (B, T, 1, hd / 2).

    An operator of its own, so that a compiler looks them up once and not in every layer, element by element.
    """
    return table[pos][:, :, None]


@rotary_rows.register_fake
def _(table: Tensor, pos: Tensor) -> Tensor:
    return table.new_empty((*pos.shape, 1, table.shape[1]))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, T, H, hd) by cos, sin (B or 1, T, 1, hd / 2); the pairs are (i, i + hd / 2), as in Hugging Face."""
    rotated: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Rotation(torch.autograd.Function):
    """The backward pass of a rotation turns back. Written out because what autograd derives from the halves (slices
    that are padded and added) makes a whole training step a quarter slower on a CPU (docs/log.md)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with per-head QK-norm before RoPE; q, k and v are one matrix in memory."""

    def __init__(self, config: ModelConfig, layer: Layer) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = nn.Linear(config.dim, heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, hd), k and v (B, Hkv, T, hd) of x (B, T, D), as they meet in `attend`: normed and rotated.

        Whoever looks inside a model (model.inside) asks the layer here, so all that a layer does to its queries and
        keys belongs in this place.
        """
        b, t, _ = x.shape
        q, k, v = (
            self.qkv(x)
            .view(b, t, -1, self.head_dim)
            .split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        )
        q = rotate(self.q_norm(q), cos, sin).transpose(1, 2)
        k = rotate(self.k_norm(k), cos, sin).transpose(1, 2)
        return q, k, v.transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask | None,
        cache: tuple[Tensor, Tensor, Tensor] | None,
        backend: Backend,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). `cache`: this layer's keys and values (B, Hkv, S, hd) and the columns (B, T) at
        which the new ones are written before all S are attended to."""
        b, t, _ = x.shape
        q, k, v = self.project(x, cos, sin)
        if cache is not None:
            keys, values, columns = cache
            at = columns[:, None, :, None].expand_as(k)
            k = keys.scatter_(2, at, k.to(keys.dtype))
            v = values.scatter_(2, at, v.to(values.dtype))
        y = attend(q, k, v, mask, backend=backend)
        out: Tensor = self.out(y.transpose(1, 2).reshape(b, t, -1))
        return out


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020); gate and up are one matrix in memory."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); dropout on both branches while training."""

    def __init__(self, config: ModelConfig, layer: Layer) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = 0.0

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask | None,
        cache: tuple[Tensor, Tensor, Tensor] | None,
        backend: Backend,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        y = self.attention(self.attention_norm(x), cos, sin, mask, cache, backend)
        x = x + F.dropout(y, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)
