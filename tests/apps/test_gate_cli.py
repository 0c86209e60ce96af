"""The gate after a stage: what it writes, what the report shows, and that a worse stage is passed over everywhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_stage
from safetensors.torch import load_file, save_file

from oriole import cli
from oriole.apps import report
from oriole.apps.found import find_model
from oriole.cli import gate
from oriole.config import to_toml, validate
from oriole.errors import DataError, ModelError
from oriole.log import console, judged_worse, last_record
from oriole.model.folder import load_model, save_model
from oriole.model.lm import LM
from oriole.text.shards import held_out
from oriole.train.recipe import Recipe
from oriole.train.tables import GateTable
from oriole.train.task import parent_of

DONE = {"event": "done", "stage": "dpo", "seconds": 1.0, "tokens": 10, "parameters": 1000, "device": "cpu",
        "bpb_before": {"zh": 2.0}, "bpb": {"zh": 2.01}}  # fmt: skip


def recipe(run: Path, stage: str, **gate_table: Any) -> Recipe:
    """A recipe on the files of `the_run`, as if of that stage."""
    made = validate(
        Recipe,
        {
            "stage": "sft", "run": run, "data": str(run / "data"), "train": {"tokens": 100, "device": "cpu"},
            "parts": {"all": {"files": ["chat.jsonl"]}}, "eval": {"questions": "eval.jsonl"},
            "gate": {"max_new_tokens": 12, **gate_table},
        },
        "test",
    )  # fmt: skip
    return made.model_copy(update={"stage": stage})


def the_run(run: Path, save_tiny: Callable[..., Path]) -> Path:
    """A run with pretrain, sft, and a dpo that was just trained from sft."""
    save_tiny(run / "pretrain" / "model", chat=False)
    save_tiny(run / "sft" / "model")
    save_tiny(run / "dpo" / "model", seed=1)
    finished(run / "dpo", "sft/model")
    (run / "sft" / "metrics.jsonl").write_text(json.dumps({**DONE, "stage": "sft"}) + "\n", encoding="utf-8")
    (run / "data").mkdir()
    questions = [{"kind": kind, "lang": "en", "messages": [{"role": "user", "content": f"sing {kind} {i}"}],
                  "answers": ["two orioles"]} for kind in "ab" for i in range(15)]  # fmt: skip
    lines = "".join(json.dumps(q) + "\n" for q in questions)
    (run / "data" / "eval.jsonl").write_text(lines, encoding="utf-8")
    return run


def finished(stage: Path, parent: str) -> None:
    (stage / "env.json").write_text(json.dumps({"schema": 1, "parent": parent}), encoding="utf-8")
    (stage / "metrics.jsonl").write_text(json.dumps(DONE) + "\n", encoding="utf-8")


def spoil(folder: Path, token: int = 300) -> None:
    """Make a model say nothing but this token, whatever is asked: for ever, unless it is 0."""
    weights = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["model.embed_tokens.weight"] += 1
    weights["model.norm.weight"] += 1
    weights["lm_head.weight"][token] = 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def record_verdict(stage: Path, verdict: str) -> None:
    with (stage / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "gate", "verdict": verdict}) + "\n")


def test_figures_are_written_once_and_anew_for_other_settings(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    run = the_run(tmp_path / "run", save_tiny)
    gate.after_stage(recipe(run, "sft"))
    assert not last_record(run / "sft" / "metrics.jsonl", "gate"), "only preference stages have a gate"
    gate.after_stage(recipe(run, "dpo", prompts=0))
    assert not last_record(run / "dpo" / "metrics.jsonl", "gate")

    with console.capture() as said:
        gate.after_stage(recipe(run, "dpo", prompts=20))
    assert "only" not in said.get() and "dpo against sft: " in said.get()
    found = last_record(run / "dpo" / "metrics.jsonl", "gate")
    assert found["parent"] == "sft" and found["prompts"] == 20 and found["bpb"]["rise"] == 0.005
    assert set(found["judges"]) == {"rules"}
    rows = [json.loads(line) for line in (run / "dpo" / "gate.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 20 and {row["kind"] for row in rows} == {"a", "b"}
    outcomes = [row["outcome"]["rules"] for row in rows]
    assert [outcomes.count(n) for n in (1, 0, -1)] == [found["judges"]["rules"][k] for k in ("wins", "ties", "losses")]

    before = (run / "dpo" / "metrics.jsonl").read_text(encoding="utf-8")
    gate.after_stage(recipe(run, "dpo", prompts=20))
    assert (run / "dpo" / "metrics.jsonl").read_text(encoding="utf-8") == before
    with console.capture() as said:
        gate.after_stage(recipe(run, "dpo"))
    assert "only 30 held-out prompts" in said.get()
    assert last_record(run / "dpo" / "metrics.jsonl", "gate")["prompts"] == 30


def test_the_runs_reward_model_judges_too(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    run = the_run(tmp_path / "run", save_tiny)
    folder = save_tiny(run / "reward" / "model")
    model = LM(load_model(folder).config, heads=("reward",))
    save_model(model, folder, chat=True)
    gate.after_stage(recipe(run, "dpo"))
    assert set(last_record(run / "dpo" / "metrics.jsonl", "gate")["judges"]) == {"rules", "reward model"}


def test_a_worse_stage_is_passed_over_and_shown(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    run = the_run(tmp_path / "run", save_tiny)
    spoil(run / "sft" / "model", token=0)
    spoil(run / "dpo" / "model")
    assert find_model(run) == run / "dpo" / "model"
    assert parent_of(recipe(run, "ppo")) == run / "dpo" / "model"
    with console.capture() as said:
        gate.after_stage(recipe(run, "dpo"))
    assert "dpo against sft: worse" in said.get() and "keeps sft" in said.get()
    assert judged_worse(run / "dpo") and not judged_worse(run / "sft")
    with console.capture() as said:
        assert find_model(run) == run / "sft" / "model"
    assert "using sft: dpo of" in said.get() and "worse than the parent" in said.get()
    assert find_model(run / "dpo") == run / "dpo" / "model", "who names a stage gets it"
    assert parent_of(recipe(run, "ppo")) == parent_of(recipe(run, "grpo")) == run / "sft" / "model"

    made = report.write(run)
    found = made["stages"]["dpo"]["gate"]
    assert found["verdict"] == "worse" and found["parent"] == "sft" and "settings" not in found
    assert 0 < len(found["examples"]) <= 6
    text = report.text(made)
    assert "dpo against its parent, sft: worse" in text and "win rate, by rules" in text and "loop rate" in text
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "dpo against sft" in page and "passed over" in page and "Answers side by side" in page
    assert json.loads((run / "report.json").read_text(encoding="utf-8")) == made


def test_a_stage_that_was_trained_anew_is_not_judged_by_its_past(
    tmp_path: Path, save_tiny: Callable[..., Path]
) -> None:
    run = the_run(tmp_path / "run", save_tiny)
    record_verdict(run / "dpo", "worse")
    assert judged_worse(run / "dpo")
    with (run / "dpo" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(DONE) + "\n" + '{"event": "ga')  # and a torn line behind it
    assert not judged_worse(run / "dpo")
    for verdict in ("better", "no difference"):
        finished(run / "dpo", "sft/model")
        record_verdict(run / "dpo", verdict)
        assert not judged_worse(run / "dpo") and find_model(run) == run / "dpo" / "model"


def test_where_every_stage_that_can_chat_is_worse_the_newest_is_used(
    tmp_path: Path, save_tiny: Callable[..., Path]
) -> None:
    run = the_run(tmp_path / "run", save_tiny)
    for name in ("dpo", "sft"):
        record_verdict(run / name, "worse")
    assert find_model(run) == run / "dpo" / "model"
    with pytest.raises(ModelError, match=r"no model to start ppo from at .*sft/model; train it first"):
        parent_of(recipe(run, "ppo"))


def test_without_prompts_or_parent_it_says_what_to_do(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    run = the_run(tmp_path / "run", save_tiny)
    with pytest.raises(DataError, match=r"no held-out prompts that fit .* gate\.prompts=0"):
        gate.after_stage(recipe(run, "dpo", max_new_tokens=160))
    finished(run / "dpo", "")
    with pytest.raises(DataError, match=r"names no parent to compare with; .*gate\.prompts=0"):
        gate.after_stage(recipe(run, "dpo"))


def test_prompts_are_those_that_pairs_and_then_chats_hold_out(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    run = the_run(tmp_path / "run", save_tiny)
    data = run / "data"
    pairs = [{"prompt": f"pair {i % 40}", "chosen": "two", "rejected": f"three {i}"} for i in range(80)]
    chats = [{"messages": [{"role": "user", "content": f"chat {i}"}, {"role": "assistant", "content": "two"}]}
             for i in range(40)]  # fmt: skip
    for name, records in (("pairs", pairs), ("chat", chats)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    base = recipe(run, "dpo")
    part = base.parts["all"].model_copy(update={"files": ["pairs.jsonl"], "format": "preference"})
    table = base.eval.model_copy(update={"questions": "", "holdout": 0.4, "holdout_pairs": 0.4})
    dpo = base.model_copy(update={"parts": {"all": part}, "eval": table})
    (run / "sft" / "recipe.toml").write_text(to_toml(recipe(run, "sft").model_copy(update={"eval": table})))

    def asked(recipe: Recipe) -> list[str]:
        gate.after_stage(recipe)
        rows = (run / "dpo" / "gate.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(row)["messages"][0]["content"] for row in rows]

    both = asked(dpo)
    hidden = {f"pair {i}" for i in range(40) if held_out(f"pair {i}", 0.4)}
    hidden |= {f"chat {i}" for i in range(40) if held_out(f"chat {i}\x00two", 0.4)}
    assert set(both) == hidden and len(both) == len(hidden) > 20, "each once"
    few = asked(dpo.model_copy(update={"gate": dpo.gate.model_copy(update={"prompts": 5})}))
    assert len(few) == 5 and all(prompt.startswith("pair") for prompt in few)
    named = part.model_copy(update={"val": ["pairs.jsonl"]})
    assert (
        len(asked(dpo.model_copy(update={"parts": {"all": named}, "gate": GateTable(prompts=40, max_new_tokens=12)})))
        == 40
    )
    assert "exact_match" not in last_record(run / "dpo" / "metrics.jsonl", "gate")

    lines = [json.dumps({"prompt": f"1+{i}=?", "answers": [str(1 + i)]}) + "\n" for i in range(12)]
    (data / "sums.jsonl").write_text("".join(lines), encoding="utf-8")
    sums = part.model_copy(update={"files": ["sums.jsonl"], "val": ["sums.jsonl"], "format": "prompt"})
    own = GateTable(prompts=12, max_new_tokens=12)
    assert set(asked(dpo.model_copy(update={"parts": {"all": sums}, "gate": own}))) == {f"1+{i}=?" for i in range(12)}
    found = last_record(run / "dpo" / "metrics.jsonl", "gate")
    assert found["exact_match"]["questions"] == 12, "a prompt that is read with its right answers can be checked"


def test_a_run_of_three_stages_ends_with_a_verdict(tmp_path: Path) -> None:
    data, run, recipes = toy_stage.write_data(tmp_path / "data"), tmp_path / "run", tmp_path / "recipes"
    pairs = [{"prompt": f"{i}?", "chosen": toy_stage.EN[i % 9 : 30], "rejected": toy_stage.ZH[i % 5 : 9]}
             for i in range(60)]  # fmt: skip
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    (data / "pairs.jsonl").write_text(lines, encoding="utf-8")
    toy_stage.write_recipes(recipes, data, run, tokens=2 * 2 * 32 * 6)
    text = {name: {"format": "text", "val": [f"{name}.txt"]} for name in ("zh", "en")}
    dpo = toy_stage.recipe(
        "dpo", data, run, tokens=None, epochs=1.0, length=64, dropout=0.0, eval={"holdout_pairs": 0.3},
        parts={"all": {"files": ["pairs.jsonl"]}, **text}, gate={"max_new_tokens": 12},
    )  # fmt: skip
    (recipes / "dpo.toml").write_text(to_toml(dpo), encoding="utf-8")

    cli.run(str(recipes))
    events = [json.loads(line) for line in (run / "dpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found, done = events[-1], events[-2]
    assert (found["event"], found["parent"], done["event"]) == ("gate", "sft", "done")
    assert found["prompts"] == 80, "the pairs' prompts are among those of the chats that sft has held out"
    assert found["bpb"] == {
        "parent": done["bpb_before"], "stage": done["bpb"],
        "rise": round(sum(done["bpb"][part] / done["bpb_before"][part] - 1 for part in ("zh", "en")) / 2, 4),
    }  # fmt: skip
    made = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert made["stages"]["dpo"]["gate"]["verdict"] == found["verdict"]
    kept = "sft" if found["verdict"] == "worse" else "dpo"
    assert find_model(run) == run / kept / "model"

    before = (run / "dpo" / "metrics.jsonl").read_bytes()
    with console.capture() as said:
        cli.run(str(recipes))
    assert (run / "dpo" / "metrics.jsonl").read_bytes() == before
    assert f"dpo against sft: {found['verdict']}" in said.get(), "a finished stage's verdict is said again"


def test_eval_compares_two_models(
    tmp_path: Path, save_tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = the_run(tmp_path / "run", save_tiny)
    spoil(run / "sft" / "model")
    questions = f"questions={run / 'data' / 'eval.jsonl'}"
    cli.evaluate(run / "dpo", [f"against={run / 'sft'}", questions], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == 30 and found["loop_rate"]["parent"] == 1.0 and found["parent"] == str(run / "sft")
    cli.evaluate(run / "dpo", [f"against={run / 'dpo'}", questions])
    assert "no difference" in capsys.readouterr().out
