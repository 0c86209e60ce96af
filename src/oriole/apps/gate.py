"""Did a preference stage help? Its answers against its parent's, on prompts that neither was trained on.

Both models answer the same prompts, sampled as `oriole chat` does (what is compared) and greedily (exact match and loop
rate). Judges compare the sampled answers one prompt at a time; two equal answers are a tie. `RULE` is how a verdict
comes about; every interval in it is exact (apps.intervals).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
import xxhash

from oriole.apps.api import Generation, Oriole
from oriole.apps.conversation import to_message
from oriole.apps.evaluate import NEW_TOKENS, Answer, ask
from oriole.apps.intervals import CONFIDENCE, Interval, difference, win_rate
from oriole.errors import ModelError
from oriole.infer.score import score
from oriole.model.folder import load_reward_model
from oriole.text.judge import exact_match, judge
from oriole.text.template import Message, render
from oriole.text.tokenizer import Tokenizer

__all__ = [
    "MARGIN", "RULE", "Said", "Score", "Verdict", "answer_all", "choose", "compare", "fitting", "messages_of",
    "reward_score", "rewards", "verdict",
]  # fmt: skip

Verdict = Literal["better", "worse", "no difference"]

Score = Callable[[Sequence[tuple[Sequence[Message], str]]], list[float]]
"""What a reward model gives for each (prompt, answer)."""

MARGIN = 0.01
"""Exact match and loop rate count as worse when their interval leaves out every change of less than so much."""

RULE = (
    "Worse: a judge prefers the parent (the interval of the win rate lies below 50 %), or exact match is lower or the "
    "loop rate higher by more than one point (by their intervals), or bits per byte have risen by more than the recipe "
    "allows (gate.max_bpb_rise). Better: not worse, and a judge prefers the stage (its interval lies above 50 %). Else "
    "no difference. All intervals are exact, at 95 %; two judges share their error."
)


# --- what is asked ---------------------------------------------------------------------------------------------------


def choose(prompts: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """`count` different prompts, evenly over kinds and languages, always the same ones; all when there are no more."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for prompt in {repr(p["messages"]): p for p in reversed(prompts)}.values():
        groups.setdefault((str(prompt.get("kind", "")), str(prompt.get("lang", ""))), []).append(prompt)
    for group in groups.values():
        group.sort(key=lambda p: xxhash.xxh3_64_intdigest(repr(p["messages"]).encode("utf-8", "surrogatepass")))
    chosen: list[Mapping[str, Any]] = []
    turn = 0
    while len(chosen) < count and any(turn < len(group) for group in groups.values()):
        chosen += [group[turn] for group in groups.values() if turn < len(group)]
        turn += 1
    return chosen[:count]


def fitting(oriole: Oriole, prompts: Sequence[Mapping[str, Any]], how: Generation) -> list[Mapping[str, Any]]:
    """The prompts that leave the model room for an answer."""
    return [prompt for prompt in prompts if _fits(oriole, prompt, how)]


def _fits(oriole: Oriole, prompt: Mapping[str, Any], how: Generation) -> bool:
    try:
        return len(oriole.prompt(messages_of(prompt), how)) + how.max_new_tokens <= oriole.context
    except ModelError:
        return False


def messages_of(prompt: Mapping[str, Any]) -> list[Message]:
    """A prompt's conversation."""
    return [to_message(m) for m in prompt["messages"]]


class Said(NamedTuple):
    """A model's answers to all prompts."""

    sampled: list[Answer]
    greedy: list[Answer]


def answer_all(oriole: Oriole, prompts: Sequence[Mapping[str, Any]], how: Generation) -> Said:
    """Both kinds of answers; `how` is for the sampled ones, each with a seed of its own."""
    conversations = [messages_of(prompt) for prompt in prompts]
    greedy = Generation(temperature=0.0, max_new_tokens=NEW_TOKENS)
    name = oriole.folder.parent.name
    return Said(
        ask(oriole, conversations, how, what=f"answers of {name}"),
        ask(oriole, conversations, greedy, what=f"greedy answers of {name}"),
    )


