"""Preference pairs from a model's own answers: whose they are, what is dropped, and that stopped work goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy_stage

from oriole.apps import prefer as module
from oriole.apps.api import Oriole
from oriole.apps.evaluate import Answer
from oriole.apps.prefer import PreferConfig, bias, prefer, summary
from oriole.cli import data as verbs
from oriole.cli.prefer import judge_for, model_for
from oriole.errors import CheckpointError, ConfigError, DataError, ModelError
from oriole.model.folder import load_model, save_model
from oriole.model.lm import LM
from oriole.text.formats import read_preferences
from oriole.text.template import Message
from oriole.train.checkpoint import load, steps
from oriole.train.stage import run_stage


def chats(path: Path, count: int = 12) -> Path:
    records = [
        {"messages": [{"role": "user", "content": f"sing {i}"}, {"role": "assistant", "content": f"two orioles {i}"}],
         "source": f"s{i % 2}"}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def config(folder: Path, **more: Any) -> PreferConfig:
    keys = {"input": [str(folder / "chats.jsonl")], "output": folder / "pairs.jsonl", "max_new_tokens": 10} | more
    return PreferConfig(**keys)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_length(answers: Any) -> list[float]:
    return [float(len(text)) for _, text in answers]


# --- one pair --------------------------------------------------------------------------------------------------------


def pair(answer: str, samples: list[str], **more: Any) -> Any:
    row = module._Row((Message("user", "What is a heron?"),), answer, "", "")
    reward = more.pop("reward", None)
    made = PreferConfig(samples=len(samples), **more)
    said = [Answer(s, len(s), True, False) for s in samples]
    return module._pair(row, said, module._scores([row], [said], made, reward)[0], made)


def test_pairs_by_hand() -> None:
    found = pair("A bird.", ["是一种鸟。"])
    assert (found["chosen"], found["rejected"], found["similarity"]) == ("A bird.", "是一种鸟。", 0.0)
    assert found["scores"] == [1.0, round(0.5 * 2 / 3, 4)], "right and in its language; neither"
    assert pair("A bird.", ["a bird"]) == "as good", "the same answer in another spelling"
    assert pair("A bird.", ["", " "]) == "empty answer"
    # 15 and 14 different pairs of characters, 14 in common: 28 / 29.
    assert pair("A bird with legs", ["A bird with leg"]) == "too similar"
    assert pair("A bird with legs", ["A bird with leg"], similarity=0.97)["rejected"] == "A bird with leg"
    worst = pair("A bird.", ["A fish.", "a bird", "鱼", "A fish of the sea."])
    assert worst["rejected"] == "鱼", "of several samples the worst"


def test_best_and_worst_by_hand() -> None:
    found = pair("A bird.", ["A fish.", "a bird", "鱼"], chosen="best")
    assert (found["chosen"], found["rejected"]) == ("a bird", "鱼")
    assert pair("A bird.", ["A fish.", "A tree."], chosen="best") == "as good"
    found = pair(
        "A bird.", ["four words are here", "two words", "", "three words are"], chosen="best", reward=by_length
    )
    assert (found["chosen"], found["rejected"]) == ("four words are here", "two words"), "an empty one is no answer"
    assert found["scores"] == [19.0, 9.0]


def test_length_bias_in_words() -> None:
    made = {"pairs": 3, "chats": 9, "output": "x", "dropped": {"as good": 6},
            "mean_tokens": {"chosen": 5.0, "rejected": 4.0},
            "mean_score": {"chosen": 1.0, "rejected": 0.5}}  # fmt: skip
    assert "length gives away" not in bias(made | {"chosen_longer": 0.5})
    for share in (0.9, 0.1):
        assert "length gives away which is better" in bias(made | {"chosen_longer": share})
    assert bias(made | {"chosen_longer": None}) == "all pairs are of equal length"
    assert "3 pairs of 9 chats" in (text := summary(made | {"chosen_longer": 0.9})) and "6 as good" in text


# --- a file ----------------------------------------------------------------------------------------------------------


def test_rejected_answers_are_the_models_own_and_the_file_reads_as_preferences(oriole: Oriole, tmp_path: Path) -> None:
    chats(tmp_path / "chats.jsonl")
    made = prefer(tmp_path, oriole, config(tmp_path))
    pairs = lines(tmp_path / "pairs.jsonl")
    assert made["pairs"] == len(pairs) and made["chats"] == 12
    assert made["pairs"] + sum(made["dropped"].values()) == 12 and made["pairs"] > 6
    for each in pairs:
        asked = each["prompt"][0]["content"]
        i = int(asked.split()[1])
        assert each["chosen"] == f"two orioles {i}" and each["source"] == f"s{i % 2}"
        assert each["rejected"] == oriole.generate(asked, max_new_tokens=10, seed=i)
        assert each["scores"][0] > each["scores"][1] and each["similarity"] < 0.9
    read = list(read_preferences(tmp_path / "pairs.jsonl"))
    assert [p.rejected[-1].content for p in read] == [each["rejected"] for each in pairs]
    sizes = [[len(oriole.tokenizer.encode(each[side])) for side in ("chosen", "rejected")] for each in pairs]
    assert made["mean_tokens"]["chosen"] == pytest.approx(sum(a for a, _ in sizes) / len(sizes), abs=0.01)
    differing = [a > b for a, b in sizes if a != b]
    assert made["chosen_longer"] == pytest.approx(sum(differing) / len(differing), abs=1e-4)


@pytest.mark.parametrize("how", [{}, {"chosen": "best", "samples": 3}])
def test_stopped_work_goes_on_to_the_same_bytes(oriole: Oriole, tmp_path: Path, how: dict[str, Any]) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        chats(tmp_path / name / "chats.jsonl", 30)
    whole = prefer(tmp_path, oriole, config(tmp_path / "whole", **how))
    prefer(tmp_path, oriole, config(tmp_path / "broken", limit=7, batch_size=1, **how))
    with (tmp_path / "broken" / "pairs.jsonl").open("ab") as file:
        file.write(b'{"prompt": [{"role"')  # killed while writing
    again = prefer(tmp_path, oriole, config(tmp_path / "broken", batch_size=5, **how))
    assert again | {"output": ""} == whole | {"output": ""}
    results = [(tmp_path / name / "pairs.jsonl").read_bytes() for name in ("whole", "broken")]
    assert results[0] == results[1]
    before = (tmp_path / "broken" / "pairs.report.json").stat().st_mtime_ns
    assert prefer(tmp_path, oriole, config(tmp_path / "broken", **how)) == again, "a third call has nothing to do"
    assert (tmp_path / "broken" / "pairs.report.json").stat().st_mtime_ns == before


def test_an_output_of_another_making_is_refused(oriole: Oriole, tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    chats(tmp_path / "chats.jsonl")
    prefer(tmp_path, oriole, config(tmp_path))
    with pytest.raises(DataError, match="made from other settings: choose another output"):
        prefer(tmp_path, oriole, config(tmp_path, temperature=0.5))
    with pytest.raises(DataError, match="made from other model"):
        prefer(tmp_path, Oriole(save_tiny(tmp_path / "other", seed=3)), config(tmp_path))
    chats(tmp_path / "chats.jsonl", 13)
    with pytest.raises(DataError, match="made from other files"):
        prefer(tmp_path, oriole, config(tmp_path))
    (tmp_path / "pairs.report.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="has schema None"):
        prefer(tmp_path, oriole, config(tmp_path))
    (tmp_path / "pairs.report.json").unlink()
    with pytest.raises(DataError, match="is there already, but was not made here"):
        prefer(tmp_path, oriole, config(tmp_path))


def test_chats_that_cannot_be_used_are_passed_over(oriole: Oriole, tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "sing"}, {"role": "assistant", "content": "two"}
    thought = {"role": "assistant", "content": "two", "reasoning_content": "one and one"}
    long = {"role": "user", "content": "sing " * 300}
    earlier = [{"role": "user", "content": "sing " * 200}, answer]
    records = [[user, answer], [user, thought], [user, answer, user], [long, answer], [*earlier, user, answer]]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": r}) + "\n" for r in records))
    made = prefer(tmp_path, oriole, config(tmp_path))
    assert made["chats"] == 3 and made["dropped"]["prompt too long"] == 2, "a conversation that was cut is another one"
    (tmp_path / "none.jsonl").write_text(json.dumps({"messages": [user, thought]}) + "\n")
    with pytest.raises(DataError, match="no chat ends with an answer in plain text"):
        prefer(
            tmp_path, oriole, config(tmp_path, input=[str(tmp_path / "none.jsonl")], output=tmp_path / "other.jsonl")
        )


def test_files_take_turns_and_a_limit_stops(oriole: Oriole, tmp_path: Path) -> None:
    for name in ("a", "b"):
        record = {"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": "two orioles"}]}
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(record) + "\n") * 20)
    rows = module._rows(tmp_path, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], config(tmp_path, limit=5))
    assert [row.prompt[0].content for row in rows] == ["a", "b", "a", "b", "a"]


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two small stages, with the last two checkpoints of each."""
    folder = tmp_path_factory.mktemp("run")
    data = toy_stage.write_data(folder / "data")
    for stage in ("pretrain", "sft"):
        run_stage(toy_stage.recipe(stage, data, folder / "run", tokens=2 * 2 * 32 * 6, lr=0.02))
    return folder / "run"


