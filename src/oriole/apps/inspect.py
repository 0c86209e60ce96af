"""What data holds, described: shards by their counts, samples and batches, files by their records.

Everything is one JSON-able description, which `inspecttext` shows on a terminal and `inspectpage` as a page. Batches
are made by the trainer's own packer, which the caller hands in, so that what is shown is what training sees.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from oriole.config import Config
from oriole.text.census import Counts, census, table
from oriole.text.clean import language
from oriole.text.kinds import READERS, RecordKind
from oriole.text.paths import Skipped
from oriole.text.records import Doc
from oriole.text.shards import Shards
from oriole.text.template import Chat, Message, Preference, Prompt
from oriole.text.tokenizer import RESERVED, Tokenizer
from oriole.text.validate import validate_chat

__all__ = ["IGNORE", "InspectConfig", "Records", "batch_preview", "describe_shards", "record_dict"]

SCHEMA = 1
IGNORE = -100
"""Target of a position that is not trained, as in the trainer's batches."""
BATCHES = 16
"""Batches whose rows are counted."""
SOURCES = 200
"""Sources of which an example is kept."""


class InspectConfig(Config):
    """What `oriole data inspect` shows."""

    tokenizer: Path | None = None
    """A folder with a tokenizer.json; shards made by `data pack` or lying in a run bring their own."""
    kind: Literal["auto", "text", "chat", "preference", "feedback"] = "auto"
    """What the records of a file are; auto: by the first one."""
    length: int | None = Field(None, ge=8)
    """Tokens in a row of a batch, for truncation and the batch; by default the run's, else 512."""
    batch_size: int | None = Field(None, ge=1)
    """Rows in a batch; by default the run's, else 16."""
    rows: int = Field(2, ge=0)
    """Rows of the first batch that are shown, those with the most documents; 0: no batch."""
    samples: int = Field(4, ge=0)
    """Documents that are shown."""
    limit: int = Field(0, ge=0)
    """Records of a file that are read; 0: all."""
    seed: int | None = None
    """Order of the documents in the batch; by default the run's, else 1337."""
    stage: str = ""
    """A run's stage to look at; by default its last."""
    html: Path | None = None
    """A file to write the same as a page for the browser."""


class Batch(Protocol):
    """One batch of the trainer's, each of it (B, T), a tensor or an array."""

    @property
    def tokens(self) -> Any: ...
    @property
    def targets(self) -> Any: ...
    @property
    def doc(self) -> Any: ...
    @property
    def pos(self) -> Any: ...


# --- shards ----------------------------------------------------------------------------------------------------------


def describe_shards(shards: Shards, tok: Tokenizer, length: int, samples: int) -> dict[str, Any]:
    """Counts, lengths and truncation (`text.census`) of one shards folder, and documents from all over it."""
    places = np.linspace(0, len(shards) - 1, min(samples, len(shards))).round().astype(int)
    return {**census(shards, tok, length), "samples": [_sample(shards, tok, int(i)) for i in places]}


def _sample(shards: Shards, tok: Tokenizer, i: int) -> dict[str, Any]:
    ids, mask = shards.doc(i)
    return {
        "document": i, "source": shards.source(i), "lang": shards.lang(i), "tokens": len(ids),
        "trained_tokens": int(mask.sum()), "spans": spans(ids[:2000].tolist(), mask[:2000].tolist(), tok),
    }  # fmt: skip


def spans(ids: Sequence[int], trained: Sequence[int], tok: Tokenizer) -> list[tuple[str, str]]:
    """The text of a document in runs of one kind: "trained", "context", or "mark" and "trained mark" for role tokens.

    A character whose bytes are spread over a run's end is shown as U+FFFD on both sides.
    """
    out: list[tuple[str, str]] = []
    run: list[int] = []
    kind = ""

    def close() -> None:
        if run:
            out.append((kind, tok.decode(run, skip_special=False)))
            run.clear()

    for id, is_trained in zip(ids, trained, strict=True):
        now = (
            ("trained" if is_trained else "context")
            if id >= len(RESERVED)
            else "trained mark"
            if is_trained
            else "mark"
        )
        if now != kind:
            close()
            kind = now
        run.append(id)
    close()
    return out


# --- batches ---------------------------------------------------------------------------------------------------------


def batch_preview(batches: Iterable[Batch], tok: Tokenizer, rows: int) -> dict[str, Any]:
    """What batches contain: figures over the first sixteen, and `rows` rows of the first, document by document.

    The rows shown are those with the most documents, where packing is to be seen best.

    {"batch_size", "length", "batches", "fill" and "trained" (shares of all places), "documents_per_row", "longest",
    "rows": [{"row" (from 0), "documents": [{"from", "to" (positions), "tokens", "trained_tokens", "spans"}],
    "padding"}]}
    """
    figures: Counter[str] = Counter()
    shown: list[dict[str, Any]] = []
    shape = (0, 0)
    for batch in itertools.islice(batches, BATCHES):
        tokens, targets, doc, pos = (np.asarray(a) for a in (batch.tokens, batch.targets, batch.doc, batch.pos))
        shape = tokens.shape
        figures["rows"] += len(tokens)
        figures["places"] += tokens.size
        figures["filled"] += int((doc >= 0).sum())
        figures["trained"] += int((targets != IGNORE).sum())
        figures["documents"] += int((doc.max(axis=1) + 1).sum())
        figures["longest"] = max(figures["longest"], int(pos.max()) + 1)
        if not shown:
            most = np.argsort(-doc.max(axis=1), kind="stable")[:rows]
            shown = [{"row": int(n), **_row(tokens[n], targets[n], doc[n], pos[n], tok)} for n in sorted(most)]
    return {
        "batch_size": shape[0], "length": shape[1], "batches": BATCHES,
        "fill": figures["filled"] / figures["places"], "trained": figures["trained"] / figures["places"],
        "documents_per_row": figures["documents"] / figures["rows"], "longest": figures["longest"], "rows": shown,
    }  # fmt: skip


