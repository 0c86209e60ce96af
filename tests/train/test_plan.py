"""Plans: what a stage has to do, what it takes by a probe's figures, and what of it fits where."""

import math
from pathlib import Path
from typing import Any

import pytest

from oriole import cli
from oriole.config import validate
from oriole.model.config import preset
from oriole.model.costs import flops_per_token, kv_cache_bytes
from oriole.train.accelerators import parse_cluster
from oriole.train.plan import plan_here, plan_there
from oriole.train.probe import Probe
from oriole.train.recipe import Recipe
from oriole.train.workload import (
    Tokens,
    expected_tokens,
    preparing_seconds,
    preset_recipe,
    schedule_counts,
    steps_of,
)

SHAPE = preset("26m")


def recipe(**train: Any) -> Recipe:
    table = {
        "stage": "pretrain",
        "model": "26m",
        "parts": {"zh": {"files": ["zh*.jsonl*"]}, "en": {"files": ["en*.jsonl*"]}},
        "train": {"tokens": 1e6, "batch_size": 8, "length": 512, "accumulate": 2} | train,
    }
    return validate(Recipe, table, "test")


def measured(**changes: Any) -> Probe:
    figures = {
        "device": "cpu", "device_is_gpu": False, "dtype": "bfloat16", "compiled": True, "compile_seconds": 30.0,
        "micro_seconds": 2.0, "optimizer_seconds": 0.5, "steps": 5, "eval_token_seconds": 1e-4, "sample_seconds": 1.0,
        "save_seconds": 0.25, "save_bytes": 300_000_000, "step_bytes": 1_900_000_000, "peak_bytes": 2_000_000_000,
        "host_bytes": 2_000_000_000, "base_bytes": 250_000_000, "rows": 8,
    } | changes  # fmt: skip
    return Probe.model_validate(figures)


def here(one: Recipe, probe: Probe, **more: Any) -> Any:
    tokens = Tokens(count=one.train.tokens or 1.0, source="train.tokens")
    settings = {"peak_flops": 1e12, "memory_limit": 24_000_000_000, "cores": 2} | more
    return plan_here("test", one, SHAPE, tokens, probe, **settings)


# --- what there is to do ---------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_loop() -> None:
    """Against the loop's own rule: at 0, at every multiple, at the end."""
    for steps in (1, 4, 5, 7, 99, 100, 1140):
        for every in (0, 1, 3, 50, 2000):
            one = validate(
                Recipe, recipe().model_dump() | {"eval": {"every": every}, "checkpoint": {"every": every}}, ""
            )
            counts = schedule_counts(one, steps)
            looks = every or max(1, math.ceil(steps / 5))
            saves = every or max(1, math.ceil(steps / 10))
            assert counts.evaluations == sum(n in (0, steps) or n % looks == 0 for n in range(steps + 1))
            assert counts.checkpoints == sum(n == steps or n % saves == 0 for n in range(1, steps + 1))


def test_steps_cover_the_tokens() -> None:
    assert steps_of(recipe(), 1e6) == math.ceil(1e6 / 8192)
    assert steps_of(recipe(), 1) == 1


def test_epochs_are_reckoned_from_what_is_there(tmp_path: Path) -> None:
    one = recipe(tokens=None, epochs=2)
    plain, packed = tmp_path / "zh.jsonl", tmp_path / "en.jsonl.gz"
    plain.write_bytes(b"x" * 4320)
    packed.write_bytes(b"x" * 1440)
    both = expected_tokens(one, {}, {"zh": [plain], "en": [packed]})
    assert both.known and both.count == pytest.approx(2 * (1000 + 1000))  # 1.08 bytes of JSON a byte, 4 bytes a token
    assert expected_tokens(one, {"zh": 700}, {"en": [packed]}).count == pytest.approx(2 * (700 + 1000))
    assert expected_tokens(one, {"zh": 700, "en": 300}, {}).source == "2 epochs of 1,000 tokens, counted"
    missing = expected_tokens(one, {"zh": 700}, {"en": []})
    assert not missing.known and "data of en is not here" in missing.source
    assert expected_tokens(recipe(), {}, {}).count == 1e6


