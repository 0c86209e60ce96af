"""Chats in plain text files: `问：… 答：…`, `Q: … A: …`, a question and its answer on one line, or rendered text.

HaoAI's files are of the first and the third kind. What cannot be paired (a question without an answer, an answer
without a question, text that is neither) is refused with its line, or counted in `skip_bad`: it is never glued to a
neighbour.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, final

from oriole.text import rendered
from oriole.text.files import Skipped, head, lines, refuse
from oriole.text.records import KNOWN
from oriole.text.tables import tsv_rows

__all__ = ["Style", "pairs", "rendered_chats", "style"]

Style = Literal["json", "rendered", "labelled", "tabbed", "joined", "prose"]

LOOK_AT = 100
"""Lines of a file by which its style is told."""
LONGEST_CHAT = 1 << 20
"""Characters of one conversation in a text file; what is longer was never ended."""

# A file uses one family of labels throughout, so that the choices "A: … B: …" of a question are no answers.
_FAMILIES: Final = (
    ("问题|提问|问", "回答|答案|答"),
    ("question|q", "answer|a"),
    ("用户|user|human", "助手|assistant|bot|ai"),
)
_LABELS: Final = tuple(
    (
        re.compile(rf"\s*(?:\d+[.、)]\s*)?(?:{ask})\s*\d*\s*[:：]\s*(.*)", re.IGNORECASE | re.DOTALL),
        re.compile(rf"\s*(?:\d+[.、)]\s*)?(?:{answer})\s*\d*\s*[:：]\s*(.*)", re.IGNORECASE | re.DOTALL),
    )
    for ask, answer in _FAMILIES
)
_JOINED = re.compile(
    r"\s*((?:[^。！？!?.\t]|\.(?!\s)){1,200}[？?]+|(?:请|帮我|介绍|告诉我|说说|解释)[^。！？!?\t]{1,80}[！!。])\s*(.*)",
    re.DOTALL,
)

Pair = tuple[str, str]


def style(path: Path) -> Style:
    """How a text file holds chats, by its first hundred lines; "prose" when it holds none."""
    sample = head(path)
    some = [line for line in sample.splitlines() if line.strip()][:LOOK_AT]
    if some and all(map(_is_record, some[:2])):
        return "json"
    if rendered.is_rendered(sample[:64]) and _is_chat(sample):
        return "rendered"
    if _family(some) is not None:
        return "labelled"
    rows = [cells for _, cells in tsv_rows(iter(enumerate(f"{line}\n" for line in some)))]
    if rows and sum(len(cells) == 2 for cells in rows) >= 0.8 * len(rows):
        return "tabbed"
    asked = [match for line in some if (match := _JOINED.match(line))]
    if len(asked) >= 0.5 * len(some) and any(match[2].strip() for match in asked):
        return "joined"
    return "prose"


def _is_record(line: str) -> bool:
    try:
        record = json.loads(line) if line.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and any(str(key).lower() in KNOWN for key in record)


def _is_chat(sample: str) -> bool:
    first = next(_blocks(iter(enumerate(sample.splitlines(keepends=True), 1))), (1, ""))[1]
    try:
        return bool(rendered.turns(first))
    except ValueError:
        return True


def _family(some: list[str]) -> int | None:
    """Which labels the lines use: those of the first line that has one, if answers follow."""
    for line in some:
        for n, (ask, _) in enumerate(_LABELS):
            if ask.fullmatch(line):
                return n if any(_LABELS[n][1].fullmatch(other) for other in some) else None
    return None


# --- pairs -----------------------------------------------------------------------------------------------------------


@final
@dataclass
class _Open:
    """A question and its answer while their lines are read."""

    line: int = 0
    ask: list[str] = field(default_factory=list)
    answer: list[str] | None = None

    def pair(self) -> Pair | None:
        ask, answer = "".join(self.ask).strip(), "".join(self.answer or ()).strip()
        return (ask, answer) if ask and answer else None


def pairs(path: Path, how: Style, skip_bad: Skipped | None = None) -> Iterator[tuple[int, Pair]]:
    """(line, (question, answer)) of each pair of a text file whose style is "labelled" or "joined"."""
    if how == "joined":
        yield from _joined(path, skip_bad)
        return
    family = _family([line for line in head(path).splitlines() if line.strip()][:LOOK_AT]) or 0
    ask_label, answer_label = _LABELS[family]
    now = _Open()
    stray = False
    for number, line in lines(path, skip_bad):
        if match := ask_label.fullmatch(line):
            yield from _closed(path, now, skip_bad)
            now, stray = _Open(number, [match[1]]), False
        elif match := answer_label.fullmatch(line):
            if now.answer is None and now.line:
                now.answer = [match[1]]
            else:
                yield from _closed(path, now, skip_bad)
                refuse(path, f"line {number}", "an answer without a question of its own; put one before it", skip_bad)
                now, stray = _Open(), True
        elif now.line:
            (now.ask if now.answer is None else now.answer).append(line)
            if sum(map(len, now.answer or now.ask)) > LONGEST_CHAT:
                refuse(path, f"line {now.line}", "a question or answer of more than a million characters", skip_bad)
                now, stray = _Open(), True
        elif line.strip() and not stray:
            refuse(path, f"line {number}", "text before the first question; remove it or give it a label", skip_bad)
            stray = True
    yield from _closed(path, now, skip_bad)


def _closed(path: Path, now: _Open, skip_bad: Skipped | None) -> Iterator[tuple[int, Pair]]:
    if pair := now.pair():
        yield now.line, pair
    elif now.line:
        refuse(path, f"line {now.line}", "a question without an answer, or an empty one; give both", skip_bad)


def _joined(path: Path, skip_bad: Skipped | None) -> Iterator[tuple[int, Pair]]:
    now = _Open()
    for number, line in lines(path, skip_bad):
        if not line.strip():
            continue
        match = _JOINED.fullmatch(line)
        if match and match[2].strip():
            yield from _closed(path, now, skip_bad)
            now = _Open()
            yield number, (match[1].strip(), match[2].strip())
        elif match:  # a question alone: what follows answers it
            yield from _closed(path, now, skip_bad)
            now = _Open(number, [match[1]])
        elif now.line:
            now.answer = [*(now.answer or ()), line]
        else:
            refuse(path, f"line {number}", "no question was found at the start of the line; put one there", skip_bad)
    yield from _closed(path, now, skip_bad)


# --- rendered --------------------------------------------------------------------------------------------------------


def rendered_chats(path: Path, skip_bad: Skipped | None = None) -> Iterator[tuple[int, str]]:
    """(line, text) of each rendered conversation of a text file."""
    for number, text in _blocks(lines(path, skip_bad)):
        if len(text) > LONGEST_CHAT:
            refuse(path, f"line {number}", "a conversation of more than a million characters", skip_bad)
        else:
            yield number, text


def _blocks(source: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Lines gathered to conversations: each ends at a mark of its end, or before a line that begins the next one."""
    held: list[str] = []
    start = size = 0
    closed = answered = blank = False
    for number, line in source:
        begins = line.startswith(("<|beginoftext|>", "<|im_start|>system", "<s>system", "##提问"))
        begins |= blank and line.startswith(("<|im_start|>", "<s>", "<|user|>"))
        if held and (size > LONGEST_CHAT or (begins and (closed or answered))):
            yield start, "".join(held)
            held, size, answered = [], 0, False
        if blank := not line.strip():
            if not held:
                continue
        else:
            start = start if held else number
            closed = line.rstrip().endswith(("<|im_end|>", "</s>", "<eos>"))
            answered |= "##回答" in line
        held.append(line)
        size += len(line)
        if line.rstrip().endswith(("<|endoftext|>", "[EOS]")):
            yield start, "".join(held)
            held, size, closed, answered = [], 0, False, False
    if held:
        yield start, "".join(held)
