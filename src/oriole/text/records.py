"""One JSON value to a `Doc`, `Chat` or `Preference`: all that is known about how others spell a record.

What a record must hold stands in `text.formats`, which reads files of them. One that does not fit raises `Misfit` with
what was expected and the likeliest reason.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from oriole.text.template import Chat, Message, Preference, Role, ToolCall

__all__ = ["ANSWER", "ASK", "Doc", "Misfit", "Record", "chat", "doc", "preference"]

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Doc:
    """One document of running text; `lang` is "zh", "en" or "" (not known)."""

    text: str
    lang: str = ""
    source: str = ""


_CONVERSATION = ("conversations", "messages", "conversation")
ASK = ("instruction", "prompt", "query", "question")
ANSWER = ("output", "response", "answer", "completion")
_ROLES: dict[str, Role | Literal["call"]] = {
    "system": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "tool_response": "tool",
    "tool_call": "call", "function_call": "call",
}  # fmt: skip

_Wanted = Literal["doc", "chat", "preference"]
_KEYS: dict[_Wanted, tuple[str, ...]] = {
    "doc": ("text",),
    "chat": (*_CONVERSATION, *ASK, *ANSWER),
    "preference": ("prompt", "chosen", "rejected"),
}
_EXPECTED: dict[_Wanted, str] = {
    "doc": "'text'",
    "chat": "'conversations' or 'messages', 'instruction' and 'output', 'prompt' and 'response', "
    "'query' and 'response', or 'question' and 'answer'",
    "preference": "'prompt', 'chosen' and 'rejected', or 'chosen' and 'rejected' as message lists that begin alike",
}
_NAMES: dict[_Wanted, str] = {
    "doc": "running text, as pretraining reads it",
    "chat": "a chat, as fine-tuning reads it",
    "preference": "a preference pair, as preference training reads it",
}


class Misfit(Exception):
    """Why a record does not fit; the reader adds file and line."""


def doc(value: Any) -> Doc:
    """`{"text"}` as a document."""
    record = _object(value, "doc")
    if "text" not in record:
        raise _unknown(record, "doc")
    text = record["text"]
    if not isinstance(text, str):
        raise Misfit(f"'text' is {_kind(text)}; it must be a string")
    return Doc(text, _lang(record), _source(record))


# --- chats -----------------------------------------------------------------------------------------------------------


def chat(value: Any) -> Chat:
    """A record of any of the chat formats, with at least one assistant's turn."""
    record = _object(value, "chat")
    ask, answer = _first(record, ASK), _first(record, ANSWER)
    tools: tuple[dict[str, Any], ...] = ()
    if (turns := _first(record, _CONVERSATION)) is not None:
        messages, tools = _messages(record[turns])
        if "chosen" in record and messages and messages[-1].role != "assistant":  # the answers are in the pair
            raise _unknown(record, "chat")
    elif "chosen" in record or ask is None or answer is None:
        raise _unknown(record, "chat")
    else:
        messages = [*_asked(record, ask), *_turns(record[answer], "assistant", answer)]
    messages = _with_system(record, messages)
    if not any(m.role == "assistant" for m in messages):
        raise Misfit("no turn is the assistant's, so there is nothing to learn; give at least one")
    return Chat(tuple(messages), _tools(record.get("tools")) or tools, _source(record), _lang(record))


def _asked(record: Record, key: str) -> list[Message]:
    """What comes before an answer in records of Alpaca's kind: history and the question with its input."""
    out: list[Message] = []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise Misfit(f"'history' is {_kind(history)}; it must be a list of [question, answer] pairs")
    for pair in history:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)):
            raise Misfit("'history' must be a list of [question, answer] pairs of strings")
        out += [Message("user", pair[0]), Message("assistant", pair[1])]
    ask, extra = record[key], record.get("input") or ""
    if extra:
        if not (isinstance(ask, str) and isinstance(extra, str)):
            raise Misfit(f"'{key}' and 'input' must both be strings")
        ask = f"{ask}\n{extra}" if ask else extra
    return out + _turns(ask, "user", key)


def _turns(value: Any, role: Role, key: str) -> list[Message]:
    """The messages of a field that may be one string, one message or a list of messages."""
    match value:
        case str() if value.strip():
            return _messages([{"role": role, "content": value}])[0]
        case str():
            raise Misfit(f"'{key}' is empty")
        case dict():
            return _messages([value])[0]
        case list():
            return _messages(value)[0]
        case _:
            raise Misfit(f"'{key}' is {_kind(value)}; it must be a string or a list of messages")


def _messages(turns: Any) -> tuple[list[Message], tuple[dict[str, Any], ...]]:
    """The messages of a list of turns, and the tools that one of them carries."""
    turns = _json(turns, "the conversation")
    if not isinstance(turns, list) or not turns:
        raise Misfit(f"the conversation is {_kind(turns)}; it must be a list of messages")
    out: list[Message] = []
    tools: tuple[dict[str, Any], ...] = ()
    for n, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise Misfit(f"message {n} is {_kind(turn)}; it must be an object with 'role' and 'content'")
        word = turn.get("role", turn.get("from"))
        role = _ROLES.get(word.strip().lower()) if isinstance(word, str) else None
        if role is None:
            raise Misfit(f"message {n} has {_role_fault(turn, word)}")
        tools = _tools(turn.get("tools")) or tools
        raw = turn.get("content", turn.get("value"))
        calls = _calls(turn.get("tool_calls") or turn.get("function_call"), n)
        if role == "call":
            calls, raw, role = (*_calls(raw, n), *calls), "", "assistant"
            if not calls:
                raise Misfit(f'message {n} is a tool call without a name; give {{"name", "arguments"}}')
            if out and out[-1].role == "assistant":  # what was said before the call, or one of several calls
                out[-1] = replace(out[-1], tool_calls=out[-1].tool_calls + calls)
                continue
        message = _message(turn, role, _content(raw, n, optional=bool(calls)), calls, n)
        if message.role != "system" or message.content.strip():  # an empty one says nothing
            out.append(message)
    return out, tools


