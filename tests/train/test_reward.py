"""The reward model's loss is the textbook's, its score stands at the end of the conversation, and a stage makes one."""

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oriole.apps import report
from oriole.config import validate
from oriole.errors import ConfigError, DataError, ModelError
from oriole.infer.score import score
from oriole.model.config import ModelConfig
from oriole.model.folder import load_model, load_reward_model, save_model
from oriole.model.lm import LM
from oriole.text.shards import write_shards
from oriole.text.template import Message, Preference, render
from oriole.text.tokenizer import Tokenizer, train_tokenizer
from oriole.train.batch import Batch
from oriole.train.pairs import Pairs, encode_pairs, make_pairs, mixed, pair_batches
from oriole.train.recipe import Recipe
from oriole.train.reward import RewardObjective, ScoredPairs, at_ends, reward_loss, with_reward_head
from oriole.train.stage import run_stage

TEXT = "Spring has come. Two orioles sing in the willow, and the children fly kites by the river. 两只黄鹂在枝头唱歌。"


# --- the loss --------------------------------------------------------------------------------------------------------


def slow_loss(chosen: float, rejected: float, margin: float, centre: float) -> float:
    """By the definitions, in Python's fp64."""
    better = 1 / (1 + math.exp(-(chosen - rejected - margin)))
    return -math.log(better) + centre * (chosen + rejected) ** 2


@pytest.mark.parametrize("centre", [0.0, 0.01, 0.5])
def test_the_loss_equals_the_definition(centre: float) -> None:
    rng = np.random.default_rng(0)
    chosen, rejected, margin = rng.normal(0, 2, 50), rng.normal(0, 2, 50), rng.random(50)
    expected = [slow_loss(*pair, centre) for pair in zip(chosen, rejected, margin, strict=True)]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        values = (torch.tensor(each, dtype=dtype) for each in (chosen, rejected, margin))
        found = reward_loss(*values, centre)
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_equal_scores_cost_ln_2_and_swapping_the_sides_flips_the_gap() -> None:
    zero, one = torch.zeros(1), torch.ones(1)
    assert float(reward_loss(one, one, zero, 0.0)) == pytest.approx(math.log(2))
    there, back = (float(reward_loss(*sides, zero, 0.0)) for sides in ((one, zero), (zero, one)))
    assert back - there == pytest.approx(1), "log sigmoid(x) - log sigmoid(-x) = x"


def test_rewards_far_apart_cost_what_they_must_and_no_nan() -> None:
    loss = reward_loss(torch.tensor([900.0, -900.0]), torch.tensor([-900.0, 900.0]), torch.zeros(2), 0.0)
    assert loss.tolist() == [0, 1800]


# --- where the score is read -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train_tokenizer([("en", TEXT * 3)], 300)


def preferences(count: int) -> list[Preference]:
    made = []
    for i in range(count):
        prompt = [Message("user", f"{i} {TEXT[: i % 11]}")]
        if i % 3 == 0:
            prompt = [Message("system", "s"), *prompt, Message("assistant", "hm"), Message("user", "more")]
        sides = (Message("assistant", TEXT[i % 20 : i % 20 + 5 + i % 13]), Message("assistant", f"x{TEXT[: i % 17]}"))
        made.append(Preference(tuple(prompt), (sides[0],), (sides[1],), margin=i % 4 / 2))
    return made


@pytest.fixture(scope="module")
def model(tok: Tokenizer) -> LM:
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=tok.vocab_size, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48,
        context=160, init_std=0.2,
    )  # fmt: skip
    return with_reward_head(LM(shape))


@pytest.fixture(scope="module")
def packed(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Preference], Batch]:
    """24 pairs, and all of them in one batch, which remembers the chosen answers."""
    given = preferences(24)
    rows = encode_pairs(given, tok, row=190, context=159, cut=False, left_out=Counter())
    pairs = Pairs(write_shards(rows, tok, tmp_path_factory.mktemp("pairs") / "shards"), whole=True)
    pairs.values["margin"] = np.repeat([p.margin for p in given], 2)
    return given, Batch.joined([at_ends(batch, answers=True) for batch, _ in pair_batches(pairs, 2, 192)])


