"""One JSON value or table row to a `Doc`, `Chat`, `Preference`, `Prompt` or `Feedback`: how others spell a record.

What a record must hold stands in `text.formats`, which reads files of them. One that does not fit raises `Misfit` with
what was expected and the likeliest reason. Single messages are `text.turns`' matter.
"""

import ast
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from oriole.text import rendered
from oriole.text.template import Chat, Message, Preference, Prompt, Role
from oriole.text.turns import Misfit, Record, from_rendered, kind, quoted, read_messages, read_tools

__all__ = [
    "ANSWER", "ASK", "KNOWN", "Doc", "Feedback", "Misfit", "Record", "chat", "dice", "doc", "docs", "feedback",
    "preference", "prompt", "prompt_of",
]  # fmt: skip


@dataclass(frozen=True)
class Doc:
    """One document of running text.

    `lang` is "zh", "en", "" (not known), or another that cleaning found, "und" where it cannot be told.
    """

    text: str
    lang: str = ""
    source: str = ""


@dataclass(frozen=True)
class Feedback:
    """One way to go on from `prompt`, which people called good or not: unpaired, as KTO learns from it."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    good: bool
    source: str = ""
    lang: str = ""


_CONVERSATION = ("conversations", "messages", "conversation")
ASK = ("instruction", "prompt", "query", "question", "q")
ANSWER = ("output", "response", "answer", "completion", "a")
_TITLED = ("title", "desc", "ask")
_LABEL = ("label", "kto_tag")
KNOWN = frozenset((
    *_CONVERSATION, *ASK, *ANSWER, *_TITLED, *_LABEL, "text", "input", "history", "system", "tools", "chosen",
    "rejected", "answers", "margin", "content", "star", "answer_id", "qid", "sections", "summary", "source", "lang",
))  # fmt: skip
"""Every name that any of the readers looks for: what need be read of a table with more columns."""

_Wanted = Literal["doc", "chat", "preference", "feedback", "prompt"]
_KEYS: dict[_Wanted, tuple[str, ...]] = {
    "doc": ("text",),
    "chat": (*_CONVERSATION, *ASK[:-1], *ANSWER[:-1]),
    "preference": ("prompt", "chosen", "rejected"),
    "feedback": ("prompt", "completion", "label", "kto_tag"),
    "prompt": ("prompt", "messages", "conversations", "answers"),
}
_EXPECTED: dict[_Wanted, str] = {
    "doc": "'text'",
    "chat": "'conversations' or 'messages', 'instruction' and 'output', 'prompt' and 'response', "
    "'query' and 'response', 'question' and 'answer', or 'title' and 'answer'",
    "preference": "'prompt', 'chosen' and 'rejected', or 'chosen' and 'rejected' as message lists that begin alike",
    "feedback": "'prompt', 'completion' and 'label', or a chat with 'kto_tag'",
    "prompt": "'prompt' or 'messages', a chat, or a preference pair",
}
_NAMES: dict[_Wanted, str] = {
    "doc": "running text, as pretraining reads it",
    "chat": "a chat, as fine-tuning reads it",
    "preference": "a preference pair, as preference training reads it",
    "feedback": "feedback on single answers, as preference training reads it",
    "prompt": "a prompt, as reinforcement learning reads it",
}

ALIKE = 0.9
"""Dice similarity from which a question's title and description say the same (ChatLM's raw_data_process.py)."""


# --- running text ----------------------------------------------------------------------------------------------------


def doc(value: Any) -> Doc:
    """`{"text"}` as a document, exactly as it stands."""
    record = _object(value, "doc")
    text = _encyclopedia(record) if "text" not in record and "sections" in record else record.get("text")
    if "text" not in record and text is None:
        raise _unknown(record, "doc")
    if not isinstance(text, str):
        raise Misfit(f"'text' is {kind(text)}; it must be a string")
    return Doc(text, _lang(record), _source(record))


def docs(value: Any) -> list[Doc]:
    """`{"text"}` as documents: several, and without the marks, where the text was rendered for some model."""
    whole = doc(value)
    if not rendered.is_rendered(whole.text):
        return [whole]
    return [Doc(text, whole.lang, whole.source) for text in rendered.documents(whole.text)]


def _encyclopedia(record: Record) -> str:
    """An entry of Baidu-baike as Phi2-mini-Chinese reads it: title, summary, and sections of title and content."""
    parts = [record.get("title"), record.get("summary")]
    sections = record["sections"]
    if not isinstance(sections, list):
        raise Misfit(f"'sections' is {kind(sections)}; it must be a list of objects with 'title' and 'content'")
    for section in sections:
        if not isinstance(section, dict):
            raise Misfit(f"a section is {kind(section)}; it must be an object with 'title' and 'content'")
        parts += [section.get("title"), section.get("content")]
    return "\n".join(part for part in parts if isinstance(part, str) and part.strip())


# --- chats -----------------------------------------------------------------------------------------------------------


def chat(value: Any) -> Chat:
    """A record of any of the chat formats, with at least one assistant's turn."""
    record = _object(value, "chat")
    if ("chosen" in record and not _ends_with_answer(record)) or _is_feedback(record):
        raise _unknown(record, "chat")
    messages, tools = _conversation(record)
    if not any(m.role == "assistant" for m in messages):
        raise Misfit("no turn is the assistant's, so there is nothing to learn; give at least one")
    return Chat(tuple(messages), tools, _source(record), _lang(record))


