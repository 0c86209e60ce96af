"""Each preference loss is what its paper says, of log-probs that are those of SFT, whatever rows the pairs stand in;
and the stage computes its reference once, starts at ln 2, moves, and goes on bit for bit."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from oriole.apps.inspect import InspectConfig
from oriole.cli.inspection import inspect
from oriole.config import validate
from oriole.errors import ConfigError, DataError, ModelError
from oriole.model.config import ModelConfig
from oriole.model.folder import load_model, save_model
from oriole.model.lm import LM
from oriole.text.template import render
from oriole.text.tokenizer import Tokenizer, train_tokenizer
from oriole.train.batch import IGNORE, Batch, Rows
from oriole.train.dpo import DPOObjective, Sides, pair_loss, rewards
from oriole.train.gradients import Objective
from oriole.train.objectives import LMObjective
from oriole.train.recipe import Recipe
from oriole.train.stage import run_stage
from oriole.train.tables import DPOTable

SHAPE = ModelConfig(
    vocab_size=50, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=24, context=64
)

# --- the formulas, spelled out ---------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(log_p: float) -> float:
    return math.exp(log_p) / (1 - math.exp(log_p))


# Of log-probs c, r, those of the reference C, R, and tokens n, m.
SLOW: dict[str, tuple[dict[str, Any], Callable[..., float]]] = {
    "sigmoid": ({}, lambda c, r, C, R, n, m: -math.log(sigmoid(0.3 * (c - r - C + R)))),
    "sigmoid_norm": ({}, lambda c, r, C, R, n, m: -math.log(sigmoid(0.3 * ((c - C) / n - (r - R) / m)))),
    "ipo": ({}, lambda c, r, C, R, n, m: ((c - C) / n - (r - R) / m - 1 / 0.6) ** 2),
    "hinge": ({}, lambda c, r, C, R, n, m: max(0.0, 1 - 0.3 * (c - r - C + R))),
    "robust": (
        {"label_smoothing": 0.2},
        lambda c, r, C, R, n, m: (
            (-0.8 * math.log(sigmoid(0.3 * (c - r - C + R))) + 0.2 * math.log(sigmoid(-0.3 * (c - r - C + R)))) / 0.6
        ),
    ),
    "simpo": ({"gamma": 0.7}, lambda c, r, C, R, n, m: -math.log(sigmoid(0.3 * (c / n - r / m) - 0.7))),
    "orpo": ({}, lambda c, r, C, R, n, m: -c / n - 0.3 * math.log(sigmoid(math.log(odds(c / n) / odds(r / m))))),
}


def table(loss: str, **more: Any) -> DPOTable:
    return DPOTable(loss=loss, beta=0.3, **(SLOW[loss][0] | more))  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", SLOW)
@pytest.mark.parametrize("sft", [0.0, 0.4])
def test_every_loss_is_its_formula(loss: str, sft: float) -> None:
    generator = torch.Generator().manual_seed(1)
    log_probs = -torch.rand(20, 2, generator=generator, dtype=torch.float64) * 12 - 0.01
    reference = -torch.rand(20, 2, generator=generator, dtype=torch.float64) * 12 - 0.01
    lengths = torch.randint(1, 9, (20, 2), generator=generator).double()
    found = pair_loss(table(loss, sft=sft), Sides(log_probs, lengths, reference))
    for k in range(20):
        (c, r), (big_c, big_r), (n, m) = (x[k].tolist() for x in (log_probs, reference, lengths))
        expected = SLOW[loss][1](c, r, big_c, big_r, n, m) - sft * c / n
        assert float(found[k]) == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("loss", SLOW)
def test_losses_and_gradients_stay_finite_where_a_policy_is_certain(loss: str) -> None:
    log_probs = torch.tensor([[0.0, -500.0], [-500.0, 0.0], [-1e-9, -1e-9]]).requires_grad_()
    pair_loss(table(loss), Sides(log_probs, torch.full((3, 2), 5.0), torch.zeros(3, 2))).sum().backward()
    assert log_probs.grad is not None and bool(log_probs.grad.isfinite().all())


@pytest.mark.parametrize("loss", [name for name in SLOW if name not in ("ipo",)])
def test_a_wider_margin_is_a_smaller_loss(loss: str) -> None:
    sides = Sides(torch.tensor([[-3.0, -4.0], [-3.0, -5.0]]), torch.full((2, 2), 4.0), torch.full((2, 2), -3.5))
    near, far = pair_loss(table(loss), sides).tolist()
    assert far < near


# --- the objective on batches ----------------------------------------------------------------------------------------


def model() -> LM:
    torch.manual_seed(2)
    return LM(SHAPE)


def conversations(count: int, seed: int = 3) -> list[tuple[Tensor, Tensor, float]]:
    """2 `count` sides: ids (n,), mask (n,) and the reference's log-prob."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(2 * count):
        n, asked = int(rng.integers(6, 20)), int(rng.integers(2, 5))
        mask = np.concatenate([np.zeros(asked, np.uint8), (rng.random(n - asked - 1) < 0.9).astype(np.uint8), [1]])
        out.append((rng.integers(0, 50, n), mask, -float(rng.random()) * 40 - 20))
    return out