def test_a_batch_marks_the_ends_of_whole_conversations_pair_by_pair(
    tok: Tokenizer, packed: tuple[list[Preference], Batch]
) -> None:
    given, batch = packed
    flat_doc, flat_tokens = batch.doc.flatten(), batch.tokens.flatten()
    sides = {tuple(render([*p.prompt, *answer], tok)[0]) for p in given for answer in (p.chosen, p.rejected)}
    found = []
    start = 0
    for n, end in enumerate(batch.rows.tolist()):
        assert flat_doc[end] % 2 == n % 2, "chosen, rejected, chosen, …"
        start = next(i for i in range(end, -1, -1) if i == 0 or flat_doc[i - 1] != flat_doc[i])
        found.append(tuple(flat_tokens[start : end + 1].tolist()))
    assert len(found) == 48 and set(found) == sides, "through the line break that `render` ends with"


def test_packed_equals_each_conversation_by_itself(
    tok: Tokenizer, model: LM, packed: tuple[list[Preference], Batch]
) -> None:
    given, batch = packed
    alone = score(model, [render([*p.prompt, *a], tok)[0] for p in given for a in (p.chosen, p.rejected)]).double()
    assert alone.std() > 0.05
    expected = [
        slow_loss(float(alone[2 * k]), float(alone[2 * k + 1]), pair.margin, 0.1) for k, pair in enumerate(given)
    ]
    objective = RewardObjective(0.1)
    loss = objective(model, batch)
    assert int(objective.weight(batch)) == len(given)
    assert float(loss.sum.detach()) == pytest.approx(sum(expected), rel=1e-5)
    gap = alone[0::2] - alone[1::2]
    assert float(loss.metrics["accuracy"]) == int((gap > 0).sum())
    assert float(loss.metrics["margin"]) == pytest.approx(float(gap.sum()), abs=1e-4)
    assert float(loss.metrics["mean_reward"]) / 24 == pytest.approx(float(alone.mean()), abs=1e-5)
    for name, value in (("min_reward", alone.min()), ("max_reward", alone.max())):
        assert float(loss.metrics[name]) / 24 == pytest.approx(float(value), abs=1e-5)


def test_the_sft_term_is_the_chosen_answers_log_prob_per_token(
    tok: Tokenizer, model: LM, packed: tuple[list[Preference], Batch]
) -> None:
    given, batch = packed
    expected = 0.0
    for pair in given:
        ids, mask = render([*pair.prompt, *pair.chosen], tok)
        begin = len(mask) - mask[::-1].index(1) - mask[::-1][mask[::-1].index(1) :].index(0)
        answer = range(begin, len(mask) - mask[::-1].index(1))
        tokens = torch.tensor(ids)
        with torch.no_grad():
            logits = (model(tokens[None]).h[0] @ model.embedding.weight.T).double()
        log_probs = logits.log_softmax(-1)
        expected -= sum(float(log_probs[i - 1, ids[i]]) for i in answer) / len(answer)
    plain, with_term = (RewardObjective(0.1, sft)(model, batch) for sft in (0.0, 0.5))
    assert float(with_term.metrics["nll_loss"]) == pytest.approx(expected, rel=1e-5)
    assert float((with_term.sum - plain.sum).detach()) == pytest.approx(0.5 * expected, rel=1e-4)


