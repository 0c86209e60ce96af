"""What is odd about a conversation before a model learns it, and how much a chosen length would cut off."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

from oriole.text.template import Chat, Message

__all__ = ["Fault", "Truncation", "faults", "truncation", "validate_chat"]

_AFTER: dict[str, tuple[str, ...]] = {
    "": ("user",),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool": ("assistant", "tool"),
}
"""Which roles may follow each; "" is the beginning. An assistant that called a tool is followed by its result."""


class Fault(NamedTuple):
    """One thing that is odd about the form of a conversation."""

    kind: Literal[
        "empty_turn", "begins_without_user", "not_alternating", "repeated_turn", "ends_without_answer", "open_call"
    ]
    said: str
    """A phrase that begins with the number of the message."""


def faults(messages: Sequence[Message]) -> Iterator[Fault]:
    """What is odd about the form of a conversation, in the order of its messages.

    Roles must alternate, the assistant must have the last word, no message may be empty (an assistant's may be a call
    or reasoning alone, a tool's result anything), and none may be said twice: the same question or the same answer
    again, or an answer that only repeats the question.
    """
    said: dict[tuple[str, str], int] = {}
    before: Message | None = None
    for n, message in enumerate(messages, 1):
        expected = _expected(before)
        if message.role not in expected and not (n == 1 and message.role == "system"):
            after = f"after the {before.role}'s" if before is not None else "at the beginning"
            yield Fault(
                "begins_without_user" if before is None or before.role == "system" else "not_alternating",
                f"message {n} is the {message.role}'s {after}; expected the {' or the '.join(expected)}'s",
            )
        content = message.content.strip()
        if message.role == "tool":
            pass
        elif content:
            if (first := said.setdefault((message.role, content), n)) != n:
                yield Fault("repeated_turn", f"message {n} says the same as message {first}")
            if message.role == "assistant" and before is not None and before.content.strip() == content:
                yield Fault("repeated_turn", f"message {n} only repeats the {before.role}'s message before it")
        elif not (message.role == "assistant" and (message.tool_calls or message.reasoning)):
            yield Fault("empty_turn", f"message {n}, the {message.role}'s, is empty")
        before = message
    if before is None:
        yield Fault("empty_turn", "it has no messages")
    elif before.role != "assistant":
        yield Fault(
            "ends_without_answer",
            f"message {len(messages)}, the last, is the {before.role}'s, not the assistant's",
        )
    elif before.tool_calls:
        yield Fault("open_call", f"message {len(messages)}, the last, calls a tool and never gets its result")


def validate_chat(chat: Chat) -> list[str]:
    """The faults of a conversation as phrases; none: it is sound."""
    return [fault.said for fault in faults(chat.messages)]


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
