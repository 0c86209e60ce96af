"""A latent block that is applied again and again to the hidden states, before anything is said.

It stands behind the last block. The literature has three places: the whole model is the loop (Universal Transformer,
Dehghani et al. 2019; Ouro, Zhu et al. 2025), a core between prelude and coda (Geiping et al. 2025), or the end. At the
end every state can be read by the one norm and head there are, as in Ouro, so that each iteration is supervised and may
be the last one without a coda being run for it; and the blocks before it, which hold most parameters, run once.

The state starts as what the last block gives, e, and before each iteration it is drawn back to it: e + a (s - e), with
a learnt number 0 < a < 1 a channel. So e is never forgotten, the state stays bounded however often the block is
applied, and one iteration is exactly a plain model with `layers` more blocks.

Keys and values are those of the first iteration; later ones ask them anew with other queries. So a token does not
depend on how long another one has thought: it may halt on its own, the cache holds what that of a plain model with
`layers` more blocks holds, and cached equals uncached whatever the number of steps. A prompt is read at the price of
that plain model, since only its last token has to think. What is lost is that one token can read another's later
states; memory networks (Sukhbaatar et al. 2015) hop over a fixed memory in the same way.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oriole.model.attention import Backend, Mask, attend
from oriole.model.cache import LayerCache
from oriole.model.config import ModelConfig
from oriole.model.layers import Context, RMSNorm, Sight, SwiGLU
from oriole.model.rope import rotate

__all__ = ["Context", "LatentLayer", "Pondering", "Reasoning", "Thought"]

KV = tuple[Tensor, Tensor]


class Pondering(NamedTuple):
    """How long to think in a forward pass."""

    steps: int
    """Iterations at most."""
    threshold: float = 1.0
    """A token whose confidence is above it goes no further; 1: none ever halts."""
    at: Tensor | None = None
    """The one place (B,) of each row that is wanted; at all others one iteration is enough, and they get no more."""


class Thought(NamedTuple):
    """What became of each token, both (B, T)."""

    steps: Tensor
    """Iterations made, int64."""
    confidence: Tensor
    """The probability that the token it makes likeliest is the right one, by the confidence head; fp32."""


class LatentLayer(nn.Module):
    """A block whose queries may be asked again: attention over keys that stay, a look at the context, SwiGLU."""

    def __init__(self, config: ModelConfig, *, cross: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = _Attention(config)
        self.cross_norm = RMSNorm(config.dim, config.norm_eps) if cross else None
        self.cross_attention = _Attention(config) if cross else None
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.ffn_dim)
        self.dropout = 0.0

    def forward(self, x: Tensor, sight: Sight, kept: KV | None, cache: LayerCache | None) -> tuple[Tensor, KV]:
        """x (B, T, D) -> (B, T, D), and the keys and values (B, Hkv, S, hd) to give as `kept` from the second iteration
        on. `cache`: as of `layers.Attention`, read and written in the first."""
        normed = self.attention_norm(x)
        rotary = sight.cos, sight.sin
        if kept is None:
            kept = self.attention.keys(normed, rotary)
            kept = kept if cache is None else cache.extended(*kept)
        x = x + self._dropped(self.attention(normed, rotary, kept, sight.mask, sight.backend))
        if self.cross_attention is not None and self.cross_norm is not None and sight.context is not None:
            given, mask = sight.context
            # A row without any context gets nothing; that it looks everywhere meanwhile keeps its softmax from nan.
            some = mask.any(1)[:, None, None]  # (B, 1, 1)
            seen = (mask[:, None] | ~some)[:, None].expand(-1, 1, x.shape[1], -1)
            memory = self.cross_attention.keys(given.to(x.dtype), None)
            y = self.cross_attention(self.cross_norm(x), None, memory, seen, sight.backend, causal=False)
            x = x + self._dropped(y * some)
        return x + self._dropped(self.mlp(self.mlp_norm(x))), kept

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class _Attention(nn.Module):
    """Attention with queries apart from keys and values, which are one matrix in memory."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.dim, config.query_dim, bias=False)
        self.kv = nn.Linear(config.dim, 2 * config.kv_dim, bias=False)
        self.out = nn.Linear(config.query_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def keys(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> KV:
        """Keys and values (B, Hkv, S, hd) of x (B, S, D); without `rotary` they have no places."""
        k, v = self.kv(x).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=2)
        k = self.k_norm(k)
        return (k if rotary is None else rotate(k, *rotary)).transpose(1, 2), v.transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        kv: KV,
        mask: Mask | None,
        backend: Backend,
        *,
        causal: bool = True,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        q = self.q_norm(self.query(x).unflatten(-1, (-1, self.head_dim)))
        q = (q if rotary is None else rotate(q, *rotary)).transpose(1, 2)
        out: Tensor = self.out(attend(q, *kv, mask, backend=backend, causal=causal).transpose(1, 2).flatten(2))
        return out


class Reasoning(nn.Module):
    """The block, what draws the state back, and the head that says how sure a state is."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.reasoning is not None
        self.config = config.reasoning
        self.layers = nn.ModuleList(LatentLayer(config, cross=self.config.cross) for _ in range(self.config.layers))
        self.keep = nn.Parameter(torch.zeros(config.dim))
        """The logit of a: what is kept of the way that the state has gone from e."""
        self.step_embedding = nn.Embedding(self.config.steps, config.dim) if self.config.step_embedding else None
        self.confidence_head = nn.Linear(config.dim, 1)
        nn.init.zeros_(self.confidence_head.bias)

    def confidence(self, h: Tensor) -> Tensor:
        """Log-odds (…,) that the likeliest token after h (…, D), a state behind the final norm, is the right one."""
        out: Tensor = self.confidence_head(h).squeeze(-1)
        return out

    def looking_beside(self) -> list[nn.Module]:
        """The parts that work for a context alone; none without `cross`."""
        layers = [layer for layer in self.layers if isinstance(layer, LatentLayer)]
        return [part for layer in layers for part in (layer.cross_norm, layer.cross_attention) if part is not None]

    def set_dropout(self, p: float) -> None:
        """Dropout probability of the layers' branches while training."""
        for layer in self.layers:
            assert isinstance(layer, LatentLayer)
            layer.dropout = p

    def iterations(
        self,
        start: Tensor,
        sight: Sight,
        norm: RMSNorm,
        caches: Sequence[LayerCache | None] = (),
        *,
        recompute: bool = False,
    ) -> tuple[Tensor, ...]:
        """The states behind the final norm, (B, T, D) each, after every one of `config.steps` iterations on what the
        last block gives, `start` (B, T, D)."""
        kept: list[KV | None] = [None] * len(self.layers)
        state, out = start, []
        for i in range(self.config.steps):
            state = self._iterate(i, state, start, sight, kept, caches, recompute=recompute)
            out.append(norm(state))
        return tuple(out)

    def ponder(
        self,
        start: Tensor,
        sight: Sight,
        norm: RMSNorm,
        caches: Sequence[LayerCache | None],
        pondering: Pondering,
    ) -> tuple[Tensor, Thought]:
        """The state behind the final norm (B, T, D) with which each token halted, and what became of it."""
        kept: list[KV | None] = [None] * len(self.layers)
        state = self._iterate(0, start, start, sight, kept, caches)
        h = norm(state)
        sure = self.confidence(h).float().sigmoid()
        steps = torch.ones_like(sure, dtype=torch.int64)
        at = pondering.at
        if at is None:
            h, sure, steps = self._go_on(pondering, start, state, (h, sure, steps), sight, norm, kept)
        else:
            place = torch.arange(len(at), device=at.device), at
            first = h[place][:, None], sure[place][:, None], steps[place][:, None]
            last = self._go_on(pondering, start[place][:, None], state[place][:, None], first, sight.at(at), norm, kept)
            h, sure, steps = (
                whole.index_put(place, part[:, 0]) for whole, part in zip((h, sure, steps), last, strict=True)
            )
        return h, Thought(steps, sure)

    def _go_on(
        self,
        pondering: Pondering,
        start: Tensor,
        state: Tensor,
        first: tuple[Tensor, Tensor, Tensor],
        sight: Sight,
        norm: RMSNorm,
        kept: list[KV | None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`first`, the state behind the norm, the confidence and the steps after one iteration, as they are when each
        token has halted."""
        h, sure, steps = first
        for i in range(1, pondering.steps):
            going = sure <= pondering.threshold
            if not bool(going.any()):
                break
            state = self._iterate(i, state, start, sight, kept)
            new = norm(state)
            h = torch.where(going[..., None], new, h)
            sure = torch.where(going, self.confidence(new).float().sigmoid(), sure)
            steps = steps + going
        return h, sure, steps

    def _iterate(
        self,
        i: int,
        state: Tensor,
        start: Tensor,
        sight: Sight,
        kept: list[KV | None],
        caches: Sequence[LayerCache | None] = (),
        *,
        recompute: bool = False,
    ) -> Tensor:
        """The state (B, T, D) after iteration i, counted from 0; the first one fills `kept`."""
        x = start + self.keep.sigmoid().to(start.dtype) * (state - start)
        if self.step_embedding is not None:  # steps beyond those of training are like the last of them
            x = x + self.step_embedding.weight[min(i, self.config.steps - 1)].to(x.dtype)
        for n, layer in enumerate(self.layers):
            cache = caches[n] if caches and i == 0 else None
            if recompute:
                x, kept[n] = checkpoint(layer, x, sight, kept[n], cache, use_reentrant=False)
            else:
                x, kept[n] = layer(x, sight, kept[n], cache)
        return x
