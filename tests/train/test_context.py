"""Documents, rows and windows that are longer than the model's context: cut, left out with a count, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_stage

from oriole.cli.plan import plan
from oriole.config import to_toml, validate
from oriole.errors import ConfigError, ModelError
from oriole.model.config import ModelConfig
from oriole.model.folder import save_model
from oriole.model.lm import LM
from oriole.model.seq2seq import Seq2Seq
from oriole.model.seq2seqconfig import SEQ2SEQ_PRESETS
from oriole.text.template import Message, render
from oriole.text.tokenizer import Tokenizer
from oriole.train import lmtask, seq2seq
from oriole.train.batch import Packer
from oriole.train.prepare import make_tokenizer
from oriole.train.recipe import Recipe
from oriole.train.stage import run_stage
from oriole.train.task import Task

CONTEXT = toy_stage.SHAPE["context"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy corpus with a document and two conversations of several contexts."""
    folder = toy_stage.write_data(tmp_path_factory.mktemp("data"))
    (folder / "zh.txt").write_text((toy_stage.ZH + toy_stage.EN) * 20, encoding="utf-8")
    short, *chats = (folder / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    long = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": toy_stage.EN * 9}]}
    (folder / "chat.jsonl").write_text("\n".join([short, json.dumps(long), json.dumps(long), *chats]))
    return folder


@pytest.fixture(scope="module")
def parent(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model of the toy's shape, as a stage's parent."""
    folder = tmp_path_factory.mktemp("parent")
    tokenizer = make_tokenizer(toy_stage.recipe("pretrain", data, folder), None)
    tokenizer.save(folder, chat=False)
    torch.manual_seed(0)
    save_model(
        LM(ModelConfig.model_validate(toy_stage.SHAPE | {"vocab_size": tokenizer.vocab_size})), folder, chat=False
    )
    return folder


def losses(task: Task, batches: int) -> list[float]:
    """Of the first batches, per trained token."""
    with torch.no_grad():
        some = [next(task.data) for _ in range(batches)]
        return [float(task.objective(task.model, b).sum / task.objective.weight(b)) for b in some]


def test_a_long_document_is_cut_into_pieces_that_the_model_can_read(data: Path, tmp_path: Path) -> None:
    recipe = toy_stage.recipe("pretrain", data, tmp_path, length=CONTEXT)
    task = lmtask.build(recipe, make_tokenizer(recipe, None), None)
    assert all(0 < loss < 10 for loss in losses(task, 8))
    assert isinstance(task.data, Packer)
    batch = next(task.data)
    assert int(batch.pos.max()) == CONTEXT - 1
    assert all(0 < bpb < 20 for bpb in task.evaluate(0)["bpb"].values())


def test_rows_longer_than_the_context_are_refused_before_anything_is_made(data: Path, parent: Path) -> None:
    message = rf"train\.length=128 is beyond the model's context of {CONTEXT} tokens; lower it to that, or make"
    for more in ({"stage": "pretrain"}, {"stage": "sft", "model": "demo"}):
        recipe = toy_stage.recipe(str(more["stage"]), data, parent, length=CONTEXT)
        table = json.loads(recipe.model_dump_json()) | {"init": "random"}
        validate(Recipe, table, "toy")
        table["train"]["length"] = 128
        with pytest.raises(ConfigError, match=message):
            validate(Recipe, table, "toy")
    # What a parent can read is only known once it is looked at.
    later = toy_stage.recipe("sft", data, parent.parent / "later", length=128).model_copy(update={"init": str(parent)})
    with pytest.raises(ConfigError, match=message):
        run_stage(later)
    assert not (later.run / "shards").exists()


def test_a_parents_context_can_be_made_longer_to_that(data: Path, parent: Path, tmp_path: Path) -> None:
    shape = toy_stage.SHAPE | {"rope_scaling": "yarn", "rope_factor": 2.0}
    recipe = toy_stage.recipe("sft", data, tmp_path, length=128, model=shape)
    task = lmtask.build(recipe.model_copy(update={"init": str(parent)}), Tokenizer.load(parent), parent)
    assert all(0 < loss < 10 for loss in losses(task, 4))


def test_a_plan_refuses_what_training_refuses(data: Path, parent: Path, tmp_path: Path) -> None:
    recipe = toy_stage.recipe("sft", data, tmp_path, length=128).model_copy(update={"init": str(parent)})
    (tmp_path / "long.toml").write_text(to_toml(recipe), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"long\.toml: train\.length=128 is beyond the model's context of {CONTEXT}"):
        plan(str(tmp_path / "long.toml"), ["device=4090"])


def test_conversations_that_are_cut_are_counted(
    data: Path, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.load(parent)
    recipe = toy_stage.recipe("sft", data, tmp_path, length=CONTEXT, tokens=None, epochs=1.0)
    task = lmtask.build(recipe.model_copy(update={"init": str(parent)}), tokenizer, parent)
    chats = [json.loads(line)["messages"] for line in (data / "chat.jsonl").read_text(encoding="utf-8").splitlines()]
    lengths = [len(render([Message(m["role"], m["content"]) for m in chat], tokenizer)[0]) for chat in chats]
    cut = sum(length - 1 > CONTEXT for length in lengths)
    assert 2 <= cut < 82
    said = f"{cut} of 82 conversations are longer than train.length=64; they are cut into pieces"
    assert said in capsys.readouterr().err
    assert all(0 < loss < 10 for loss in losses(task, 8))
    replay = toy_stage.recipe("pretrain", data, tmp_path / "text", length=CONTEXT)
    lmtask.build(replay, Tokenizer.load(parent), None)
    assert "cut into pieces" not in capsys.readouterr().err


def test_windows_of_validation_text_end_at_the_context(data: Path, parent: Path, tmp_path: Path) -> None:
    figures = []
    for length in (CONTEXT, 200):
        recipe = toy_stage.recipe("pretrain", data, tmp_path, length=CONTEXT, eval={"length": length, "prompts": []})
        figures.append(lmtask.build(recipe, Tokenizer.load(parent), None).evaluate(0)["bpb"])
    assert figures[0] == figures[1]
    # Rows of pairs may be longer than the context; what is measured beside them may not.
    table = json.loads(recipe.model_dump_json()) | {"stage": "dpo", "init": str(parent)}
    table["parts"]["pairs"] = {"files": ["pairs.jsonl"]}
    table["train"]["length"] = 500
    pairs = validate(Recipe, table, "toy")
    assert pairs.window(ModelConfig.model_validate(toy_stage.SHAPE)) == CONTEXT


@pytest.mark.parametrize("source_length", [0, 48])
def test_pairs_that_an_encoder_decoder_cannot_read_are_counted_on_both_sides(
    data: Path, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source_length: int
) -> None:
    shape = {"vocab_size": 300, "dim": 16, "encoder_layers": 1, "decoder_layers": 1, "num_heads": 2, "ffn_dim": 16}
    table: dict[str, Any] = {
        "stage": "seq2seq", "run": tmp_path, "data": str(data), "model": shape | {"context": CONTEXT},
        "parts": {"chat": {"files": ["chat.jsonl"], "val": ["chat.jsonl"]}}, "tokenizer": {"path": str(parent)},
        "train": {"tokens": 4000, "batch_size": 2, "length": 200, "compile": False, "device": "cpu", "dtype": "fp32"},
        "seq2seq": {"source_length": source_length} if source_length else {}, "eval": {"prompts": []},
    }  # fmt: skip
    task = seq2seq.build(validate(Recipe, table, "toy"), Tokenizer.load(parent), None)
    said = capsys.readouterr().err
    assert f"pairs are left out: a source is longer than {source_length or CONTEXT} tokens, or a target than 64" in said
    assert "2 of 82 held-out pairs of chat are not measured" in said
    assert all(0 < loss < 10 for loss in losses(task, 4))
    assert 0 < task.evaluate(0)["bpb"]["chat"] < 20


def test_a_position_that_no_table_has_is_named() -> None:
    lm = LM(ModelConfig.model_validate(toy_stage.SHAPE))
    x, doc = torch.ones(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.int32)
    pos, message = torch.tensor([[62, 63, 64]]), "position 64 is beyond the model's context of 64"
    with pytest.raises(ModelError, match=message):
        lm(x, doc, pos)
    assert lm(x, doc, pos - 1).h.isfinite().all()
    small = {"dim": 16, "num_heads": 2, "ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1, "context": 64}
    for preset in ("demo", "classic"):
        model = Seq2Seq(SEQ2SEQ_PRESETS[preset].model_copy(update=small))
        with pytest.raises(ModelError, match=message):
            model(x, doc, pos - 1, source=x, source_doc=doc, source_pos=pos)
        assert model(x, doc, pos - 1, source=x, source_doc=doc, source_pos=pos - 1).h.isfinite().all()
