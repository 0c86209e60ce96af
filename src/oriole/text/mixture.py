"""The seeded mixture that training reads token shards through: parts by their shares, resumed from a few numbers."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol, Self, final

import numpy as np
import xxhash
from numpy.typing import NDArray

from oriole.errors import CheckpointError, ConfigError, DataError
from oriole.text.shards import Ids, Mask

__all__ = ["Documents", "Mixture"]

SCHEMA: Final = 1
"""Of the saved position."""


class Documents(Protocol):
    """What a mixture walks through: documents by number, as `Shards` and `View` have them."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def lengths(self) -> NDArray[np.int64]: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def doc(self, i: int, /) -> tuple[Ids, Mask]: ...


@final
class _Walk:
    """One part of a mixture: epoch after epoch, each in an order of its own."""

    def __init__(self, name: str, part: Documents, share: float, seed: int, length: int | None) -> None:
        self.name, self.part, self.share, self._seed, self.length = name, part, share, seed, length
        # Pieces of document i are _first[i] … _first[i + 1] - 1.
        pieces = np.ones(len(part), np.int64) if length is None else np.maximum(1, -(-(part.lengths - 1) // length))
        self._first: NDArray[np.int64] = np.concatenate([[0], np.cumsum(pieces)])
        self.size = int(self._first[-1])
        self.epoch = self.cursor = self.tokens = 0
        self._order_of = -1
        self._order: NDArray[np.int64]

    def next(self) -> tuple[Ids, Mask]:
        if self.cursor == self.size:
            self.epoch, self.cursor = self.epoch + 1, 0
        if self._order_of != self.epoch:
            self._order, self._order_of = self._permutation(self.epoch), self.epoch
        ids, mask = self._piece(int(self._order[self.cursor]))
        self.cursor += 1
        self.tokens += len(ids)
        return ids, mask

    def _piece(self, number: int) -> tuple[Ids, Mask]:
        if self.length is None:
            return self.part.doc(number)
        doc = int(np.searchsorted(self._first, number, side="right")) - 1
        ids, mask = self.part.doc(doc)
        start = (number - int(self._first[doc])) * self.length
        span = slice(start, start + self.length + 1)
        return ids[span], mask[span]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        # Sorting a generator's raw output, because NumPy promises that stream for all versions, `permutation` not.
        key = xxhash.xxh3_128_intdigest(f"{self._seed}\0{self.name}\0{epoch}".encode())
        return np.argsort(np.random.PCG64(key).random_raw(self.size), kind="stable")


@final
class Mixture:
    """An endless iterator of documents, ids (n,) and loss mask (n,), from several parts by their shares of the tokens.

    The next document comes from the part that is furthest below its share of the tokens so far (the first of equals).
    Each part is walked in epochs, each a permutation that follows from `seed`, the part's name and the epoch alone:
    the state is a few numbers for each part, whatever the size of the data.

    With a `length`, what is walked are pieces of `length` + 1 tokens of which each opens with the last token of the one
    before: `length` pairs of a token and its successor, none lost and none twice. So a book is spread over the epoch,
    where whole it would fill one batch after the other with nothing but itself.
    """

    def __init__(
        self, parts: Mapping[str, Documents], weights: Mapping[str, float], seed: int, length: int | None = None
    ) -> None:
        """`weights` need not sum to 1; a part of weight 0 is left out. `ConfigError`, `DataError` when unusable."""
        if set(parts) != set(weights):
            raise ConfigError(f"the mixture has parts {_names(parts)} but weights for {_names(weights)}; name the same")
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigError(f"the weight of part '{name}' is {weight}; give a number that is not negative")
            if weight and not parts[name].num_tokens:
                raise DataError(f"part '{name}' of the mixture is empty; give it files or a weight of 0")
        total = sum(weights.values())
        if not total:
            raise ConfigError("no part of the mixture has a weight above 0; give at least one")
        self._seed = seed
        self._walks = [_Walk(n, part, weights[n] / total, seed, length) for n, part in parts.items() if weights[n]]
        self._tokens = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Ids, Mask]:
        walk = self._walks[0]
        most = walk.share * self._tokens - walk.tokens
        for other in self._walks[1:]:
            behind = other.share * self._tokens - other.tokens
            if behind > most:
                walk, most = other, behind
        doc = walk.next()
        self._tokens += len(doc[0])
        return doc

    def epochs(self) -> dict[str, float]:
        """How often each part has been walked, 1.5 after one and a half times."""
        return {walk.name: walk.epoch + walk.cursor / walk.size for walk in self._walks}

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as JSON: a mixture of the same parts that loads it goes on with the very next document."""
        return {
            "schema": SCHEMA,
            "seed": self._seed,
            "parts": {
                w.name: {"epoch": w.epoch, "cursor": w.cursor, "tokens": w.tokens, **_identity(w)} for w in self._walks
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; `CheckpointError` unless it comes from the same parts, weights and seed."""
        if state.get("schema") != SCHEMA:
            raise CheckpointError(
                f"the data position has schema {state.get('schema')}, this Oriole reads {SCHEMA}; start the run afresh"
            )
        if state["seed"] != self._seed:
            raise CheckpointError(
                f"the data was shuffled with seed {state['seed']}, not {self._seed}; use that seed to go on"
            )
        if list(state["parts"]) != [w.name for w in self._walks]:
            raise CheckpointError(
                f"the data position is one of parts {_names(state['parts'])}, the mixture has "
                f"{_names(w.name for w in self._walks)}; use the same parts to go on"
            )
        for walk in self._walks:
            said = state["parts"][walk.name]
            for key, now in _identity(walk).items():
                if said.get(key) != now:
                    raise CheckpointError(
                        f"part '{walk.name}' had {key} {said.get(key)} when the position was saved, now {now}; "
                        "use the same data and weights to go on, or start the run afresh"
                    )
        for walk in self._walks:
            said = state["parts"][walk.name]
            walk.epoch, walk.cursor, walk.tokens = said["epoch"], said["cursor"], said["tokens"]
        self._tokens = sum(w.tokens for w in self._walks)


def _identity(walk: _Walk) -> dict[str, Any]:
    """What must be the same for a position to mean the same."""
    return {"fingerprint": walk.part.fingerprint, "share": walk.share, "length": walk.length}


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