@pytest.mark.parametrize("sft", [0.0, 0.5])
def test_pieces_add_up_to_the_whole_and_the_whole_model_learns(
    model: LM, packed: tuple[list[Preference], Batch], sft: float
) -> None:
    _, batch = packed
    objective = RewardObjective(0.01, sft)
    model.zero_grad()
    objective(model, batch).sum.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert whole.keys() == dict(model.named_parameters()).keys()
    assert all(grad.abs().max() > 0 for grad in whole.values()), "no frozen base"
    model.zero_grad()
    for start in range(0, len(batch.tokens), 2):
        objective(model, batch.cut(start, start + 2)).sum.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_new_and_the_body_the_language_models(tied: bool) -> None:
    shape = ModelConfig(
        vocab_size=40, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, tie_embeddings=tied
    )
    lm = LM(shape)
    made = with_reward_head(lm)
    tokens = torch.arange(20)[None]
    assert torch.equal(made(tokens).h, lm(tokens).h)
    assert 0.01 < float(made.scalar_heads["reward"].get_parameter("weight").detach().std()) < 0.03
    with torch.no_grad():
        made.embedding.weight.zero_()
    assert lm.embedding.weight.abs().max() > 0, "a copy"


# --- the stage -------------------------------------------------------------------------------------------------------

KIND = ("Please come in.", "Thank you so much.", "How nice to see you.", "You are welcome here.")
RUDE = ("Leave me alone.", "Go away at once.", "What a stupid thing.", "I do not care now.")


