"""Token tensors that KHAOSZ and its successor trained on, back into text: documents, chats and preference pairs.

Such a file is a dictionary of flat integer tensors in which one record follows the other:

    {"sequence"}                                          running text, an end mark behind each document
    {"sequence", "mask"} (or "loss_mask")                 chats: the mask is 1 on what the assistant says
    {"chosen", "rejected", "chosen_mask", "rejected_mask"}

Ids mean nothing without the tokenizer that made them, so a file is read only together with that tokenizer, and only
after it has proved to be the one: every id is in its vocabulary, and the text encodes to the same ids again. Oriole's
models have another tokenizer, so what is handed on is text. Files are opened by `torch.load(weights_only=True)`,
mapped, not loaded; pickles (.pkl), which can run any program, are refused.
"""

import pickle
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, final

import tokenizers
import torch

from oriole.errors import DataError, ModelError, raise_for_os_error
from oriole.text import records, rendered
from oriole.text.files import Skipped, refuse
from oriole.text.records import Doc
from oriole.text.template import Chat, Message, Preference

__all__ = ["AGREEMENT", "SUFFIXES", "TokenFile"]

SUFFIXES: Final = (".pt", ".pth")
"""Of files with token tensors."""

AGREEMENT: Final = 0.9
"""Share of ids that must come back when a sample is decoded and encoded again. Measured with KHAOSZ's kind of tokenizer
on Chinese and English: 1.00 with the one that made the ids, 0.6 with one of the same size learned from other text. One
with the same merges and more gives 0.97, and the right text too."""

SAMPLE = 20_000
"""Ids that are tried."""
LONGEST = 1 << 20
"""Ids without an end mark after which a document is cut."""

_WINDOW = 1 << 24
_ENDS = ("<eos>", "<|endoftext|>", "</s>", "<|end_of_text|>")
_CONTROL = (*_ENDS, "<bos>", "<s>", "<pad>", "<|padding|>", "<|beginoftext|>")


Exchange = tuple[str, str, str, str]
"""Place, whole text with its marks, question and answer of one conversation."""


