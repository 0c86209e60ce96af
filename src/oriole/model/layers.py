"""The parts of a block: RMSNorm, attention with its cache, SwiGLU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oriole.model import gates
from oriole.model.attention import Backend, Mask, attend
from oriole.model.cache import LayerCache
from oriole.model.config import Layer, ModelConfig
from oriole.model.moe import MoE, Routing
from oriole.model.rope import rotate

__all__ = ["Attention", "Block", "RMSNorm", "SwiGLU"]


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

    def project(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys_seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
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
        q = rotate(self.q_norm(q), cos, sin)
        if self.temperature is not None:
            q = (q * self._temperature(x, keys_seen, self.temperature)).to(q.dtype)
        q = q.transpose(1, 2)
        k = rotate(self.k_norm(k), cos, sin).transpose(1, 2)
        return q, k, v.transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask | None,
        cache: LayerCache | None,
        backend: Backend,
        keys_seen: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). `mask` says what this layer's queries see, `cache` holds its earlier keys, and
        `keys_seen` (B or 1, T) is how many keys a query sees without a window, for a temperature from the length."""
        b, t, _ = x.shape
        q, k, v = self.project(x, cos, sin, keys_seen)
        if cache is not None:
            k, v = cache.extended(k, v)
        y = attend(q, k, v, mask, backend=backend)
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

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask | None,
        cache: LayerCache | None,
        backend: Backend,
        keys_seen: Tensor | None = None,
        real: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """x (B, T, D) -> (B, T, D), and how experts were chosen where there are any; `real` (B, T): no padding."""
        y = self.attention(self.attention_norm(x), cos, sin, mask, cache, backend, keys_seen)
        x = x + self._scaled(y, self.attention_scale)
        routing = None
        if isinstance(self.mlp, MoE):
            y, routing = self.mlp(self.mlp_norm(x), real, backend)
        else:
            y = self.mlp(self.mlp_norm(x))
        return x + self._scaled(y, self.mlp_scale), routing

    def _scaled(self, y: Tensor, scale: Tensor | None) -> Tensor:
        y = F.dropout(y, self.dropout, self.training)
        return y if scale is None else y * scale


def _experts(config: ModelConfig) -> MoE:
    shared = config.moe.shared_ffn_dim
    return MoE(config, SwiGLU(config.dim, shared) if shared else None)
