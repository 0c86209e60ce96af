"""The messages of one conversation, as others spell them: roles, contents, tool calls and reasoning.

What does not fit raises `Misfit` with the number of the message and what was expected.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from oriole.text import rendered
from oriole.text.template import Message, Role, ToolCall

__all__ = ["Misfit", "Record", "as_json", "from_rendered", "kind", "quoted", "read_messages", "read_tools"]

Record = Mapping[str, Any]

_ROLES: dict[str, Role | Literal["call"]] = {
    "system": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "tool_response": "tool",
    "tool_call": "call", "function_call": "call",
}  # fmt: skip


_ANSWER = re.compile(r"\s*<answer>\s*(.*?)\s*</answer>\s*", re.DOTALL)


class Misfit(Exception):
    """Why a record does not fit; the reader adds file and line."""


def read_messages(turns: Any) -> tuple[list[Message], tuple[dict[str, Any], ...]]:
    """The messages of a list of turns, and the tools that one of them carries."""
    turns = from_rendered(turns) or as_json(turns, "the conversation")
    if not isinstance(turns, list) or not turns:
        raise Misfit(f"the conversation is {kind(turns)}; it must be a list of messages")
    out: list[Message] = []
    tools: tuple[dict[str, Any], ...] = ()
    for n, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise Misfit(f"message {n} is {kind(turn)}; it must be an object with 'role' and 'content'")
        word = turn.get("role", turn.get("from"))
        role = _ROLES.get(word.strip().lower()) if isinstance(word, str) else None
        if role is None:
            raise Misfit(f"message {n} has {_role_fault(turn, word)}")
        tools = read_tools(turn.get("tools") or turn.get("functions")) or tools
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


def from_rendered(value: Any) -> list[dict[str, Any]]:
    """The turns of a string that is a chat rendered for some model; none for anything else."""
    if not isinstance(value, str) or not rendered.is_rendered(value):
        return []
    try:
        return rendered.turns(value)
    except ValueError as error:
        raise Misfit(str(error)) from None


def _message(turn: Record, role: Role, content: str, calls: tuple[ToolCall, ...], n: int) -> Message:
    thought = turn.get("reasoning_content") or turn.get("reasoning") or None
    if thought is not None and not isinstance(thought, str):
        raise Misfit(f"the reasoning of message {n} is {kind(thought)}; it must be a string")
    if role != "assistant":
        if calls or thought:
            raise Misfit(f"message {n} is of role {role} but has tool calls or reasoning; only an assistant's can")
        return Message(role, content)
    opening = content.lstrip()
    if thought is None and opening.startswith("<think>") and "</think>" in opening:
        thought, _, content = opening.removeprefix("<think>").partition("</think>")
        thought, content = thought.strip("\n"), content.lstrip("\n")
        if answer := _ANSWER.fullmatch(content):  # MiniMind's r1 files
            content = answer[1]
    if not content.strip() and not calls and not thought:
        raise Misfit(f"message {n}, the assistant's, is empty; give it text or remove the record")
    return Message(role, content, calls, thought)


def _role_fault(turn: Record, word: Any) -> str:
    if word is None:
        return f"no 'role' and no 'from' (its keys: {quoted(turn)}); expected 'role' and 'content'"
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
        raise Misfit(f"the content of message {n} is {kind(raw)}; it must be a string")
    texts = []
    for part in raw:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise Misfit(f"the content of message {n} has a part that is not text; only text can be read")
        texts.append(part["text"])
    return "".join(texts)


# --- tools -----------------------------------------------------------------------------------------------------------


def _calls(value: Any, n: int) -> tuple[ToolCall, ...]:
    """Tool calls written as one object, a list of them, or the JSON of either; OpenAI's "function" level or not."""
    value = as_json(value, f"the tool call of message {n}")
    if not value:
        return ()
    out = []
    for call in value if isinstance(value, list) else [value]:
        inner = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise Misfit(f'a tool call of message {n} has no \'name\'; give {{"name", "arguments"}}')
        arguments = as_json(inner.get("arguments", inner.get("parameters")), f"the arguments in message {n}")
        if not isinstance(arguments or {}, dict):
            raise Misfit(f"the arguments of '{inner['name']}' in message {n} are no JSON object")
        out.append(ToolCall(inner["name"], arguments or {}))
    return tuple(out)


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Tool definitions in OpenAI's form: {"type": "function", "function": {"name", "description", "parameters"}}."""
    value = as_json(value, "'tools'")
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Misfit("'tools' must be a list of tool definitions, or its JSON")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


def as_json(value: Any, what: str) -> Any:
    """What a string spells as JSON; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise Misfit(f"{what} is a string that is not valid JSON: {value[:60]!r}") from None


# --- words ------------------------------------------------------------------------------------------------------------


def quoted(keys: Iterable[Any]) -> str:
    names = [f"'{key}'" for key in keys]
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "")


def kind(value: Any) -> str:
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
