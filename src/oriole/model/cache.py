"""Keys and values of earlier tokens: all of them where a layer sees everything, the window's where it has one."""

from typing import NamedTuple

import torch
from torch import Tensor

from oriole.errors import ModelError
from oriole.model.attention import Backend, Band, Mask, mask_for
from oriole.model.config import ModelConfig
from oriole.model.seq2seqconfig import Seq2SeqConfig

__all__ = ["Cache", "LayerCache", "Place"]


class Place(NamedTuple):
    """Where the new tokens of one forward pass go in the layers of one kind, and what their queries see."""

    mask: Mask | None
    """Over the keys that `LayerCache.extended` gives."""
    columns: Tensor
    """Columns (B, T) of the new keys. They are written first, then the columns in use are attended to."""
    used: int
    """Columns in use afterwards: decoding costs what the longest row holds, not what was allocated."""
    roll: tuple[Tensor, Tensor] | None = None
    """Where T > 1 tokens would overwrite keys that the first of them still see. Columns (B, P) of the keys before the
    new ones, in their order: these and the new ones are attended to. And which new token each column holds afterwards
    (B, W); negative: the one it held."""


class LayerCache(NamedTuple):
    """One layer's keys and values (B, Hkv, columns, hd) in one forward pass."""

    keys: Tensor
    values: Tensor
    place: Place

    def extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k, v (B, Hkv, T, hd); keys and values to attend to (B, Hkv, S, hd)."""
        return self._extended(self.keys, k), self._extended(self.values, v)

    def _extended(self, held: Tensor, new: Tensor) -> Tensor:
        new = new.to(held.dtype)
        if self.place.roll is None:
            return held[:, :, : self.place.used].scatter_(2, _rows(self.place.columns, new), new)
        before, kept = self.place.roll
        seen = torch.cat((held.gather(2, _rows(before, new)), new), dim=2)
        held.copy_(torch.where(_rows(kept, new) >= 0, new.gather(2, _rows(kept.clamp(min=0), new)), held))
        return seen


def _rows(places: Tensor, like: Tensor) -> Tensor:
    """places (B, n) for every head and channel: (B, Hkv, n, hd)."""
    return places[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


class Cache:
    """Keys and values of `batch` rows of up to `length` tokens; every row has a length of its own.

    New tokens of a row are written from its length on, and `lengths` is what the next forward starts from. Nothing
    beyond a row's length is ever read, so a row is freed by `lengths[row] = 0` and nothing else. Rows that are done may
    be overwritten (`move`), and `rows` gives a view of some of them that shares the memory, but not the lengths: copy
    those back after a forward on the view.

    A layer with a window of W keeps the last W tokens, token p in column p mod W: its memory stops growing there. A
    model of such layers alone holds rows of any length once `length` reaches the window. What a window has passed is
    gone, so that a row cannot be shortened to anything but 0.
    """

    def __init__(
        self,
        config: ModelConfig | Seq2SeqConfig,
        batch: int,
        length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.windows = list(config.windows)
        shapes = [(batch, config.num_kv_heads, min(length, w or length), config.head_dim) for w in self.windows]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.lengths = [0] * batch
        rolls = all(w is not None and w <= length for w in self.windows)
        self.capacity = max(length, config.context) if rolls else length
        """Tokens a row can hold."""

    def rows(self, start: int, stop: int) -> "Cache":
        """Rows start … stop - 1 as a cache that shares the memory, with lengths of its own."""
        view = object.__new__(Cache)
        view.windows, view.capacity = self.windows, self.capacity
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

    def keep(self, start: int, view: "Cache") -> None:
        """Take over the lengths of a view that begins at row `start`."""
        self.lengths[start : start + len(view.lengths)] = view.lengths

    def take_over(self, other: "Cache") -> None:
        """Copy all rows of a cache of the same model that is not larger in any direction."""
        count = len(other.lengths)
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            mine[:count, :, : theirs.shape[2]] = theirs
        self.lengths[:count] = other.lengths

    def places(self, tokens: Tensor, added: list[int], backend: Backend) -> tuple[Tensor, list[Place]]:
        """Positions (B, T) of the new tokens, and their place in each layer, made once for each kind of layer.

        `added`: how many of a row's tokens are no padding. `ModelError` where the tokens do not fit.
        """
        b, t = tokens.shape
        if b != len(self.lengths):
            raise ModelError(f"{b} rows of tokens for a cache of {len(self.lengths)}; give one row of tokens for each")
        used = max(self.lengths) + t
        if used > self.capacity:
            raise ModelError(f"{used} tokens do not fit into a cache of {self.capacity}")
        starts = torch.tensor(self.lengths, device=tokens.device)
        pos = starts[:, None] + torch.arange(t, device=tokens.device)
        made: dict[int, Place] = {}
        for keys in self.keys:
            columns = min(used, keys.shape[2])
            if columns not in made:
                if used > columns and t > 1:
                    counts = torch.tensor(added, device=tokens.device)
                    made[columns] = _rolling(pos, counts, columns, used - t, backend)
                else:
                    made[columns] = _writing(pos, columns)
        return pos, [made[min(used, keys.shape[2])] for keys in self.keys]


def _writing(pos: Tensor, columns: int) -> Place:
    """The new tokens are written into their columns, and what these hold then is seen: everything, or a window."""
    at = pos % columns
    if pos.shape[1] == columns:  # nothing before: causal
        return Place(None, at, columns)
    return Place((torch.arange(columns, device=pos.device) <= pos[:, :, None])[:, None], at, columns)


def _rolling(pos: Tensor, added: Tensor, window: int, longest: int, backend: Backend) -> Place:
    """Several new tokens that leave their window: they are attended to beside the window before them, then kept."""
    start, past = pos[:, :1], min(window - 1, longest)
    before = start - past + torch.arange(past, device=pos.device)  # (B, P), negative where a row is shorter
    if past:
        doc = torch.cat((torch.where(before >= 0, 0, -1), torch.zeros_like(pos)), dim=1)
        mask: Mask = mask_for(doc, backend, window, pos.shape[1])
    else:
        mask = Band(window)
    last = start + added[:, None] - 1
    # The newest token that falls into each column.
    holds = last - (last - torch.arange(window, device=pos.device)) % window
    return Place(mask, pos % window, window, (before % window, holds - start))