@final
class TokenFile:
    """One file of token tensors, opened and checked against its tokenizer."""

    def __init__(self, path: str | Path, tokenizer: str | Path) -> None:
        """Open `path` with the `tokenizer.json` (or its folder) that made it; `DataError` when the two do not fit."""
        self.path = Path(path)
        self._tokenizer = _tokenizer(Path(tokenizer))
        self._tensors = _tensors(self.path)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self._ends = torch.tensor([vocab[name] for name in _ENDS if name in vocab] or [-1])
        self._control = {vocab[name] for name in _CONTROL if name in vocab}
        self._check(max(vocab.values()))

    @property
    def kind(self) -> Literal["text", "chat", "preference"]:
        """What the names of the tensors say that it holds."""
        if "chosen" in self._tensors or "rejected" in self._tensors:
            return "preference"
        return "chat" if self._mask_name() in self._tensors else "text"

    # --- what it holds -----------------------------------------------------------------------------------------------

    def docs(self, skip_bad: Skipped | None = None) -> Iterator[Doc]:
        """The documents, cut at end marks."""
        for ids in self._segments("sequence"):
            for piece in self._documents(ids):
                if text := self._text(piece).strip():
                    yield Doc(text, source=self.path.stem)

    def chats(self, skip_bad: Skipped | None = None) -> Iterator[Chat]:
        """The conversations; one whose text fits no template is refused with its place, or counted in `skip_bad`."""
        for one in self._exchanges("sequence", self._mask_name()):
            if chat := self._chat(one, skip_bad):
                yield chat

    def preferences(self, skip_bad: Skipped | None = None) -> Iterator[Preference]:
        """The pairs: the n-th conversation of "chosen" with the n-th of "rejected"."""
        sides = [list(self._exchanges(side, f"{side}_mask")) for side in ("chosen", "rejected")]
        if len(sides[0]) != len(sides[1]):
            raise DataError(
                f"{self.path} has {len(sides[0])} chosen and {len(sides[1])} rejected answers; they cannot be paired"
            )
        for good, bad in zip(*sides, strict=True):
            pair = [self._chat(one, skip_bad) for one in (good, bad)]
            if pair[0] is None or pair[1] is None:
                continue
            (*asked, chosen), (*also, rejected) = pair[0].messages, pair[1].messages
            if asked != also or chosen == rejected:
                why = "the two answers are the same" if asked == also else "the two answers have different prompts"
                refuse(self.path, good[0], f"{why}; remove the pair", skip_bad)
                continue
            yield Preference(tuple(asked), (chosen,), (rejected,), source=self.path.stem)

    # --- ids to text -------------------------------------------------------------------------------------------------

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i not in self._control], skip_special_tokens=False)

    def _documents(self, ids: torch.Tensor) -> Iterator[list[int]]:
        """The ids of each document; what is longer than `LONGEST` is cut."""
        held: list[int] = []
        for start in range(0, len(ids), LONGEST):
            window = ids[start : start + LONGEST]
            done = 0
            for end in torch.isin(window, self._ends).nonzero().flatten().tolist():
                yield held + window[done : end + 1].tolist()
                held, done = [], end + 1
            held += window[done:].tolist()
            if len(held) >= LONGEST:
                yield held
                held = []
        if held:
            yield held

    def _exchanges(self, name: str, mask_name: str) -> Iterator[Exchange]:
        """Each conversation; the answers are where the mask is 1."""
        held: Exchange | None = None
        for n, (ids, mask) in enumerate(zip(self._segments(name), self._segments(mask_name), strict=True)):
            if len(ids) != len(mask):
                raise DataError(f"{self.path}: '{name}' has {len(ids)} ids but '{mask_name}' {len(mask)} marks")
            for start, turn, stop in _blocks(mask):
                place = f"ids {start} to {stop} of '{name}'" + (f", tensor {n}" if n else "")
                ask, answer = ids[start:turn].tolist(), ids[turn:stop].tolist()
                text = self._tokenizer.decode(ask + answer, skip_special_tokens=False)
                if held is not None and text.startswith("\n"):  # KHAOSZ joins the turns of one chat by line breaks
                    held = (held[0], held[1] + text, held[2], held[3])
                    continue
                if held is not None:
                    yield held
                held = (place, text, self._text(ask), self._text(answer))
        if held is not None:
            yield held

    def _chat(self, one: Exchange, skip_bad: Skipped | None) -> Chat | None:
        place, text, ask, answer = one
        try:
            record = {"text": text.strip()} if rendered.turns(text) else {"prompt": ask, "response": answer}
            chat = records.chat(record)
        except (records.Misfit, ValueError) as fault:
            refuse(self.path, place, str(fault), skip_bad)
            return None
        messages = tuple(Message(m.role, m.content.strip(), m.tool_calls, m.reasoning) for m in chat.messages)
        return Chat(messages, chat.tools, self.path.stem)

    # --- tensors -----------------------------------------------------------------------------------------------------

    def _mask_name(self) -> str:
        return "loss_mask" if "loss_mask" in self._tensors else "mask"

    def _segments(self, name: str) -> list[torch.Tensor]:
        if name not in self._tensors:
            have = ", ".join(f"'{key}'" for key in self._tensors)
            raise DataError(f"{self.path} has {have}, but '{name}' is needed; read it as what it is")
        return self._tensors[name]

    def _check(self, last: int) -> None:
        """That this tokenizer made these ids; `DataError` when it cannot have."""
        tried = came_back = 0
        for name, tensors in self._tensors.items():
            if name.endswith("mask"):
                continue
            for ids in tensors:
                low, high = (int(v) for v in torch.aminmax(ids)) if len(ids) else (0, 0)
                if low < 0 or high > last:
                    raise DataError(
                        f"{self.path}: '{name}' has the id {high if high > last else low}, but the tokenizer's go from "
                        f"0 to {last}; give the tokenizer that made the file"
                    )
                if tried < SAMPLE:
                    for piece in self._documents(ids[:SAMPLE]):
                        plain = [i for i in piece if i not in self._control]
                        again = self._tokenizer.encode(self._text(piece), add_special_tokens=False).ids
                        tried += max(len(plain), len(again))
                        came_back += (Counter(plain) & Counter(again)).total()
        if came_back < AGREEMENT * tried:
            raise DataError(
                f"{self.path} was not made by this tokenizer: only {came_back / tried:.0%} of its ids come back when "
                "its text is encoded again; give the tokenizer that made the file"
            )


def _blocks(mask: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """(start, turn, stop): runs of 0 and then 1 of a mask; a question without an answer at the end is left out."""
    changes: list[int] = []
    for start in range(0, len(mask), _WINDOW):
        part = mask[start : start + _WINDOW + 1].to(torch.int8)
        changes += (torch.diff(part).nonzero().flatten() + start + 1).tolist()
    edges = [0, *changes, len(mask)]
    for i in range(0 if len(mask) and not mask[0] else 1, len(edges) - 2, 2):
        yield edges[i], edges[i + 1], edges[i + 2]


def _tensors(path: Path) -> dict[str, list[torch.Tensor]]:
    if path.suffix.lower() not in SUFFIXES:
        how = "torch.save(pickle.load(open(FILE, 'rb')), 'FILE.pt')" if "pkl" in path.suffix else "torch.save"
        raise DataError(f"{path} is no .pt file; token tensors are read from those only: where you trust it, use {how}")
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise_for_os_error(error, "reading", path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        why = str(error).partition("\n")[0][:120]
        raise DataError(
            f"{path} is damaged or holds more than tensors ({why}); save only tensors with torch.save"
        ) from error
    if isinstance(found, torch.Tensor):
        found = {"sequence": found}
    if not isinstance(found, Mapping) or not found:
        raise DataError(f"{path} holds {type(found).__name__}; expected a dictionary of token tensors")
    out: dict[str, list[torch.Tensor]] = {}
    for name, value in found.items():
        tensors = value if isinstance(value, list | tuple) else [value]
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor) or tensor.dim() != 1 or tensor.is_floating_point():
                raise DataError(f"{path}: '{name}' is not flat; expected tensors of one dimension with whole numbers")
        out[str(name)] = list(tensors)
    return out


def _tokenizer(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"no tokenizer at {file}; give the tokenizer.json that the token tensors were made by")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain `Exception`
        raise ModelError(f"{file} is no tokenizer ({error}); give the one that the tensors were made by") from error