def _ends_with_answer(record: Record) -> bool:
    """Whether a record with a pair of answers also has a conversation that is whole without them."""
    turns = _first(record, _CONVERSATION)
    messages = read_messages(record[turns])[0] if turns is not None else []
    return bool(messages) and messages[-1].role == "assistant"


def _is_feedback(record: Record) -> bool:
    return record.get("kto_tag") is not None or ("completion" in record and record.get("label") is not None)


def _conversation(record: Record) -> tuple[list[Message], tuple[dict[str, Any], ...]]:
    """The messages and tools of a record, whichever way it spells them."""
    ask, answer = _first(record, ASK), _first(record, ANSWER)
    tools: tuple[dict[str, Any], ...] = ()
    if (turns := _first(record, _CONVERSATION)) is not None:
        messages, tools = read_messages(record[turns])
    elif ask is None and (said := from_rendered(record.get("text"))):
        messages, tools = read_messages(said)
    elif ask is None and _first(record, _TITLED) is not None and (key := answer or _article(record)):
        messages = [Message("user", _titled(record)), *_turns(record[key], "assistant", key)]
    elif ask is None or answer is None:
        raise _unknown(record, "chat")
    elif isinstance(record[ask], str) and (said := rendered.belle_turns(record[ask])):
        messages = [*read_messages(said)[0], *_turns(record[answer], "assistant", answer)]
    else:
        messages = [*_asked(record, ask), *_turns(record[answer], "assistant", answer)]
    return _with_system(record, messages), read_tools(record.get("tools")) or tools


def _article(record: Record) -> str | None:
    """webtext2019zh calls the answer "content"; so do news, which are no answers and have no such number or stars."""
    return "content" if "content" in record and _first(record, ("star", "answer_id", "qid")) is not None else None


def _titled(record: Record) -> str:
    """The question of baike_qa2019, webtext2019zh, the medical sets or TFChat: a title, a description, or both."""
    title, more = (_string(record, keys) for keys in (("title",), ("desc", "ask")))
    if not (title or more):
        raise Misfit("its title and its description are both empty; give a question or remove the record")
    if title in more or not title:
        return more
    if more in title or dice(title, more) >= ALIKE:
        return max(title, more, key=len)
    return f"{title}\n{more}"


def _string(record: Record, keys: Sequence[str]) -> str:
    key = _first(record, keys)
    value = record[key] if key is not None else ""
    if not isinstance(value, str):
        raise Misfit(f"'{key}' is {kind(value)}; it must be a string")
    return value.strip()


def dice(a: str, b: str) -> float:
    """Dice similarity of the sets of characters of two texts, from 0 to 1: 2 |A and B| / (|A| + |B|)."""
    left, right = set(a), set(b)
    return 2 * len(left & right) / (len(left) + len(right)) if left or right else 1.0


def _asked(record: Record, key: str) -> list[Message]:
    """What comes before an answer in records of Alpaca's kind: history and the question with its input."""
    out: list[Message] = []
    for pair in _history(record.get("history")):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(p, str) for p in pair)):
            raise Misfit("'history' must be a list of [question, answer] pairs of strings")
        out += [Message("user", pair[0]), Message("assistant", pair[1])]
    ask, extra = record[key], record.get("input") or ""
    if extra:
        if not (isinstance(ask, str) and isinstance(extra, str)):
            raise Misfit(f"'{key}' and 'input' must both be strings")
        ask = f"{ask}\n{extra}" if ask else extra
    return out + _turns(ask, "user", key)


