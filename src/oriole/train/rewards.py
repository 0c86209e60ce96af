"""What an answer is worth: rules that can be checked, and a reward model, each with a weight."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from oriole.errors import ConfigError, DataError, ModelError
from oriole.infer.score import score
from oriole.model.folder import load_reward_model
from oriole.model.lm import LM
from oriole.text import judge
from oriole.text.template import Message, Prompt, render
from oriole.text.tokenizer import Tokenizer
from oriole.train.tables import RewardName, RolloutTable

__all__ = ["Answer", "Rewards", "Score", "applies", "model_score", "rewards_for", "rule"]


class Answer(NamedTuple):
    """What was said to a prompt."""

    prompt: Prompt
    text: str
    ended: bool
    """Whether the end mark came."""


Score = Callable[[Sequence[Answer]], list[float | None]]
"""A number for each answer; None where the rule has nothing to say about its prompt."""


class Rewards:
    """The weighted sum of the scores that apply to an answer."""

    def __init__(self, scores: Mapping[str, tuple[Score, float]], *, skip_bad: bool = False) -> None:
        """`scores`: function and weight by name. `skip_bad`: leave out answers whose score is not finite, and count
        them, instead of stopping."""
        self.scores, self.skip_bad = dict(scores), skip_bad

    def __call__(self, answers: Sequence[Answer]) -> tuple[Tensor, dict[str, Tensor]]:
        """The rewards (N,), and the scores (N,) by name, fp64; nan where no score applies or one is not finite.

        `DataError` for a score that is not finite, unless those are to be skipped.
        """
        total = torch.zeros(len(answers), dtype=torch.float64)
        applies = torch.zeros(len(answers), dtype=torch.bool)
        columns: dict[str, Tensor] = {}
        for name, (function, weight) in self.scores.items():
            given = function(answers)
            bad = [i for i, value in enumerate(given) if value is not None and not math.isfinite(value)]
            if bad and not self.skip_bad:
                raise DataError(
                    f"the reward '{name}' gave {given[bad[0]]} for {len(bad)} of {len(given)} answers, for example "
                    f"{answers[bad[0]].text[:60]!r}; mend it, or count and leave such answers out with skip_bad=true"
                )
            column = torch.tensor([math.nan if v is None else v for v in given], dtype=torch.float64)
            known = torch.tensor([v is not None for v in given])
            # One that is not finite makes the sum nan, and the answer is left out.
            total = torch.where(known, total + weight * torch.where(column.isfinite(), column, math.nan), total)
            applies |= known
            columns[name] = torch.where(column.isfinite(), column, math.nan)
        return torch.where(applies, total, math.nan), columns


# --- rules -----------------------------------------------------------------------------------------------------------


def rule(name: RewardName, *, long_answer: int) -> Callable[[Answer], float | None]:
    """The rule of that name, all from 0 to 1; `long_answer` in characters of Chinese and words."""

    def length(answer: Answer) -> float:
        count = len(judge.units(answer.text))
        return max(0.0, min(1.0, 2 - count / long_answer))

    match name:
        case "arithmetic":
            return lambda a: _number(judge.arithmetic_right(a.prompt.messages[-1].content, a.text))
        case "exact":
            return lambda a: float(judge.exact_match(a.text, a.prompt.answers)) if a.prompt.answers else None
        case "language":
            return lambda a: float(judge.language_fits(a.prompt.messages, a.text))
        case "format":
            return lambda a: float(judge.well_formed(a.text, ended=a.ended))
        case "repetition":
            return lambda a: 1.0 - judge.repetition(a.text)
        case "length":
            return length
        case "rules":
            return lambda a: judge.judge(a.prompt.messages, a.text, accepted=a.prompt.answers, ended=a.ended).score
        case "model":
            raise ValueError("a reward model is no rule")


def _each(one: Callable[[Answer], float | None]) -> Score:
    return lambda answers: [one(answer) for answer in answers]


def applies(names: Collection[RewardName], prompt: Prompt) -> bool:
    """Whether any of the rewards has something to say about answers to the prompt."""
    checked = {"arithmetic": judge.asked_value(prompt.messages[-1].content) is not None, "exact": bool(prompt.answers)}
    return any(checked.get(name, True) for name in names)


def _number(right: bool | None) -> float | None:
    return None if right is None else float(right)


# --- the reward model ------------------------------------------------------------------------------------------------


def model_score(model: LM, tokenizer: Tokenizer) -> Score:
    """Scores of a reward model, for the whole conversation with its answer."""

    def scored(answers: Sequence[Answer]) -> list[float | None]:
        conversations = []
        for answer in answers:
            messages = [*answer.prompt.messages, Message("assistant", answer.text)]
            # An answer cut off or endless may leave no room; what a model with a shorter context reads is its end.
            conversations.append(render(messages, tokenizer)[0][-model.config.context :])
        return [*score(model, conversations).tolist()]

    return scored


def rewards_for(
    table: RolloutTable, tokenizer: Tokenizer, folder: Path, device: torch.device, *, skip_bad: bool
) -> Rewards:
    """The rewards that a recipe names; `folder` is the reward model's.

    `ModelError` when its tokenizer is another than the policy's.
    """
    scores: dict[str, tuple[Score, float]] = {}
    for name, weight in table.rewards.items():
        if name == "model":
            scores[name] = model_score(_reward_model(folder, tokenizer, device), tokenizer), weight
        else:
            scores[name] = _each(rule(name, long_answer=table.long_answer)), weight
    return Rewards(scores, skip_bad=skip_bad)


def _reward_model(folder: Path, tokenizer: Tokenizer, device: torch.device) -> LM:
    if not folder.exists():
        raise ConfigError(
            f"rollout.rewards names the reward model, but there is none at {folder}; train it first (stage reward), or "
            "name its folder: rollout.reward_model=FOLDER"
        )
    model = load_reward_model(folder, device)
    if Tokenizer.load(folder).fingerprint() != tokenizer.fingerprint():
        raise ModelError(
            f"the reward model in {folder} reads with another tokenizer than the policy's; train one from the policy's "
            "own parent"
        )
    return model
