"""What a forward pass leaves behind: residual stream, attention weights, logits of every depth.

Nothing here is on the path of training or generation: hooks are put on the blocks for one forward pass and taken off
again, and attention weights, which the fast backends never have as a whole, are computed anew from the layer's q and k.
"""

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oriole.errors import ModelError
from oriole.model.attention import attention_weights
from oriole.model.layers import Block
from oriole.model.lm import LM

__all__ = ["Inside", "entropy", "lens", "look", "nearest", "principal"]


class Inside(NamedTuple):
    """One row of T tokens on its way through L blocks."""

    residual: Tensor
    """The residual stream (L + 1, T, D): the embedding, then what each block leaves."""
    attended: Tensor
    """What attention adds to it (L, T, D)."""
    transformed: Tensor
    """What the MLP adds to it (L, T, D)."""
    weights: tuple[Tensor, ...]
    """Of each layer the attention weights (H, T, T) in fp32, a query a row."""
    logits: Tensor
    """Of the next token (T, V)."""
    steps: tuple[Tensor, ...]
    """Of a model with a latent block the states (T, D) behind the final norm after each iteration; the head reads them,
    and the last of them gives the logits."""


@torch.no_grad()
def look(model: LM, tokens: Tensor) -> Inside:
    """Run `model`, which must be in evaluation mode, over tokens (T,) and keep what it computes on the way.

    `ModelError` when the tokens exceed the model's context.
    """
    stream: list[Tensor] = []
    halfway: list[Tensor] = []
    weights: list[Tensor] = []

    def before(_: Any, args: tuple[Any, ...]) -> None:
        stream.append(args[0][0])

    def after(_: Any, args: tuple[Any, ...], out: tuple[Tensor, Any]) -> None:
        stream.append(out[0][0])

    def between(_: Any, args: tuple[Any, ...]) -> None:
        halfway.append(args[0][0])

    def attending(attention: Any, args: tuple[Any, ...]) -> None:
        x, cos, sin, mask, _, _, keys_seen = args
        q, k, _ = attention.project(x, cos, sin, keys_seen)
        weights.append(attention_weights(q, k, mask)[0])

    with ExitStack() as hooks:
        for block in model.blocks:
            assert isinstance(block, Block)
            hooks.callback(block.register_forward_pre_hook(before).remove)
            hooks.callback(block.attention.register_forward_pre_hook(attending).remove)
            hooks.callback(block.mlp_norm.register_forward_pre_hook(between).remove)
        hooks.callback(model.blocks[-1].register_forward_hook(after).remove)
        out = model(tokens[None])
    residual, middle = torch.stack(stream), torch.stack(halfway)
    return Inside(
        residual,
        middle - residual[:-1],
        residual[1:] - middle,
        tuple(weights),
        model.head("logits", out.h)[0],
        tuple(h[0] for h in out.mid) if model.reasoning is not None else (),
    )


@torch.no_grad()
def lens(model: LM, residual: Tensor) -> Tensor:
    """Logits (T, V) that the final norm and the head read from a residual stream (T, D) of any depth.

    The logit lens (nostalgebraist 2020): of the last block's stream they are the model's own logits,
    unless a latent block stands behind it.
    """
    return model.head("logits", model.norm(residual[None]))[0]


def entropy(logits: Tensor) -> Tensor:
    """Entropy (…,) in nats of the distributions softmax(logits (…, V))."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1)


@torch.no_grad()
def nearest(table: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each of ids (n,) the `count` other rows of an embedding table (V, D) nearest by cosine: ids and cosines, both
    (n, count), the nearest first."""
    if not 0 < count < len(table):
        raise ModelError(f"{count} neighbours of a token in a vocabulary of {len(table)}; ask for fewer")
    norms = table.float().norm(dim=1).clamp_min(1e-12)
    cosines = (table[ids].float() @ table.float().T) / (norms[ids][:, None] * norms)
    cosines.scatter_(1, ids[:, None], -torch.inf)
    found = cosines.topk(count, dim=1)
    return found.indices, found.values


def principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates (n, 2) of the rows of x (n, D) along their two principal axes, and each axis's share of the variance
    (2,). An axis points to where its largest entry is positive, so that the picture does not depend on the library."""
    centred = x.float() - x.float().mean(0)
    u, s, v = torch.linalg.svd(centred, full_matrices=False)
    at = v[:2].abs().argmax(1, keepdim=True)
    signs = v[:2].gather(1, at)[:, 0].sign()
    variance = s.square()
    return u[:, :2] * s[:2] * signs, variance[:2] / variance.sum().clamp_min(1e-12)
