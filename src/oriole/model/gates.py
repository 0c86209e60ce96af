"""What the letters g, c, t, s, r and z of a pattern add to a block: gates, temperatures, residual scales.

Each is one parameter that starts at a fixed value and draws no random numbers: two models of one seed that differ in
these options have all other weights in common. A gate is a matrix of its own, not more rows of the fused q, k, v, for
the same reason, and because it then has its own name on disk, is one matrix to Muon, and is no part of what LoRA adapts
(adapters belong to the seven matrices that Qwen3 has; what an option adds is frozen beside them).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oriole.model.config import Layer, ModelConfig

__all__ = [
    "LARGEST",
    "SMALL",
    "drop_heads",
    "gate_weight",
    "gated",
    "keys_seen",
    "length_temperature",
    "query_temperature",
    "residual_scale",
    "temperature_weight",
]

LARGEST = 4.0
"""A temperature from the query lies between 1 / LARGEST and LARGEST, so that no input can blow the scores up."""

SMALL = 0.1
"""First value of a LayerScale: the one of Touvron et al. 2021 for up to 18 layers. Their smaller ones for
deeper models are left out, since our output projections already start smaller by 1 / sqrt(2 L)."""


# --- gates -----------------------------------------------------------------------------------------------------------


def gate_weight(config: ModelConfig, layer: Layer) -> nn.Parameter | None:
    """W (H, D) or (H hd, D) of a layer's gate, zero: it starts half open everywhere, the mean of a random start."""
    match layer.gate:
        case "none":
            return None
        case "head":
            return nn.Parameter(torch.zeros(config.num_heads, config.dim))
        case "channel":
            return nn.Parameter(torch.zeros(config.query_dim, config.dim))


def gated(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y (B, T, H, hd) * sigmoid(W x), one number a head or one a channel, for the layer's normed input x (B, T, D).

    Qiu et al. 2025, equation 5 with the gate behind the attention (their G1); Qwen3-Next has it by channel.
    """
    b, t, h, _ = y.shape
    return y * F.linear(x, weight).sigmoid().view(b, t, h, -1)


# --- temperatures ----------------------------------------------------------------------------------------------------
#
# Scores are linear in the query, so a temperature is a factor of q, and every attention backend has it for nothing.


def temperature_weight(config: ModelConfig, layer: Layer) -> nn.Parameter | None:
    """query: W (H, D), zero, a factor of 1. length: s (H,), 1 / log n for the most keys n that a query may see, so that
    the last queries of a full row start as they would without."""
    match layer.temperature:
        case "none":
            return None
        case "query":
            return nn.Parameter(torch.zeros(config.num_heads, config.dim))
        case "length":
            most = max(2, min(config.context, layer.window or config.context))
            return nn.Parameter(torch.full((config.num_heads,), 1 / math.log(most)))


def query_temperature(x: Tensor, weight: Tensor) -> Tensor:
    """LARGEST^tanh(W x) (B, T, H, 1) in fp32, of the layer's normed input x (B, T, D): positive, bounded, 1 for W = 0.

    A temperature from the query token as in Zhang et al. 2024 (selective attention), there tanh itself.
    """
    return (F.linear(x, weight).float().tanh() * math.log(LARGEST)).exp()[..., None]


def length_temperature(keys: Tensor, s: Tensor, window: int | None) -> Tensor:
    """s log n (B or 1, T, H, 1) in fp32, n the number of keys that a query sees: those in `keys` (B or 1, T) of which a
    window leaves at most so many (Nakanishi 2025, equation 4: softmax to the base n^s)."""
    n = keys if window is None else keys.clamp(max=window)
    return (n.float().log()[..., None] * s.float())[..., None]


def keys_seen(doc: Tensor) -> Tensor:
    """Keys (B, T) that a query of doc (B, T) may see: the tokens of its document up to itself.

    A document is a run of equal numbers, as packing makes them. Positions are not asked: they may start anywhere.
    """
    place = torch.arange(doc.shape[1], device=doc.device)
    begins = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0), value=True)
    return place - torch.where(begins, place, 0).cummax(1).values + 1


# --- the residual stream ---------------------------------------------------------------------------------------------


def residual_scale(config: ModelConfig, layer: Layer) -> nn.Parameter | None:
    """Factor of what one branch of a block adds: (D,) at SMALL (LayerScale, Touvron et al. 2021) or (1,) at 0 (ReZero,
    Bachlechner et al. 2020, here before a normed branch: the block starts as the identity)."""
    match layer.residual:
        case "none":
            return None
        case "scale":
            return nn.Parameter(torch.full((config.dim,), SMALL))
        case "zero":
            return nn.Parameter(torch.zeros(1))


def drop_heads(y: Tensor, p: float) -> Tensor:
    """y (B, H, T, hd) with each head of each row zero with probability p, the others divided by 1 - p (DropHead, Zhou
    et al. 2020). Dropout of attention's weights would have to form them, which the fast backends never do."""
    return y * F.dropout(y.new_ones(*y.shape[:2], 1, 1), p)
