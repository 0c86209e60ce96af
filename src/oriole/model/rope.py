"""Rotary positions (Su et al. 2021), and how they are stretched for contexts longer than the model was trained with."""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from oriole.errors import ModelError
from oriole.model.config import ModelConfig
from oriole.model.seq2seqconfig import Seq2SeqConfig

__all__ = ["Angles", "frequencies", "rope_table", "rotary_rows", "rotate", "stretched_frequencies"]

FAST, SLOW = 32.0, 1.0
"""YaRN: pairs that turn more often than FAST times within the trained context stay as they are, those that turn less
often than SLOW are interpolated (beta and alpha in section 3.2; the paper's values for Llama)."""


def frequencies(head_dim: int, theta: float) -> Tensor:
    """Angle per token of each of the hd / 2 pairs, in fp64."""
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def stretched_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """The frequencies (hd / 2,) of a model as `rope_scaling` says, and the factor of cos and sin.

    linear: every frequency divided by the factor s (Chen et al. 2023). ntk: a larger base instead, theta
    s^(hd / (hd - 2)), so that the slowest pair is interpolated by s and the fastest not at all (bloc97 2023). yarn:
    each pair by how often it turns within the trained context ("NTK-by-parts"), and attention a little sharper: both
    queries and keys are multiplied by 0.1 ln s + 1 (Peng et al. 2023, equations 15 to 23).
    """
    head_dim, theta, factor = config.head_dim, config.scaled_theta, config.rope_factor
    plain = frequencies(head_dim, theta)
    match config.rope_scaling:
        case "none" | "ntk":
            return plain, 1.0
        case "linear":
            return plain / factor, 1.0
        case "yarn":
            kept = _kept(head_dim, theta, config.trained_context)
            return plain * (kept + (1 - kept) / factor), 0.1 * math.log(factor) + 1.0


def _kept(head_dim: int, theta: float, length: int) -> Tensor:
    """YaRN's gamma (hd / 2,): the share of a frequency that is not interpolated.

    Equation 18 lets it fall with the number of turns. The authors' own code, and all that follow it (transformers,
    llama.cpp), let it fall evenly over the pairs between the two bounds, rounded outwards; models in circulation are
    trained so.
    """

    def pair(turns: float) -> float:
        """The (fractional) pair that turns so many times in `length` tokens: equation 17 solved for d."""
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair(FAST)), 0), min(math.ceil(pair(SLOW)), head_dim - 1)
    fallen = (torch.arange(head_dim // 2, dtype=torch.float64) - low) / ((high - low) or 0.001)
    return 1 - fallen.clamp(0, 1)


def rope_table(frequencies: Tensor, length: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin (length, hd / 2) in fp32 of the rotary angles, both times `scale`."""
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return (angles.cos() * scale).float(), (angles.sin() * scale).float()


class Angles(nn.Module):
    """cos and sin (context, n) of the angles of a model's positions: n is hd / 2 where queries and keys are rotated by
    them, D / 2 where they are added to the embeddings.

    They are no weights: never saved, on the model's device, and fp32 whatever the model's precision.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig | Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        cos, sin = _table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def reset(self, config: ModelConfig | Seq2SeqConfig) -> None:
        """Compute the tables anew, for that shape."""
        self.config, device = config, self.cos.device
        self.cos, self.sin = (x.to(device) for x in _table(config))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast with the model; computed anew where that would change them, or after the `to_empty` of a model
        that was built on the meta device."""
        before = self.cos.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.cos.device
        if device.type != "meta" and (device != before or self.cos.dtype != torch.float32):
            self.reset(self.config)
        return self

    def rows(self, length: int, pos: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin (B or 1, T, 1, n) at the positions pos (B, T), by default 0 … T - 1."""
        if pos is None:
            return self.cos[:length][None, :, None], self.sin[:length][None, :, None]
        return rotary_rows(self.cos, pos), rotary_rows(self.sin, pos)


def _table(config: ModelConfig | Seq2SeqConfig) -> tuple[Tensor, Tensor]:
    match config:
        case ModelConfig():
            pairs, scale = stretched_frequencies(config)
            return rope_table(pairs, config.context, scale)
        case Seq2SeqConfig(positions="sinusoid"):  # Vaswani et al. 2017, 3.5
            return rope_table(frequencies(config.dim, 10_000.0), config.context)
        case _:
            return rope_table(frequencies(config.head_dim, config.rope_theta), config.context)


@torch.library.custom_op("oriole::rotary_rows", mutates_args=())
def rotary_rows(table: Tensor, pos: Tensor) -> Tensor:
    """Rows of a table of angles (length, n) at the positions pos (B, T): (B, T, 1, n).

    An operator of its own, so that a compiler looks them up once and not in every layer, element by element.
    `ModelError` where the table has no such position; a GPU's own kernels refuse it in words of theirs.
    """
    try:
        return table[pos][:, :, None]
    except IndexError as error:
        raise ModelError(f"position {int(pos.max())} is beyond the model's context of {len(table)}") from error


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
    # Cast before they are joined: where that is no cast and the last thing a function does, torch 2.11's compiler loses
    # the function's gradient.
    return torch.cat(((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)), dim=-1)