def batched(sides: list[Any], layout: list[list[int]], length: int = 64, holes: int = 0) -> Batch:
    """A batch whose rows hold the pairs of `layout`, by number."""
    rows = Rows(len(layout) + holes, length)
    reference = np.zeros((len(layout) + holes, length), np.float64)
    for row, pairs in enumerate(layout):
        for ids, mask, value in (sides[2 * k + side] for k in pairs for side in range(2)):
            span = rows.add(row, ids[:-1], np.where(mask[1:], ids[1:], IGNORE))
            reference[row, span.stop - 1] = value
    return rows.batch({"reference": reference})


def grads(objective: Objective, lm: LM, batches: list[Batch]) -> tuple[float, Tensor, dict[str, float]]:
    lm.zero_grad()
    total, sums = 0.0, {}
    for batch in batches:
        loss = objective(lm, batch)
        loss.sum.backward()
        total += float(loss.sum.detach())
        for name, value in loss.metrics.items():
            assert not value.requires_grad
            sums[name] = sums.get(name, 0.0) + float(value)
    flat = torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])
    return total, flat, sums


def slow_side(lm: LM, ids: np.ndarray, mask: np.ndarray) -> tuple[Tensor, int]:
    """The sum of the answer's log-probs, of a conversation alone in its row, by log_softmax."""
    logits = lm.head("logits", lm(torch.as_tensor(ids)[None]).h)[0].double()
    log_probs = logits.log_softmax(-1)[:-1].gather(-1, torch.as_tensor(ids)[1:, None]).squeeze(-1)
    return log_probs[torch.as_tensor(mask[1:]) > 0].sum(), int(mask[1:].sum())


@pytest.mark.parametrize("loss", SLOW)
def test_packed_pairs_give_the_slow_loss_and_gradient(loss: str) -> None:
    lm, sides = model(), conversations(5)
    total, flat, sums = grads(DPOObjective(table(loss, sft=0.3)), lm, [batched(sides, [[0, 3], [4], [2, 1]])])
    lm.zero_grad()
    slow = torch.zeros((), dtype=torch.float64)
    worth = []
    for k in range(5):
        (c, n), (r, m) = (slow_side(lm, *sides[2 * k + s][:2]) for s in range(2))
        log_probs, lengths = torch.stack([c, r]), torch.tensor([n, m]).double()
        pair = Sides(log_probs, lengths, torch.tensor([sides[2 * k][2], sides[2 * k + 1][2]], dtype=torch.float64))
        slow = slow + pair_loss(table(loss, sft=0.3), pair)
        worth.append(rewards(table(loss), pair).detach())
    slow.backward()
    expected = torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])
    assert total == pytest.approx(float(slow.detach()), rel=1e-6)
    torch.testing.assert_close(flat, expected, atol=2e-6 * float(expected.abs().max()), rtol=1e-5)
    assert sums["rewards/chosen"] == pytest.approx(float(sum(w[0] for w in worth)), rel=1e-5)
    assert sums["rewards/margins"] == pytest.approx(float(sum(w[0] - w[1] for w in worth)), rel=1e-4)
    assert sums["rewards/accuracies"] == sum(bool(w[0] > w[1]) for w in worth)


