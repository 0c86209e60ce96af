"""Where a stage starts from."""

import json
from pathlib import Path

import pytest
import toy_stage

from oriole.config import apply_overrides, validate
from oriole.errors import ConfigError, ModelError
from oriole.model.folder import load_model
from oriole.train.recipe import Recipe
from oriole.train.stage import run_stage
from oriole.train.task import parent_of


def made(run: Path, stage: str, verdict: str = "") -> Path:
    """A stage that is finished, as far as its successors look, perhaps with a verdict of the gate."""
    folder = run / stage / "model"
    folder.mkdir(parents=True)
    records = [{"event": "done"}, *([{"event": "gate", "verdict": verdict}] if verdict else [])]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run / stage / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def parent(run: Path, stage: str, init: str = "") -> Path | None:
    recipe = toy_stage.recipe("sft", run / "data", run)
    return parent_of(recipe.model_copy(update={"stage": stage, "init": init}))


def test_the_newest_stage_before_that_came_out_no_worse(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model to start sft from"):
        parent(tmp_path, "sft")
    pretrain = made(tmp_path, "pretrain")
    assert parent(tmp_path, "sft") == pretrain and parent(tmp_path, "pretrain") is None
    with pytest.raises(ModelError, match=r"no model to start grpo from at .*sft/model; train it first, or name one"):
        parent(tmp_path, "grpo")
    sft = made(tmp_path, "sft")
    made(tmp_path, "reward")
    for stage in ("reward", "dpo", "ppo", "grpo", "distill"):
        assert parent(tmp_path, stage) == sft
    dpo = made(tmp_path, "dpo", "no difference")
    made(tmp_path, "grpo", "better")
    assert [parent(tmp_path, stage) for stage in ("reward", "dpo", "ppo", "grpo")] == [sft, sft, dpo, dpo]
    made(tmp_path, "ppo", "worse")
    assert parent(tmp_path, "grpo") == dpo
    (tmp_path / "dpo" / "metrics.jsonl").write_text('{"event": "gate", "verdict": "worse"}\n', encoding="utf-8")
    assert parent(tmp_path, "grpo") == parent(tmp_path, "ppo") == sft
    assert parent(tmp_path, "grpo", str(dpo)) == dpo and parent(tmp_path, "grpo", "random") is None


def test_the_parent_is_recorded(tmp_path: Path) -> None:
    data = toy_stage.write_data(tmp_path / "data")
    for stage, expected in (("pretrain", ""), ("sft", "pretrain/model")):
        run_stage(toy_stage.recipe(stage, data, tmp_path / "run", tokens=256))
        env = json.loads((tmp_path / "run" / stage / "env.json").read_text(encoding="utf-8"))
        assert env["parent"] == expected
    elsewhere = toy_stage.recipe("sft", data, tmp_path / "other", tokens=256)
    init = tmp_path / "run" / "sft" / "model"
    run_stage(elsewhere.model_copy(update={"init": str(init)}))
    env = json.loads((tmp_path / "other" / "sft" / "env.json").read_text(encoding="utf-8"))
    assert env["parent"] == str(init)


def test_a_stage_makes_its_parents_context_longer(tmp_path: Path) -> None:
    """As `oriole train RECIPE model.rope_scaling=yarn model.rope_factor=2` does; twice is not four times."""
    data = toy_stage.write_data(tmp_path / "data")
    run_stage(toy_stage.recipe("pretrain", data, tmp_path / "run", tokens=256))
    table = toy_stage.recipe("sft", data, tmp_path / "run", tokens=256, length=96).model_dump(mode="json")
    del table["model"]
    apply_overrides(table, {"model.rope_scaling": "yarn", "model.rope_factor": 2})
    longer = validate(Recipe, table, "here")
    run_stage(longer)
    model = load_model(longer.folder / "model")
    assert (model.config.context, model.config.rope_scaling, model.config.trained_context) == (128, "yarn", 64)
    assert len(model.angles.cos) == 128
    assert longer.lengthened(model.config) == model.config
    plain = load_model(tmp_path / "run" / "pretrain" / "model")
    assert (plain.config.dim, plain.config.context, plain.config.rope_scaling) == (32, 64, "none")
    plain.stretch("yarn", 2.0)
    assert plain.config == model.config and plain.angles.cos.equal(model.angles.cos)


def test_a_context_is_not_made_longer_while_answers_are_rewarded(tmp_path: Path) -> None:
    table = toy_stage.recipe("sft", tmp_path, tmp_path).model_dump(mode="json")
    table |= {"stage": "grpo", "parts": {"all": {"files": ["chat.jsonl"]}}, "train": {"epochs": 1}}
    table["model"] = {"preset": "demo", "rope_scaling": "yarn", "rope_factor": 2}
    with pytest.raises(ConfigError, match="lengthen it in an sft stage before"):
        validate(Recipe, table, "here")
