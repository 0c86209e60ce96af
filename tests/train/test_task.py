"""Where a stage starts from."""

import json
from pathlib import Path

import pytest
import toy_stage

from oriole.errors import ModelError
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
