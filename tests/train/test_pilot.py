"""What a run decides by itself, seen to act in real runs of tiny models: rollback, cooling, early stopping."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import VOCAB, Counting, digest, model, trainer

from oriole.apps.report import read_events
from oriole.config import validate
from oriole.errors import ConfigError, Interrupted
from oriole.model.folder import load_model
from oriole.train import checkpoint
from oriole.train.batch import IGNORE, Batch, Packer
from oriole.train.loop import Trainer
from oriole.train.optim import OptimConfig
from oriole.train.recipe import Recipe
from oriole.train.smart import SmartConfig
from oriole.train.stage import run_stage

BATCH = 4 * 32


class Poisoned:
    """Batches of counting documents; those numbered in `bad` have random targets. `seen` lists the numbers given."""

    def __init__(self, bad: range = range(0), *, stop_at: int = 0, nan: bool = False) -> None:
        self.packer, self.bad, self.given, self.nan = Packer(Counting(), 4, 32), bad, 0, nan
        self.seen: list[int] = []
        self.stop_at = stop_at  # the fetch, counted in this process, during which a signal comes

    def __next__(self) -> Batch:
        batch = next(self.packer)
        if self.given in self.bad:
            noise = torch.Generator().manual_seed(self.given)
            random = torch.randint(VOCAB, batch.targets.shape, generator=noise)
            batch = replace(batch, targets=torch.where(batch.targets == IGNORE, IGNORE, random))
        self.seen.append(self.given)
        self.given += 1
        if len(self.seen) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"packer": self.packer.state_dict(), "given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.packer.load_state_dict(state["packer"])
        self.given = state["given"]


def watched(folder: Path, data: Poisoned, smart: dict[str, Any], **more: Any) -> Trainer:
    config = {"steps": 70, "checkpoint_every": 10, "log_every": 1} | more
    optim = OptimConfig(lr=2e-2, schedule="constant", warmup=3)
    arguments = {"data": data, "optim": optim, "smart": SmartConfig.model_validate(smart)}
    return trainer(folder, **config, more=arguments)


def decisions(made: Trainer) -> list[tuple[int, str]]:
    return [(r["step"], r["what"]) for r in made.metrics.of("smart")]


ROLLBACK = {"rollback": True, "cool": True, "cool_steps": 20}


def test_a_spike_is_gone_back_from_and_its_data_are_not_seen_again(tmp_path: Path) -> None:
    data = Poisoned(range(44, 52))
    made = watched(tmp_path, data, ROLLBACK)
    summary = made.fit()
    # Batch 44 is step 45; the third bad loss is that of step 47, seen at the look after step 50.
    assert decisions(made) == [(50, "rollback"), (40, "cool")]
    record = made.metrics.of("smart")[0]
    assert (record["to"], record["wasted_tokens"]) == (40, 10 * BATCH)
    assert "since step 45: back to step 40 and on with data not seen yet (rollback 1 of 5)" in record["why"]
    assert data.seen == list(range(80)), "a batch was seen twice"
    assert summary["tokens"] == 70 * BATCH and summary["smart"]["wasted_tokens"] == 10 * BATCH
    losses = {r["step"]: r["loss"] for r in made.metrics.of("step")}  # of a step done twice the second
    assert losses[45] < losses[40] + 0.5 and losses[70] < losses[40]


def test_without_rollback_the_same_data_are_trained_on(tmp_path: Path) -> None:
    made = watched(tmp_path, Poisoned(range(44, 52)), {})
    made.fit()
    losses = {r["step"]: r["loss"] for r in made.metrics.of("step")}
    assert losses[47] > losses[40] + 2 and not decisions(made)


def test_losses_that_are_not_finite_are_gone_back_from(tmp_path: Path) -> None:
    class Exploding(Poisoned):
        """From the 41st batch on the weights are broken, as an overflow would."""

        def __next__(self) -> Batch:
            if self.given == 40:
                with torch.no_grad():
                    made.model.norm.weight.fill_(math.nan)
            return super().__next__()

    data = Exploding()
    made = watched(tmp_path, data, {"rollback": True})
    summary = made.fit()
    assert decisions(made) == [(50, "rollback")]
    assert "not finite since step 41: back to step 30" in made.metrics.of("smart")[0]["why"]
    assert summary["skipped"] == 0 and math.isfinite(summary["loss"])


def test_rollbacks_are_bounded(tmp_path: Path) -> None:
    made = watched(tmp_path, Poisoned(range(44, 1000)), ROLLBACK | {"max_rollbacks": 2, "cool": False})
    made.fit()
    whats = [what for _, what in decisions(made)]
    assert whats[:3] == ["rollback", "rollback", "no_rollback"] and set(whats[2:]) == {"no_rollback"}
    first, second = made.metrics.of("smart")[:2]
    assert (first["to"], second["to"]) == (40, 30), "the second goes further back"
    assert "the 2 rollbacks are used up" in made.metrics.of("smart")[2]["why"]


def test_without_a_checkpoint_from_before_it_goes_on(tmp_path: Path) -> None:
    made = watched(tmp_path, Poisoned(range(44, 48)), ROLLBACK, checkpoint_every=0)
    made.fit()
    assert decisions(made) == [(50, "no_rollback"), (50, "cool")]
    assert "no checkpoint from before it" in made.metrics.of("smart")[0]["why"]


@pytest.mark.parametrize("stop_at", [42, 48, 51, 54, 63])
def test_a_run_broken_off_around_a_rollback_is_the_unbroken_run(tmp_path: Path, stop_at: int) -> None:
    """Before the spike, where it saves a checkpoint of its own; within it; around the rollback; and after it."""
    unbroken = watched(tmp_path / "a", Poisoned(range(44, 52)), ROLLBACK)
    whole = unbroken.fit()
    with pytest.raises(Interrupted):
        watched(tmp_path / "b", Poisoned(range(44, 52), stop_at=stop_at), ROLLBACK).fit()
    second = watched(tmp_path / "b", Poisoned(range(44, 52)), ROLLBACK, lm=model(0.1, seed=9))
    summary = second.fit()
    assert digest(second.model) == digest(unbroken.model)
    assert (summary["smart"], summary["tokens"]) == (whole["smart"], whole["tokens"])


def test_a_crash_between_rollback_and_the_next_checkpoint_changes_nothing(tmp_path: Path) -> None:
    class Crash(Poisoned):
        def __next__(self) -> Batch:
            if self.given == 54:
                raise RuntimeError("power cut")
            return super().__next__()

    unbroken = watched(tmp_path / "a", Poisoned(range(44, 52)), ROLLBACK)
    unbroken.fit()
    with pytest.raises(RuntimeError, match="power cut"):
        watched(tmp_path / "b", Crash(range(44, 52)), ROLLBACK).fit()
    second = watched(tmp_path / "b", Poisoned(range(44, 52)), ROLLBACK)
    second.fit()
    assert second.metrics.of("start")[0]["step"] == 40 and not decisions(second)
    assert digest(second.model) == digest(unbroken.model)


def test_cooling_lowers_the_rate_and_warms_it_up_again(tmp_path: Path) -> None:
    made = watched(tmp_path, Poisoned(range(44, 47)), {"cool": True, "cool_steps": 10, "spike_look": 1})
    made.fit()
    assert decisions(made) == [(47, "cool")]
    lr = {r["step"]: r["lr"] for r in made.metrics.of("step")}  # of step n is what updated the weights in it
    assert [lr[n] / lr[40] for n in (47, 48, 53, 58, 70)] == pytest.approx([1, 0.5, 0.75, 1, 1])


# --- validation ------------------------------------------------------------------------------------------------------


class WorseAfter:
    """Bits per byte that fall up to step `best` and rise from there; keeps a digest of the weights it has seen."""

    def __init__(self, best: int) -> None:
        self.lm, self.best, self.digests = model(0.1), best, dict[int, str]()

    def __call__(self, step: int) -> dict[str, Any]:
        self.digests[step] = digest(self.lm)
        away = abs(step - self.best) / 100
        return {"bpb": {"zh": 2 + away, "en": 1 + away}}


def validating(folder: Path, smart: dict[str, Any], best: int = 15, data: Any = None, **more: Any) -> Trainer:
    evaluate = WorseAfter(best)
    config = {"steps": 60, "eval_every": 5, "checkpoint_every": 10, "log_every": 5} | more
    arguments: dict[str, Any] = {"evaluate": evaluate, "smart": SmartConfig.model_validate(smart)}
    arguments["data"] = data or Poisoned()
    arguments["optim"] = OptimConfig(schedule="constant", warmup=0)
    return trainer(folder, lm=evaluate.lm, **config, more=arguments)


STOPPING = {"early_stop": True, "early_stop_patience": 3}


def test_early_stopping_ends_the_stage_with_the_best_weights(tmp_path: Path) -> None:
    made = validating(tmp_path, STOPPING)
    summary = made.fit()
    assert decisions(made) == [(30, "early_stop"), (30, "best")]
    assert made.metrics.of("step")[-1]["step"] == 30
    assert summary["bpb"] == {"zh": 2.0, "en": 1.0}
    assert summary["smart"] | {"best_step": 15, "stopped_early": True} == summary["smart"]
    assert digest(made.model) == made._evaluate.digests[15] != made._evaluate.digests[30]
    again = validating(tmp_path, STOPPING)  # finished: there is nothing to do, and the model is the same
    assert again.fit()["bpb"] == summary["bpb"] and not again.metrics.of("step")
    assert digest(again.model) == digest(made.model)


def test_the_best_weights_are_kept_when_the_steps_end_first(tmp_path: Path) -> None:
    made = validating(tmp_path, STOPPING | {"early_stop_patience": 50})
    summary = made.fit()
    assert decisions(made) == [(60, "best")] and not summary["smart"]["stopped_early"]
    assert digest(made.model) == made._evaluate.digests[15]
    falling = validating(tmp_path / "b", STOPPING, best=60)
    falling.fit()
    assert not decisions(falling) and digest(falling.model) == falling._evaluate.digests[60]


@pytest.mark.parametrize("stop_at", [14, 15, 23, 30])
def test_broken_off_and_resumed_it_stops_at_the_same_step(tmp_path: Path, stop_at: int) -> None:
    with pytest.raises(Interrupted):
        validating(tmp_path, STOPPING, data=Poisoned(stop_at=stop_at)).fit()
    made = validating(tmp_path, STOPPING)
    summary = made.fit()
    assert summary["smart"]["best_step"] == 15 and summary["bpb"] == {"zh": 2.0, "en": 1.0}
    whole = validating(tmp_path / "whole", STOPPING)
    whole.fit()
    assert made.now.step == whole.now.step == 30 and digest(made.model) == digest(whole.model)


def test_a_plateau_lowers_the_rate_of_the_steps_that_follow(tmp_path: Path) -> None:
    made = validating(tmp_path, {"plateau": True, "plateau_patience": 2, "plateau_factor": 0.1, "plateau_min": 0.05})
    made.fit()
    assert decisions(made) == [(25, "lower_lr"), (35, "lower_lr")]
    assert [r["lr"] for r in made.metrics.of("step")] == pytest.approx([1e-3] * 5 + [1e-4] * 2 + [5e-5] * 5)


def test_a_run_with_every_switch_off_decides_nothing(tmp_path: Path) -> None:
    made = validating(tmp_path, {}, data=Poisoned(range(20, 25)))
    summary = made.fit()
    assert not decisions(made) and "smart" not in summary and made.now.step == 60


# --- in a recipe -----------------------------------------------------------------------------------------------------


def test_a_recipes_table_reaches_the_run(tmp_path: Path) -> None:
    for lang in ("zh", "en"):
        lines = [json.dumps({"text": f"{lang} {n}: two orioles sing in {n} green willows"}) for n in range(60)]
        (tmp_path / f"{lang}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    shape = {"vocab_size": 300, "dim": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
             "ffn_dim": 48, "context": 64}  # fmt: skip
    table = {
        "stage": "pretrain", "run": tmp_path / "run", "data": str(tmp_path), "model": shape,
        "parts": {lang: {"files": [f"{lang}.jsonl"]} for lang in ("zh", "en")},
        "tokenizer": {"vocab_size": 300},
        "train": {"tokens": 2 * 32 * 40, "batch_size": 2, "length": 32, "compile": False, "device": "cpu"},
        "eval": {"tokens": 256, "every": 2, "holdout": 0.1},
        # Nothing is better than the first evaluation by ten bits: the second and third that are not end the stage.
        "smart": {"early_stop": True, "early_stop_patience": 3, "min_delta": 10, "micro_batch": True},
    }  # fmt: skip
    recipe = validate(Recipe, table, "test")
    done = run_stage(recipe)
    events = read_events(recipe.folder)
    assert [e["what"] for e in events if e["event"] == "smart"][:2] == ["micro_batch", "early_stop"]
    evaluations = {e["step"]: e["bpb"] for e in events if e["event"] == "eval"}
    assert list(evaluations) == [0, 2, 4, 6] and done["smart"]["stopped_early"]
    assert done["bpb"] == min(evaluations.values(), key=lambda bpb: sum(bpb.values()))
    saved = load_model(recipe.folder / "model")
    best = checkpoint.load(recipe.folder / "checkpoints" / f"step-{checkpoint.best(recipe.folder / 'checkpoints')}")
    assert best.state["bpb"] == done["bpb"]
    assert all(torch.equal(t, saved.state_dict()[name]) for name, t in best.tensors["model"].items())
    assert run_stage(recipe) == done  # finished is finished
    with pytest.raises(ConfigError, match="smart differ"):
        run_stage(validate(Recipe, table | {"smart": {"early_stop": False}}, "test"))