def test_a_checkpoint_answers_with_its_own_weights(trained: Path) -> None:
    kept = steps(trained / "sft" / "checkpoints")
    earliest = model_for(trained, PreferConfig())
    newest = model_for(trained, PreferConfig(checkpoint=f"step-{max(kept)}"))
    final = model_for(trained, PreferConfig(chosen="best"))
    own = load(trained / "sft" / "checkpoints" / f"step-{min(kept)}").tensors["model"]
    assert len(kept) == 2 and earliest.can_chat
    assert all(tensor.equal(own[name]) for name, tensor in earliest.model.state_dict().items())
    weights = [m.model.state_dict()["embedding.weight"] for m in (earliest, newest, final)]
    assert weights[1].equal(weights[2]) and not weights[0].equal(weights[2])
    with pytest.raises(ModelError, match="does not exist"):
        model_for(trained, PreferConfig(checkpoint="step-9999"))
    with pytest.raises(ModelError, match=r"no reward model at .*train one first"):
        judge_for(trained, PreferConfig(judge="reward"), final)


def test_a_damaged_checkpoint_and_one_of_an_unfinished_stage_cannot_answer(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    step = min(steps(run / "sft" / "checkpoints"))
    path = run / "sft" / "checkpoints" / f"step-{step}" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        model_for(run, PreferConfig())
    shutil.rmtree(run / "sft" / "model")
    with pytest.raises(ModelError, match="sft is not finished"):
        model_for(run, PreferConfig())


def test_the_verb_takes_the_files_of_sft(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "pairs.jsonl"
    words = [f"output={output}", "max_new_tokens=8", "limit=20"]
    verbs.prefer(trained, words, as_json=True)
    made = json.loads(capsys.readouterr().out)
    assert made["chats"] == 20 and made["pairs"] == len(lines(output)) > 0
    assert all(toy_stage.EN[5:20] in each["chosen"] + toy_stage.EN for each in lines(output))
    verbs.prefer(trained, words)
    assert f"{made['pairs']:,} pairs of 20 chats" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="did you mean 'samples'"):
        verbs.prefer(trained, ["sample=2"])


def test_a_reward_model_judges_the_verbs_pairs(trained: Path, tmp_path: Path) -> None:
    final = Oriole(trained)
    folder = tmp_path / "reward"
    save_model(LM(load_model(final.folder).config, heads=("reward",)), folder, chat=True)
    final.tokenizer.save(folder, chat=True)
    words = [f"output={tmp_path / 'best.jsonl'}", "max_new_tokens=8", "limit=6", "chosen=best", "samples=3",
             "judge=reward", f"reward_model={folder}"]  # fmt: skip
    verbs.prefer(trained, words)
    score = judge_for(trained, PreferConfig(judge="reward", reward_model=folder), final)
    assert score is not None and lines(tmp_path / "best.jsonl")
    for each in lines(tmp_path / "best.jsonl"):
        asked = [Message(m["role"], m["content"]) for m in each["prompt"]]
        given = score([(asked, each["chosen"]), (asked, each["rejected"])])
        assert given == pytest.approx(each["scores"], abs=1e-3) and given[0] > given[1]
