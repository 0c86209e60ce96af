"""What is odd about a conversation before a model learns it, and how much a chosen length would cut off."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from oriole.text.template import Chat, Message

__all__ = ["Truncation", "truncation", "validate_chat"]

_AFTER: dict[str, tuple[str, ...]] = {
    "": ("user",),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool": ("assistant", "tool"),
}
"""Which roles may follow each; "" is the beginning. An assistant that called a tool is followed by its result."""


def validate_chat(chat: Chat) -> list[str]:
    """The problems of a conversation, each as a phrase that begins with the number of its message; none: it is sound.

    Roles must alternate, the assistant must have the last word, no message may be empty, and none may be said twice:
    the same question or the same answer again, or an answer that only repeats the question.
    """
    problems: list[str] = []
    said: dict[tuple[str, str], int] = {}
    before: Message | None = None
    for n, message in enumerate(chat.messages, 1):
        expected = _expected(before)
        if message.role not in expected and not (n == 1 and message.role == "system"):
            after = f"after the {before.role}'s" if before is not None else "at the beginning"
            problems.append(f"message {n} is the {message.role}'s {after}; expected the {' or the '.join(expected)}'s")
        content = message.content.strip()
        if not content and not message.tool_calls and message.role != "tool":
            problems.append(f"message {n}, the {message.role}'s, is empty")
        elif content and message.role != "tool":
            if (first := said.setdefault((message.role, content), n)) != n:
                problems.append(f"message {n} says the same as message {first}")
            if message.role == "assistant" and before is not None and before.content.strip() == content:
                problems.append(f"message {n} only repeats the {before.role}'s message before it")
        before = message
    if before is None:
        problems.append("it has no messages")
    elif before.role != "assistant":
        problems.append(f"message {len(chat.messages)}, the last, is the {before.role}'s, not the assistant's")
    elif before.tool_calls:
        problems.append(f"message {len(chat.messages)}, the last, calls a tool and never gets its result")
    return problems


def _expected(before: Message | None) -> tuple[str, ...]:
    if before is None:
        return _AFTER[""]
    if before.role == "assistant" and before.tool_calls:
        return ("tool",)
    return _AFTER[before.role]


@final
@dataclass(frozen=True)
class Truncation:
    """What a limit on the length of a row cuts: rows that are longer, and their tokens beyond it."""

    rows: int
    cut: int
    tokens: int
    lost: int

    @property
    def rate(self) -> float:
        """The share of rows that are cut."""
        return self.cut / self.rows if self.rows else 0.0

    @property
    def lost_rate(self) -> float:
        """The share of tokens that are lost."""
        return self.lost / self.tokens if self.tokens else 0.0


def truncation(lengths: Iterable[int], length: int) -> Truncation:
    """How many rows of these lengths (in tokens) are longer than `length`, and how many tokens that costs."""
    rows = cut = tokens = lost = 0
    for size in lengths:
        rows += 1
        tokens += size
        if size > length:
            cut += 1
            lost += size - length
    return Truncation(rows, cut, tokens, lost)