LAYOUTS: list[list[list[int]]] = [[[0, 1, 2]], [[2, 0], [1]], [[0], [1], [2]], [[1], [2, 0]]]


@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
def test_rows_may_be_filled_and_cut_anywhere(loss: str) -> None:
    lm, sides, objective = model(), conversations(3), DPOObjective(table(loss))
    one = grads(objective, lm, [batched(sides, [[0], [1], [2]])])
    for layout in LAYOUTS:
        batch = batched(sides, layout, 128, holes=1)
        assert int(objective.weight(batch)) == 3
        whole = grads(objective, lm, [batch])
        pieces = [batch.cut(row, row + 1) for row in range(len(layout) + 1)]
        assert [int(objective.weight(piece)) for piece in pieces] == [*map(len, layout), 0]
        for other in (whole, grads(objective, lm, pieces)):
            assert other[0] == pytest.approx(one[0], rel=1e-6)
            torch.testing.assert_close(other[1], one[1], atol=2e-6 * float(one[1].abs().max()), rtol=1e-5)
            assert other[2] == pytest.approx(one[2], rel=1e-5)


def test_a_row_of_odd_length_full_to_its_end() -> None:
    lm, sides, objective = model(), conversations(2), DPOObjective(table("sigmoid"))
    full = sum(len(ids) - 1 for ids, _, _ in sides)
    for length in (full, full + 1):  # one of the two is odd
        total, _, _ = grads(objective, lm, [batched(sides, [[0, 1]], length)])
        assert total == pytest.approx(grads(objective, lm, [batched(sides, [[0], [1]])])[0], rel=1e-6)


def test_a_log_prob_is_minus_the_lm_loss_on_the_same_ids() -> None:
    lm, sides = model(), conversations(1)
    _, _, sums = grads(DPOObjective(table("sigmoid")), lm, [batched(sides, [[0]])])
    for name, (ids, mask, _) in zip(("chosen", "rejected"), sides, strict=True):
        rows = Rows(1, 32)
        rows.add(0, ids[:-1], np.where(mask[1:], ids[1:], IGNORE))
        assert sums[f"logps/{name}"] == pytest.approx(-float(LMObjective()(lm, rows.batch()).sum.detach()), rel=1e-6)


def test_swapped_sides_flip_the_margin() -> None:
    lm, sides, objective = model(), conversations(4), DPOObjective(table("sigmoid"))
    swapped = [sides[i ^ 1] for i in range(8)]
    _, _, one = grads(objective, lm, [batched(sides, [[0, 1], [2, 3]])])
    _, _, other = grads(objective, lm, [batched(swapped, [[0, 1], [2, 3]])])
    assert other["rewards/margins"] == pytest.approx(-one["rewards/margins"], rel=1e-6)
    assert other["rewards/accuracies"] == 4 - one["rewards/accuracies"]
    assert other["logits/chosen"] == pytest.approx(one["logits/rejected"], rel=1e-5)


def test_token_metrics_are_those_of_the_logits() -> None:
    lm, sides = model(), conversations(2)
    _, _, sums = grads(DPOObjective(table("sigmoid")), lm, [batched(sides, [[0, 1]])])
    hits = logits = entropy = 0.0
    for k in range(2):
        each = []
        for ids, mask, _ in sides[2 * k : 2 * k + 2]:
            rows = torch.as_tensor(mask[1:]) > 0
            raw = lm.head("logits", lm(torch.as_tensor(ids)[None]).h)[0, :-1][rows].detach()
            each.append((raw, torch.as_tensor(ids)[1:][rows]))
        hits += float((each[0][0].argmax(-1) == each[0][1]).float().mean())
        logits += float(each[0][0].mean())
        both = torch.cat([raw for raw, _ in each])
        entropy += float(torch.distributions.Categorical(logits=both).entropy().mean())
    assert sums["mean_token_accuracy"] == pytest.approx(hits)
    assert sums["logits/chosen"] == pytest.approx(logits, rel=1e-4, abs=1e-7)
    assert sums["entropy"] == pytest.approx(entropy, rel=1e-5)


