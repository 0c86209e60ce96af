"""The text of an answer as its ids come, and what is thought before it: both kinds of reasoning that a person may see.

The visible kind is a `<think>` block: kept apart from the answer, and ended by force when its budget is used up. The
other kind happens in a latent block (model.reasoning); what is known of it are the steps and the confidence of a token.
"""

from collections.abc import Sequence
from typing import NamedTuple, final

import torch

from oriole.infer.engine import Constraint, Finish
from oriole.text.tokenizer import THINK, THINK_END, Detokenizer, Tokenizer

__all__ = ["AnswerText", "Piece", "Reasoned", "budget", "without_thought"]


class Piece(NamedTuple):
    """What one more token adds to an answer; often nothing."""

    text: str
    last: bool
    thought: bool = False
    """The text belongs to a `<think>` block and not to the answer."""


class Reasoned(NamedTuple):
    """An answer of a model with a latent block, and how it came about."""

    text: str
    reasoning: str
    """What stood in a `<think>` block, "" where there was none."""
    ids: tuple[int, ...]
    """Every token that was generated, a block's and the end mark among them."""
    steps: tuple[int, ...]
    """Iterations of the latent block for each of them."""
    confidence: tuple[float, ...]
    """For each, the probability that the model's likeliest token was the right one, as the model sees it."""


def budget(tokens: int, vocab_size: int) -> Constraint:
    """A constraint that lets nothing but `</think>` come once a block holds so many tokens; `vocab_size` ids in all."""
    close = torch.zeros(vocab_size, dtype=torch.bool)
    close[THINK_END] = True

    def allowed(ids: Sequence[int]) -> torch.Tensor | None:
        opened = max((i for i, id in enumerate(ids) if id == THINK), default=None)
        if opened is None or THINK_END in ids[opened:]:
            return None
        return close if len(ids) - opened > tokens else None

    return allowed


def without_thought(ids: Sequence[int]) -> list[int]:
    """The ids of the answer alone: no block, and of one that never ends nothing that follows."""
    out: list[int] = []
    inside = False
    for id in ids:
        if id == THINK:
            inside = True
        elif id == THINK_END:
            inside = False
        elif not inside:
            out.append(id)
    return out


@final
class AnswerText:
    """The text of one answer: whole characters, and nothing of a stop string even where it comes in several tokens.

    Of what stands in a `<think>` block the line breaks around it are left out, and behind the block white space, as
    the template writes them; stop strings are looked for in the answer only.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = stops
        self._held = ""
        self._thinking = self._thought = self._begun = False
        self.ended = False

    def add(self, token: int, finish: Finish | None) -> Piece:
        """The text that is certain after this token, which ends the answer if `finish` is given."""
        if finish is None and token in (THINK, THINK_END) and self._thinking != (token == THINK):
            return self._turn(token == THINK)
        new = "" if finish == "stop" else self._detokenizer.feed(token)
        if finish is not None:
            new += self._detokenizer.flush()
        if self._thinking:
            return self._think(new, finish)
        if self._thought and not self._begun:
            new = new.lstrip()
            self._begun = bool(new)
        self._held += new
        found = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:  # the one that is complete first, whatever the tokens were
            self.ended = True
            return Piece(self._held[: min(found)[1]], True)
        if finish is not None:
            self.ended = True
            return Piece(self._held, True)
        return Piece(self._certain(max((_overlap(self._held, s) for s in self._stops), default=0)), False)

    def _turn(self, thinking: bool) -> Piece:
        """Into the block or out of it: what was held back on this side is certain now."""
        rest, self._held = self._held + self._detokenizer.flush(), ""
        piece = Piece(rest if thinking else rest.rstrip("\n"), False, thought=not thinking)
        self._thinking, self._thought, self._begun = thinking, True, False
        return piece

    def _think(self, new: str, finish: Finish | None) -> Piece:
        self._held += new if self._begun else new.lstrip("\n")
        self._begun = self._begun or bool(self._held)
        if finish is not None:
            self.ended = True
            return Piece(self._held, True, thought=True)
        return Piece(self._certain(len(self._held) - len(self._held.rstrip("\n"))), False, thought=True)

    def _certain(self, keep: int) -> str:
        """All but the last `keep` characters, which stay held."""
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