def write_pairs(path: Path, start: int, count: int, **more: Any) -> Path:
    rows = []
    for i in range(start, start + count):
        filler = TEXT[i * 7 % 40 : i * 7 % 40 + 3 + i * 5 % 19]
        other = TEXT[i * 3 % 40 : i * 3 % 40 + 3 + i * 11 % 19]
        sides = {"chosen": f"{KIND[i % 4]} {filler}", "rejected": f"{RUDE[i // 4 % 4]} {other}"}
        rows.append({"prompt": f"{i}: {TEXT[i % 30 : i % 30 + 9]}?", **sides, "source": "ab"[i % 2], **more})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with an SFT model, and pairs beside it."""
    tokenizer = train_tokenizer([("en", TEXT * 3 + " ".join(KIND + RUDE) * 2)], 320)
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=320, dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12, ffn_dim=96, context=128
    )
    save_model(LM(shape), tmp_path / "run" / "sft" / "model", chat=True)
    tokenizer.save(tmp_path / "run" / "sft" / "model", chat=True)
    write_pairs(tmp_path / "train.jsonl", 0, 240)
    write_pairs(tmp_path / "val.jsonl", 1000, 60)
    return tmp_path / "run"


def recipe(run: Path, **changes: Any) -> Recipe:
    table: dict[str, Any] = {
        "stage": "reward", "run": run, "data": str(run.parent),
        "parts": {"pairs": {"files": ["train.jsonl"], "val": ["val.jsonl"]}},
        "train": {"epochs": 4, "batch_size": 4, "length": 128, "lr": 3e-3, "compile": False, "device": "cpu",
                  "dtype": "fp32"},
    }  # fmt: skip
    for name, values in changes.items():
        table[name] = {**table.get(name, {}), **values} if isinstance(values, dict) else values
    return validate(Recipe, table, "test")


def events(run: Path, event: str) -> list[dict[str, Any]]:
    lines = (run / "reward" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for line in lines if (record := json.loads(line))["event"] == event]


def test_a_stage_learns_to_tell_good_answers_from_bad_ones(run: Path) -> None:
    done = run_stage(recipe(run))
    before, *_, after = events(run, "eval")
    assert before["accuracy"] < 0.8 and after["accuracy"] >= 0.95 and after["auc"] >= 0.95
    assert after["pairs"] == 60 and after["accuracy_by_source"].keys() == {"a", "b"}
    assert after["min_reward"] < after["mean_reward"] < after["max_reward"]
    assert abs(after["mean_reward"]) < 1, "centred"
    step = events(run, "step")[-1]
    assert {"loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward", "grad_norm"} <= step.keys()
    assert step["accuracy"] > 0.9 and 0 <= done["loss"] < 0.5
    # What it says of a folder: scores through the public way are those that were measured.
    model, tok = load_reward_model(run / "reward" / "model"), Tokenizer.load(run / "reward" / "model")
    kind, rude = (render([Message("user", "9: orioles?"), Message("assistant", words)], tok)[0]
                  for words in (KIND[1], RUDE[2]))  # fmt: skip
    scores = score(model, [kind, rude])
    assert scores[0] > scores[1]
    with pytest.raises(ModelError, match="reward model: it scores answers"):
        load_model(run / "reward" / "model")
    shown = report.text(report.build(report.read_stages(run)))
    assert f"{100 * after['accuracy']:.1f} %" in shown and "AUC" in shown


def test_a_stage_that_was_broken_off_ends_with_the_same_weights(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"train": {"epochs": 1}, "checkpoint": {"every": 3}}
    run_stage(recipe(run, **small))
    weights = (run / "reward" / "model" / "model.safetensors").read_bytes()
    (run / "reward").rename(run / "first")
    original = ScoredPairs.__next__
    given = []

    def breaking(self: ScoredPairs) -> Batch:
        given.append(1)
        if len(given) == 9:
            raise RuntimeError("the power is gone")
        return original(self)

    monkeypatch.setattr(ScoredPairs, "__next__", breaking)
    with pytest.raises(RuntimeError, match="power"):
        run_stage(recipe(run, **small))
    run_stage(recipe(run, **small))
    assert (run / "reward" / "model" / "model.safetensors").read_bytes() == weights


def test_margins_of_the_file_are_asked_for(run: Path) -> None:
    write_pairs(run.parent / "train.jsonl", 0, 40, margin=3.0)
    write_pairs(run.parent / "val.jsonl", 1000, 20, margin=3.0)
    run_stage(recipe(run, train={"epochs": 1}))
    loss = events(run, "eval")[0]["loss"]
    assert loss == pytest.approx(math.log(1 + math.exp(3)), abs=0.3), "scores are still near 0"
    (run / "reward").rename(run / "with")
    write_pairs(run.parent / "train.jsonl", 0, 40)
    write_pairs(run.parent / "val.jsonl", 1000, 20)
    run_stage(recipe(run, train={"epochs": 1}))
    assert events(run, "eval")[0]["loss"] == pytest.approx(math.log(2), abs=0.1)


def test_a_margin_follows_its_pair_into_the_parts_of_a_mixture(run: Path) -> None:
    first = write_pairs(run.parent / "a.jsonl", 0, 9).read_text(encoding="utf-8")
    second = write_pairs(run.parent / "b.jsonl", 100, 7, margin=2.0, source="c").read_text(encoding="utf-8")
    lines = [*first.splitlines(), *second.splitlines()]
    random.Random(0).shuffle(lines)
    (run.parent / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    made = recipe(run, parts={"pairs": {"files": ["train.jsonl"], "val": ["val.jsonl"], "sources": {"c": 0.5}}})
    tok = Tokenizer.load(run / "sft" / "model")
    for _ in range(2):  # made, and found again
        train, val = make_pairs(made, tok, context=128, cut=False, whole=True)
        parts, _ = mixed(made, train, whole=True)
        assert sorted((len(p), *set(p.margins.tolist())) for p in parts) == [(7, 2), (9, 0)]
        assert Pairs(val["pairs"]).margins.tolist() == [0] * 60


def test_what_a_reward_stage_cannot_do_is_refused_by_name(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"parts\.text: a reward model writes nothing"):
        run_stage(recipe(run, parts={"text": {"files": ["train.jsonl"], "format": "text"}}))
    for more in ({"checkpoint": {"keep_best": 1}}, {"smart": {"early_stop": True}}):
        with pytest.raises(ConfigError, match="bits per byte, which a reward model does not have"):
            run_stage(recipe(run, **more))
    with pytest.raises(DataError, match=r"no documents.*left out: 240 answer too long|left out: 240"):
        run_stage(recipe(run, train={"length": 16}))
    run_stage(recipe(run, train={"epochs": 0.1}))
    with pytest.raises(ModelError, match="holds a reward model"):
        run_stage(recipe(run.parent / "other", data=str(run.parent), init=str(run / "reward" / "model")))
