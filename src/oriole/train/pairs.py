"""Preference pairs: read, rendered, checked, and packed so that both sides of a pair stand in the same row.

On disk the pairs of a part are token shards in which document 2k is the better and 2k + 1 the worse side of pair k;
both are whole conversations, prompt and answer, and only the answer's tokens are marked as trained. In a batch they are
documents 2k and 2k + 1 of their row, whichever rows the batch is cut into.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, final

import numpy as np
from numpy.typing import NDArray

from oriole.errors import DataError
from oriole.log import say, track
from oriole.text.formats import Skipped, expand, read_preferences
from oriole.text.mixture import Mixture
from oriole.text.shards import Ids, Mask, Row, Shards, View, held_out, write_shards
from oriole.text.template import Message, Preference, render
from oriole.text.tokenizer import Tokenizer
from oriole.train.batch import Batch, BestFit, Rows, shifted
from oriole.train.prepare import data_root, weighted
from oriole.train.recipe import Part, Recipe

__all__ = ["PairPacker", "Pairs", "encode_pairs", "make_pairs", "mixed", "pair_batches", "prompt_key"]

Side = tuple[Ids, Mask]
"""Ids (n,) of a conversation and the mask (n,) of what is the answer in it."""


# --- text to pairs ---------------------------------------------------------------------------------------------------


def encode_pairs(
    preferences: Iterable[Preference],
    tok: Tokenizer,
    *,
    row: int,
    context: int,
    cut: bool,
    left_out: Counter[str],
    margins: list[float] | None = None,
) -> Iterator[Row]:
    """Two rows for each pair, the better side first, that fit into `row` positions together and `context` each.

    A pair that cannot teach anything is counted by name in `left_out` instead: "equal sides", "empty completion",
    "prompt too long". Answers that are too long lose their end with `cut`, the longer one first; without it
    the pair is left out as "answer too long". The margin of each pair that is taken is added to `margins`.
    """
    with track("tokenizing", unit="pairs") as bar:
        for preference in preferences:
            sides = _sides(preference, tok, row, context, cut)
            if isinstance(sides, str):
                left_out[sides] += 1
                continue
            bar.update(1)
            if margins is not None:
                margins.append(preference.margin)
            for ids, mask in sides:
                yield ids, mask, preference.source


def _sides(
    preference: Preference, tok: Tokenizer, row: int, context: int, cut: bool
) -> tuple[tuple[list[int], list[int]], ...] | str:
    """Ids and answer mask of both sides, or why there is nothing to learn from them."""
    if any(_is_empty(answer) for answer in (preference.chosen, preference.rejected)):
        return "empty completion"
    chosen, rejected = (_side(preference.prompt, answer, tok) for answer in (preference.chosen, preference.rejected))
    if chosen == rejected:
        return "equal sides"
    first, second = (len(ids) - 1 for ids, _ in (chosen, rejected))  # positions: the last id is only a target
    # Of two long answers each gets half of the row; a short one leaves the rest of its half to the other.
    most = min(context, max(row - second, row // 2)), min(context, max(row - first, row // 2))
    if any(mask.index(1) > limit for (_, mask), limit in zip((chosen, rejected), most, strict=True)):
        return "prompt too long"
    if not cut and (first > most[0] or second > most[1]):
        return "answer too long"
    made = tuple(
        (ids[: limit + 1], mask[: limit + 1]) for (ids, mask), limit in zip((chosen, rejected), most, strict=True)
    )
    return "equal sides" if made[0] == made[1] else made


def _side(prompt: Sequence[Message], answer: Sequence[Message], tok: Tokenizer) -> tuple[list[int], list[int]]:
    """The conversation as `render` writes it, with the mask of what the assistant says in the answer only."""
    ids, mask = render([*prompt, *answer], tok)
    # What the assistant says is one run of ones for each of its messages; those of the prompt come first.
    for _ in range(sum(message.role == "assistant" for message in prompt)):
        start = mask.index(1)
        end = mask.index(0, start)
        mask[start:end] = [0] * (end - start)
    return ids, mask


def _is_empty(answer: Sequence[Message]) -> bool:
    return not any(
        m.role == "assistant" and (m.content.strip() or m.tool_calls or (m.reasoning or "").strip()) for m in answer
    )


def prompt_key(prompt: Sequence[Message]) -> str:
    """What decides whether a prompt is held out: all pairs of a prompt, and its rollouts, are on the same side."""
    return "\x00".join(message.content for message in prompt)


# --- pairs of a recipe -----------------------------------------------------------------------------------------------


@final
class Pairs:
    """The pairs of one part, as a mixture walks through them: "document" k of part i is [i, k].

    A side's last id is only a target and has no position in a batch, unless the sides are to be `whole`: then it has
    one, behind which nothing is predicted, and which is where a reward model reads its score.
    """

    def __init__(self, shards: Shards | View, number: int = 0, *, whole: bool = False) -> None:
        self.shards, self.number, self.whole = shards, number, whole
        self.values: dict[str, NDArray[np.float64]] = {}
        """What is known of each side, (2 pairs,), by name: it comes with the batches, as `extra`."""

    def __len__(self) -> int:
        return len(self.shards) // 2

    def pair(self, k: int) -> tuple[Side, Side]:
        """The better and the worse side of pair `k`; a `whole` one with an id more, which is never read."""
        better, worse = self.shards.doc(2 * k), self.shards.doc(2 * k + 1)
        return (_prolonged(better), _prolonged(worse)) if self.whole else (better, worse)

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """(pairs,): what each takes of a row."""
        sides = self.shards.lengths - (0 if self.whole else 1)
        return sides[::2] + sides[1::2]

    # --- for the mixture: a pair counts one, whatever its length

    @property
    def num_tokens(self) -> int:
        """Of the pairs' numbers."""
        return 2 * len(self)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Of the pairs' numbers."""
        return np.full(len(self), 2, np.int64)

    @property
    def fingerprint(self) -> str:
        """Changes with the shards' content."""
        return self.shards.fingerprint

    def doc(self, k: int, /) -> tuple[Ids, Mask]:
        """[number of the part, k]."""
        return np.array([self.number, k], np.uint32), np.ones(2, np.uint8)

    @cached_property
    def margins(self) -> NDArray[np.float64]:
        """(pairs,): how much better the better side is, 0 where the data does not say."""
        base = self.shards.shards if isinstance(self.shards, View) else self.shards
        path = _margins_path(base.folder)
        every: NDArray[np.float64] = np.zeros(len(base) // 2)
        if path.exists():
            every = np.load(path, allow_pickle=False)
        return every[self.shards.indices[::2] // 2] if isinstance(self.shards, View) else every


def _prolonged(side: Side) -> Side:
    ids, mask = side
    more: Ids = np.concatenate([ids, ids[-1:]])
    return more, np.concatenate([mask, np.zeros(1, np.uint8)])


def _margins_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.margins.npy")


def make_pairs(
    recipe: Recipe, tokenizer: Tokenizer, *, context: int, cut: bool, whole: bool = False
) -> tuple[dict[str, Shards], dict[str, Shards]]:
    """Training and held-out pairs of every preference part, made where they are missing or made from other files.

    A part's `val` files, or the pairs whose prompts a hash holds out, are the held-out ones, `eval.pairs` at most.
    `whole` leaves room for both sides' last ids (`Pairs`).
    """
    beyond = int(whole)
    context, row = context - beyond, recipe.train.length - 2 * beyond
    train: dict[str, Shards] = {}
    val: dict[str, Shards] = {}
    for name, part in recipe.parts.items():
        if recipe.format_of(part) == "preference":
            train[name] = _part_pairs(recipe, tokenizer, name, part, "train", row, context, cut)
            val[name] = _part_pairs(recipe, tokenizer, name, part, "val", row, context, cut)
    if not train:
        raise DataError(f"no part of the {recipe.stage} recipe holds preference pairs; name their files in one")
    return train, val


def _part_pairs(
    recipe: Recipe, tokenizer: Tokenizer, name: str, part: Part, split: str, row: int, context: int, cut: bool
) -> Shards:
    paths = expand(part.val if split == "val" and part.val else part.files, data_root(recipe))
    files = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
    limit = 2 * recipe.eval.pairs if split == "val" else None
    made_from = [
        split,
        files,
        bool(part.val),
        recipe.eval.holdout_pairs,
        recipe.skip_bad,
        limit,
        tokenizer.fingerprint(),
    ]
    made_from += [row, context, cut]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    folder = recipe.run / "shards" / f"pairs-{name}-{split}-{key}"
    if folder.exists():
        return Shards.open(folder)

    skipped = Skipped() if recipe.skip_bad else None
    left_out: Counter[str] = Counter()
    margins: list[float] = []
    where = f"{split} part '{name}' of {recipe.stage}, from {', '.join(map(str, paths))}"
    rows = encode_pairs(
        _split(recipe, part, paths, split, skipped), tokenizer,
        row=row, context=context, cut=cut, left_out=left_out, margins=margins,
    )  # fmt: skip
    try:
        made = write_shards(_noting(itertools.islice(rows, limit), margins, folder), tokenizer, folder)
    except DataError as error:
        why = f"; left out: {_listed(left_out)}" if left_out else ""
        raise DataError(f"{error} ({where}{why})") from error
    if skipped is not None and skipped.total:
        say(f"{skipped.total:,} bad records skipped, for example: {skipped.examples[0]}", "yellow")
    if left_out:
        say(f"pairs left out: {_listed(left_out)} ({where})", "yellow")
    return made


def _noting(rows: Iterable[Row], margins: Sequence[float], folder: Path) -> Iterator[Row]:
    """The rows; behind the last, before their folder is whole, their margins are written beside it if there are any."""
    yield from rows
    if any(margins):
        np.save(_margins_path(folder), np.array(margins, np.float64))


def _listed(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {why}" for why, count in sorted(left_out.items()))


def _split(
    recipe: Recipe, part: Part, paths: Sequence[Path], split: str, skipped: Skipped | None
) -> Iterator[Preference]:
    for preference in read_preferences(paths, skip_bad=skipped):
        if part.val or held_out(prompt_key(preference.prompt), recipe.eval.holdout_pairs) == (split == "val"):
            yield preference


def mixed(recipe: Recipe, train: Mapping[str, Shards], *, whole: bool = False) -> tuple[list[Pairs], dict[str, float]]:
    """The parts of the mixture, numbered, and their shares of the pairs, by name."""
    views, shares = weighted(recipe, train)
    return [Pairs(view, number, whole=whole) for number, view in enumerate(views.values())], shares


# --- pairs to batches ------------------------------------------------------------------------------------------------


@final
class PairPacker:
    """An endless iterator of batches (B, T) of whole pairs, best fit first, in the order of a mixture.

    What is known of a side (`Pairs.values`) stands in `extra` at the side's last position and is 0 everywhere else, so
    that the sum over a document is its value.
    """

    def __init__(
        self, parts: Sequence[Pairs], shares: Mapping[str, float], seed: int, batch_size: int, length: int
    ) -> None:
        self.parts, self.batch_size, self.length = list(parts), batch_size, length
        self.stream = Mixture(dict(zip(shares, parts, strict=True)), shares, seed)
        self._room: BestFit[tuple[int, int]] = BestFit()  # part and pair

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return self._batch([self._row() for _ in range(self.batch_size)])

    def rows_for(self, pairs: float) -> int:
        """How many rows the next `pairs` pairs fill; the packer has moved on by them afterwards."""
        rows = 0
        while pairs > 0:
            pairs -= len(self._row())
            rows += 1
        return rows

    def _row(self) -> list[tuple[int, int]]:
        while self._room.tokens < 2 * self.batch_size * self.length:
            number, k = map(int, next(self.stream)[0])
            self._room.add(int(self.parts[number].positions[k]), (number, k))
        return list(self._room.row(self.length))

    def _batch(self, chosen: Sequence[Sequence[tuple[int, int]]]) -> Batch:
        return _filled(self.parts, chosen, self.length)

    def state_dict(self) -> dict[str, Any]:
        """The stream's state and which pairs wait, for JSON."""
        waiting = [[length, order, *item] for length, order, item in self._room.waiting()]
        return {"stream": self.stream.state_dict(), "arrived": self._room.arrived, "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self.stream.load_state_dict(state["stream"])
        waiting = [(length, order, (number, k)) for length, order, number, k in state["waiting"]]
        self._room.restore(state["arrived"], waiting)


def pair_batches(pairs: Pairs, batch_size: int, length: int) -> Iterator[tuple[Batch, list[list[int]]]]:
    """Every pair once, packed in the order of length, and which pairs stand in each row of a batch: for measuring."""
    room: BestFit[int] = BestFit()
    for k in range(len(pairs)):
        room.add(int(pairs.positions[k]), k)
    rows: list[list[int]] = []
    while room.tokens:
        rows.append(list(room.row(length)))
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        yield _filled([pairs], [[(0, k) for k in row] for row in some], length), some


def _filled(parts: Sequence[Pairs], chosen: Sequence[Sequence[tuple[int, int]]], length: int) -> Batch:
    """A batch whose rows hold these pairs, each (part, pair)."""
    rows = Rows(len(chosen), length)
    names = parts[0].values
    extra = {name: np.zeros((len(chosen), length), np.float32) for name in names}
    for row, refs in enumerate(chosen):
        for number, k in refs:
            for side, (ids, mask) in enumerate(parts[number].pair(k)):
                span = rows.add(row, *shifted(ids, mask))
                for name in names:
                    extra[name][row, span.stop - 1] = parts[number].values[name][2 * k + side]
    return rows.batch(extra)
