"""Text that was rendered for some model already, back into what it was made from: documents or turns of a chat.

Whole chats   ChatML `<|im_start|>role⏎…<|im_end|>`, with Qwen's tools and calls or MiniMind's `<s>role⏎…</s>`;
              `##提问:⏎…⏎##回答:⏎…[EOS]` (Phi2-mini-Chinese); `<|user|> … <|system|> <bos>…<eos>` (KHAOSZ, in which the
              assistant is named `<|system|>`); `Human: … Assistant: …` (BELLE's conversations)
Documents     `<|beginoftext|>…<|endoftext|>`, `<|im_start|>…<|im_end|>` without roles and `<s>…</s>` (old MiniMind),
              `…[EOS]`, `…<|endoftext|>`

Only text that begins (or, for documents, ends) with such a mark is taken apart; one that speaks *about* marks stays.
"""

import contextlib
import json
import re
from typing import Any, Final

__all__ = ["belle_turns", "documents", "is_rendered", "turns"]

Turn = dict[str, Any]

_FRAMES: Final = (
    ("<|beginoftext|>", "<|endoftext|>"),
    ("<|im_start|>", "<|im_end|>"),
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
)
_OPENINGS = ("<|beginoftext|>", "<|im_start|>", "<|user|>", "<s>", "<bos>", "##提问")
_ENDINGS = ("[EOS]", "<|endoftext|>", "</s>", "<eos>", "<|im_end|>")

_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(<\|im_end\|>|(?=<\|im_start\|>)|\Z)", re.DOTALL)
_OLD_MINIMIND = re.compile(r"<s>(system|user|assistant)\n(.*?)(</s>|(?=<s>)|\Z)", re.DOTALL)
_PHI2 = re.compile(r"##(提问|回答)[:：][ \t]*\n?(.*?)(?=\n?##(?:提问|回答)[:：]|\Z)", re.DOTALL)
_KHAOSZ = re.compile(
    r"<\|(user|system)\|>:?[ \t]*(?:<bos>|<s>)?[ \t]?(.*?)[ \t\n]*(?:<eos>|</s>)?[ \t\n]*(?=<\|(?:user|system)\|>|\Z)",
    re.DOTALL,
)
_BELLE = re.compile(r"(Human|Assistant)[:：][ \t]*(.*?)(?=\n+(?:Human|Assistant)[:：]|\Z)", re.DOTALL)

_TOOLS = re.compile(r"(?:\A|\n\n)# Tools\n\n[^<]*<tools></tools>[^<]*<tools>\n(.*?)\n</tools>.*\Z", re.DOTALL)
_CALL = re.compile(r"\n?<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\n(.*?)\n</tool_response>\n?", re.DOTALL)


def is_rendered(text: str) -> bool:
    """Whether the text begins or ends as rendered text does: a quick look before the careful one."""
    return text[:32].lstrip().startswith(_OPENINGS) or text[-32:].rstrip().endswith(_ENDINGS)


# --- documents -------------------------------------------------------------------------------------------------------


def documents(text: str) -> list[str]:
    """The documents of a rendered text without its marks: of a chat what was said, else what the marks enclose."""
    with contextlib.suppress(ValueError):
        if chat := turns(text):
            return ["\n".join(str(turn["content"]) for turn in chat if turn["content"])]
    text = text.strip()
    pieces = [text]
    for begin, end in _FRAMES:
        if text.startswith(begin) and (begin.startswith("<|") or text.endswith(end)):
            inner = text.removeprefix(begin).removesuffix(end)
            pieces = re.split(rf"{re.escape(end)}\s*{re.escape(begin)}", inner)
            break
    for end in ("[EOS]", "<|endoftext|>"):
        if pieces[-1].rstrip().endswith(end):
            pieces = [part for piece in pieces for part in piece.split(end)]
    return [piece.strip("\r\n ") for piece in pieces if piece.strip()]


# --- chats -----------------------------------------------------------------------------------------------------------


def turns(text: str) -> list[Turn]:
    """The turns of a rendered chat as {"role", "content"} with "tools" and "tool_calls"; none for other text.

    `ValueError` for a chat that was cut within a turn.
    """
    text = text.strip().removeprefix("<|beginoftext|>")
    for end in ("<|endoftext|>", "[EOS]"):
        text = text.removesuffix(end).rstrip()
    if _CHATML.match(text):
        return _from_chatml(_CHATML.findall(text))
    if _OLD_MINIMIND.match(text):
        return _from_chatml(_OLD_MINIMIND.findall(text))
    if _PHI2.match(text):
        found = [("user" if name == "提问" else "assistant", said) for name, said in _PHI2.findall(text)]
        return [_turn(role, said.strip("\n").removesuffix("[EOS]")) for role, said in found]
    if text.startswith("<|user|>") and "<|system|>" in text:
        return [_turn("user" if name == "user" else "assistant", said) for name, said in _KHAOSZ.findall(text)]
    return []


def belle_turns(text: str) -> list[Turn]:
    """The turns of BELLE's `Human: … Assistant: …`, without a last one that is empty; none for other text."""
    if not text.startswith(("Human:", "Human：")):
        return []
    found = [_turn("user" if name == "Human" else "assistant", said.strip()) for name, said in _BELLE.findall(text)]
    return found[:-1] if not found[-1]["content"] else found


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _from_chatml(found: list[tuple[str, str, str]]) -> list[Turn]:
    if found[-1] == ("assistant", "", ""):  # the opening of an answer that was to be generated
        found = found[:-1]
    for n, (_, _, end) in enumerate(found, 1):
        if not end:
            raise ValueError(f"turn {n} of the rendered chat is not closed; it was cut short, so remove the record")
    return _with_tools([(role, said) for role, said, _ in found])


def _with_tools(found: list[tuple[str, str]]) -> list[Turn]:
    if all(said.endswith("\n") for _, said in found):  # mini-ChatGPT's variant breaks the line before <|im_end|>
        found = [(role, said.removesuffix("\n")) for role, said in found]
    out: list[Turn] = []
    for role, said in found:
        match role:
            case "system" if tools := _TOOLS.search(said):
                out.append(_turn(role, said[: tools.start()]) | {"tools": _json_lines(tools[1])})
            case "user" if said.startswith("<tool_response>\n") and not _RESULT.sub("", said):
                out += [_turn("tool", result) for result in _RESULT.findall(said)]
            case "assistant" if calls := _CALL.findall(said):
                out.append(_turn(role, _CALL.sub("", said)) | {"tool_calls": [_loaded(call) for call in calls]})
            case _:
                out.append(_turn(role, said))
    return out


def _json_lines(text: str) -> list[Any]:
    return [_loaded(line) for line in text.splitlines() if line.strip()]


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # the reader of records says what is wrong with it