def test_a_preset_alone_means_twenty_tokens_a_parameter_in_batches_that_fit() -> None:
    one = preset_recipe("1b", [], parse_cluster("8xH100"))
    assert one.train.tokens == 20 * preset("1b").num_params()
    assert one.train.batch_size * one.train.accumulate * one.train.length == 2**19
    small = preset_recipe("1b", [], parse_cluster("8x4090"))
    assert small.train.batch_size < one.train.batch_size
    changed = preset_recipe("64m", ["train.tokens=1e9", "train.batch_size=4", "model.vocab_size=100"][:2], None)
    assert (changed.train.tokens, changed.train.batch_size) == (1e9, 4)
    assert preset_recipe("64m", ["train.epochs=1"], None).train.tokens is None


def test_preparing_is_only_what_is_not_there_yet(tmp_path: Path) -> None:
    one = recipe().model_copy(update={"run": tmp_path})
    tokens = Tokens(count=11e6, source="")
    sample = min(64e6, 44e6)
    assert preparing_seconds(one, tokens, 2) == pytest.approx(11e6 / 2.2e6 + sample / 2.2e6)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    assert preparing_seconds(one, tokens, 2) == pytest.approx(11e6 / 2.2e6)
    (tmp_path / "shards" / "pretrain-zh-train-0123").mkdir(parents=True)
    assert preparing_seconds(one, tokens, 2) == 0


# --- here ------------------------------------------------------------------------------------------------------------


def test_time_and_cost_add_up() -> None:
    plan = here(recipe(), measured(), price=2.0)
    steps = math.ceil(1e6 / 8192)
    assert plan.steps == steps == 123
    assert plan.seconds["training"] == pytest.approx(steps * (2 * 2.0 + 0.5))
    assert plan.seconds["compiling"] == 30
    # Six looks (at 0, five times on the way or at the end) at 20,000 tokens of each part, and the prompts.
    assert plan.seconds["evaluating"] == pytest.approx(6 * (2 * 20_000 * 1e-4 + 1.0))
    assert plan.seconds["saving"] == pytest.approx(10 * 0.25)
    assert plan.total_seconds == sum(plan.seconds.values())
    assert plan.cost == pytest.approx(2.0 * plan.total_seconds / 3600)
    assert plan.flops == pytest.approx(flops_per_token(SHAPE, 512) * steps * 8192)
    assert plan.tokens_per_second == pytest.approx(8192 / 4.5)
    assert plan.mfu == pytest.approx(8192 / 4.5 * flops_per_token(SHAPE, 512) / 1e12)


@pytest.mark.parametrize("peak", [2_000_000_000, 900_000_000, 300_000_000])
def test_the_parts_of_the_memory_are_the_measured_peak(peak: int) -> None:
    plan = here(recipe(), measured(peak_bytes=peak))
    assert plan.peak == peak and min(plan.memory.values()) >= 0


def test_questions_at_the_end_need_their_keys_and_values_on_a_cpu() -> None:
    plain = recipe()
    asking = plain.model_copy(update={"eval": plain.eval.model_copy(update={"questions": "eval.jsonl"})})
    more = here(asking, measured()).peak - here(plain, measured()).peak
    assert more == kv_cache_bytes(SHAPE, 32, SHAPE.context, 4)
    card = measured(device_is_gpu=True, device="a card")
    assert here(asking, card).peak == here(plain, card).peak


def test_what_does_not_fit_or_starves_is_said() -> None:
    tight = here(recipe(), measured(), memory_limit=1_000_000_000)
    assert not tight.fits
    assert "train.batch_size=4 train.accumulate=4" in " ".join(tight.notes)
    card = {"device_is_gpu": True, "device": "a card"}
    assert here(recipe(), measured(**card), memory_limit=3_000_000_000).fits
    assert not here(recipe(), measured(**card), memory_limit=2_100_000_000).fits  # driver and libraries need room, too
    hungry = here(recipe(), measured(batch_gain=1.4))
    assert "16 rows at once run 40% faster than 8; try train.batch_size=16 train.accumulate=1" in " ".join(hungry.notes)
    assert here(recipe(), measured(batch_gain=1.05)).notes == ()


