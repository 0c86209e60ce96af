"""The stages ppo and grpo from their recipe to a model folder, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_rl import SHAPE, tokenizer

from oriole.apps.inspect import InspectConfig
from oriole.cli.inspection import inspect
from oriole.config import to_toml, validate
from oriole.errors import ConfigError, DataError, ModelError
from oriole.log import console
from oriole.model.folder import load_model, save_model
from oriole.model.lm import LM
from oriole.text.template import Message, Prompt
from oriole.text.tokenizer import train_tokenizer
from oriole.train.recipe import Recipe
from oriole.train.rewards import Answer, Rewards, model_score, rule
from oriole.train.stage import run_stage


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent and a reward model with random weights, sums and chats."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(5)
    save_model(LM(SHAPE), folder / "parent", chat=True)
    tokenizer().save(folder / "parent", chat=True)
    save_model(LM(SHAPE, heads=("reward",)), folder / "judge", chat=True)
    tokenizer().save(folder / "judge", chat=True)
    sums = [{"prompt": f"{a}+{b}=?", "response": str(a + b)} for a in range(4) for b in range(5)]
    talk = [{"prompt": f"hello {i}", "response": "a willow"} for i in range(10)]
    for name, records in (("sums", sums), ("talk", talk), ("long", [{"prompt": "1+1=?" + "?" * 60}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def recipe(stage: str, home: Path, run: Path, **more: Any) -> Recipe:
    table: dict[str, Any] = {
        "stage": stage, "run": run, "data": str(home), "init": str(home / "parent"),
        "parts": {
            "sums": {"files": ["sums.jsonl"], "val": ["sums.jsonl"]},
            "talk": {"files": ["talk.jsonl"], "val": ["talk.jsonl"], "format": "chat"},
        },
        "rollout": {"prompts": 4, "max_new_tokens": 4, "rewards": {"format": 1.0, "language": 0.5}, "eval_prompts": 6},
        "grpo": {"group": 2},
        "train": {"epochs": 0.4, "batch_size": 4, "length": 32, "device": "cpu", "dtype": "fp32", "lr": 1e-2,
                  "log_every": 1},
        "checkpoint": {"every": 1, "keep": 99},
        "eval": {"tokens": 256, "prompts": []},
    }  # fmt: skip
    for name, values in more.items():
        table[name] = table.get(name, {}) | values if isinstance(values, dict) else values
    return validate(Recipe, table, "toy")


def records(run: Path, stage: str, event: str) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return [record for record in every if record["event"] == event]


# --- from a recipe to a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_stage_trains_saves_the_policy_alone_and_reports(home: Path, tmp_path: Path, stage: str) -> None:
    made = recipe(stage, home, tmp_path, ppo={"epochs": 2})
    done = run_stage(made)
    # 20 prompts x 0.4 / 4 = 2 rollouts; of 4 answers, 1 step a pass, or of 8, 2 steps
    assert [r["step"] for r in records(tmp_path, stage, "step")] == [1, 2, 3, 4]
    before, model = load_model(home / "parent"), load_model(tmp_path / stage / "model")
    assert set(load_file(tmp_path / stage / "model" / "model.safetensors")) == set(
        load_file(home / "parent" / "model.safetensors")
    )
    assert not torch.equal(before.embedding.weight, model.embedding.weight)
    assert done["bpb"].keys() == {"talk"}
    first, *_, last = records(tmp_path, stage, "eval")
    assert first["rewards"].keys() == {"format", "language"} and first["reward_gain"] == 0.0
    low, high = last["reward_gain_interval"]
    assert low <= last["reward_gain"] <= high and "clipped_ratio" in last
    assert validate(Recipe, made.model_dump(mode="json"), "again") == made and "[rollout.rewards]" in to_toml(made)
    assert run_stage(made) == done  # finished
    (part,) = inspect(tmp_path, InspectConfig())["parts"]
    assert part["name"] == "sums" and part["total"]["documents"] == 20, "what it is asked, not what is only measured"
    with pytest.raises(ConfigError, match="rollout differ"):
        run_stage(recipe(stage, home, tmp_path, ppo={"epochs": 2}, rollout={"temperature": 0.5}))


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_run_goes_on_from_any_checkpoint_to_the_same_weights(home: Path, tmp_path: Path, stage: str) -> None:
    more: dict[str, Any] = {"ppo": {"epochs": 2}, "grpo": {"epochs": 2, "beta": 0.1}, "train": {"epochs": 0.4}}
    run_stage(recipe(stage, home, tmp_path / "a", **more))
    whole = (tmp_path / "a" / stage / "model" / "model.safetensors").read_bytes()
    for step in (1, 2, 3):
        run = tmp_path / f"b{step}"
        more["train"]["resume"] = str(tmp_path / "a" / stage / "checkpoints" / f"step-{step}")
        run_stage(recipe(stage, home, run, **more))
        assert (run / stage / "model" / "model.safetensors").read_bytes() == whole
    more["train"] = {"epochs": 0.4, "seed": 2}
    run_stage(recipe(stage, home, tmp_path / "c", **more))
    assert (tmp_path / "c" / stage / "model" / "model.safetensors").read_bytes() != whole


def test_the_reward_model_scores_the_conversation_and_the_value_model_starts_from_it(
    home: Path, tmp_path: Path
) -> None:
    made = recipe(
        "ppo", home, tmp_path, rollout={"rewards": {"model": 1.0}, "reward_model": str(home / "judge")},
        ppo={"value_init": "reward", "epochs": 1},
    )  # fmt: skip
    run_stage(made)
    assert "rewards/model/mean" in records(tmp_path, "ppo", "step")[0]


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_policy_with_adapters_learns_too(home: Path, tmp_path: Path, stage: str) -> None:
    run_stage(recipe(stage, home, tmp_path, lora={"rank": 2}))
    assert (tmp_path / stage / "adapter").exists()
    before, after = (load_file(f / "model.safetensors") for f in (home / "parent", tmp_path / stage / "model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("_proj" in name for name in moved), "the matrices with adapters, and nothing else"
    first = records(tmp_path, stage, "step")[0]
    assert first["ratio" if stage == "grpo" else "val/ratio"] == 1.0


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_rules_by_name() -> None:
    def score(name: Any, question: str, answer: str, *, ended: bool = True, known: tuple[str, ...] = ()) -> Any:
        return rule(name, long_answer=4)(Answer(Prompt((Message("user", question),), known), answer, ended))

    assert score("arithmetic", "17+25=?", "17+25=30+12=42") == 1.0
    assert score("arithmetic", "17+25=?", "17+25=43") == 0.0
    assert score("arithmetic", "你好！", "你好！") is None
    assert score("exact", "谁？", "黄鹂。", known=("黄鹂",)) == 1.0
    assert score("exact", "谁？", "柳树", known=("黄鹂",)) == 0.0
    assert score("exact", "谁？", "黄鹂") is None
    assert (score("language", "你好！", "你好！"), score("language", "你好！", "Hello!")) == (1.0, 0.0)
    assert score("format", "?", "yes") == 1.0
    assert score("format", "?", "yes", ended=False) == score("format", "?", " ") == 0.0
    assert score("repetition", "?", "la la la la la la la la") == 0.0 and score("repetition", "?", "one two") == 1.0
    assert [score("length", "?", "a " * n) for n in (1, 4, 6, 8, 20)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert score("rules", "17+25=?", "42") == 1.0 > score("rules", "17+25=?", "43") > 0


def test_scores_are_weighted_and_those_that_do_not_apply_left_out() -> None:
    answers = [Answer(Prompt((Message("user", "?"),)), text, True) for text in "abc"]
    rewards = Rewards({"one": (lambda a: [1.0, 2.0, None], 2.0), "two": (lambda a: [None, 10.0, None], 0.5)})
    total, columns = rewards(answers)
    assert total[:2].tolist() == [2.0, 9.0] and total[2].isnan()
    assert columns["two"][1] == 10.0 and columns["two"][[0, 2]].isnan().all()


def test_a_score_of_the_reward_model_is_that_of_the_rendered_conversation(home: Path) -> None:
    from oriole.infer.score import score
    from oriole.model.folder import load_reward_model
    from oriole.text.template import render

    judge = load_reward_model(home / "judge")
    prompt = Prompt((Message("user", "hello"),))
    (ours,) = model_score(judge, tokenizer())([Answer(prompt, "a willow", True)])
    ids, _ = render([*prompt.messages, Message("assistant", "a willow")], tokenizer())
    assert ours == float(score(judge, [ids])[0])


# --- what is refused or counted --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"train": {"epochs": None, "tokens": 1e4}}, "counts in passes over its prompts"),
        ({"train": {"dropout": 0.1}}, "train.dropout, train.head_dropout and lora.dropout must be 0 in grpo"),
        ({"train": {"head_dropout": 0.1}}, "train.head_dropout and lora.dropout must be 0 in grpo"),
        ({"lora": {"dropout": 0.1}}, "lora.dropout must be 0 in grpo"),
        ({"train": {"compile": True}}, "leave train.compile at auto"),
        ({"train": {"parallel": "fsdp"}}, "use train.parallel=ddp"),
        ({"parts": {"sums": {"files": ["sums.jsonl"], "format": "text"}}}, "needs a part with prompts"),
        ({"parts": {"sums": {"files": ["sums.jsonl"], "sources": {"a": 0.5}}}}, "without shards or sources"),
        ({"rollout": {"rewards": {}}}, "at least one reward"),
        ({"rollout": {"rewards": {"luck": 1.0}}}, "luck"),
    ],
)
def test_recipes_that_cannot_be_are_refused_with_the_reason(
    home: Path, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe("grpo", home, tmp_path, **more)


def test_a_rollout_that_does_not_divide_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"8 answers \(rollout.prompts = 4 x 2\) is not divided evenly into"):
        run_stage(recipe("grpo", home, tmp_path, train={"batch_size": 3}))


def test_prompts_too_long_or_without_a_rule_are_counted(home: Path, tmp_path: Path) -> None:
    parts = {"both": {"files": ["sums.jsonl", "talk.jsonl", "long.jsonl"], "val": ["sums.jsonl"]}}
    with console.capture() as capture:
        run_stage(recipe("grpo", home, tmp_path, parts=parts, rollout={"rewards": {"arithmetic": 1.0}}))
    said = capture.get()
    assert "train part 'both': 1 prompts of more than 28 tokens are left out" in said
    assert "train part 'both': 10 prompts are left out, about which no reward has anything to say" in said


def test_a_part_without_any_prompt_left_is_an_error(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"part 'talk' has no prompt left: 0 are longer .* about 10 none of"):
        run_stage(recipe("grpo", home, tmp_path, parts={"talk": {"files": ["talk.jsonl"], "val": ["talk.jsonl"]}},
                         rollout={"rewards": {"arithmetic": 1.0}}))  # fmt: skip


def test_a_reward_model_of_another_tokenizer_or_none_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is none at .*reward.model; train it first"):
        run_stage(recipe("grpo", home, tmp_path, rollout={"rewards": {"model": 1.0}}))
    save_model(LM(SHAPE, heads=("reward",)), tmp_path / "other", chat=True)
    train_tokenizer([("en", "quite another text than that")], 280).save(tmp_path / "other", chat=True)
    with pytest.raises(ModelError, match="another tokenizer than the policy's"):
        run_stage(recipe("grpo", home, tmp_path / "x",
                         rollout={"rewards": {"model": 1.0}, "reward_model": str(tmp_path / "other")}))  # fmt: skip
    with pytest.raises(ModelError, match="holds a language model"):
        run_stage(recipe("grpo", home, tmp_path / "y",
                         rollout={"rewards": {"model": 1.0}, "reward_model": str(home / "parent")}))  # fmt: skip


def test_without_a_chat_model_there_is_nothing_to_start_from(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="init=FOLDER"):
        run_stage(recipe("grpo", home, tmp_path, init=""))
    with pytest.raises(ModelError, match="init=FOLDER"):
        run_stage(recipe("ppo", home, tmp_path, init="random", tokenizer={"path": str(home / "parent")}))