def _row(
    tokens: NDArray[Any], targets: NDArray[Any], doc: NDArray[Any], pos: NDArray[Any], tok: Tokenizer
) -> dict[str, Any]:
    """One row: its documents with their positions, tokens and mask, and how much padding follows."""
    documents = []
    for number in range(int(doc.max()) + 1):
        (places,) = np.nonzero(doc == number)
        ids, wanted = tokens[places].tolist(), targets[places]
        # A token is learnt where the place before it has it as its target; the first never is. The last target is no
        # place of its own in the row, but it is learnt like the others.
        learnt = [False, *(wanted != IGNORE)]
        ids.append(int(wanted[-1]))
        if not learnt[-1]:
            del ids[-1], learnt[-1]
        documents.append(
            {
                "from": int(pos[places[0]]), "to": int(pos[places[-1]]), "tokens": len(places),
                "trained_tokens": int((wanted != IGNORE).sum()), "spans": spans(ids, learnt, tok),
            }
        )  # fmt: skip
    return {"documents": documents, "padding": int((doc < 0).sum())}


# --- files -----------------------------------------------------------------------------------------------------------


class Records:
    """The records of files, counted while something else reads them on."""

    def __init__(self, kind: RecordKind, samples: int, limit: int) -> None:
        self.kind, self.samples, self.limit = kind, samples, limit
        self.skipped = Skipped()
        self._counts: dict[tuple[str, str], Counts] = {}
        self._examples: list[dict[str, Any]] = []
        self._problems: Counter[str] = Counter()
        self._sound = self._read = 0

    def read(self, paths: Sequence[Path]) -> Iterator[Any]:
        """The records, each counted as it passes; bad ones are counted and left out."""
        for record in READERS[self.kind](paths, skip_bad=self.skipped):
            if self.limit and self._read >= self.limit:
                return
            self._count(record)
            yield record

    def _count(self, record: Any) -> None:
        self._read += 1
        text = _text(record)
        lang = record.lang or language(text)
        counts = self._counts.setdefault((record.source, lang), {"documents": 0, "characters": 0, "bytes": 0})
        counts["documents"] += 1
        counts["characters"] += len(text)
        counts["bytes"] += len(text.encode("utf-8", "replace"))
        new = counts["documents"] == 1 and len(self._counts) <= SOURCES
        if new or len(self._examples) < self.samples:  # of every source at least the first
            self._examples.append({"source": record.source, "lang": lang, **record_dict(record)})
        if isinstance(record, Chat):
            problems = validate_chat(record)
            self._sound += not problems
            self._problems.update({_general(p) for p in problems})

    def describe(self) -> dict[str, Any]:
        """What was counted: {"kind", "total", "sources", "samples", "skipped", "converted", "validation"}."""
        rows = [{"source": source, "lang": lang, **counts} for (source, lang), counts in self._counts.items()]
        made: dict[str, Any] = {"kind": self.kind, **table(rows), "samples": self._some()}
        made["skipped"] = {"total": self.skipped.total, "examples": self.skipped.examples}
        made["limited"] = bool(self.limit and self._read >= self.limit)
        if self.kind == "chat":
            made["validation"] = {
                "chats": self._read,
                "sound": self._sound,
                "problems": dict(self._problems.most_common()),
            }
        return made

    def _some(self) -> list[dict[str, Any]]:
        """`samples` of what was kept, one of each source first."""
        first = {(e["source"], e["lang"]): e for e in reversed(self._examples)}
        rest = [e for e in self._examples if e is not first[e["source"], e["lang"]]]
        return [*reversed(first.values()), *rest][: self.samples]


def _general(problem: str) -> str:
    """A problem without its numbers, so that equal ones count as one: "message 3 is empty" -> "message … is empty"."""
    words = problem.split(" ")
    return " ".join("…" if word.rstrip(",").isdigit() else word for word in words)


def _messages(record: Any) -> Sequence[Message]:
    match record:
        case Chat() | Prompt():
            return record.messages
        case Preference():
            return (*record.prompt, *record.chosen, *record.rejected)
        case _:
            return (*record.prompt, *record.completion)


def _text(record: Any) -> str:
    return record.text if isinstance(record, Doc) else "\n".join(m.content for m in _messages(record))


def record_dict(record: Any) -> dict[str, Any]:
    """A record as JSON: {"text"}, {"messages"}, or messages under the names of its fields."""

    def dicts(messages: Iterable[Message]) -> list[dict[str, str]]:
        return [{"role": m.role, "content": m.content or json_calls(m)} for m in messages]

    match record:
        case Doc():
            return {"text": record.text[:4000]}
        case Chat():
            return {"messages": dicts(record.messages)}
        case Prompt():
            return {"messages": dicts(record.messages), "answers": list(record.answers)}
        case Preference():
            return {key: dicts(getattr(record, key)) for key in ("prompt", "chosen", "rejected")}
        case _:
            return {"prompt": dicts(record.prompt), "completion": dicts(record.completion), "label": record.good}


def json_calls(message: Message) -> str:
    """An assistant's tool calls as a line of text."""
    return "  ".join(f"{call.name}({dict(call.arguments)})" for call in message.tool_calls)