def _history(value: Any) -> list[Any]:
    """The history of a record: a list, or in old MiniMind's csv files the way Python writes one."""
    if isinstance(value, str) and value.strip():
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise Misfit("'history' is a string that is no list of [question, answer] pairs") from None
    if not isinstance(value or [], list):
        raise Misfit(f"'history' is {kind(value)}; it must be a list of [question, answer] pairs")
    return value or []


def _turns(value: Any, role: Role, key: str) -> list[Message]:
    """The messages of a field that may be one string, one message or a list of messages."""
    match value:
        case str() if value.strip():
            return read_messages(from_rendered(value) or [{"role": role, "content": value}])[0]
        case str():
            raise Misfit(f"'{key}' is empty")
        case dict():
            return read_messages([value])[0]
        case [str() as only]:  # TFChat
            return _turns(only, role, key)
        case list() if value and all(isinstance(item, str) for item in value):
            raise Misfit(f"'{key}' holds {len(value)} texts; give one")
        case list():
            return read_messages(value)[0]
        case _:
            raise Misfit(f"'{key}' is {kind(value)}; it must be a string or a list of messages")


# --- preferences -----------------------------------------------------------------------------------------------------


def preference(value: Any) -> Preference:
    """A pair of answers to one prompt, which may be given once or stand before both."""
    record = _object(value, "preference")
    if "chosen" not in record or "rejected" not in record:
        raise _unknown(record, "preference")
    if read_tools(record.get("tools")):
        raise Misfit("preference pairs with 'tools' are not read yet; remove the record")
    chosen, rejected = (_turns(record[key], "assistant", key) for key in ("chosen", "rejected"))
    ask, turns = _first(record, ASK), _first(record, _CONVERSATION)
    if ask is None and turns is None:
        if isinstance(record["chosen"], str) or isinstance(record["rejected"], str):
            raise Misfit("'prompt' is missing; expected it beside 'chosen' and 'rejected' when those are strings")
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        prompt = chosen[: min(len(chosen), len(rejected)) if same is None else same]
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        prompt = _asked(record, ask) if ask is not None else read_messages(record[turns or ""])[0]
        # Some files repeat the prompt before each answer.
        chosen, rejected = (c[len(prompt) :] if c[: len(prompt)] == prompt else c for c in (chosen, rejected))
    prompt = _with_system(record, prompt)
    if chosen == rejected:
        raise Misfit("'chosen' and 'rejected' are the same; there is nothing to prefer")
    if not prompt or prompt[-1].role == "assistant":
        raise Misfit("the prompt must end with a message that is not the assistant's")
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[0].role != "assistant":
            raise Misfit(f"'{key}' must go on from the prompt with an assistant's message")
    margin = _margin(record)
    return Preference(tuple(prompt), tuple(chosen), tuple(rejected), _source(record), _lang(record), margin)


def _margin(record: Record) -> float:
    """How much better the chosen answer is, where the record says so; a table's cell may be text."""
    value = record.get("margin")
    if value in (None, ""):
        return 0.0
    try:
        margin = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        margin = math.nan
    if not 0 <= margin < math.inf:
        raise Misfit(f"'margin' is {value!r}; it must be a number, 0 or more: how much better 'chosen' is")
    return margin


# --- prompts ---------------------------------------------------------------------------------------------------------


def prompt(value: Any) -> Prompt:
    """What a record asks: a prompt, or a chat or preference pair up to its last answer, which is a right one."""
    record = _object(value, "prompt")
    if read_tools(record.get("tools")):
        raise Misfit("prompts with 'tools' are not read yet; remove the record")
    if "chosen" in record and not _ends_with_answer(record):
        pair = preference(record)
        return prompt_of(Chat((*pair.prompt, *pair.chosen), (), pair.source, pair.lang))
    ask = _first(record, ASK)
    if ask is not None and _first(record, (*ANSWER, *_CONVERSATION)) is None:
        messages = _asked(record, ask)
    elif (turns := _first(record, _CONVERSATION)) is not None:
        messages = read_messages(record[turns])[0]
    elif _first(record, ANSWER) is None:
        raise _unknown(record, "prompt")
    else:
        messages = _conversation(record)[0]
    found = prompt_of(Chat(tuple(_with_system(record, messages)), (), _source(record) or _kind(record), _lang(record)))
    accepted = record.get("answers")
    if accepted is None:
        return found
    if not (isinstance(accepted, list) and accepted and all(isinstance(each, str) for each in accepted)):
        raise Misfit("'answers' must be a list of texts")
    return replace(found, answers=tuple(accepted))