# --- elsewhere -------------------------------------------------------------------------------------------------------


def there(one: Recipe, device: str, model: str = "26m", **more: Any) -> Any:
    tokens = Tokens(count=one.train.tokens or 1.0, source="train.tokens")
    return plan_there("test", one, preset(model), tokens, parse_cluster(device), **more)


def test_a_step_is_the_same_step_on_any_number_of_gpus() -> None:
    one = recipe(batch_size=8, accumulate=4)
    for device, rows, accumulate in (("H100", 8, 4), ("4xH100", 8, 1), ("8xH100", 4, 1), ("2x8xH100", 2, 1)):
        plan = there(one, device)
        assert (plan.rows, plan.accumulate) == (rows, accumulate)
        assert plan.gpus * plan.rows * plan.accumulate * plan.length == plan.step_tokens == 8 * 4 * 512
    assert "do not divide among 3 GPUs" in " ".join(there(one, "3xH100").notes)


def test_more_gpus_are_faster_and_never_more_than_in_proportion() -> None:
    one = recipe(batch_size=16, accumulate=16, length=1024, tokens=1e9)
    rates = [there(one, d, "110m").tokens_per_second for d in ("H100", "2xH100", "8xH100", "4x8xH100")]
    for few, many, factor in zip(rates, rates[1:], (2, 4, 4), strict=False):
        assert few < many <= factor * few * 1.0001


def test_what_does_not_fit_gets_smaller_micro_batches_or_fsdp() -> None:
    one = recipe(batch_size=32, accumulate=1, length=2048)
    plan = there(one, "4090", "1b")
    assert not plan.fits
    large = there(one, "H100", "1b")
    assert not large.fits
    advice = next(n for n in large.notes if n.startswith("it does not fit"))
    rows, accumulate = (int(w.partition("=")[2]) for w in advice.split() if w.startswith("train."))
    assert rows * accumulate == 32
    assert there(recipe(batch_size=rows, accumulate=accumulate, length=2048), "H100", "1b").fits
    wide = there(recipe(batch_size=1, accumulate=8, length=2048), "8x3090", "1b")
    assert wide.strategy == "fsdp" and any("train.parallel=fsdp" in n for n in wide.notes)
    asked = there(recipe(batch_size=1, accumulate=8, length=2048, parallel="fsdp"), "8xH100", "1b")
    assert asked.strategy == "fsdp" and not any("train.parallel" in n for n in asked.notes)
    assert there(recipe(batch_size=1, accumulate=8, length=2048), "8xH100", "1b").strategy == "ddp"


def test_the_starving_batch_is_named_and_the_advice_mends_it() -> None:
    one = recipe(batch_size=2, accumulate=1, length=128)
    plan = there(one, "H100", "demo")
    advice = next(n for n in plan.notes if "starves" in n)
    need = int(advice.partition("train.batch_size=")[2].split()[0])
    assert not any(
        "starves" in n for n in there(recipe(batch_size=need, length=128, accumulate=1), "H100", "demo").notes
    )
    assert any(
        "starves" in n for n in there(recipe(batch_size=need - 1, length=128, accumulate=1), "H100", "demo").notes
    )


@pytest.mark.parametrize("name", [name for name in cli.builtin_recipes() if not name.endswith("/seq2seq")])
def test_every_packaged_recipe_can_be_planned_without_its_data(name: str, tmp_path: Path) -> None:
    one = cli.load_recipe(name, [f"run={tmp_path}/run", f"data={tmp_path}"])
    shape = cli.plan._shape(name, one, {})
    plan = plan_there(name, one, shape, cli.plan._tokens(one, tmp_path), parse_cluster("H100"), price=2.5)
    assert plan.fits and 0 < plan.total_seconds < 1e7 and plan.cost is not None and plan.cost > 0
    assert plan.parameters > 1e6
    if name.startswith("26m/"):
        assert plan.parameters == pytest.approx(30.9e6, rel=0.01)  # SFT trains what pretraining made