def test_keys_without_an_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match="label_smoothing has no effect"):
        validate(DPOTable, {"loss": "sigmoid", "label_smoothing": 0.1}, "test")
    with pytest.raises(ConfigError, match="has no reference"):
        validate(DPOTable, {"loss": "simpo", "reference": "x"}, "test")


# --- the stage -------------------------------------------------------------------------------------------------------

WORDS = ["sun", "rain", "wind", "snow", "春", "夏", "秋", "冬"]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that can chat, with random weights."""
    folder = tmp_path_factory.mktemp("parent")
    tok = train_tokenizer([("en", " ".join(WORDS) * 5)], 280)
    torch.manual_seed(4)
    save_model(LM(SHAPE.model_copy(update={"vocab_size": tok.vocab_size, "context": 128})), folder, chat=True)
    tok.save(folder, chat=True)
    return folder


def pair(i: int) -> dict[str, Any]:
    word = WORDS[i % 8]
    return {"prompt": f"{i} {word}?", "chosen": f"{word} yes", "rejected": f"{word} no", "source": "weather"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "pairs.jsonl", [pair(i) for i in range(120)])
    chats = [{"messages": [{"role": "user", "content": "sun?"}, {"role": "assistant", "content": "rain"}]}] * 3
    write(folder / "chat.jsonl", chats)
    return folder


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def recipe(run: Path, data: Path, parent: Path, **tables: Any) -> Recipe:
    made: dict[str, Any] = {
        "stage": "dpo", "run": run, "data": str(data), "init": str(parent),
        "parts": {"pairs": {"files": ["pairs.jsonl"]}, "en": {"format": "chat", "val": ["chat.jsonl"]}},
        "train": {"epochs": 1.5, "batch_size": 2, "length": 128, "lr": 3e-3, "warmup": 0.0, "schedule": "constant",
                  "compile": False, "device": "cpu", "dtype": "fp32", "log_every": 1, "dropout": 0.1},
        "checkpoint": {"every": 7, "keep": 100},
        "eval": {"tokens": 256, "holdout_pairs": 0.2, "every": 30, "prompts": ["sun?"]},
    }  # fmt: skip
    for name, values in tables.items():
        made[name] = made.get(name, {}) | values if isinstance(values, dict) and name != "parts" else values
    return validate(Recipe, made, "toy")


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "dpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == kind]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path, parent: Path) -> Path:
    run = tmp_path_factory.mktemp("run")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_stage(recipe(run, data, parent))
    torch.set_num_threads(threads)
    return run


def test_at_step_0_the_loss_is_ln_2_and_nothing_has_a_reward(trained: Path) -> None:
    first = events(trained, "eval")[0]
    assert first["step"] == 0
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("chosen", "rejected", "margins"):
        assert first[f"eval_rewards/{name}"] == pytest.approx(0.0, abs=1e-6)


def test_training_learns_what_is_preferred_and_says_so_by_trls_names(trained: Path) -> None:
    before, *_, after = events(trained, "eval")
    assert before["pairs"] == after["pairs"] > 10
    assert after["eval_rewards/accuracies"] == after["eval_logps/accuracies"] == 1.0
    assert after["accuracy_by_source"] == {"weather": 1.0}
    assert after["eval_loss"] < 0.3 and after["eval_rewards/margins"] > 1
    assert set(after["bpb"]) == {"en"}
    steps = events(trained, "step")
    names = {f"{a}/{b}" for a in ("rewards", "logps", "logits") for b in ("chosen", "rejected")}
    assert names | {"rewards/margins", "rewards/accuracies", "entropy", "mean_token_accuracy"} <= steps[-1].keys()
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=0.1)  # not exactly: the policy has dropout
    assert (trained / "dpo" / "model" / "chat_template.jinja").exists()


def test_the_pairs_of_a_run_can_be_looked_at(trained: Path) -> None:
    made = inspect(trained, InspectConfig(rows=1))
    assert [part["name"] for part in made["parts"]] == ["pairs"], "not what is only measured"
    better, worse, *_ = made["batch"]["rows"][0]["documents"]
    said = [{kind: text for kind, text in side["spans"] if kind == "trained"} for side in (better, worse)]
    assert said[0]["trained"].endswith("yes") and said[1]["trained"].endswith("no")
    assert made["batch"]["batch_size"] == 2 and made["batch"]["length"] == 128


def test_epochs_are_epochs(trained: Path) -> None:
    shards = _shards(trained, "train")[0]
    used = 1.5 * sum(len(shards.doc(i)[0]) - 1 for i in range(len(shards)))
    assert 90 <= len(shards) // 2 <= 105
    assert 0.6 < used / events(trained, "done")[0]["tokens"] <= 1


def _shards(run: Path, split: str) -> list[Any]:
    from oriole.text.shards import Shards

    return [Shards.open(folder) for folder in (run / "shards").glob(f"pairs-*-{split}-*")]


def test_a_prompt_is_trained_or_held_out_never_both(trained: Path) -> None:
    def prompts(split: str) -> set[tuple[int, ...]]:
        found = set()
        for shards in _shards(trained, split):
            for i in range(len(shards)):
                ids, mask = shards.doc(i)
                found.add(tuple(ids[: int(np.argmax(mask))].tolist()))
        return found

    assert prompts("train") and prompts("val") and not prompts("train") & prompts("val")


def test_the_reference_is_computed_once_for_a_model_and_its_data(
    trained: Path, tmp_path: Path, data: Path, parent: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = sorted((run / "shards").glob("reference-*"))
    assert len(before) == 2  # training and held-out pairs
    short = {"resume": "no", "epochs": 0.1}
    run_stage(recipe(run, data, parent, train=short))
    assert "reference log-probs" not in capfd.readouterr().err
    assert sorted((run / "shards").glob("reference-*")) == before
    other = {"reference": str(trained / "dpo" / "model")}
    run_stage(recipe(run, data, parent, dpo=other, train=short))
    assert len(list((run / "shards").glob("reference-*"))) == 4
    assert events(run, "eval")[0]["eval_rewards/margins"] < 0  # the other model knows better


def test_going_on_equals_never_having_stopped(tmp_path: Path, data: Path, parent: Path) -> None:
    made = recipe(tmp_path, data, parent, train={"epochs": 0.6})
    run_stage(made)
    stage = tmp_path / "dpo"
    whole = (stage / "model" / "model.safetensors").read_bytes()
    for checkpoint in (stage / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > 7:
            shutil.rmtree(checkpoint)
    shutil.rmtree(stage / "model")
    run_stage(made)
    assert events(tmp_path, "start")[-1]["step"] == 7
    assert (stage / "model" / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_without_a_reference_compute_none(tmp_path: Path, data: Path, parent: Path, loss: str) -> None:
    run_stage(recipe(tmp_path, data, parent, dpo={"loss": loss, "beta": 2.0}, train={"dropout": 0.0, "epochs": 0.6}))
    assert not list((tmp_path / "shards").glob("reference-*"))
    before, *_, after = events(tmp_path, "eval")
    assert after["eval_logps/accuracies"] > before["eval_logps/accuracies"] or after["eval_logps/accuracies"] == 1.0
    assert after["eval_loss"] < before["eval_loss"]


def test_adapters_learn_from_pairs_and_leave_the_rest_alone(tmp_path: Path, data: Path, parent: Path) -> None:
    run_stage(recipe(tmp_path, data, parent, lora={"rank": 4}, train={"dropout": 0.0, "lr": 1e-2}))
    before, *_, after = events(tmp_path, "eval")
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6) and after["eval_loss"] < 0.6
    was, now = (load_file(f / "model.safetensors") for f in (parent, tmp_path / "dpo" / "model"))
    assert {name for name in was if not torch.equal(was[name], now[name])} <= {n for n in was if "_proj" in n}
    assert (tmp_path / "dpo" / "adapter").exists()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "'chosen' is empty"),
    ],
)
def test_bad_pairs_are_refused_with_file_and_line_or_skipped(
    tmp_path: Path, parent: Path, capfd: pytest.CaptureFixture[str], bad: dict[str, Any], why: str
) -> None:
    write(tmp_path / "pairs.jsonl", [*(pair(i) for i in range(40)), bad])
    made = {"parts": {"pairs": {"files": ["pairs.jsonl"], "val": ["pairs.jsonl"]}}, "train": {"epochs": 0.1}}
    with pytest.raises(DataError, match=rf"pairs\.jsonl, line 41.*{why}"):
        run_stage(recipe(tmp_path / "a", tmp_path, parent, **made))
    run_stage(recipe(tmp_path / "b", tmp_path, parent, skip_bad=True, **made))
    assert "1 bad records skipped" in capfd.readouterr().err


def test_prompts_that_are_too_long_are_counted_and_nothing_left_is_an_error(
    tmp_path: Path, parent: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    long = {"prompt": " ".join(WORDS * 20), "chosen": "yes", "rejected": "no"}
    write(tmp_path / "pairs.jsonl", [*(pair(i) for i in range(40)), long])
    part = {"pairs": {"files": ["pairs.jsonl"], "val": ["pairs.jsonl"]}}
    run_stage(recipe(tmp_path / "a", tmp_path, parent, parts=part, train={"epochs": 0.1}))
    assert "pairs left out: 1 prompt too long" in " ".join(capfd.readouterr().err.split())
    write(tmp_path / "pairs.jsonl", [long, long])
    with pytest.raises(DataError, match="left out: 2 prompt too long"):
        run_stage(recipe(tmp_path / "b", tmp_path, parent, parts=part, train={"epochs": 0.1}))


def test_a_broken_parent_and_other_misfits_are_named(tmp_path: Path, data: Path, parent: Path) -> None:
    broken, other = tmp_path / "broken", tmp_path / "other"
    shutil.copytree(parent, broken)
    lm = load_model(parent)
    with torch.no_grad():
        lm.norm.weight[0] = math.nan
    save_model(lm, broken, chat=True)
    with pytest.raises(ModelError, match="log-prob that is not finite"):
        run_stage(recipe(tmp_path / "a", data, broken))
    shutil.copytree(parent, other)
    train_tokenizer([("en", "something else entirely " * 9)], 280).save(other, chat=True)
    with pytest.raises(ModelError, match="has another tokenizer"):
        run_stage(recipe(tmp_path / "b", data, parent, dpo={"reference": str(other)}))
    with pytest.raises(ModelError, match="no model to start dpo from"):
        run_stage(recipe(tmp_path / "c", data, parent, init=""))
    with pytest.raises(ConfigError, match="init=FOLDER"):
        run_stage(recipe(tmp_path / "d", data, parent, init="random"))


def test_what_does_not_belong_to_a_stage_is_refused(tmp_path: Path, data: Path, parent: Path) -> None:
    pairs = {"pairs": {"files": ["pairs.jsonl"], "format": "preference"}}
    with pytest.raises(ConfigError, match="does not read"):
        recipe(tmp_path, data, parent, stage="sft", parts=pairs)
    with pytest.raises(ConfigError, match="not from shards"):
        recipe(tmp_path, data, parent, parts={"pairs": {"shards": str(tmp_path)}})
    with pytest.raises(ConfigError, match="either files or shards"):
        recipe(tmp_path, data, parent, parts={"pairs": {"val": ["pairs.jsonl"], "files": []}})


def test_the_rendered_sides_are_those_of_sft(trained: Path, parent: Path) -> None:
    from oriole.text.template import Message

    tok = Tokenizer.load(parent)
    shards = _shards(trained, "train")[0]
    ids, mask = shards.doc(1)
    text = tok.decode(ids.tolist())
    number, word = text.split("?")[0].split()[-2:]
    whole, sft = render([Message("user", f"{number} {word}?"), Message("assistant", f"{word} no")], tok)
    assert ids.tolist() == whole and mask.tolist() == sft
