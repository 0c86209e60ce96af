"""The parts of a block: RMSNorm, attention with its cache, SwiGLU."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oriole.model import gates
from oriole.model.attention import Backend, Mask, attend
from oriole.model.cache import LayerCache
from oriole.model.config import Layer, ModelConfig
from oriole.model.moe import MoE, Routing
from oriole.model.rope import rotate

__all__ = ["Attention", "Block", "Context", "RMSNorm", "Sight", "SwiGLU"]


class Context(NamedTuple):
    """What the block may look at beside the sequence: retrieved passages, or turns that are in it no longer."""

    h: Tensor
    """Their hidden states (B, S, D), as `Out.h`."""
    mask: Tensor
    """(B, S), True where there is one; a row may have none."""


class Sight(NamedTuple):
    """Where the tokens of a forward pass stand and what they may look at: the same in all layers of one kind."""

    cos: Tensor
    sin: Tensor
    """Rotary rows (B or 1, T, 1, hd / 2)."""
    mask: Mask | None
    """What the queries see."""
    backend: Backend
    keys_seen: Tensor | None = None
    """Keys (B or 1, T) that a query sees without a window, for a temperature from the length."""
    real: Tensor | None = None
    """(B, T), False for padding, which no expert counts."""
    context: Context | None = None
    """What a latent block sees beside the sequence."""

    def at(self, place: Tensor) -> "Sight":
        """The view from one place (B,) of each row: T = 1."""
        b = len(place)
        row = torch.arange(b, device=place.device)
        cos, sin = (x.expand(b, *x.shape[1:])[row, place][:, None] for x in (self.cos, self.sin))
        if self.mask is None:
            mask = (torch.arange(self.cos.shape[1], device=place.device) <= place[:, None])[:, None, None]
        else:
            assert isinstance(self.mask, Tensor), "a place of a row is asked for with a cache only"
            mask = self.mask.expand(b, *self.mask.shape[1:])[row, :, place][:, :, None]
        return self._replace(cos=cos, sin=sin, mask=mask)


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


class Attention(nn.Module):
    """Grouped-query attention with per-head QK-norm before RoPE; q, k and v are one matrix in memory.

    The layer may have a gate on its output and a temperature of its scores (model.gates).
    """

    def __init__(self, config: ModelConfig, layer: Layer) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = nn.Linear(config.dim, config.query_dim + 2 * config.kv_dim, bias=False)
        self.out = nn.Linear(config.query_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.layer = layer
        self.gate = gates.gate_weight(config, layer)
        self.temperature = gates.temperature_weight(config, layer)
        self.head_dropout = 0.0

    def project(self, x: Tensor, sight: Sight) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, hd), k and v (B, Hkv, T, hd) of x (B, T, D), as they meet in `attend`: normed and rotated, the
        queries times the layer's temperature.

        Whoever looks inside a model (model.inside) asks the layer here, so all that a layer does to its queries and
        keys belongs in this place.
        """
        b, t, _ = x.shape
        q, k, v = (
            self.qkv(x)
            .view(b, t, -1, self.head_dim)
            .split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        )
        q = rotate(self.q_norm(q), sight.cos, sight.sin)
        if self.temperature is not None:
            q = (q * self._temperature(x, sight.keys_seen, self.temperature)).to(q.dtype)
        q = q.transpose(1, 2)
        k = rotate(self.k_norm(k), sight.cos, sight.sin).transpose(1, 2)
        return q, k, v.transpose(1, 2)

    def forward(self, x: Tensor, sight: Sight, cache: LayerCache | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D); `cache` holds this layer's earlier keys."""
        b, t, _ = x.shape
        q, k, v = self.project(x, sight)
        if cache is not None:
            k, v = cache.extended(k, v)
        y = attend(q, k, v, sight.mask, backend=sight.backend)
        if self.training and self.head_dropout > 0:
            y = gates.drop_heads(y, self.head_dropout)
        y = y.transpose(1, 2)
        if self.gate is not None:
            y = gates.gated(y, x, self.gate)
        out: Tensor = self.out(y.reshape(b, t, -1))
        return out

    def _temperature(self, x: Tensor, keys_seen: Tensor | None, weight: Tensor) -> Tensor:
        """What the queries are multiplied by (B or 1, T, H, 1)."""
        if self.layer.temperature == "query":
            return gates.query_temperature(x, weight)
        assert keys_seen is not None, "the model counts keys where a layer asks for them"
        return gates.length_temperature(keys_seen, weight, self.layer.window)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020); gate and up are one matrix in memory."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) -> (…, D)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); dropout on both branches while training, and perhaps a learned
    factor of each."""

    def __init__(self, config: ModelConfig, layer: Layer) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = _experts(config) if layer.experts else SwiGLU(config.dim, config.ffn_dim)
        self.attention_scale = gates.residual_scale(config, layer)
        self.mlp_scale = gates.residual_scale(config, layer)
        self.dropout = 0.0

    def forward(self, x: Tensor, sight: Sight, cache: LayerCache | None = None) -> tuple[Tensor, Routing | None]:
        """x (B, T, D) -> (B, T, D), and how experts were chosen where there are any."""
        y = self.attention(self.attention_norm(x), sight, cache)
        x = x + self._scaled(y, self.attention_scale)
        routing = None
        if isinstance(self.mlp, MoE):
            y, routing = self.mlp(self.mlp_norm(x), sight.real, sight.backend)
        else:
            y = self.mlp(self.mlp_norm(x))
        return x + self._scaled(y, self.mlp_scale), routing

    def _scaled(self, y: Tensor, scale: Tensor | None) -> Tensor:
        y = F.dropout(y, self.dropout, self.training)
        return y if scale is None else y * scale


def _experts(config: ModelConfig) -> MoE:
    shared = config.moe.shared_ffn_dim
    return MoE(config, SwiGLU(config.dim, shared) if shared else None)
