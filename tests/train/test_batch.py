"""Packing loses nothing, doubles nothing, mixes nothing, and goes on exactly where it was stopped."""

import itertools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oriole.errors import DataError
from oriole.train.batch import IGNORE, Batch, Packer


class Cycle:
    """The documents again and again; every document is known by its first token."""

    def __init__(self, docs: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self.docs, self.at = docs, 0

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        self.at += 1
        return self.docs[(self.at - 1) % len(self.docs)]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def documents(lengths: list[int], seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [(rng.integers(1, 60_000, n).astype(np.uint16), rng.integers(0, 2, n).astype(np.uint8)) for n in lengths]


def pieces(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tokens, targets) of every segment of a batch, in order."""
    out = []
    for tokens, targets, doc, pos in zip(batch.tokens, batch.targets, batch.doc, batch.pos, strict=True):
        for number in range(int(doc.max()) + 1):
            where = doc == number
            assert pos[where].tolist() == list(range(int(where.sum())))
            out.append((tuple(tokens[where].tolist()), tuple(targets[where].tolist())))
        hole = doc < 0
        assert (targets[hole] == IGNORE).all() and (tokens[hole] == 0).all()
    return out


def expected(docs: list[tuple[np.ndarray, np.ndarray]], length: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The segments of the documents, cut at multiples of `length`, spelled out slowly."""
    out = []
    for ids, mask in docs:
        for start in range(0, len(ids) - 1, length):
            span = range(start, min(start + length, len(ids) - 1))
            following = [int(ids[i + 1]) if mask[i + 1] else IGNORE for i in span]
            out.append((tuple(int(ids[i]) for i in span), tuple(following)))
    return out


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=40).filter(lambda n: max(n) > 1),
    batch_size=st.integers(1, 4),
    length=st.sampled_from([8, 16, 33]),
)
def test_nothing_is_lost_or_doubled_or_starved(lengths: list[int], batch_size: int, length: int) -> None:
    stream = Cycle(documents(lengths))
    packer = Packer(stream, batch_size, length)
    seen: Counter[Any] = Counter()
    for batch in itertools.islice(packer, 30):
        seen.update(pieces(batch))
    waiting = [(tuple(i), tuple(t)) for _, i, t in packer.state_dict()["waiting"]]
    drawn = [stream.docs[i % len(stream.docs)] for i in range(stream.at)]
    assert seen + Counter(waiting) == Counter(expected(drawn, length))
    # No document waits for ever: whatever waits came in among the newest that were drawn.
    oldest = min((order for order, _, _ in packer.state_dict()["waiting"]), default=packer.state_dict()["arrived"])
    assert (
        packer.state_dict()["arrived"] - oldest <= sum(seen.values()) / 30 * (2 * length + 4) + 2 * batch_size * length
    )


@given(stop=st.integers(0, 12), seed=st.integers(0, 3))
def test_resumed_equals_unbroken(stop: int, seed: int) -> None:
    docs = documents([5, 9, 40, 3, 17, 1, 22], seed)
    unbroken = Packer(Cycle(docs), 2, 16)
    for _ in range(stop):
        next(unbroken)
    resumed = Packer(Cycle(docs), 2, 16)
    resumed.load_state_dict(json.loads(json.dumps(unbroken.state_dict())))
    for _ in range(10):
        a, b = next(unbroken), next(resumed)
        for name in ("tokens", "targets", "doc", "pos"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_documents_without_a_pair_are_an_error_not_an_endless_search() -> None:
    with pytest.raises(DataError, match="no second token"):
        next(Packer(Cycle(documents([1, 1])), 1, 8))


def test_rows_of_short_chats_are_full() -> None:
    rng = np.random.default_rng(1)
    packer = Packer(Cycle(documents(rng.integers(15, 70, 5000).tolist())), 16, 256)
    filled = [float((b.doc >= 0).float().mean()) for b in itertools.islice(packer, 50)]
    assert np.mean(filled) > 0.97


def test_the_state_does_not_grow_with_the_corpus() -> None:
    packer = Packer(Cycle(documents([30] * 2000)), 4, 64)
    sizes = []
    for _ in range(200):
        next(packer)
        sizes.append(len(json.dumps(packer.state_dict())))
    assert max(sizes[100:]) < 1.2 * max(sizes[:100])


def test_what_else_a_batch_holds_is_cut_and_joined_with_its_rows() -> None:
    whole = Batch(
        torch.arange(24).view(4, 6),
        torch.arange(24).view(4, 6) + 1,
        torch.zeros(4, 6, dtype=torch.int32),
        torch.arange(6).expand(4, 6),
        extra={"advantages": torch.arange(24.0).view(4, 6)},
    )
    first, rest = whole.cut(0, 1), whole.cut(1, 4)
    assert first.extra["advantages"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert rest.rows.tolist() == list(range(18))
    again = Batch.joined([first, rest]).to("cpu")
    assert torch.equal(again.extra["advantages"], whole.extra["advantages"])
    assert torch.equal(again.tokens, whole.tokens) and torch.equal(again.rows, whole.rows)
