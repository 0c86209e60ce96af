"""Conversations and preference pairs as rows of JSON, as one text, and what must be known of them before training.

Rows are written in the forms that `text.formats` reads back to the same value: {"conversations", "tools"} and
{"prompt", "chosen", "rejected"}, each with "lang" and "source".
"""

from collections.abc import Iterable, Sequence
from typing import Any, final

from oriole.text.template import Chat, Message, Preference, message_dict, render
from oriole.text.tokenizer import Tokenizer
from oriole.text.validate import faults

__all__ = ["Figures", "chat_row", "flat", "preference_row", "spoken"]

CHARS_PER_TOKEN = {"zh": 1.5, "en": 4.0}
"""What a vocabulary of 16,384 reaches, for estimates."""
ROLE_TOKENS = 5
"""Of each message's header and end."""


def chat_row(chat: Chat) -> dict[str, Any]:
    """The conversation as `read_chats` reads it."""
    row: dict[str, Any] = {"conversations": [message_dict(message) for message in chat.messages]}
    if chat.tools:
        row["tools"] = [dict(tool) for tool in chat.tools]
    return row | {"lang": chat.lang, "source": chat.source}


def preference_row(pair: Preference) -> dict[str, Any]:
    """The pair as `read_preferences` reads it."""
    parts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    row: dict[str, Any] = {name: [message_dict(m) for m in messages] for name, messages in parts.items()}
    margin = {"margin": pair.margin} if pair.margin else {}
    return row | margin | {"lang": pair.lang, "source": pair.source}


def flat(messages: Iterable[Message]) -> str:
    """What the messages say, one after another: what is compared, measured and shown of them.

    Without system messages, which many rows share.
    """
    return "\n\n".join(_said(message) for message in messages if message.role != "system")


def spoken(messages: Iterable[Message]) -> str:
    """All that the messages say, system's among it, a line after another: what a tokenizer meets of them."""
    return "\n".join(filter(None, map(_said, messages)))


def _said(message: Message) -> str:
    calls = (f"{call.name} {dict(call.arguments)}" for call in message.tool_calls)
    return "\n".join(part for part in (message.reasoning, message.content, *calls) if part)


# --- figures ---------------------------------------------------------------------------------------------------------


@final
class Figures:
    """Counts over the rows of one input, as JSON that adds up."""

    def __init__(self, length: int, tokenizer: Tokenizer | None) -> None:
        self._length, self._tokenizer = length, tokenizer
        self.counts: dict[str, int] = {"rows": 0, "messages": 0, "tokens": 0, "longer": 0}

    def add(self, messages: Sequence[Message], chat: Chat | None, lang: str) -> None:
        """Count a row as it was read; `chat` where it is one, for its tools."""
        tokens = self._tokens(messages, chat, lang)
        self._count("rows", 1)
        self._count("messages", len(messages))
        self._count("tokens", tokens)
        self._count("longer", tokens > self._length)
        self._count("with_system", any(m.role == "system" for m in messages))
        self._count("with_tools", bool(chat and chat.tools) or any(m.tool_calls for m in messages))
        self._count("with_reasoning", any(m.reasoning for m in messages))
        self._count("several_rounds", sum(m.role == "user" for m in messages) > 1)
        for kind in dict.fromkeys(fault.kind for fault in faults(messages)):
            self._count(kind, 1)

    def _count(self, name: str, amount: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount

    def _tokens(self, messages: Sequence[Message], chat: Chat | None, lang: str) -> int:
        if self._tokenizer is not None:
            return len(render(messages, self._tokenizer, tools=chat.tools if chat else ())[0])
        chars = sum(len(_said(message)) for message in messages)
        chars += len(str(chat.tools)) if chat and chat.tools else 0
        return round(chars / CHARS_PER_TOKEN.get(lang, 4.0)) + ROLE_TOKENS * len(messages)