def _message(turn: Record, role: Role, content: str, calls: tuple[ToolCall, ...], n: int) -> Message:
    thought = turn.get("reasoning_content") or turn.get("reasoning") or None
    if thought is not None and not isinstance(thought, str):
        raise Misfit(f"the reasoning of message {n} is {_kind(thought)}; it must be a string")
    if role != "assistant":
        if calls or thought:
            raise Misfit(f"message {n} is of role {role} but has tool calls or reasoning; only an assistant's can")
        return Message(role, content)
    opening = content.lstrip()
    if thought is None and opening.startswith("<think>") and "</think>" in opening:
        thought, _, content = opening.removeprefix("<think>").partition("</think>")
        thought, content = thought.strip("\n"), content.lstrip("\n")
    if not content.strip() and not calls and not thought:
        raise Misfit(f"message {n}, the assistant's, is empty; give it text or remove the record")
    return Message(role, content, calls, thought)


def _role_fault(turn: Record, word: Any) -> str:
    if word is None:
        return f"no 'role' and no 'from' (its keys: {_quoted(turn)}); expected 'role' and 'content'"
    near = difflib.get_close_matches(str(word).lower(), _ROLES, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "use system, user, assistant or tool"
    return f"the role {word!r}; {hint}"


def _content(raw: Any, n: int, optional: bool) -> str:
    """A message's text: a string, or OpenAI's list of text parts."""
    if isinstance(raw, str):
        return raw
    if raw is None and optional:
        return ""
    if not isinstance(raw, list):
        raise Misfit(f"the content of message {n} is {_kind(raw)}; it must be a string")
    texts = []
    for part in raw:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise Misfit(f"the content of message {n} has a part that is not text; only text can be read")
        texts.append(part["text"])
    return "".join(texts)


# --- tools -----------------------------------------------------------------------------------------------------------


def _calls(value: Any, n: int) -> tuple[ToolCall, ...]:
    """Tool calls written as one object, a list of them, or the JSON of either; OpenAI's "function" level or not."""
    value = _json(value, f"the tool call of message {n}")
    if not value:
        return ()
    out = []
    for call in value if isinstance(value, list) else [value]:
        inner = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise Misfit(f'a tool call of message {n} has no \'name\'; give {{"name", "arguments"}}')
        arguments = _json(inner.get("arguments", inner.get("parameters")), f"the arguments in message {n}")
        if not isinstance(arguments or {}, dict):
            raise Misfit(f"the arguments of '{inner['name']}' in message {n} are no JSON object")
        out.append(ToolCall(inner["name"], arguments or {}))
    return tuple(out)


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Tool definitions in OpenAI's form: {"type": "function", "function": {"name", "description", "parameters"}}."""
    value = _json(value, "'tools'")
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Misfit("'tools' must be a list of tool definitions, or its JSON")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


def _json(value: Any, what: str) -> Any:
    """What a string spells as JSON; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise Misfit(f"{what} is a string that is not valid JSON: {value[:60]!r}") from None


# --- preferences -----------------------------------------------------------------------------------------------------


def preference(value: Any) -> Preference:
    """A pair of answers to one prompt, which may be given once or stand before both."""
    record = _object(value, "preference")
    if "chosen" not in record or "rejected" not in record:
        raise _unknown(record, "preference")
    if _tools(record.get("tools")):
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
        prompt = _asked(record, ask) if ask is not None else _messages(record[turns or ""])[0]
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
    return Preference(tuple(prompt), tuple(chosen), tuple(rejected), _source(record), _lang(record))


# --- common ----------------------------------------------------------------------------------------------------------


def _with_system(record: Record, messages: list[Message]) -> list[Message]:
    """The messages with the record's own "system" text before them."""
    system = record.get("system")
    if not system:
        return messages
    if not isinstance(system, str):
        raise Misfit(f"'system' is {_kind(system)}; it must be a string")
    if messages and messages[0].role == "system":
        raise Misfit("there is a 'system' text and a system message too; keep one of them")
    return [Message("system", system), *messages]


def _object(value: Any, wanted: _Wanted) -> Record:
    if not isinstance(value, dict):
        raise Misfit(f"{_kind(value)} where an object with {_EXPECTED[wanted]} was expected")
    return value


def _unknown(record: Record, wanted: _Wanted) -> Misfit:
    """The fault of a record whose keys do not fit, with the likeliest reason."""
    looks: dict[_Wanted, bool] = {
        "preference": "chosen" in record and "rejected" in record,
        "chat": any(key in record for key in _CONVERSATION) or bool(_first(record, ASK) and _first(record, ANSWER)),
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
    return Misfit(f"the record has {_quoted(record) or 'no keys'}, but {_EXPECTED[wanted]} was expected{hint}")


def _quoted(keys: Iterable[Any]) -> str:
    names = [f"'{key}'" for key in keys]
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "")


def _first(record: Record, keys: Sequence[str]) -> str | None:
    return next((key for key in keys if record.get(key) is not None), None)


def _source(record: Record) -> str:
    source = record.get("source")
    return source if isinstance(source, str) else ""


def _lang(record: Record) -> str:
    lang = record.get("lang")
    short = lang[:2].lower() if isinstance(lang, str) else ""
    return short if short in ("zh", "en") else ""


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list" if value else "an empty list"
        case _:
            return "an object"
