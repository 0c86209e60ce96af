"""The decoder: tokens -> hidden states; heads are separate calls, so that nobody pays for logits they do not need."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oriole.errors import ConfigError, ModelError
from oriole.model.attention import Backend, Band, Mask, fastest, mask_for
from oriole.model.cache import Cache, LayerCache
from oriole.model.config import ModelConfig
from oriole.model.deep import Deep
from oriole.model.deepconfig import DeepConfig
from oriole.model.gates import keys_seen
from oriole.model.layers import Block, Context, RMSNorm, Sight
from oriole.model.moe import Routing, figures
from oriole.model.reasoning import Pondering, Reasoning, Thought
from oriole.model.rope import Angles

__all__ = ["LM", "Cache", "Head", "Out", "check_context"]

NO_REASONING = "this model has no latent block to reason with; train one with model.reasoning.steps=4"
NO_CONTEXT = (
    "this model looks at no context beside the tokens; one that does has reasoning.cross and is trained in Python: "
    "LM(tokens, context=LM.context_of(passages))"
)

Head = Literal["logits", "value", "reward", "confidence"]


class Out(NamedTuple):
    """What a forward pass gives."""

    h: Tensor
    """Hidden states after the final norm (B, T, D)."""
    mid: tuple[Tensor, ...]
    """What else goes to the head while training, each (B, T, D): states of supervised depths, then of further tokens
    (`LM.supervise`); empty for the standard model."""
    aux: Tensor
    """Auxiliary loss per unit (router balance), 0-dim; zero for the standard model."""
    metrics: dict[str, Tensor]
    """Figures for the log, 0-dim and without gradient (how experts are used); empty for the standard model."""
    thought: Thought | None = None
    """Steps and confidence of each token, where the call said how long to think."""


class LM(nn.Module):
    """A decoder-only language model, exactly Qwen3 (or Llama without `qk_norm`)."""

    def __init__(self, config: ModelConfig, *, heads: Sequence[Head] = (), backend: Backend | None = None) -> None:
        super().__init__()
        self.config = config
        self.backend: Backend | None = backend
        """Attention backend; None: what is fastest here for the shape."""
        self.recompute = False
        """Keep only what goes in and out of a block, and compute the rest again in the backward pass: a third more
        arithmetic for a fraction of the activations' memory (Chen et al. 2016)."""
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.reasoning = Reasoning(config) if config.reasoning else None
        self._counts_keys = any(layer.temperature == "length" for layer in config.layers)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.scalar_heads = nn.ModuleDict({name: nn.Linear(config.dim, 1, bias=False) for name in heads})
        self.deep: Deep | None = None
        """What `supervise` has added; run state like a value head, no part of the model on disk."""
        self.angles = Angles(config)
        self._init_weights(self)

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, init_std); the projections that write into the residual stream get init_std / sqrt(2 L) (GPT-2)."""
        std = self.config.init_std
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear | nn.Embedding):  # norms and options have first values of their own
                writes_residual = name.endswith(("attention.out", "mlp.down", "shared.down"))
                small = std / math.sqrt(2 * self.config.num_layers)
                nn.init.normal_(part.weight, 0.0, small if writes_residual else std)

    def supervise(self, table: DeepConfig, seed: int) -> None:
        """From now on a forward pass without a cache gives states for further losses (`Out.mid`), by weights drawn with
        a seed of their own: those of the model stay as they are. `ConfigError` where a depth is not one of its, and for
        a model with a latent block, of which every iteration is supervised anyway."""
        if self.reasoning is not None:
            raise ConfigError("a model with a latent block (model.reasoning) supervises its iterations; leave out deep")
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            deep = Deep(self.config, table)
            self._init_weights(deep)
        deep.like(self.blocks[-1])
        self.deep = deep.to(self.embedding.weight.device)

    def stretch(self, scaling: Literal["linear", "ntk", "yarn"], factor: float) -> None:
        """Make the context `factor` times as long as it was in training (model.rope); the weights stay as they are.

        ntk and yarn are meant to work at once; all three gain by some training on long documents (Peng et al. 2023).
        `ConfigError` for a factor that is not above 1.
        """
        self.config = self.config.stretched(scaling, factor)
        self.angles.reset(self.config)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """Rows of the parts of every fused matrix, by parameter name: q, k, v and gate, up are one in memory, and so
        are all experts of a layer."""
        c = self.config
        rows: dict[str, tuple[int, ...]] = {}
        plain = [f"deep.ahead.{k}.block" for k in range(0 if self.deep is None else len(self.deep.ahead))]
        mixtures = [f"blocks.{i}" for i, layer in enumerate(c.layers) if layer.experts]
        plain += [f"blocks.{i}" for i, layer in enumerate(c.layers) if not layer.experts]
        for block in (*plain, *mixtures):
            rows[f"{block}.attention.qkv.weight"] = (c.query_dim, c.kv_dim, c.kv_dim)
        for block in mixtures:
            rows[f"{block}.mlp.gate_up.weight"] = (c.expert_dim,) * (2 * c.moe.experts)
            rows[f"{block}.mlp.down.weight"] = (c.dim,) * c.moe.experts
            if c.moe.shared_ffn_dim:
                rows[f"{block}.mlp.shared.gate_up.weight"] = (c.moe.shared_ffn_dim,) * 2
        if c.reasoning is not None:
            latent = [f"reasoning.layers.{i}" for i in range(c.reasoning.layers)]
            names = ("attention", "cross_attention") if c.reasoning.cross else ("attention",)
            rows |= {f"{layer}.{name}.kv.weight": (c.kv_dim, c.kv_dim) for layer in latent for name in names}
            plain += latent
        return rows | {f"{block}.mlp.gate_up.weight": (c.ffn_dim, c.ffn_dim) for block in plain}

    def sign_steps(self) -> dict[str, float]:
        """Parameters that move by a fixed length against the sign of their gradient, and that length: the biases by
        which experts are balanced (model.moe)."""
        moe = self.config.moe
        layers = enumerate(self.config.layers) if moe.balance == "bias" else ()
        return {f"blocks.{i}.mlp.bias": moe.balance_weight for i, layer in layers if layer.experts}

    def set_dropout(self, p: float, heads: float = 0.0, depth: Literal["constant", "linear"] = "constant") -> None:
        """While training: dropout of the residual branches with probability `p`, of whole attention heads with `heads`.

        constant: the same in every layer; linear: l / L of both in layer l of L (the schedule of Huang et al. 2016;
        what they drop is a whole branch, here it is single numbers of it).
        """
        for number, block in enumerate(self.blocks, 1):
            assert isinstance(block, Block)
            share = number / len(self.blocks) if depth == "linear" else 1.0
            block.dropout, block.attention.head_dropout = share * p, share * heads
        if self.deep is not None:
            self.deep.like(self.blocks[-1])
        if self.reasoning is not None:
            self.reasoning.set_dropout(p)

    def forward(
        self,
        tokens: Tensor,
        doc: Tensor | None = None,
        pos: Tensor | None = None,
        cache: Cache | None = None,
        *,
        pondering: Pondering | None = None,
        context: Context | None = None,
    ) -> Out:
        """Hidden states of tokens (B, T).

        Without a cache: `doc` (B, T) tells documents apart (attention stays inside one; < 0 is padding), None means one
        document a row; `pos` (B, T) are the rotary positions, by default 0 … T - 1.
        With a cache: the tokens continue the cached rows; `doc` < 0 marks padding at the end of a row, which is not
        kept (other values of `doc` mean nothing there). Rows may have different lengths.
        A model with a latent block applies it as often as its config says, and gives the states of all iterations as
        `mid`; with `pondering` as long as that says, token by token. `context` is for one that can look at it.
        `ModelError` when the tokens fit neither the model's context nor the cache.
        """
        b, t = tokens.shape
        backend = self.backend or fastest(tokens.device.type)
        masks: Sequence[Mask | None]
        if cache is None:
            masks = self._masks(doc, t, backend)
            if pos is None:
                check_context(t, self.config.context)
        else:
            added = [t] * b if doc is None else _added(doc)
            columns, places = cache.places(tokens, added, backend)
            check_context(max(cache.lengths) + t, self.config.context)
            masks = [place.mask for place in places]
            pos = columns if pos is None else pos
        cos, sin = self.angles.rows(t, pos)

        seen = None  # keys that each query sees without a window; counted where a layer asks for them
        if self._counts_keys and cache is not None:
            seen = columns + 1
        elif self._counts_keys:
            seen = torch.arange(1, t + 1, device=tokens.device)[None] if doc is None else keys_seen(doc)

        layers: list[LayerCache | None] = [None] * len(masks)
        if cache is not None:
            layers = [LayerCache(*each) for each in zip(cache.keys, cache.values, places, strict=True)]
        x = embedded = self.embedding(tokens)
        sight = Sight(cos, sin, None, backend, seen, None if doc is None else doc >= 0, context)
        sights = [sight._replace(mask=mask) for mask in masks]
        recompute = self.recompute and torch.is_grad_enabled()
        routed: list[Routing] = []
        kept = []  # residual streams of supervised depths
        for i, block in enumerate(self.blocks):
            if recompute:
                x, routing = checkpoint(block, x, sights[i], layers[i], use_reentrant=False)
            else:
                x, routing = block(x, sights[i], layers[i])
            if routing is not None:
                routed.append(routing)
            if self.deep is not None and i + 1 in self.deep.table.depths:
                kept.append(x)
        mid: tuple[Tensor, ...] = ()
        if self.deep is not None and cache is None:
            mid = self.deep(kept, x, embedded, sights[len(self.blocks) - 1], recompute)
        if cache is not None:
            cache.lengths = [n + m for n, m in zip(cache.lengths, added, strict=True)]
        if routed:
            aux, metrics = torch.stack([one.balance for one in routed]).mean(), figures(routed)
        else:
            aux, metrics = torch.zeros((), device=tokens.device), {}
        if self.reasoning is None:
            if pondering is not None or context is not None:
                raise ModelError(NO_REASONING)
            return Out(self.norm(x), mid, aux, metrics)
        if context is not None and not self.reasoning.config.cross:
            raise ModelError(NO_CONTEXT)
        if context is not None and len(context.h) != b:
            raise ModelError(f"a context of {len(context.h)} rows beside {b} rows of tokens; give each row its own")
        latent = layers[len(self.blocks) :]
        if pondering is None:
            every = self.reasoning.iterations(x, sights[-1], self.norm, latent, recompute=recompute)
            return Out(every[-1], every, aux, metrics)
        h, thought = self.reasoning.ponder(x, sights[-1], self.norm, latent, pondering)
        return Out(h, (), aux, metrics, thought)

    def context_of(self, rows: Sequence[Sequence[Sequence[int]]]) -> Context:
        """What passages (token ids) give a latent block to look at: their states, each passage read by itself. Every
        row has passages of its own; one with none sees nothing. `ModelError` for a passage longer than the context."""
        check_context(max((len(ids) for passages in rows for ids in passages), default=0), self.config.context)
        width = max(1, *(sum(map(len, passages)) for passages in rows))
        tokens, pos, doc = (torch.full((len(rows), width), n, dtype=torch.int64) for n in (0, 0, -1))
        for row, passages in enumerate(rows):
            start = 0
            for number, ids in enumerate(passages):
                at = slice(start, start := start + len(ids))
                tokens[row, at], doc[row, at] = torch.tensor(ids, dtype=torch.int64), number
                pos[row, at] = torch.arange(len(ids))
        device = self.embedding.weight.device
        tokens, pos, doc = (x.to(device) for x in (tokens, pos, doc))
        return Context(self(tokens, doc, pos).h, doc >= 0)

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache in the model's precision."""
        weight = self.embedding.weight
        return Cache(self.config, batch, length, dtype=weight.dtype, device=weight.device)

    def prefill(
        self,
        tokens: Tensor,
        lengths: Tensor,
        cache: Cache,
        *,
        most: int,
        pondering: Pondering | None = None,
        context: Context | None = None,
    ) -> Out:
        """Read prompts (B, T), of which the first `lengths` (B,) tokens count, into empty rows: several at once, or a
        single one in pieces of `most` tokens. The states, (B, 1, D), are those of the last token of each, which says
        how it goes on and alone is thought about."""
        cache.lengths = [0] * len(tokens)
        doc = torch.where(torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None], 0, -1)
        for start in range(0, tokens.shape[1], most):
            piece = slice(start, start + most)
            at = (lengths - 1 - start).clamp(max=most - 1)
            thinking = pondering and pondering._replace(at=at)
            out = self(tokens[:, piece], doc=doc[:, piece], cache=cache, pondering=thinking, context=context)
        place = torch.arange(len(tokens), device=tokens.device), at
        thought = out.thought and Thought(*(x[place][:, None] for x in out.thought))
        return Out(out.h[place][:, None], (), out.aux, out.metrics, thought)

    def _masks(self, doc: Tensor | None, length: int, backend: Backend) -> list[Mask | None]:
        """What the queries of each layer see, made once for each kind of layer; a window as long as the row is none."""
        windows = [w if w is not None and w < length else None for w in self.config.windows]
        made: dict[int | None, Mask | None] = {}
        for window in set(windows):
            if doc is not None:
                made[window] = mask_for(doc, backend, window)
            else:
                made[window] = None if window is None else Band(window)
        return [made[window] for window in windows]

    def head(self, name: Head, h: Tensor) -> Tensor:
        """Logits (…, V), or a value, a reward or the log-odds of being right (…,), of hidden states h (…, D)."""
        if name == "logits":
            return F.linear(h, self.embedding.weight if self.lm_head is None else self.lm_head.weight)
        if name == "confidence":
            if self.reasoning is None:
                raise ModelError(NO_REASONING)
            return self.reasoning.confidence(h)
        if name not in self.scalar_heads:
            raise ModelError(f"this model has no {name} head; build it with LM(config, heads=('{name}',))")
        return self.scalar_heads[name](h).squeeze(-1)  # type: ignore[no-any-return]


def check_context(length: int, context: int) -> None:
    """`ModelError` when so many tokens are more than a model is meant for."""
    if length > context:
        raise ModelError(f"{length} tokens exceed the model's context of {context}; give it fewer")


def _added(doc: Tensor) -> list[int]:
    """Tokens of each row of doc (B, T) that are no padding; all of them must stand before the padding."""
    real = doc >= 0
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise ModelError("padding before or between the tokens of a cached row; put it at the end")
    return real.sum(1).tolist()
