"""What a forward pass leaves behind: residual stream, attention weights, chosen experts, logits of every depth.

Nothing here is on the path of training or generation: hooks are put on the blocks for one forward pass and taken off
again. Attention weights, which the fast backends never have as a whole, are computed anew from the layer's q and k, and
the experts are asked for once more.
"""

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oriole.errors import ModelError
from oriole.model.attention import attention_weights
from oriole.model.layers import Block
from oriole.model.lm import LM
from oriole.model.moe import MoE
from oriole.model.seq2seq import Seq2Seq
from oriole.model.seq2seqlayers import Layer, MultiHead

__all__ = ["Chosen", "Inside", "Stack", "entropy", "lens", "look", "look_across", "nearest", "principal"]


class Stack(NamedTuple):
    """One row of T tokens on its way through L blocks."""

    residual: Tensor
    """The residual stream (L + 1, T, D): the embedding, then what each block leaves."""
    attended: Tensor
    """What attention adds to it (L, T, D)."""
    transformed: Tensor
    """What the MLP adds to it (L, T, D)."""
    weights: tuple[Tensor, ...]
    """Of each layer the attention weights (H, T, T) in fp32, a query a row."""


class Chosen(NamedTuple):
    """Where the router of a layer sends T tokens, each to k of E experts."""

    layer: int
    """Place of the layer, from 0."""
    num_experts: int
    """Experts of the layer (E)."""
    experts: Tensor
    """The chosen ones (T, k), the one with the largest weight first."""
    weights: Tensor
    """Their weights (T, k), which sum to 1."""
    shared: bool
    """Whether one more expert is added for every token as it is."""


class Inside(NamedTuple):
    """What a model computes over one row of T tokens; of an encoder-decoder beside a source of S tokens."""

    stack: Stack
    """The blocks that write, the only ones of a decoder alone."""
    logits: Tensor
    """Of the next token (T, V)."""
    steps: tuple[Tensor, ...] = ()
    """Of a model with a latent block the states (T, D) behind the final norm after each iteration; the head reads them,
    and the last of them gives the logits."""
    chosen: tuple[Chosen, ...] = ()
    """Of each layer with experts."""
    encoder: Stack | None = None
    """The blocks that read the source."""
    crossed: Tensor | None = None
    """What cross-attention adds to the stream (L, T, D)."""
    cross: tuple[Tensor, ...] = ()
    """Of each layer of the decoder the weights of cross-attention (H, T, S) in fp32."""


@torch.no_grad()
def look(model: LM, tokens: Tensor) -> Inside:
    """Run `model`, which must be in evaluation mode, over tokens (T,) and keep what it computes on the way.

    `ModelError` when the tokens exceed the model's context.
    """
    stream: list[Tensor] = []
    halfway: list[Tensor] = []
    weights: list[Tensor] = []
    chosen: list[Chosen] = []

    def attending(attention: Any, args: tuple[Any, ...]) -> None:
        x, sight, _ = args
        q, k, _ = attention.project(x, sight)
        weights.append(attention_weights(q, k, sight.mask)[0])

    def routing(experts: MoE, args: tuple[Any, ...]) -> None:
        _, choice, share = experts.route(args[0][0])
        order = share.argsort(dim=1, descending=True, stable=True)
        at = len(stream) - 1  # the block whose input was kept last
        shared = experts.shared is not None
        chosen.append(Chosen(at, experts.experts, choice.gather(1, order), share.gather(1, order), shared))

    with ExitStack() as hooks:
        for block in model.blocks:
            assert isinstance(block, Block)
            _keep_input(hooks, block, stream)
            _keep_input(hooks, block.mlp_norm, halfway)
            hooks.callback(block.attention.register_forward_pre_hook(attending).remove)
            if isinstance(block.mlp, MoE):
                hooks.callback(block.mlp.register_forward_pre_hook(routing).remove)
        _keep_output(hooks, model.blocks[-1], stream)
        out = model(tokens[None])
    residual, middle = torch.stack(stream), torch.stack(halfway)
    stack = Stack(residual, middle - residual[:-1], residual[1:] - middle, tuple(weights))
    steps = tuple(h[0] for h in out.mid) if model.reasoning is not None else ()
    return Inside(stack, model.head("logits", out.h)[0], steps, tuple(chosen))


@torch.no_grad()
def look_across(model: Seq2Seq, source: Tensor, tokens: Tensor) -> Inside:
    """`look` for an encoder-decoder: tokens (T,) of the decoder, which begin with START, beside a source (S,).

    With the norms behind the sums, as in the paper, the stream is what the norm leaves, and what a branch adds is what
    it adds before the norm. `ModelError` when either side exceeds the model's context.
    """
    with ExitStack() as hooks:
        encoder, decoder = _Watch(hooks, model.encoder), _Watch(hooks, model.decoder)
        h = model(tokens[None], source=source[None]).h
    return Inside(
        decoder.stack(),
        model.head("logits", h)[0],
        encoder=encoder.stack(),
        crossed=torch.stack(decoder.crossed),
        cross=tuple(decoder.cross),
    )


class _Watch:
    """What a stack of an encoder-decoder computes in one forward pass."""

    def __init__(self, hooks: ExitStack, layers: nn.ModuleList) -> None:
        self.residual: list[Tensor] = []
        self.attended: list[Tensor] = []
        self.crossed: list[Tensor] = []
        self.transformed: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.cross: list[Tensor] = []
        for layer in layers:
            assert isinstance(layer, Layer)
            _keep_input(hooks, layer, self.residual)
            _keep_output(hooks, layer.attention, self.attended)
            _keep_weights(hooks, layer.attention, self.weights)
            if layer.cross is not None:
                _keep_output(hooks, layer.cross, self.crossed)
                _keep_weights(hooks, layer.cross, self.cross)
            _keep_output(hooks, layer.mlp, self.transformed)
        _keep_output(hooks, layers[-1], self.residual)

    def stack(self) -> Stack:
        """All of it but cross-attention."""
        residual, attended, transformed = map(torch.stack, (self.residual, self.attended, self.transformed))
        return Stack(residual, attended, transformed, tuple(self.weights))


def _keep_input(hooks: ExitStack, module: nn.Module, kept: list[Tensor]) -> None:
    """Until the hooks go, keep the first row of what the module is given."""
    hooks.callback(module.register_forward_pre_hook(lambda _, args: kept.append(args[0][0])).remove)


def _keep_output(hooks: ExitStack, module: nn.Module, kept: list[Tensor]) -> None:
    """The same of what it gives, or of the first thing that it gives."""

    def after(_: Any, args: tuple[Any, ...], out: Any) -> None:
        kept.append((out[0] if isinstance(out, tuple) else out)[0])

    hooks.callback(module.register_forward_hook(after).remove)


def _keep_weights(hooks: ExitStack, attention: MultiHead, kept: list[Tensor]) -> None:
    """The same of an attention's weights."""

    def attending(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        x, (keys, _), rotary, mask, _ = args
        kept.append(attention_weights(attention.queries(x, rotary), keys, mask, causal=options["causal"])[0])

    hooks.callback(attention.register_forward_pre_hook(attending, with_kwargs=True).remove)


@torch.no_grad()
def lens(model: LM | Seq2Seq, residual: Tensor) -> Tensor:
    """Logits (T, V) that the final norm, where there is one, and the head read from a residual stream (T, D) of any
    depth of what writes.

    The logit lens (nostalgebraist 2020): of the last block's stream they are the model's own logits,
    unless a latent block stands behind it.
    """
    norm = model.norm if isinstance(model, LM) else model.decoder_norm
    return model.head("logits", norm(residual[None]))[0]


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
