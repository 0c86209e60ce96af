"""The encoder-decoder: a source is read in both directions, and a target is written that looks at it.

One embedding serves source, target and head. A decoder that is asked for an answer reads `START`, then what it has
written; keys and values of the source are computed once for a request (`Seq2SeqCache`).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oriole.errors import ModelError
from oriole.model.attention import Backend, Mask, document_mask, fastest, mask_for, pair_mask_for
from oriole.model.cache import Cache, LayerCache
from oriole.model.lm import Out, check_context
from oriole.model.rope import Angles
from oriole.model.seq2seqconfig import Seq2SeqConfig
from oriole.model.seq2seqlayers import Layer, Rotary, Sight, distance_bucket, norm, sinusoids

__all__ = ["START", "Seq2Seq", "Seq2SeqCache"]

START = 1
"""What the decoder reads first: the id of `<|im_start|>`, which no answer has in it."""


class Seq2SeqCache(NamedTuple):
    """What decoding keeps of some rows: keys and values of the written tokens, and of the sources; to the engine a
    `model.cache.Cache`."""

    own: Cache
    source: Cache

    @property
    def lengths(self) -> list[int]:
        """Written tokens of each row."""
        return self.own.lengths

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold of each."""
        return self.own.capacity

    def rows(self, start: int, stop: int) -> "Seq2SeqCache":
        """As `Cache.rows`."""
        return Seq2SeqCache(self.own.rows(start, stop), self.source.rows(start, stop))

    def keep(self, start: int, view: "Seq2SeqCache") -> None:
        """As `Cache.keep`."""
        self.own.keep(start, view.own)
        self.source.keep(start, view.source)

    def take_over(self, other: "Seq2SeqCache") -> None:
        """As `Cache.take_over`."""
        self.own.take_over(other.own)
        self.source.take_over(other.source)

    def move(self, source: int, target: int) -> None:
        """As `Cache.move`."""
        self.own.move(source, target)
        self.source.move(source, target)


