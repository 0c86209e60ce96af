"""The rules against their papers' figures and what was found to work, and what a recipe with "auto" becomes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oriole import cli
from oriole.config import load, read_toml, to_toml, validate
from oriole.errors import ConfigError
from oriole.model.config import PRESETS
from oriole.train.recipe import Recipe
from oriole.train.scaling import best_batch, best_lr, best_weight_decay, matching_muon_lr, shape_of

AUTO = {"lr": "auto", "muon_lr": "auto", "weight_decay": "auto", "accumulate": "auto"}


def recipe(train: dict[str, Any], **more: Any) -> Recipe:
    table = {
        "stage": "pretrain",
        "parts": {"zh": {"files": ["a.jsonl"]}},
        "model": "26m",
        "train": {"tokens": 600e6, "batch_size": 8, "length": 1024, "optimizer": "muon", **train},
        **more,
    }
    return validate(Recipe, table, "test")


def test_rules_give_the_figures_of_their_papers() -> None:
    # Step Law: a billion parameters on a hundred billion tokens, computed by hand.
    assert best_batch(1e11) == pytest.approx(1.107e6, rel=1e-3)
    assert best_lr(1e9, 1e11, best_batch(1e11)) == pytest.approx(1.632e-3, rel=1e-3)
    assert best_lr(1e9, 1e11, 4 * best_batch(1e11)) == pytest.approx(2 * best_lr(1e9, 1e11, best_batch(1e11)))
    # Liu et al.: a step of Muon has the root mean square 0.2 lr. An orthogonal (n, n) has 1 / sqrt(n).
    assert matching_muon_lr(1e-3, 1024) / 1024**0.5 == pytest.approx(0.2e-3)
    # Power Lines at 20 tokens for each parameter: the average reaches over 22 % of the steps.
    decay = best_weight_decay(2e-3, 1e8, 2e9, 2e5)
    assert 1 / (2e-3 * decay * (2e9 / 2e5)) == pytest.approx(0.224, abs=0.002)


def test_rules_lie_near_what_was_found_for_the_small_recipes() -> None:
    """Within a factor of three: AdamW 4e-3 … 8e-3 and Muon 0.02 at 4.5M parameters and 1.75M tokens; 3e-3 at 26M."""
    assert best_batch(1.75e6) == pytest.approx(1536, rel=0.5)
    assert 1.6e-3 < best_lr(4.5e6, 1.75e6, 1536) < 1e-2
    assert 0.0066 < matching_muon_lr(best_lr(4.5e6, 1.75e6, 1536), 256) < 0.06
    assert 1e-3 < best_lr(22.5e6, 600e6, 131_072) < 1e-2


@given(st.sampled_from(sorted(PRESETS)), st.floats(1e6, 1e11), st.integers(1, 4096))
def test_auto_becomes_numbers_that_a_recipe_may_have(model: str, tokens: float, rows: int) -> None:
    made = recipe({**AUTO, "tokens": tokens, "batch_size": rows, "length": 512}, model=model)
    train = made.train
    assert 1e-5 < train.lr < 0.2 and 1e-4 < train.muon_lr < 2 and train.accumulate >= 1 and train.weight_decay > 0
    step = train.accumulate * rows * 512
    assert train.accumulate == 1 or abs(step - best_batch(tokens)) <= rows * 512
    assert set(made.derived) == {"train.lr", "train.muon_lr", "train.weight_decay", "train.accumulate"}


def test_what_is_given_stays_and_the_rest_follows_it() -> None:
    given_lr = recipe({**AUTO, "lr": 1e-4})
    assert given_lr.train.lr == 1e-4 and given_lr.train.muon_lr == pytest.approx(0.2 * 512**0.5 * 1e-4, rel=1e-2)
    assert "train.lr" not in given_lr.derived
    wanted = recipe({**AUTO, "batch_tokens": 300_000})
    assert wanted.train.accumulate == round(300_000 / 8192) and "as asked" in wanted.derived["train.accumulate"]
    assert wanted.train.lr > recipe(AUTO).train.lr  # a larger batch bears a larger step
    adafactor = recipe({**AUTO, "optimizer": "adafactor"})
    assert adafactor.train.lr == 0.01
    plain = recipe({"lr": 1e-3})
    assert plain.derived == {} and plain.train.accumulate == 1


def test_a_resolved_recipe_is_read_again_as_it_is(tmp_path: Path) -> None:
    made = recipe({**AUTO, "batch_tokens": 1e5}, model="30M")
    (tmp_path / "recipe.toml").write_text(to_toml(made), encoding="utf-8")
    assert load(Recipe, tmp_path / "recipe.toml") == made
    assert read_toml(tmp_path / "recipe.toml")["derived"]["train.lr"].startswith(f"{made.train.lr:g} (1.79")


@pytest.mark.parametrize(
    ("train", "more", "message"),
    [
        ({"lr": "auto"}, {"stage": "sft"}, "for pretraining from random weights"),
        ({"lr": "auto"}, {"init": "some/model"}, "for pretraining from random weights"),
        ({"lr": "auto", "tokens": None, "epochs": 2}, {}, r"train\.tokens must be a number"),
        ({"batch_tokens": 1e5, "accumulate": 4}, {}, r"reached by train\.accumulate=auto"),
        ({"batch_tokens": 1e5}, {}, r"reached by train\.accumulate=auto"),
        ({"lr": "Auto"}, {}, r"train\.lr"),
        ({}, {"model": "d100"}, "multiple of 64"),
        ({}, {"model": "0.1M"}, "no width comes near"),
        ({}, {"model": "27m"}, "no model preset"),
    ],
)
def test_what_no_rule_can_answer_is_refused(train: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(train, **more)


@pytest.mark.parametrize("vocab_size", [4096, 16384, 100_000])
@pytest.mark.parametrize("name", ["10M", "30M", "100M", "350M", "1.5B", "7B"])
def test_a_number_of_parameters_becomes_a_shape_near_it(name: str, vocab_size: int) -> None:
    budget = float(name[:-1]) * (1e6 if name.endswith("M") else 1e9)
    shape = shape_of(name, vocab_size)
    assert shape is not None and shape.vocab_size == vocab_size
    assert shape.num_params() == pytest.approx(budget, rel=0.35)
    assert shape.num_heads * 64 == shape.dim == shape.num_layers * 64


def test_a_width_becomes_the_presets_proportions() -> None:
    shape = shape_of("d256", 4096)
    assert shape is not None and (shape.ffn_dim, shape.num_heads, shape.num_kv_heads) == (704, 4, 2)
    shape = shape_of("d512", 6400)
    assert shape is not None and (shape.ffn_dim, shape.num_layers) == (1408, 8)
    assert shape_of("26m", 6400) is None and shape_of("nonsense", 6400) is None


def test_plateau_turns_on_what_lowers_the_rate_and_leaves_other_schedules_alone() -> None:
    assert recipe({"schedule": "plateau"}).smart.plateau
    assert not recipe({"schedule": "constant"}).smart.plateau
    assert not recipe({"schedule": "plateau"}, smart={"plateau": False}).smart.plateau


def test_the_built_in_dial() -> None:
    (made,) = cli.load_recipes("auto", ["model=d384", "train.tokens=2e9"])
    assert made.derived.keys() == {"model", "train.lr", "train.muon_lr", "train.weight_decay", "train.accumulate"}


def test_rules_need_no_torch() -> None:
    code = "import sys, oriole.train.scaling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
