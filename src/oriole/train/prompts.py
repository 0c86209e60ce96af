"""Prompts for reinforcement learning: read, rendered and counted, and an endless stream of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import xxhash

from oriole.errors import DataError
from oriole.log import say
from oriole.model.config import ModelConfig
from oriole.text.formats import Skipped, expand, read_prompts
from oriole.text.shards import held_out
from oriole.text.template import Prompt, render
from oriole.text.tokenizer import Tokenizer
from oriole.train.pairs import prompt_key
from oriole.train.prepare import data_root
from oriole.train.recipe import Part, Recipe
from oriole.train.rewards import applies

__all__ = ["PromptStream", "Question", "fingerprint", "read_questions", "trained_parts"]


@dataclass(frozen=True)
class Question:
    """A prompt and its ids, up to where the answer begins."""

    prompt: Prompt
    ids: list[int]


def trained_parts(recipe: Recipe) -> dict[str, Part]:
    """The parts of a recipe that hold prompts; the others are only measured."""
    return {name: part for name, part in recipe.parts.items() if recipe.format_of(part) == "prompt"}


def read_questions(
    recipe: Recipe, tokenizer: Tokenizer, shape: ModelConfig, split: Literal["train", "val"]
) -> dict[str, list[Question]]:
    """The prompts of each part in the split, without those that are too long or that no reward can judge.

    Both are counted aloud. `DataError` when a part has none left.
    """
    room = min(recipe.train.length, shape.context) - recipe.rollout.max_new_tokens
    out: dict[str, list[Question]] = {}
    for name, part in trained_parts(recipe).items():
        kept, long, mute = [], 0, 0
        for prompt in _prompts(recipe, part, split):
            if not applies(recipe.rollout.rewards, prompt):
                mute += 1
                continue
            ids, _ = render(prompt.messages, tokenizer, generation=True)
            if len(ids) > room:
                long += 1
            else:
                kept.append(Question(prompt, ids))
        if long:
            say(
                f"{split} part '{name}': {long:,} prompts of more than {room} tokens are left out (train.length or the "
                "model's context, minus rollout.max_new_tokens)",
                "yellow",
            )
        if mute:
            say(f"{split} part '{name}': {mute:,} prompts are left out, about which no reward has anything to say")
        if not kept:
            raise DataError(
                f"{split} part '{name}' has no prompt left: {long:,} are longer than {room} tokens, and about {mute:,} "
                f"none of the rewards ({', '.join(recipe.rollout.rewards)}) has anything to say"
            )
        out[name] = kept
    return out


def _prompts(recipe: Recipe, part: Part, split: str) -> Iterator[Prompt]:
    """As in the other stages: files of their own, or a hash of the text, keep what is held out apart."""
    paths = expand(part.val if split == "val" and part.val else part.files, data_root(recipe))
    skipped = Skipped() if recipe.skip_bad else None
    for prompt in read_prompts(paths, skip_bad=skipped):
        if part.val or held_out(prompt_key(prompt.messages), recipe.eval.holdout_pairs) == (split == "val"):
            yield prompt
    if skipped is not None and skipped.total:
        say(f"{skipped.total:,} bad records skipped, for example: {skipped.examples[0]}", "yellow")


def fingerprint(questions: Sequence[Question]) -> str:
    """Of prompts and right answers, in their order."""
    digest = xxhash.xxh3_128()
    for question in questions:
        digest.update(repr((question.ids, question.prompt.answers)).encode())
    return digest.hexdigest()


class PromptStream:
    """Places of prompts for ever, (part, number): parts by their weights, each in an order drawn anew every pass."""

    def __init__(self, parts: Mapping[str, Sequence[Question]], weights: Mapping[str, float], seed: int) -> None:
        self.parts, self.weights, self.seed = dict(parts), dict(weights), seed
        self._given = dict.fromkeys(self.parts, 0)
        self._orders: dict[str, tuple[int, list[int]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[str, int]:
        # The part that has had the least of its share.
        name = min(self.parts, key=lambda one: (self._given[one] + 1) / self.weights[one])
        turn, at = divmod(self._given[name], len(self.parts[name]))
        if self._orders.get(name, (-1, []))[0] != turn:
            key = xxhash.xxh3_128_intdigest(f"{self.seed}\0{name}\0{turn}".encode())
            raw = np.random.PCG64(key).random_raw(len(self.parts[name]))
            self._orders[name] = turn, np.argsort(raw, kind="stable").tolist()
        self._given[name] += 1
        return name, self._orders[name][1][at]

    def __getitem__(self, place: tuple[str, int]) -> Question:
        return self.parts[place[0]][place[1]]

    def state_dict(self) -> dict[str, Any]:
        """How many prompts of each part were given."""
        return {"given": dict(self._given)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._given = dict(state["given"])
