"""Rules for conversations, each `Chat -> Chat | Drop`: validation of turns, repeated answers, tasks of other kinds.

Their texts are mended by the rules of `text.rulesmend`; what they drop is counted like documents are.
"""

import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise

from oriole.config import Config
from oriole.text.rules import Drop, Rule
from oriole.text.template import Chat, Message
from oriole.text.validate import faults

__all__ = ["ChatRulesConfig", "build_chat_rules", "dice"]


class ChatRulesConfig(Config):
    """Which rules for conversations run; 0 or false switches one off. "ChatLM": ChatLM-mini-Chinese's preprocessing."""

    empty: bool = True
    """A user's turn without text, or an assistant's without text, tool call and reasoning, drops the conversation."""
    roles: bool = True
    """The system speaks first if at all; then user and assistant alternate, beginning with the user and ending with the
    assistant; tool results stand between an assistant's call and its next turn."""
    duplicated: bool = True
    """A turn that says the same as the one before it, or an exchange that occurs twice, drops the conversation."""
    same: float = 0.9
    """Question and answer whose sets of characters have at least this Dice similarity: the answer repeats the question
    (ChatLM: 0.90; there the pair becomes one text)."""
    question_characters: int = 1
    """Least characters of a user's turn (ChatLM: 3 for baike and medicine, 4 Zhihu, 10 finance)."""
    answer_characters: int = 1
    """Least characters of the last answer (ChatLM: 15 for most sources, 5 to 15 BELLE, 10 Zhihu)."""
    max_characters: int = 0
    """Most characters of a conversation (ChatLM: 320 for a turn of SFT)."""
    translation: bool = False
    """Drop translation tasks, which a small model cannot learn (ChatLM does so for SFT). Off: a bilingual model can."""
    tables: bool = False
    """Drop tasks that ask for or answer with tables (ChatLM does so for SFT)."""


_ROLES = ("begins_without_user", "not_alternating", "ends_without_answer")
"""A conversation may well end with a call: that is what sets for tool use teach."""


def build_chat_rules(config: ChatRulesConfig) -> list[Rule[Chat]]:
    """The rules that `config` switches on: validation first, then what the turns say."""
    rules: list[tuple[object, str, Callable[[Chat], str]]] = [
        (config.empty, "empty", partial(_fault, ("empty_turn",))),
        (config.roles, "roles", partial(_fault, _ROLES)),
        (config.duplicated, "duplicated", _duplicated),
        (config.same, "same", partial(_same, config.same)),
        (config.question_characters, "question_characters", partial(_short, "user", config.question_characters)),
        (config.answer_characters, "answer_characters", partial(_short, "assistant", config.answer_characters)),
        (config.max_characters, "max_characters", partial(_long, config.max_characters)),
        (config.translation, "translation", _translation),
        (config.tables, "tables", _tables),
    ]
    return [Rule(name, partial(_judge, name, why)) for on, name, why in rules if on]


def _judge(name: str, why: Callable[[Chat], str], chat: Chat) -> Chat | Drop:
    reason = why(chat)
    return Drop(name, reason) if reason else chat


def _fault(kinds: tuple[str, ...], chat: Chat) -> str:
    """The first fault of these kinds."""
    return next((fault.said for fault in faults(chat.messages) if fault.kind in kinds), "")


def _key(message: Message) -> str:
    return " ".join(message.content.split())


def _duplicated(chat: Chat) -> str:
    spoken = [m for m in chat.messages if m.role in ("user", "assistant") and not m.tool_calls]
    seen: set[tuple[str, str]] = set()
    for first, second in pairwise(spoken):
        one, two = _key(first), _key(second)
        if one and one == two:
            return f"two turns in a row say {one[:40]!r}"
        if first.role == "user" and second.role == "assistant":
            if (one, two) in seen:
                return f"the exchange about {one[:40]!r} occurs twice"
            seen.add((one, two))
    return ""


def dice(one: str, two: str) -> float:
    """Dice similarity of the sets of characters, 2·|A ∩ B| / (|A| + |B|); 0 where both are empty.

    As ChatLM's `get_sentences_dice_similarity`, which says so when a title is only its description again.
    """
    a, b = set(one), set(two)
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 0.0


def _same(most: float, chat: Chat) -> str:
    for first, second in pairwise(chat.messages):
        if first.role == "user" and second.role == "assistant" and not second.tool_calls:
            one, two = first.content, second.content
            # Two long texts share their characters whatever they say; words must agree as well.
            if dice(one, two) >= most and max(len(one), len(two)) <= 2 * min(len(one), len(two)):
                pairs = dice_of_pairs(one, two)
                if pairs >= most:
                    return f"the answer repeats the question (similarity {pairs:.2f})"
    return ""


def dice_of_pairs(one: str, two: str) -> float:
    """Dice similarity of the sets of pairs of neighbouring characters; of the characters themselves in short texts."""
    if min(len(one), len(two)) < 3:
        return dice(one, two)
    a = set(map("".join, pairwise(one)))
    b = set(map("".join, pairwise(two)))
    return 2 * len(a & b) / (len(a) + len(b))


def _short(role: str, least: int, chat: Chat) -> str:
    turns = [m for m in chat.messages if m.role == role]
    if role == "assistant":
        turns = [m for m in turns[-1:] if not m.tool_calls]
    for m in turns:
        if len(m.content.strip()) < least:
            return f"a turn of {len(m.content.strip())} characters"
    return ""


def _long(most: int, chat: Chat) -> str:
    size = sum(len(m.content) for m in chat.messages)
    return f"{size} characters" if size > most else ""


_TRANSLATE = re.compile(
    r"(?:翻译|译)(?:成|为|到|一下|以下|下面|下列|这|：|:)|(?:请|帮我|把|将).{0,30}(?:翻译|译[成为])"
    r"|英译[中汉]|[中汉]译英|译成[中英]文|[中英]译|(?<![A-Za-z])translat(?:e|ion of|ing) ",
    re.IGNORECASE,
)
_TABLE_ASK = re.compile(
    r"表格"
    r"|(?<![A-Za-z])(?:in|into|as|make|create|draw|build|generate|using) (?:an? |the )?(?:\w+ ){0,2}table(?![A-Za-z])",
    re.IGNORECASE,
)
_TABLE = re.compile(r"(?m)^[ \t]*\|?[ \t]*:?-{3,}:?[ \t]*\|[-: |\t]*$")


def _translation(chat: Chat) -> str:
    for m in chat.messages:
        if m.role == "user" and (found := _TRANSLATE.search(m.content[:400])):
            return f"asks for a translation: {found[0]!r}"
    return ""


def _tables(chat: Chat) -> str:
    for m in chat.messages:
        if m.role == "user" and (found := _TABLE_ASK.search(m.content)):
            return f"asks for a table: {found[0]!r}"
        if m.role in ("user", "assistant") and _TABLE.search(m.content):
            return "has a table"
    return ""
