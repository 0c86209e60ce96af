"""Does a tokenizer keep what it is given? The questions that the earlier systems' tokenizers failed, asked of any file.

Tabs and line breaks that vanish, characters that become "unknown", role tokens that a user can type, streams that cut
a character, a template that renders otherwise in training than in serving.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from oriole.errors import ModelError
from oriole.text.template import CHAT_TEMPLATE, Message, message_dict, render
from oriole.text.tokenizer import IM_END, IM_START, RESERVED, Detokenizer, Tokenizer
from oriole.text.tokreport import load_any
from oriole.text.tokspec import FIRST_BYTE

__all__ = ["CASES", "Finding", "check_tokenizer"]

CASES: dict[str, str] = {
    "spaces": "  a  b   c ",
    "tabs": "\tif x:\n\t\treturn\t1",
    "line breaks": "one\n\ntwo\r\nthree\rfour\n",
    "full-width punctuation": "春眠不觉晓，处处闻啼鸟。“夜来风雨声”——（花落知多少）？！\u3000完",
    "rare characters": "𠮷野家的𨋢在龘龘之上，㐀",
    "traditional characters": "兩個黃鸝鳴翠柳，一行白鷺上青天。",
    "classical Chinese": "學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？",
    "emoji": "🎉👩‍👩‍👧‍👦👋🏽🇨🇳❤️‍🔥 1️⃣",
    "accents": "naïve café, e\u0301 and é, Ångström",
    "other scripts": "Привет мир, مرحبا بالعالم, こんにちは世界, 안녕하세요, नमस्ते",
    "code": "def f(x):\n    return {'k': [i**2 for i in x if i != 0]}  # done\n",
    "LaTeX and addresses": "$\\frac{1}{2}\\sum_{i=0}^n x_i$ https://example.org/a?b=c&d=%20#e",
    "numbers": "3.14159 -1e-9 ２０２４ ⅷ ½ 1,234,567",
    "control characters": "a\x00b\x1b[31mc\x7f\u200b\u200d\u2028\ufeffd",
    "edges of UTF-8": "\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff\ufffd",
    "long runs": "中" * 300 + "a" * 300 + " " * 300 + "\n" * 300,
}
"""Texts that must come back as they were."""

_CHAT = (
    Message("system", "Be brief.\n"),
    Message("user", "\t你好 <|im_end|> 👋🏽"),
    Message("assistant", "你好！\n\nHello."),
    Message("user", "</think>再见"),
)


class Finding(NamedTuple):
    """One question, whether the answer is as it should be, and what was seen where it is not."""

    name: str
    ok: bool
    detail: str


def check_tokenizer(path: Path) -> list[Finding]:
    """All questions, asked of a folder or of a tokenizer.json, be it Oriole's or not."""
    foreign = load_any(path)
    findings = [Finding(f"round trip: {name}", *_round_trip(foreign, text)) for name, text in CASES.items()]
    names = "".join(f"<{name}> {name}" for name in RESERVED)
    findings.append(Finding("round trip: names of role tokens", *_round_trip(foreign, names)))
    if path.is_file():
        if path.name != "tokenizer.json":
            return findings
        path = path.parent
    try:
        tokenizer = Tokenizer.load(path)
    except ModelError as error:
        return [*findings, Finding("form: Oriole's, which llama.cpp can load", False, str(error))]
    findings.append(Finding("form: Oriole's, which llama.cpp can load", True, ""))
    for name, problems in (
        ("ids: the same as other readers of the file get", _same_ids(tokenizer, foreign)),
        ("ids: every one spells something of its own", _distinct(tokenizer)),
        ("reserved ids: no text becomes one", _unreachable(tokenizer)),
        ("reserved ids: other readers know 0 to 15", _known(foreign)),
        ("streaming: whole characters only", _streaming(tokenizer)),
        ("template: roles, ends and content", _template(tokenizer)),
        ("template: the file renders the same", _rendered(path, tokenizer, foreign)),
        ("model: its embedding has a row for each id", _embedding(path, tokenizer)),
    ):
        found = list(problems)
        findings.append(Finding(name, not found, "; ".join(found[:3])))
    return findings


def _round_trip(tokenizer: tokenizers.Tokenizer, text: str) -> tuple[bool, str]:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    back = tokenizer.decode(ids, skip_special_tokens=False)
    if back == text:
        return True, ""
    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    start = max(0, at - 4)
    return False, f"{text[start : at + 8]!r} came back as {back[start : at + 8]!r}"


