"""The ablation's arithmetic: equal FLOPs, intervals over seeds, and the table from lines."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import ablate
from bench.blocks import differences, student
from oriole.model.config import preset
from oriole.model.costs import flops_per_token
from oriole.model.deepconfig import DeepConfig


def test_students_t_is_the_tables() -> None:
    known = {1: 12.706, 2: 4.303, 9: 2.262, 10: 2.228, 26: 2.056, 60: 2.000, 1000: 1.962}
    assert {n: student(n) for n in known} == pytest.approx(known, abs=1e-3)


def test_steps_pay_for_the_same_flops() -> None:
    shape = preset("demo")
    plain = flops_per_token(shape, 256)
    for deep in (DeepConfig(depths=(2, 4)), DeepConfig(tokens_ahead=2)):
        flops = flops_per_token(shape, 256, deep)
        steps = ablate.equal_steps(244, plain, flops)
        assert steps < 244 and abs(steps * flops - 244 * plain) <= flops / 2
    assert ablate.equal_steps(244, plain, plain) == 244
    assert ablate.equal_steps(1, 1.0, 1e9) == 1


@pytest.mark.parametrize("name", ablate.options(128))
def test_every_option_is_a_recipe_of_both_stages_and_none_is_plain(name: str, tmp_path: Path) -> None:
    identity = {"corpus": "builtin", "option": name, "seed": 1}
    chosen: dict[str, Any] = dict(ablate.DEFAULTS)
    for stage in ("pretrain", "sft"):
        parts = ablate._builtin_parts(stage, tmp_path)
        changes = [{}, ablate.options(128)[name].changes]
        plain, made = (ablate._recipe(stage, c, parts, identity, chosen, tmp_path, tmp_path) for c in changes)
        assert (made == plain) == (name == "plain")
        assert made.train.seed == 1 and made.train.length == 128 and len(made.parts) == len(plain.parts) >= 2


def test_two_options_have_the_paired_interval() -> None:
    plain, other = {0: 2.0, 1: 2.1, 2: 2.3}, {0: 1.9, 1: 2.05, 2: 2.1}
    paired = np.array([other[s] - plain[s] for s in plain])
    (found,) = differences({"plain": plain, "other": other}).values()
    assert found.mean == pytest.approx(paired.mean())
    assert found.half == pytest.approx(4.303 * paired.std(ddof=1) / math.sqrt(3))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """A thousand ablations of six options that are worth nothing but one, whose seeds are what varies most."""
    rng, held, found_one = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        seeds = rng.normal(0, 1, 3)
        values = {
            name: {s: seeds[s] + effect + rng.normal(0, 0.01) for s in range(3)}
            for name, effect in zip(["plain", "a", "b", "c", "d", "e"], [0, 0, 0, 0, 0, -0.05], strict=True)
        }
        found = differences(values)
        held += abs(found["a"].mean) < found["a"].half
        found_one += found["e"].clear
    assert 0.93 < held / 1000 < 0.97
    assert found_one > 980


def test_what_is_not_complete_has_no_interval_and_disturbs_none() -> None:
    values = {"plain": {0: 1.0, 1: 2.0}, "a": {0: 1.1, 1: 2.2}}
    alone = differences(values)["a"]
    more = differences({**values, "b": {1: 1.5}, "c": {0: math.nan, 1: 2.0}, "d": {7: 1.0}})
    assert more["a"] == alone and set(more) == {"a", "b", "c"}
    assert more["b"].mean == -0.5 and math.isnan(more["b"].half) and not more["b"].clear
    assert not more["c"].clear


def line(option: str, seed: int, zh: float, **more: Any) -> dict[str, Any]:
    same = {"preset": "demo", "seq": 256}
    return {
        "identity": {"corpus": "real", "option": option, "seed": seed, "settings": same, "changes": {}},
        "bpb": {"zh": zh, "en": 2 * zh}, "tokens_per_second": 9000.0, "peak_memory_bytes": 5e8, "cache_bytes": 1e5,
        "stages": {"pretrain": {"tokens": 1_000_000, "flops": 3.5e13}}, "device": "cpu", "torch": "2", "threads": 2,
        "commit": "abc", "load": 1.0, **more,
    }  # fmt: skip


def test_the_table_compares_with_plain_and_marks_what_is_clear() -> None:
    lines = [line("plain", s, 1.0 + 0.1 * s) for s in range(3)]
    lines += [line("LLLG", s, 0.9 + 0.1 * s + 0.001 * (s == 1)) for s in range(3)]
    lines += [line("ahead", s, 1.0 + 0.1 * s + 0.001 * (s == 2), acceptance={"zh": {"2": 0.5}}) for s in range(3)]
    text = ablate.markdown(lines)
    rows = {row.split(" | ")[0]: row.split(" | ") for row in text.splitlines() if row.startswith("| ")}
    assert list(rows) == ["| option", "| ---", "| `plain`", "| `LLLG`", "| `ahead`"]
    assert rows["| `plain`"][2] == "1.100" and rows["| `LLLG`"][2].startswith("1.000 (**-0.100 ± 0.00")
    assert rows["| `ahead`"][2].startswith("1.100 (+0.000 ± 0.00")
    assert "`ahead`: zh 50 % accepted." in text and "3.5e+13 training FLOPs each" in text
    assert ablate.markdown(lines[3:]).startswith("no plain model")


def test_a_run_that_is_there_is_not_run_again() -> None:
    chosen = ablate.DEFAULTS | {"options": "LLLG", "seeds": 2}
    todo = ablate._todo(chosen, set())
    assert [(run["seed"], run["option"]) for run in todo] == [(s, o) for s in (0, 1) for o in ("plain", "LLLG")]
    there = {json.dumps(run, sort_keys=True) for run in todo[:3]}
    assert ablate._todo(chosen, there) == todo[3:]
    assert len(ablate._todo(chosen | {"sft_tokens": 1e5}, there)) == 4
    with pytest.raises(SystemExit, match="no option LLG; known: plain, L, LLLG"):
        ablate._todo(chosen | {"options": "LLG"}, set())


def test_keys_for_all_runs_reach_the_plain_model_and_make_other_lines(tmp_path: Path) -> None:
    chosen = ablate.DEFAULTS | {"options": "Gr", "seeds": 1, "everywhere": "train.muon_lr=0.01"}
    for identity in ablate._todo(chosen, set()):
        assert identity not in ablate._todo(chosen | {"everywhere": ""}, set())
        parts = ablate._builtin_parts("pretrain", tmp_path)
        recipe = ablate._recipe("pretrain", identity["changes"], parts, identity, chosen, tmp_path, tmp_path / "run")
        assert recipe.train.muon_lr == 0.01
