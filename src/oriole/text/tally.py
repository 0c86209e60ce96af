"""What cleaning does, counted by rule and language, with a few samples of each.

Everything here is bounded whatever the corpus holds, is JSON, and merges: each input is tallied by itself, and the
report adds the tallies up.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import xxhash

__all__ = ["OTHER", "Samples", "Tally", "add", "count_source", "difference", "excerpt", "merge_samples"]

EXCERPT_HEAD, EXCERPT_TAIL = 500, 160
"""Characters shown of the beginning and the end of a dropped document."""
CONTEXT, WINDOW = 60, 420
"""Characters shown before the first change in a changed document, and in all."""
MAX_SOURCES = 200
"""Sources that are counted by name; further ones are counted together."""
OTHER = "(other sources)"

Sample = dict[str, Any]


@final
class Samples:
    """Of each group the `size` members whose ranks are lowest.

    A rank is the hash of seed, group and member, so the choice is random, the same in every run, and the choice from
    all inputs is the choice from the choices of each. What a sample shows is made only for members that are chosen.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._groups: dict[str, list[tuple[int, int, Sample]]] = {}  # heaps of (-rank, order, sample)
        self._order = 0

    def offer(self, group: str, member: str, make: Callable[[], Sample]) -> None:
        """Consider one member of `group`; its name must be the same in every run."""
        rank = xxhash.xxh3_64_intdigest(f"{self._seed}\0{group}\0{member}".encode("utf-8", "replace"))
        heap = self._groups.setdefault(group, [])
        self._order += 1
        if len(heap) < self._size:
            heapq.heappush(heap, (-rank, self._order, make()))
        elif heap and -rank > heap[0][0]:
            heapq.heapreplace(heap, (-rank, self._order, make()))

    def as_json(self) -> dict[str, list[list[Any]]]:
        """{group: [[rank, sample], …]} with the lowest rank first, groups sorted."""
        return {
            group: [[-rank, sample] for rank, _, sample in sorted(heap, key=lambda entry: -entry[0])]
            for group, heap in sorted(self._groups.items())
        }


def merge_samples(parts: Iterable[Mapping[str, list[list[Any]]]], size: int) -> dict[str, list[Sample]]:
    """The choice of `size` from all parts together, one part in memory at a time, without the ranks."""
    merged: dict[str, list[list[Any]]] = {}
    for part in parts:
        for group, entries in part.items():
            both = [*merged.get(group, ()), *entries]
            merged[group] = sorted(both, key=lambda entry: entry[0])[:size]
    return {group: [sample for _, sample in merged[group]] for group in sorted(merged)}


@final
class Tally:
    """The counts and samples of one input."""

    def __init__(self, name: str, size: int, seed: int) -> None:
        self.counts: dict[str, Any] = {"read": {}, "rules": {}, "cleaned": {}, "heldout": {}, "sources": {}}
        self.samples = Samples(size, seed)
        self._name = name
        self._number = 0

    def read(self, lang: str, source: str, chars: int) -> None:
        """A document has been read; what is said next is about it."""
        self._number += 1
        _count(self.counts["read"], lang, 1, chars)
        count_source(self.counts["sources"], source, chars)

    def dropped(self, rule: str, lang: str, source: str, text: str, detail: str) -> None:
        """The rule has dropped the document, whose text was then `text`."""
        _count(self.counts["rules"].setdefault(rule, {}), lang, 1, len(text), 0, 0)
        self.samples.offer(
            f"dropped\t{rule}\t{lang}", f"{self._name}\0{self._number}", lambda: _shown(source, excerpt(text), detail)
        )

    def changed(self, rule: str, lang: str, source: str, before: str, after: str) -> None:
        """The rule has changed the document's text."""
        _count(self.counts["rules"].setdefault(rule, {}), lang, 0, 0, 1, len(after) - len(before))

        def make() -> Sample:
            was, now = difference(before, after)
            return {"source": source, "before": was, "after": now}

        self.samples.offer(f"changed\t{rule}\t{lang}", f"{self._name}\0{self._number}", make)

    def kept(self, lang: str, chars: int, *, heldout: bool) -> None:
        """The document has passed every rule."""
        _count(self.counts["heldout" if heldout else "cleaned"], lang, 1, chars)


def count_source(sources: dict[str, list[int]], source: str, chars: int) -> None:
    """One more document of a source; the names of some hundred sources are kept apart."""
    _count(sources, source if source in sources or len(sources) < MAX_SOURCES else OTHER, 1, chars)


def _count(table: dict[str, list[int]], key: str, *amounts: int) -> None:
    row = table.get(key)
    if row is None:
        table[key] = list(amounts)
    else:
        for i, amount in enumerate(amounts):
            row[i] += amount


def add(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add the numbers of `more` to those of `into`, in place: nested tables, lists place by place."""
    for key, value in more.items():
        match value:
            case Mapping():
                add(into.setdefault(key, {}), value)
            case list():
                _count(into, key, *value)
            case _:
                into[key] = into.get(key, 0) + value


# --- what samples show -----------------------------------------------------------------------------------------------


def _shown(source: str, text: str, detail: str) -> Sample:
    return {"source": source, "detail": detail[:200], "text": text}


def excerpt(text: str) -> str:
    """The text, or the beginning and the end of a long one with what lies between them counted."""
    hidden = len(text) - EXCERPT_HEAD - EXCERPT_TAIL
    if hidden <= 40:
        return text
    return f"{text[:EXCERPT_HEAD]}\n[… {hidden:,} characters …]\n{text[-EXCERPT_TAIL:]}"


def difference(before: str, after: str, size: int = WINDOW) -> tuple[str, str]:
    """Both texts, `size` characters of them, around the place where they begin to differ."""
    pairs = zip(before, after, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))
    start = 0 if first < size // 2 else first - CONTEXT
    return _window(before, start, start + size), _window(after, start, start + size)


def _window(text: str, start: int, end: int) -> str:
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")
