"""What was said so far, in the forms that people give it in."""

from collections.abc import Mapping, Sequence
from typing import Any

from oriole.errors import DataError
from oriole.text.template import Message, message_dict

__all__ = ["History", "conversation", "to_message", "turn"]

History = Sequence[tuple[str, str]] | Sequence[Message] | Sequence[Mapping[str, Any]]
"""What was said so far: (user, assistant) pairs, `Message`s, or `{"role", "content"}` objects."""


def conversation(query: str, history: History | None, system: str | None) -> list[Message]:
    """Everything as messages, the query last; `system` takes the place of a system prompt in the history."""
    if not isinstance(query, str):
        raise DataError(f"the query is {query!r}; give it as a string")
    past: list[Message] = []
    for turn in history or ():
        match turn:
            case Message():
                past.append(turn)
            case Mapping():
                past.append(to_message(turn))
            case (str(asked), str(answered)):
                past += [Message("user", asked), Message("assistant", answered)]
            case _:
                raise DataError(
                    f"{turn!r} in the history is neither a (user, assistant) pair of strings, a Message, nor an object "
                    "with role and content"
                )
    if system is not None:
        past = [Message("system", system), *(past[1:] if past and past[0].role == "system" else past)]
    return [*past, Message("user", query)]


def to_message(record: Any) -> Message:
    """`{"role", "content"}` as a `Message`; `DataError` for anything else."""
    match record:
        case {"role": "system" | "user" | "assistant" | "tool" as role, "content": str(content)} if not record.get(
            "tool_calls"
        ):
            return Message(role, content, reasoning=record.get("reasoning_content"))
        case _:
            raise DataError(
                f"{record!r} is no message; expected an object with role (system, user, assistant or tool) and content "
                "(a string)"
            )


def turn(query: str, answer: str, like: Sequence[object], reasoning: str | None) -> list[Any]:
    """One turn in the form of the history it follows."""
    messages = [Message("user", query), Message("assistant", answer, reasoning=reasoning)]
    match like[-1] if like else None:
        case Message():
            return list(messages)
        case Mapping():
            return [message_dict(m) for m in messages]
        case _:
            return [(query, answer)]