def prompt_of(chat: Chat) -> Prompt:
    """A conversation up to its last question, with what was answered there."""
    messages, last = list(chat.messages), ""
    while messages and messages[-1].role not in ("user", "tool"):
        last = messages.pop().content
    if not messages:
        raise Misfit("no message asks anything; it must hold one of the user's")
    return Prompt(tuple(messages), (last,) if last else (), chat.source, chat.lang)


def _kind(record: Record) -> str:
    kind = record.get("kind")
    return kind if isinstance(kind, str) else ""


# --- feedback --------------------------------------------------------------------------------------------------------


def feedback(value: Any) -> Feedback:
    """An answer with a mark: `{"prompt", "completion", "label"}`, or any chat that ends with the answer, and "kto_tag".

    Without a prompt the completion is a whole conversation that ends with the answer.
    """
    record = _object(value, "feedback")
    label = _first(record, _LABEL)
    if label is None or "chosen" in record:
        raise _unknown(record, "feedback")
    if read_tools(record.get("tools")):
        raise Misfit("feedback with 'tools' is not read yet; remove the record")
    if "completion" in record and _first(record, ASK) is None:
        messages = _with_system(record, _turns(record["completion"], "assistant", "completion"))
    elif _first(record, (*_CONVERSATION, *ASK)) is None:
        raise _unknown(record, "feedback")
    else:
        messages = _conversation(record)[0]
    last = next((i for i, m in enumerate(messages) if m.role == "assistant" and _is_end(messages[i:])), 0)
    if not last or messages[-1].role != "assistant":
        raise Misfit("it must be a prompt and, after it, an answer of the assistant's")
    return Feedback(
        tuple(messages[:last]), tuple(messages[last:]), _good(record[label], label), _source(record), _lang(record)
    )


def _is_end(messages: Sequence[Message]) -> bool:
    """Whether the messages are one answer: the assistant's, with what tools said between."""
    return all(m.role in ("assistant", "tool") for m in messages)


def _good(value: Any, key: str) -> bool:
    match value:
        case bool():
            return value
        case 0 | 1:
            return bool(value)
        case str() if value.strip().lower() in ("true", "false", "0", "1"):
            return value.strip().lower() in ("true", "1")
        case _:
            raise Misfit(f"'{key}' is {value!r}; it must be true or false")


# --- common ----------------------------------------------------------------------------------------------------------


def _with_system(record: Record, messages: list[Message]) -> list[Message]:
    """The messages with the record's own "system" text before them."""
    system = record.get("system")
    if not system:
        return messages
    if not isinstance(system, str):
        raise Misfit(f"'system' is {kind(system)}; it must be a string")
    if messages and messages[0].role == "system":
        raise Misfit("there is a 'system' text and a system message too; keep one of them")
    return [Message("system", system), *messages]


def _object(value: Any, wanted: _Wanted) -> Record:
    if not isinstance(value, dict):
        raise Misfit(f"{kind(value)} where an object with {_EXPECTED[wanted]} was expected")
    if KNOWN.isdisjoint(value):  # Zhihu-KOL spells them INSTRUCTION and RESPONSE
        lower = {str(key).lower(): item for key, item in value.items()}
        return value if KNOWN.isdisjoint(lower) else lower
    return value


def _unknown(record: Record, wanted: _Wanted) -> Misfit:
    """The fault of a record whose keys do not fit, with the likeliest reason."""
    looks: dict[_Wanted, bool] = {
        "preference": "chosen" in record and "rejected" in record,
        "feedback": _is_feedback(record),
        "chat": _first(record, _CONVERSATION) is not None
        or bool(_first(record, (*ASK, *_TITLED)) and _first(record, ANSWER)),
        "doc": "text" in record,
    }
    hint = ""
    for other, like in looks.items():
        if like and other != wanted:
            hint = f"; it looks like {_NAMES[other]}"
            break
    else:
        for key in record:
            near = difflib.get_close_matches(str(key).lower(), _KEYS[wanted], n=1, cutoff=0.7)
            if near and near[0] not in record:
                hint = f"; did you mean '{near[0]}' for '{key}'?"
                break
    return Misfit(f"the record has {quoted(record) or 'no keys'}, but {_EXPECTED[wanted]} was expected{hint}")


def _first(record: Record, keys: Sequence[str]) -> str | None:
    return next((key for key in keys if record.get(key) is not None), None)


def _source(record: Record) -> str:
    source = record.get("source")
    return source if isinstance(source, str) else ""


def _lang(record: Record) -> str:
    lang = record.get("lang")
    short = lang[:2].lower() if isinstance(lang, str) else ""
    return short if short in ("zh", "en") else ""