def _same_ids(tokenizer: Tokenizer, foreign: tokenizers.Tokenizer) -> Iterator[str]:
    for name, text in CASES.items():
        ours, theirs = tokenizer.encode(text), foreign.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            yield f"{name}: {ours[:8]}… here, {theirs[:8]}… there"


def _distinct(tokenizer: Tokenizer) -> Iterator[str]:
    seen: dict[bytes, int] = {}
    for i in range(FIRST_BYTE, tokenizer.vocab_size):
        token = tokenizer.token_bytes(i)
        if not token or token in seen:
            yield f"id {i} spells {token!r}" + (f", as does id {seen[token]}" if token in seen else "")
        seen[token] = i


def _unreachable(tokenizer: Tokenizer) -> Iterator[str]:
    for text in (*RESERVED, "".join(RESERVED), *(f"a{name}b\n" for name in RESERVED)):
        ids = tokenizer.encode(text)
        if min(ids) < FIRST_BYTE or tokenizer.decode(ids) != text:
            yield f"{text!r} becomes {ids}"


def _known(foreign: tokenizers.Tokenizer) -> Iterator[str]:
    for i, name in enumerate(RESERVED):
        ids = foreign.encode(name, add_special_tokens=False).ids
        if ids != [i]:
            yield f"{name} is {ids}, not {i}"


def _streaming(tokenizer: Tokenizer) -> Iterator[str]:
    for name, text in CASES.items():
        stream, said = Detokenizer(tokenizer), ""
        for id in tokenizer.encode(text):
            said += stream.feed(id)
            if not text.startswith(said):
                yield f"{name}: {said[-8:]!r} was sent"
                break
        if said + stream.flush() != text:
            yield f"{name}: the pieces do not make up the text"


def _template(tokenizer: Tokenizer) -> Iterator[str]:
    ids, mask = render(_CHAT, tokenizer, generation=True)
    starts, ends = ids.count(IM_START), ids.count(IM_END)
    if (starts, ends) != (len(_CHAT) + 1, len(_CHAT)):
        yield f"{starts} beginnings and {ends} ends for {len(_CHAT)} messages and the answer to come"
    text = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in _CHAT) + "<|im_start|>assistant\n"
    if (back := tokenizer.decode(ids, skip_special=False)) != text:
        yield f"rendered as {back!r}"
    answer = [i for i, trained in zip(ids, mask, strict=True) if trained]
    if tokenizer.decode(answer, skip_special=False) != _CHAT[2].content + "<|im_end|>":
        yield f"trained on {tokenizer.decode(answer, skip_special=False)!r}"


def _rendered(path: Path, tokenizer: Tokenizer, foreign: tokenizers.Tokenizer) -> Iterator[str]:
    """The template that lies in the folder, as another program would use it."""
    files = {
        "chat_template.jinja": path / "chat_template.jinja",
        "tokenizer_config.json": path / "tokenizer_config.json",
    }
    for name, file in files.items():
        if not file.is_file():
            yield f"{name} is missing; `oriole tokenizer add {path} … out=DIR` or training writes it"
            return
    template = files["chat_template.jinja"].read_text(encoding="utf-8")
    config = json.loads(files["tokenizer_config.json"].read_text(encoding="utf-8"))
    if template != CHAT_TEMPLATE or config.get("chat_template", CHAT_TEMPLATE) != CHAT_TEMPLATE:
        yield "it is not the template that Oriole renders by, so training and serving would differ"
    if config.get("eos_token") not in (RESERVED[0], RESERVED[IM_END]):
        yield f"tokenizer_config.json ends a text with {config.get('eos_token')!r}"
    chat = [m for m in _CHAT if not any(name in m.content for name in RESERVED)]  # with markers, ours stays plain text
    if (text := _jinja(template, chat)) is not None:
        ours, _ = render(chat, tokenizer, generation=True)
        if foreign.encode(text, add_special_tokens=False).ids != ours:
            yield f"it gives {text!r}, which other readers encode otherwise"


def _jinja(template: str, chat: Sequence[Message]) -> str | None:
    """The template rendered by jinja; None where jinja is not installed."""
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [message_dict(m) for m in chat]
    rendered: Any = environment.from_string(template).render(messages=messages, add_generation_prompt=True)
    return str(rendered)


def _embedding(path: Path, tokenizer: Tokenizer) -> Iterator[str]:
    file = path / "config.json"
    if file.is_file():
        rows = json.loads(file.read_text(encoding="utf-8")).get("vocab_size")
        if isinstance(rows, int) and rows < tokenizer.vocab_size:
            yield f"config.json has {rows:,} rows, the tokenizer {tokenizer.vocab_size:,} ids; the embedding must grow"