class Seq2Seq(nn.Module):
    """Encoder and decoder of a `Seq2SeqConfig`, in the classic or the modern form."""

    def __init__(self, config: Seq2SeqConfig, *, backend: Backend | None = None) -> None:
        super().__init__()
        self.config = config
        self.backend: Backend | None = backend
        """Attention backend; None: what is fastest here for the shape."""
        self.recompute = False
        """Keep only what goes in and out of a block and compute the rest again in the backward pass."""
        self.dropout = 0.0
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.encoder = nn.ModuleList(Layer(config, decoder=False) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(Layer(config, decoder=True) for _ in range(config.decoder_layers))
        pre, relative = config.norm_at == "pre", config.positions == "relative"
        self.encoder_norm = norm(config) if pre else nn.Identity()
        self.decoder_norm = norm(config) if pre else nn.Identity()
        self.encoder_bias = nn.Embedding(config.buckets, config.num_heads) if relative else None
        self.decoder_bias = nn.Embedding(config.buckets, config.num_heads) if relative else None
        self.angles = None if relative else Angles(config)
        self._init_weights()

    def _init_weights(self) -> None:
        """Modern: N(0, init_std), what writes into a residual stream with init_std / sqrt(branches). Classic: Xavier's
        uniform, with keys and values as two matrices, and embeddings of N(0, 1 / D), since they are scaled up."""
        c = self.config
        branches = 2 * c.encoder_layers + 3 * c.decoder_layers
        fused = self.fused_rows()
        for name, parameter in self.named_parameters():
            if parameter is self.embedding.weight:
                nn.init.normal_(parameter, 0.0, c.dim**-0.5 if c.positions == "sinusoid" else c.init_std)
            elif parameter.dim() < 2:
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
            elif c.norm_at == "post":
                for part in torch.split(parameter, list(fused.get(name, (len(parameter),)))):
                    nn.init.xavier_uniform_(part)
            else:
                writes_residual = name.endswith((".out.weight", ".down.weight"))
                nn.init.normal_(parameter, 0.0, c.init_std / math.sqrt(branches) if writes_residual else c.init_std)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """Rows of the parts of every fused matrix, by parameter name."""
        c = self.config
        parts = {".kv.weight": (c.dim, c.dim)}
        if c.activation == "swiglu":
            parts[".up.weight"] = (c.ffn_dim, c.ffn_dim)
        names = [name for name, _ in self.named_parameters()]
        return {name: rows for name in names for end, rows in parts.items() if name.endswith(end)}

    def set_dropout(self, p: float) -> None:
        """Dropout probability while training: on every branch, and on the embeddings with their positions."""
        self.dropout = p
        for layer in (*self.encoder, *self.decoder):
            assert isinstance(layer, Layer)
            layer.dropout = p

    # --- forward

    def forward(
        self,
        tokens: Tensor,
        doc: Tensor | None = None,
        pos: Tensor | None = None,
        cache: Seq2SeqCache | None = None,
        *,
        source: Tensor | None = None,
        source_doc: Tensor | None = None,
        source_pos: Tensor | None = None,
    ) -> Out:
        """Decoder states of targets `tokens` (B, T) beside sources `source` (B, S).

        Without a cache: `doc` (B, T) and `source_doc` (B, S) tell the pairs of a row apart, target k sees source k and
        nothing else; < 0 is padding, and None one pair a row. `pos` and `source_pos` are positions within a pair.
        With a cache (`prefill` has filled it) the tokens continue the cached rows, and there is no source.
        `ModelError` when something is longer than the context.
        """
        if cache is not None:
            return self._continue(tokens, cache)
        if source is None:
            raise ModelError("an encoder-decoder needs a source to look at; give it one, or a cache that has seen one")
        memory = self.encode(source, source_doc, source_pos)
        backend = self.backend or fastest(tokens.device.type)
        cross = None
        if doc is not None and source_doc is not None:
            cross = pair_mask_for(doc, source_doc, backend)
        elif source_doc is not None:
            cross = (source_doc >= 0)[:, None, None].expand(-1, -1, tokens.shape[1], -1)
        sight = self._sight(tokens.shape[1], doc, pos, self.decoder_bias, tokens.device)._replace(cross=cross)
        x = self._embed(tokens, pos)
        for layer in self.decoder:
            x = self._through(layer, x, sight, memory)
        return Out(self.decoder_norm(x), (), torch.zeros((), device=tokens.device), {})

    def encode(self, source: Tensor, doc: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """States (B, S, D) of sources (B, S), each token of which sees all of its own document."""
        sight = self._sight(source.shape[1], doc, pos, self.encoder_bias, source.device, encoder=True)
        x = self._embed(source, pos)
        for layer in self.encoder:
            x = self._through(layer, x, sight)
        encoded: Tensor = self.encoder_norm(x)
        return encoded

    def _through(self, layer: nn.Module, x: Tensor, sight: Sight, memory: Tensor | None = None) -> Tensor:
        out: Tensor
        if self.recompute and torch.is_grad_enabled():
            out = checkpoint(layer, x, sight, memory, use_reentrant=False)
        else:
            out = layer(x, sight, memory)
        return out

    def _sight(
        self,
        length: int,
        doc: Tensor | None,
        pos: Tensor | None,
        bias: nn.Embedding | None,
        device: torch.device,
        *,
        encoder: bool = False,
    ) -> Sight:
        """Rotary rows and masks of a stack that reads `length` tokens at once."""
        if pos is None:
            check_context(length, self.config.context)
        backend = self.backend or fastest(device.type)
        cross_backend = backend
        if bias is not None and backend != "eager":
            backend = "sdpa"  # a bias that is learned has its gradient there
        mask: Mask | None = None
        if doc is not None:
            if encoder:
                mask = pair_mask_for(doc, doc, backend)
            else:  # a learned bias is added to the whole square
                mask = mask_for(doc, backend) if bias is None else document_mask(doc)
        if bias is not None:
            at = torch.arange(length, device=device)
            if mask is None and not encoder:
                mask = (at <= at[:, None])[None, None]
            assert mask is None or isinstance(mask, Tensor)
            mask = self._biased(bias, (at - at[:, None])[None], mask, causal=not encoder)
        return Sight(self._rotary(length, pos), mask, None, backend, cross_backend)

    def _rotary(self, length: int, pos: Tensor | None) -> Rotary:
        return self.angles.rows(length, pos) if self.angles is not None and self.config.positions == "rope" else None

    def _biased(self, bias: nn.Embedding, distance: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
        """What is added to the scores, (B or 1, H, T, S), at distances key - query (B or 1, T, S)."""
        bucket = distance_bucket(distance, self.config.buckets, self.config.farthest, causal=causal)
        added: Tensor = bias(bucket).permute(0, 3, 1, 2)
        return added if mask is None else added.masked_fill(~mask, -math.inf)

    def _embed(self, tokens: Tensor, pos: Tensor | None) -> Tensor:
        x = self.embedding(tokens)
        if self.angles is not None and self.config.positions == "sinusoid":
            places = sinusoids(*self.angles.rows(tokens.shape[1], pos))[:, :, 0]
            x = x * math.sqrt(self.config.dim) + places.to(x.dtype)
        return F.dropout(x, self.dropout, self.training)

    # --- one token at a time

    def new_cache(self, batch: int, length: int) -> Seq2SeqCache:
        """An empty cache in the model's precision."""
        weight = self.embedding.weight
        own, source = (Cache(self.config, batch, length, dtype=weight.dtype, device=weight.device) for _ in range(2))
        return Seq2SeqCache(own, source)

    def prefill(self, source: Tensor, lengths: Tensor, cache: Seq2SeqCache) -> Out:
        """Read sources (B, S), of which the first `lengths` (B,) tokens count, into empty rows; the decoder's states
        (B, 1, D) after START, which say how the answers begin."""
        b, s = source.shape
        if s > cache.capacity:
            raise ModelError(f"{s} tokens do not fit into a cache of {cache.capacity}")
        doc = torch.where(torch.arange(s, device=source.device) < lengths[:, None], 0, -1)
        memory = self.encode(source, doc)
        for i, layer in enumerate(self.decoder):
            assert isinstance(layer, Layer) and layer.cross is not None
            keys, values = layer.cross.keys_values(memory, None)
            cache.source.keys[i][:, :, :s], cache.source.values[i][:, :, :s] = keys, values
        cache.source.lengths, cache.own.lengths = lengths.tolist(), [0] * b
        start = torch.full((b, 1), START, dtype=torch.int64, device=source.device)
        return self._continue(start, cache)

    def _continue(self, tokens: Tensor, cache: Seq2SeqCache) -> Out:
        """Decoder states of tokens (B, T) that follow the cached ones."""
        b, t = tokens.shape
        device, own, source = tokens.device, cache.own, cache.source
        backend = self.backend or fastest(device.type)
        columns, places = own.places(tokens, [t] * b, backend)
        check_context(max(own.lengths) + t, self.config.context)
        place, own_backend = places[0], backend
        mask = place.mask
        if self.decoder_bias is not None:
            distance = torch.arange(place.used, device=device) - columns[:, :, None]  # (B, T, S)
            mask = self._biased(self.decoder_bias, distance, (distance <= 0)[:, None], causal=True)
            own_backend = backend if backend == "eager" else "sdpa"
        seen, lengths = max(source.lengths), torch.tensor(source.lengths, device=device)
        cross = (torch.arange(seen, device=device) < lengths[:, None])[:, None, None].expand(-1, -1, t, -1)
        sight = Sight(self._rotary(t, columns), mask, cross, own_backend, backend)
        x = self._embed(tokens, columns)
        for i, layer in enumerate(self.decoder):
            memory = source.keys[i][:, :, :seen], source.values[i][:, :, :seen]
            x = layer(x, sight, memory, LayerCache(own.keys[i], own.values[i], place))
        own.lengths = [n + t for n in own.lengths]
        return Out(self.decoder_norm(x), (), torch.zeros((), device=device), {})

    def head(self, name: str, h: Tensor) -> Tensor:
        """Logits (…, V) of hidden states h (…, D)."""
        if name != "logits":
            raise ModelError(f"an encoder-decoder has no {name} head; give a language model for that")
        return F.linear(h, self.embedding.weight)
