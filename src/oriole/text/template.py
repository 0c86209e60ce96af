"""Conversations and the one place that knows role tokens: `render` turns messages into ids and a loss mask.

The format is ChatML with Qwen3's tools and reasoning and no default system prompt:

    <|im_start|>system\\n{...}<|im_end|>\\n<|im_start|>user\\n{...}<|im_end|>\\n<|im_start|>assistant\\n{...}<|im_end|>\\n

What is decided here, for good (a model remembers the format it was trained on):

* Text of a message, a tool or an argument is always plain text: it can never become a role token, whatever it says.
* Reasoning is written as `<think>\\n…\\n</think>\\n\\n` before the answer. `reasoning=None` writes no block,
  `reasoning=""` the empty one. As in Qwen3, reasoning from before the last user message is left out, so a model reads
  its old answers but not its old thoughts, in training and in use alike; within a chain of tool calls they stay.
* Generation with `thinking=False` opens the answer with the empty block; `None` and `True` leave the choice to the
  model.
* White space at the start of an assistant's answer is dropped. With it the line break of the role header could become
  part of another token than the one a generation prompt ends with; without it a prompt is a prefix of the training ids.
* A run of tool results is one user turn of `<tool_response>` blocks.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from oriole.errors import DataError
from oriole.text.tokenizer import RESERVED, Tokenizer

__all__ = ["CHAT_TEMPLATE", "Chat", "Message", "Preference", "Prompt", "Role", "ToolCall", "message_dict", "render"]

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """One call an assistant makes: the tool's name and its arguments as a JSON object."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One message; only an assistant's has `tool_calls` or `reasoning` (None: no thought block, "": an empty one)."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None


@dataclass(frozen=True)
class Chat:
    """A conversation to learn from; `tools` are JSON schemas as in OpenAI's API, `lang` is "zh", "en" or ""."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    source: str = ""
    lang: str = ""


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for the assistant's answer, its last message the user's or a tool's."""

    messages: tuple[Message, ...]
    answers: tuple[str, ...] = ()
    """Right answers, where some are known."""
    source: str = ""
    lang: str = ""


@dataclass(frozen=True)
class Preference:
    """Two ways to go on from `prompt`, of which people preferred `chosen`."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: str = ""
    lang: str = ""
    margin: float = 0.0
    """How much better the chosen one is, in a reward model's units; 0 where nobody has said so."""


_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"