def reward_score(folder: Path, tokenizer: Tokenizer, device: torch.device | str = "cpu") -> Score:
    """The scores of the reward model in `folder`; `ModelError` when its tokenizer is not the answering model's."""
    if Tokenizer.load(folder).fingerprint() != tokenizer.fingerprint():
        raise ModelError(
            f"the reward model in {folder} reads with another tokenizer than the models it is to judge; name one that "
            "was trained from the same pretrained model"
        )
    model = load_reward_model(folder, device)

    def scored(answers: Sequence[tuple[Sequence[Message], str]]) -> list[float]:
        # What is longer than the reward model's context is read from its end.
        ids = [render([*asked, Message("assistant", text)], tokenizer)[0] for asked, text in answers]
        return [float(x) for x in score(model, [one[-model.config.context :] for one in ids])]

    return scored


def rewards(reward: Score, answers: Sequence[tuple[Sequence[Message], str]]) -> list[float]:
    """What the reward model gives; `ModelError` when one of them is no number."""
    given = reward(answers)
    bad = next((i for i, value in enumerate(given) if not math.isfinite(value)), None)
    if bad is not None:
        raise ModelError(
            f"the reward model gives {given[bad]} to {answers[bad][1][:60]!r}; it is broken: train it afresh, or judge "
            "by rules alone"
        )
    return given


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(
    prompts: Sequence[Mapping[str, Any]],
    parent: Said,
    stage: Said,
    *,
    reward: Score | None = None,
    bpb: tuple[Mapping[str, float], Mapping[str, float]] | None = None,
    max_bpb_rise: float = 0.05,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures with the verdict, and one row for each prompt with both answers and what the judges said.

    Prompts are `{"messages"}`, perhaps with accepted "answers", "kind" and "lang"; `bpb` are bits per byte by part, of
    the parent and of the stage.
    """
    scores = {"rules": [_by_rules(prompts, one.sampled) for one in (parent, stage)]}
    if reward is not None:
        scores["reward model"] = [
            rewards(reward, [(messages_of(p), a.text) for p, a in zip(prompts, one.sampled, strict=True)])
            for one in (parent, stage)
        ]
    outcomes = {name: _outcomes(parent.sampled, stage.sampled, *both) for name, both in scores.items()}
    confidence = 1 - (1 - CONFIDENCE) / len(scores)
    judges = {
        name: _judge(outcomes[name], parent.sampled, stage.sampled, confidence)
        | {"mean": {"parent": _rounded(fmean(both[0])), "stage": _rounded(fmean(both[1]))}}
        for name, both in scores.items()
    }
    exact = _exact(prompts, parent.greedy, stage.greedy)
    loop = _shares([a.loop for a in parent.greedy], [a.loop for a in stage.greedy])
    bits = _bits(*bpb) if bpb is not None else None
    found, why = verdict(
        {name: _interval(table["win_rate"]) for name, table in judges.items()},
        _interval(exact["difference"]) if exact else None,
        _interval(loop["difference"]),
        bits["rise"] if bits else None,
        max_bpb_rise,
    )
    figures: dict[str, Any] = {
        "prompts": len(prompts),
        "verdict": found,
        "why": why,
        "judges": judges,
        **({"exact_match": exact} if exact else {}),
        "loop_rate": loop,
        **({"bpb": bits} if bits else {}),
        "length": {"parent": _length(parent.sampled), "stage": _length(stage.sampled)},
        "rule": RULE,
    }
    return figures, [*_rows(prompts, parent, stage, scores, outcomes)]


def verdict(
    judges: Mapping[str, Interval],
    exact: Interval | None,
    loop: Interval,
    bpb_rise: float | None,
    max_bpb_rise: float,
) -> tuple[Verdict, str]:
    """What `RULE` says of these figures, and why: win rates by judge, then differences of stage less parent."""
    bad = [f"the {name} judge prefers the parent ({_win(rate)})" for name, rate in judges.items() if rate.high < 0.5]
    if exact is not None and exact.high < -MARGIN:
        bad.append(f"exact match is lower by {_points(-exact.value)}")
    if loop.low > MARGIN:
        bad.append(f"the loop rate is higher by {_points(loop.value)}")
    if bpb_rise is not None and not bpb_rise <= max_bpb_rise:  # nan is a rise, too
        bad.append(f"bits per byte have risen by {100 * bpb_rise:.1f} %, more than {100 * max_bpb_rise:.1f} %")
    if bad:
        return "worse", "; ".join(bad)
    good = [f"the {name} judge prefers the stage ({_win(rate)})" for name, rate in judges.items() if rate.low > 0.5]
    if good:
        return "better", "; ".join(good)
    return "no difference", "; ".join(f"the {name} judge cannot tell ({_win(rate)})" for name, rate in judges.items())


def _win(rate: Interval) -> str:
    return f"wins {100 * rate.value:.1f} %, {100 * rate.low:.1f} to {100 * rate.high:.1f}"


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


def _by_rules(prompts: Sequence[Mapping[str, Any]], said: Sequence[Answer]) -> list[float]:
    return [
        judge(messages_of(p), a.text, accepted=p.get("answers") or (), ended=a.ended).score
        for p, a in zip(prompts, said, strict=True)
    ]


def _outcomes(
    parent: Sequence[Answer], stage: Sequence[Answer], before: Sequence[float], after: Sequence[float]
) -> list[int]:
    """1 where the stage's answer is better, -1 where the parent's is; equal answers are equally good."""
    return [
        0 if (p.text, p.ended) == (s.text, s.ended) else (y > x) - (y < x)
        for p, s, x, y in zip(parent, stage, before, after, strict=True)
    ]


def _judge(
    outcomes: Sequence[int], parent: Sequence[Answer], stage: Sequence[Answer], confidence: float
) -> dict[str, Any]:
    """Win rate and length bias: is the longer answer the better one, and how long are the answers that win?"""
    wins, losses, ties = (outcomes.count(n) for n in (1, -1, 0))
    differing = [
        (o > 0) == (s.tokens > p.tokens)
        for o, p, s in zip(outcomes, parent, stage, strict=True)
        if o and p.tokens != s.tokens
    ]
    won = [(p.tokens, s.tokens) for o, p, s in zip(outcomes, parent, stage, strict=True) if o > 0]
    return {
        "win_rate": _table(win_rate(wins, losses, ties, confidence)),
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "longer_wins": _rounded(fmean(differing)) if differing else None,
        "length_of_wins": {"parent": _rounded(fmean(p for p, _ in won)), "stage": _rounded(fmean(s for _, s in won))}
        if won
        else None,
    }


def _exact(
    prompts: Sequence[Mapping[str, Any]], parent: Sequence[Answer], stage: Sequence[Answer]
) -> dict[str, Any] | None:
    """Exact match of the greedy answers where there are accepted ones."""
    asked = [i for i, p in enumerate(prompts) if p.get("answers")]
    if not asked:
        return None
    right = [[exact_match(said[i].text, prompts[i]["answers"]) for i in asked] for said in (parent, stage)]
    return _shares(*right) | {"questions": len(asked)}


def _shares(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    gained = sum(y and not x for x, y in zip(before, after, strict=True))
    lost = sum(x and not y for x, y in zip(before, after, strict=True))
    return {
        "parent": _rounded(fmean(before)),
        "stage": _rounded(fmean(after)),
        "difference": _table(difference(gained, lost, len(before))),
    }


def _bits(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any] | None:
    """Bits per byte by part, and their mean relative rise."""
    parts = [part for part in before if part in after]
    if not parts:
        return None
    rise = fmean(after[part] / before[part] - 1 for part in parts)
    return {"parent": {p: before[p] for p in parts}, "stage": {p: after[p] for p in parts}, "rise": _rounded(rise)}


def _length(said: Sequence[Answer]) -> float:
    """Mean tokens of an answer."""
    return _rounded(fmean(a.tokens for a in said))


def _rounded(x: float) -> float:
    return round(x, 4)


def _table(interval: Interval) -> dict[str, float]:
    return {name: _rounded(x) for name, x in interval._asdict().items()}


def _interval(table: Mapping[str, float]) -> Interval:
    return Interval(table["value"], table["low"], table["high"])


def _rows(
    prompts: Sequence[Mapping[str, Any]],
    parent: Said,
    stage: Said,
    scores: Mapping[str, Sequence[Sequence[float]]],
    outcomes: Mapping[str, Sequence[int]],
) -> Iterator[dict[str, Any]]:
    for i, prompt in enumerate(prompts):
        yield {
            **prompt,
            "parent": parent.sampled[i].text,
            "stage": stage.sampled[i].text,
            "outcome": {name: list_[i] for name, list_ in outcomes.items()},
            "scores": {name: {"parent": _rounded(b[i]), "stage": _rounded(a[i])} for name, (b, a) in scores.items()},
            "greedy": {"parent": parent.greedy[i].text, "stage": stage.greedy[i].text},
        }
