"""The gate: verdicts by hand, on a simulated null, and with real models."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oriole.apps.api import Generation, Oriole
from oriole.apps.evaluate import Answer
from oriole.apps.gate import Said, answer_all, choose, compare, fitting, reward_score, verdict
from oriole.apps.intervals import Interval, difference, win_rate
from oriole.errors import ModelError
from oriole.model.folder import load_model, save_model
from oriole.model.lm import LM
from oriole.text.template import Message
from oriole.text.tokenizer import train_tokenizer

HOW = Generation(temperature=1.0, max_new_tokens=12, seed=0)


def question(text: str, *answers: str, kind: str = "a", lang: str = "en") -> dict[str, Any]:
    return {"kind": kind, "lang": lang, "messages": [{"role": "user", "content": text}], "answers": list(answers)}


def said(*texts: str, loops: int = 0) -> Said:
    """Answers, the same sampled and greedy; the first `loops` of them are counted as loops."""
    answers = [Answer(text, len(text.split()), True, i < loops) for i, text in enumerate(texts)]
    return Said(answers, answers)


def sure(value: float, half: float = 0.01) -> Interval:
    return Interval(value, value - half, value + half)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    prompts = [question("What is a heron?", "a bird"), question("1+1=?", "2"), question("Who are you?"),
               question("Say yes.", "yes")]  # fmt: skip
    parent = said("a fish of the sea", "2", "我不知道。", "yes")
    stage = said("a bird", "1+1=3", "An oriole.", "yes")
    figures, rows = compare(prompts, parent, stage, bpb=({"zh": 2.0, "en": 1.0}, {"zh": 2.02, "en": 1.03}))
    judge = figures["judges"]["rules"]
    assert [row["outcome"]["rules"] for row in rows] == [1, -1, 1, 0]
    assert (judge["wins"], judge["losses"], judge["ties"]) == (2, 1, 1)
    assert judge["win_rate"]["value"] == (2 + 0.5) / 4
    rate = win_rate(2, 1, 1)
    assert (judge["win_rate"]["low"], judge["win_rate"]["high"]) == (round(rate.low, 4), round(rate.high, 4))
    # By tokens (words here): 2 against 5, 1 against 1, 2 against 1. The longer one wins in one of the two that differ.
    assert judge["longer_wins"] == 0.5
    assert judge["length_of_wins"] == {"parent": (5 + 1) / 2, "stage": (2 + 2) / 2}
    # Scores: half for being right, and of the other half a third for the language.
    means = judge["mean"]
    assert means["parent"] == pytest.approx((0.5 + 1 + 2 / 3 + 1) / 4, abs=1e-4)
    assert means["stage"] == pytest.approx((1 + 0.5 + 1 + 1) / 4, abs=1e-4)
    exact = figures["exact_match"]
    assert (exact["questions"], exact["parent"], exact["stage"]) == (3, round(2 / 3, 4), round(2 / 3, 4))
    assert exact["difference"]["low"] == round(difference(1, 1, 3).low, 4)
    assert figures["bpb"]["rise"] == 0.02
    assert figures["length"] == {"parent": (5 + 1 + 1 + 1) / 4, "stage": (2 + 1 + 2 + 1) / 4}
    assert figures["verdict"] == "no difference" and "cannot tell" in figures["why"]
    assert json.loads(json.dumps([figures, rows])) == [figures, rows]


def test_equal_answers_are_a_tie_whatever_a_judge_computes() -> None:
    prompts = [question(f"{i}?") for i in range(30)]
    noise = random.Random(0)
    same = said(*["fine"] * 30)
    figures, _ = compare(prompts, same, same, reward=lambda answers: [noise.random() for _ in answers])
    assert figures["judges"]["reward model"]["ties"] == 30
    assert figures["verdict"] == "no difference"
    assert "exact_match" not in figures, "no accepted answers, nothing to match"


def test_two_judges_share_the_error() -> None:
    prompts = [question(f"{i}?", "right") for i in range(8)]
    parent, stage = said(*["wrong"] * 8), said(*["right"] * 6, *["wrong"] * 2)
    alone, _ = compare(prompts, parent, stage)
    both, _ = compare(prompts, parent, stage, reward=lambda answers: [0.0] * len(answers))
    assert alone["judges"]["rules"]["win_rate"]["low"] == round(win_rate(6, 0, 2, 0.95).low, 4)
    assert both["judges"]["rules"]["win_rate"]["low"] == round(win_rate(6, 0, 2, 0.975).low, 4)


def test_a_broken_reward_model_is_named() -> None:
    with pytest.raises(ModelError, match="gives nan to 'fine'"):
        compare([question("a?")], said("fine"), said("well"), reward=lambda answers: [math.nan])


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate, exact, loop, rise, expected, why",
    [
        (sure(0.6), sure(0.0), sure(0.0), 0.0, "better", "prefers the stage"),
        (sure(0.5), sure(0.0), sure(0.0), 0.0, "no difference", "cannot tell"),
        (sure(0.4), sure(0.2), sure(-0.2), -0.1, "worse", "prefers the parent"),
        (sure(0.9), sure(-0.03), sure(0.0), 0.0, "worse", "exact match is lower by 3.0 points"),
        (sure(0.9), sure(-0.03, 0.025), sure(0.0), 0.0, "better", "prefers"),
        (sure(0.9), sure(0.0), sure(0.03), 0.0, "worse", "loop rate is higher by 3.0 points"),
        (sure(0.9), sure(0.0), sure(0.03, 0.025), 0.0, "better", "prefers"),
        (sure(0.9), None, sure(0.0), 0.06, "worse", "bits per byte have risen by 6.0 %"),
        (sure(0.9), None, sure(0.0), 0.04, "better", "prefers"),
        (sure(0.9), None, sure(0.0), math.nan, "worse", "bits per byte"),
        (sure(0.9), None, sure(0.0), None, "better", "prefers"),
    ],
)
def test_verdicts_by_hand(
    rate: Interval, exact: Interval | None, loop: Interval, rise: float | None, expected: str, why: str
) -> None:
    found, words = verdict({"rules": rate}, exact, loop, rise, 0.05)
    assert found == expected and why in words


def test_one_judge_against_is_enough() -> None:
    judges = {"rules": sure(0.3), "reward model": sure(0.9)}
    found, why = verdict(judges, None, sure(0.0), None, 0.05)
    assert found == "worse" and "rules judge prefers the parent" in why and "reward" not in why


def simulated(rng: np.random.Generator, n: int, better: float) -> str:
    """A verdict on made-up outcomes of two judges, exact match and loops; `better` is who wins of the decided."""

    def drawn(decided: float, wins: float) -> tuple[int, int, int]:
        won, lost, tied = rng.multinomial(n, [decided * wins, decided * (1 - wins), 1 - decided])
        return int(won), int(lost), int(tied)

    judges = {name: win_rate(*drawn(often, better), 0.975) for name, often in (("rules", 0.4), ("reward model", 0.9))}
    exact, loops = drawn(0.3, better), drawn(0.05, 0.5)
    found, _ = verdict(judges, difference(*exact[:2], n), difference(*loops[:2], n), 0.0, 0.05)
    return found


def test_no_difference_where_there_is_none() -> None:
    """Models that are equally good are told apart in at most five of a hundred trials, and seldom in none of them."""
    rng = np.random.default_rng(7)
    found = [simulated(rng, 400, 0.5) for _ in range(400)]
    told = 1 - found.count("no difference") / len(found)
    assert 0 < told <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / len(found))


def test_a_clear_difference_is_seen() -> None:
    rng = np.random.default_rng(8)
    assert [simulated(rng, 400, 0.65) for _ in range(40)].count("better") >= 38
    assert [simulated(rng, 400, 0.35) for _ in range(40)].count("worse") >= 38


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_chosen_prompts_are_spread_over_kinds_and_languages_and_do_not_depend_on_their_order() -> None:
    many = [question(f"{kind} {lang} {i}", kind=kind, lang=lang)
            for kind, count in (("a", 50), ("b", 5)) for lang in ("zh", "en") for i in range(count)]  # fmt: skip
    chosen = choose(many, 40)
    assert [sum(p["kind"] == "b" and p["lang"] == lang for p in chosen) for lang in ("zh", "en")] == [5, 5]
    assert [sum(p["kind"] == "a" and p["lang"] == lang for p in chosen) for lang in ("zh", "en")] == [15, 15]
    mixed = random.Random(1).sample(many, len(many))
    key = lambda p: p["messages"][0]["content"]  # noqa: E731
    assert sorted(map(key, choose(mixed, 40))) == sorted(map(key, chosen))
    assert len(choose([*many, *many], 1000)) == len(many) and choose([], 5) == []


# --- with models -----------------------------------------------------------------------------------------------------


def test_answers_are_those_of_generate_with_a_seed_for_each_prompt(oriole: Oriole) -> None:
    prompts = [question(t) for t in ("sing", "窗", "blue sky", "白鹭上青天")]
    found = answer_all(oriole, prompts, HOW)
    for i, prompt in enumerate(prompts):
        options = HOW.model_dump(exclude={"seed"})
        assert found.sampled[i].text == oriole.generate(prompt["messages"][0]["content"], **options, seed=i)
        alone = oriole.generate(prompt["messages"][0]["content"], temperature=0, max_new_tokens=64)
        assert found.greedy[i].text == alone


def test_a_model_is_no_better_than_itself_and_one_that_never_ends_is_worse(oriole: Oriole) -> None:
    prompts = [question(f"sing {i}") for i in range(30)]
    first = answer_all(oriole, prompts, HOW)
    again = answer_all(oriole, prompts, HOW)
    other = answer_all(oriole, prompts, HOW.model_copy(update={"seed": 1000}))
    same, rows = compare(prompts, first, again)
    assert same["verdict"] == "no difference" and all(row["parent"] == row["stage"] for row in rows)
    assert compare(prompts, first, other)[0]["verdict"] == "no difference"
    endless = Said(*([a._replace(ended=False, loop=True) for a in answers] for answers in first))
    ended = Said(*([a._replace(ended=True, loop=False) for a in answers] for answers in first))
    worse, _ = compare(prompts, ended, endless)
    assert worse["loop_rate"]["difference"]["value"] == 1.0 and worse["judges"]["rules"]["wins"] == 0
    assert worse["verdict"] == "worse" and "loop rate" in worse["why"]


def test_prompts_without_room_for_an_answer_are_left_out(oriole: Oriole) -> None:
    short, long = question("sing"), question("sing " * 300)
    assert fitting(oriole, [short, long], HOW) == [short]


def test_a_reward_model_judges_and_one_of_another_tokenizer_is_refused(
    oriole: Oriole, model_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    model = LM(load_model(model_folder).config, heads=("reward",))
    torch.nn.init.normal_(model.scalar_heads["reward"].weight)
    folder = tmp_path / "reward"
    save_model(model, folder, chat=True)
    oriole.tokenizer.save(folder, chat=True)
    score = reward_score(folder, oriole.tokenizer)
    asked = [Message("user", "sing")]
    one, two = score([(asked, "two golden orioles"), (asked, "窗含西岭千秋雪")])
    assert one != two
    assert score([(asked, "窗含西岭千秋雪")])[0] == pytest.approx(two, abs=1e-5)
    prompts = [question(f"sing {i}") for i in range(12)]
    mine = answer_all(oriole, prompts, HOW)
    other = answer_all(oriole, prompts, HOW.model_copy(update={"seed": 500}))
    figures, rows = compare(prompts, mine, other, reward=score)
    for row in rows:
        given = row["scores"]["reward model"]
        want = 0 if row["parent"] == row["stage"] else int(np.sign(given["stage"] - given["parent"]))
        assert row["outcome"]["reward model"] == want
    assert sum(figures["judges"]["reward model"][k] for k in ("wins", "ties", "losses")) == 12
    train_tokenizer([("en", "another text altogether " * 50)], vocab_size=280).save(folder, chat=True)
    with pytest.raises(ModelError, match="another tokenizer"):
        reward_score(folder, oriole.tokenizer)