CHAT_TEMPLATE = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- TOOLS_HEAD }}
    {%- for tool in tools %}
        {{- '\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- TOOLS_TAIL }}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last_query = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning = none %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1] %}
        {%- endif %}
        {%- set content = content.lstrip() %}
        {{- '<|im_start|>assistant\n' }}
        {%- if reasoning is string and loop.index0 > ns.last_query %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if content or not loop.first %}
                    {{- '\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": ' }}
                {{- tool_call.name | tojson }}
                {{- ', "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
""".replace("TOOLS_HEAD", json.dumps(_TOOLS_HEAD)).replace("TOOLS_TAIL", json.dumps(_TOOLS_TAIL))
"""The same format for everyone else (transformers, llama.cpp, vLLM …), written into each model folder.

It gives the ids of `render` for every conversation whose text contains no marker string. Where text does contain one,
`render` keeps it plain, while other tools read it as the token; `</think>` in an answer is how they return reasoning.
"""

_MARKER = re.compile("|".join(map(re.escape, RESERVED)))
_IDS = {name: i for i, name in enumerate(RESERVED)}
_Piece = tuple[str | int, int]  # plain text or a reserved id, and whether it is trained on


def render(
    messages: Sequence[Message],
    tok: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    generation: bool = False,
    thinking: bool | None = None,
) -> tuple[list[int], list[int]]:
    """The ids (n,) of a conversation and its loss mask (n,) of 0 and 1.

    The mask is 1 on what an assistant says, its reasoning, answer, tool calls and `<|im_end|>`, and 0 on all else: role
    headers, the line break between messages, other roles, the generation prompt. `generation` adds the header of the
    answer to come; `thinking=False` also the empty thought block. `DataError` for a conversation no template fits.
    """
    check(messages)
    ids: list[int] = []
    mask: list[int] = []

    def add(piece: list[int], trained: int) -> None:
        ids.extend(piece)
        mask.extend([trained] * len(piece))

    text, text_trained = "", 0
    for piece, trained in _pieces(messages, tools, generation, thinking):
        # Text between two role tokens is encoded in one go: a line break may be in one token with what follows it.
        # It is cut only where an answer starts, and there a token ends anyway, because answers begin with no space.
        if isinstance(piece, int) or trained != text_trained:
            add(tok.encode(text), text_trained)
            text = ""
        if isinstance(piece, int):
            add([piece], trained)
        else:
            text += piece
        text_trained = trained
    add(tok.encode(text), text_trained)
    return ids, mask


def check(messages: Sequence[Message]) -> None:
    """Raise `DataError` unless the messages are a conversation that can be rendered."""
    if not messages:
        raise DataError("a conversation without messages cannot be rendered; give it at least one")
    for i, message in enumerate(messages):
        if message.role not in get_args(Role):
            raise DataError(f"message {i + 1} has the role {message.role!r}; use one of {', '.join(get_args(Role))}")
        if not isinstance(message.content, str):
            raise DataError(f"message {i + 1} ({message.role}) has {message.content!r} as its content; give it text")
        if message.role != "assistant" and (message.tool_calls or message.reasoning is not None):
            raise DataError(
                f"message {i + 1} has the role {message.role!r} but tool calls or reasoning; only an assistant's can"
            )


def message_dict(message: Message) -> dict[str, Any]:
    """The message as `apply_chat_template` and OpenAI's API spell it (reasoning as `reasoning_content`)."""
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        out["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.tool_calls
        ]
    if message.reasoning is not None:
        out["reasoning_content"] = message.reasoning
    return out


def _pieces(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], generation: bool, thinking: bool | None
) -> Iterator[_Piece]:
    """The rendered conversation as text and reserved ids; the twin of CHAT_TEMPLATE."""
    first_system = messages[0].role == "system"
    if tools:
        yield from _format("<|im_start|>system\n")
        if first_system:
            yield messages[0].content + "\n\n", 0
        yield from _format(_TOOLS_HEAD)
        for tool in tools:
            yield "\n" + _json(tool), 0
        yield from _format(_TOOLS_TAIL + "<|im_end|>\n")
    last_query = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)
    for i, message in enumerate(messages):
        match message.role:
            case "system" if i == 0 and tools:
                pass  # it stands in the tools' block
            case "system" | "user":
                yield from _format(f"<|im_start|>{message.role}\n")
                yield message.content, 0
                yield from _format("<|im_end|>\n")
            case "assistant":
                yield from _format("<|im_start|>assistant\n")
                yield from _answer(message, with_reasoning=i > last_query)
                yield "\n", 0
            case "tool":
                if i == 0 or messages[i - 1].role != "tool":
                    yield from _format("<|im_start|>user")
                yield from _format("\n<tool_response>\n")
                yield message.content, 0
                yield from _format("\n</tool_response>")
                if i + 1 == len(messages) or messages[i + 1].role != "tool":
                    yield from _format("<|im_end|>\n")
    if generation:
        yield from _format("<|im_start|>assistant\n")
        if thinking is False:
            yield from _format(_EMPTY_THOUGHT)


def _answer(message: Message, with_reasoning: bool) -> Iterator[_Piece]:
    """What an assistant says, from behind its header to its end mark: all of it is trained on."""
    content = message.content.lstrip()
    if message.reasoning is not None and with_reasoning:
        yield from _format("<think>\n", 1)
        yield message.reasoning.strip("\n"), 1
        yield from _format("\n</think>\n\n", 1)
    yield content, 1
    for n, call in enumerate(message.tool_calls):
        if content or n:
            yield "\n", 1
        yield from _format("<tool_call>\n", 1)
        yield f'{{"name": {_json(call.name)}, "arguments": {_json(call.arguments)}}}', 1
        yield from _format("\n</tool_call>", 1)
    yield from _format("<|im_end|>", 1)


def _format(text: str, trained: int = 0) -> Iterator[_Piece]:
    """Split our own format text, never a user's, into plain text and the reserved ids its markers stand for."""
    end = 0
    for marker in _MARKER.finditer(text):
        if marker.start() > end:
            yield text[end : marker.start()], trained
        yield _IDS[marker[0]], trained
        end = marker.end()
    if end < len(text):
        yield text[end:], trained


def _json(value: Any) -> str:
    """As `tojson` in transformers' templates: no ASCII escapes, keys in their order."""
    return json.dumps(dict(value) if isinstance(value, Mapping) else value, ensure_ascii=False)
