"""The decoder: tokens -> hidden states; heads are separate calls, so that nobody pays for logits they do not need."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oriole.errors import ModelError
from oriole.model.attention import Backend, Mask, mask_for
from oriole.model.config import ModelConfig
from oriole.model.layers import Block, RMSNorm, rope_table, rotary_rows

__all__ = ["LM", "Cache", "Head", "Out"]

Head = Literal["logits", "value", "reward"]


class Out(NamedTuple):
    """What a forward pass gives."""

    h: Tensor
    """Hidden states after the final norm (B, T, D)."""
    mid: tuple[Tensor, ...]
    """Hidden states of supervised depths; empty for the standard model."""
    aux: Tensor
    """Auxiliary loss per unit (router balance), 0-dim; zero for the standard model."""


class Cache:
    """Keys and values of `batch` rows of up to `length` tokens; every row has a length of its own.

    New tokens of a row are written from its length on, and `lengths` is what the next forward starts from. Nothing
    beyond a row's length is ever read, so a row is freed by `lengths[row] = 0` and nothing else. Rows that are done may
    be overwritten (`move`), and `rows` gives a view of some of them that shares the memory, but not the lengths: copy
    those back after a forward on the view.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch, config.num_kv_heads, length, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.lengths = [0] * batch

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.keys[0].shape[2]

    def rows(self, start: int, stop: int) -> "Cache":
        """Rows start … stop - 1 as a cache that shares the memory, with lengths of its own."""
        view = object.__new__(Cache)
        view.keys = [k[start:stop] for k in self.keys]
        view.values = [v[start:stop] for v in self.values]
        view.lengths = self.lengths[start:stop]
        return view

    def move(self, source: int, target: int) -> None:
        """Copy row `source` over row `target`."""
        n = self.lengths[source]
        for kv in (*self.keys, *self.values):
            kv[target, :, :n] = kv[source, :, :n]
        self.lengths[target] = n


class LM(nn.Module):
    """A decoder-only language model, exactly Qwen3 (or Llama without `qk_norm`)."""

    cos: Tensor
    sin: Tensor

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
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.scalar_heads = nn.ModuleDict({name: nn.Linear(config.dim, 1, bias=False) for name in heads})
        cos, sin = rope_table(config.head_dim, config.context, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        """N(0, init_std); the projections that write into the residual stream get init_std / sqrt(2 L) (GPT-2)."""
        std = self.config.init_std
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                writes_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, 0.0, std / math.sqrt(2 * self.config.num_layers) if writes_residual else std)

    def reset_rope(self) -> None:
        """Compute the rotary tables anew, in fp32: they are no weights and never leave that precision."""
        cos, sin = rope_table(self.config.head_dim, self.config.context, self.config.rope_theta)
        device = self.embedding.weight.device
        self.cos, self.sin = cos.to(device), sin.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the model; the rotary table follows to the device but stays fp32 (and is filled anew after the
        `to_empty` of a model that was built on the meta device)."""
        before = self.cos.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.cos.device
        if device.type != "meta" and (device != before or self.cos.dtype != torch.float32):
            self.reset_rope()
        return self

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """Rows of the parts of every fused matrix, by parameter name: q, k, v and gate, up are one in memory."""
        c = self.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        layers = [f"blocks.{i}" for i in range(c.num_layers)]
        qkv = {f"{layer}.attention.qkv.weight": (q, kv, kv) for layer in layers}
        return qkv | {f"{layer}.mlp.gate_up.weight": (c.ffn_dim, c.ffn_dim) for layer in layers}

    def set_dropout(self, p: float) -> None:
        """Dropout probability of the residual branches while training."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.dropout = p

    def forward(
        self, tokens: Tensor, doc: Tensor | None = None, pos: Tensor | None = None, cache: Cache | None = None
    ) -> Out:
        """Hidden states of tokens (B, T).

        Without a cache: `doc` (B, T) tells documents apart (attention stays inside one; < 0 is padding), None means one
        document a row; `pos` (B, T) are the rotary positions, by default 0 … T - 1.
        With a cache: the tokens continue the cached rows; `doc` < 0 marks padding at the end of a row, which is not
        kept (other values of `doc` mean nothing there). Rows may have different lengths.
        `ModelError` when the tokens fit neither the model's context nor the cache.
        """
        b, t = tokens.shape
        backend = self.backend or _fastest(tokens.device.type)
        mask: Mask | None
        if cache is None:
            mask = None if doc is None else mask_for(doc, backend)
            columns = None
            if pos is None:
                self._check_context(t)
                cos, sin = self.cos[:t][None, :, None], self.sin[:t][None, :, None]
        else:
            columns, mask = self._extend(cache, tokens)
            added = [t] * b if doc is None else _added(doc)
            pos = columns if pos is None else pos
        if pos is not None:
            cos, sin = rotary_rows(self.cos, pos), rotary_rows(self.sin, pos)

        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            # Only the columns in use are read: decoding costs what the longest row holds, not what was allocated.
            layer = None
            if cache is not None:
                assert columns is not None and isinstance(mask, Tensor)
                used = mask.shape[-1]
                layer = (cache.keys[i][:, :, :used], cache.values[i][:, :, :used], columns)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, layer, backend, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, layer, backend)
        if cache is not None:
            cache.lengths = [n + m for n, m in zip(cache.lengths, added, strict=True)]
        return Out(self.norm(x), (), torch.zeros((), device=tokens.device))

    def _extend(self, cache: Cache, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (B, T) where the new tokens go, and the mask (B, 1, T, S) over the columns in use afterwards."""
        b, t = tokens.shape
        if b != len(cache.lengths):
            raise ModelError(f"{b} rows of tokens for a cache of {len(cache.lengths)}; give one row of tokens for each")
        used = max(cache.lengths) + t
        if used > cache.capacity:
            raise ModelError(f"{used} tokens do not fit into a cache of {cache.capacity}")
        self._check_context(used)
        starts = torch.tensor(cache.lengths, device=tokens.device)
        columns = starts[:, None] + torch.arange(t, device=tokens.device)
        mask = torch.arange(used, device=tokens.device) <= columns[:, :, None]
        return columns, mask[:, None]

    def _check_context(self, length: int) -> None:
        if length > self.config.context:
            raise ModelError(f"{length} tokens exceed the model's context of {self.config.context}; give it fewer")

    def head(self, name: Head, h: Tensor) -> Tensor:
        """Logits (…, V), or a value or reward (…,), of hidden states h (…, D)."""
        if name == "logits":
            return F.linear(h, self.embedding.weight if self.lm_head is None else self.lm_head.weight)
        if name not in self.scalar_heads:
            raise ModelError(f"this model has no {name} head; build it with LM(config, heads=('{name}',))")
        return self.scalar_heads[name](h).squeeze(-1)  # type: ignore[no-any-return]


def _added(doc: Tensor) -> list[int]:
    """Tokens of each row of doc (B, T) that are no padding; all of them must stand before the padding."""
    real = doc >= 0
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise ModelError("padding before or between the tokens of a cached row; put it at the end")
    return real.sum(1).tolist()


def _fastest(device: str) -> Backend:
    match device:
        case "cpu":
            return "grouped"  # at every length (docs/log.md)
        case "cuda" if torch.compiler.is_compiling():
            return "flex"
        case _:
            return "sdpa"
