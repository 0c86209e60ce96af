"""Stage distill, whole: cached and live teachers, epochs, resume, adapters, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_stage import SHAPE, recipe, write_data

from oriole.errors import ConfigError, DataError, ModelError, ResourceError
from oriole.log import console
from oriole.model.folder import load_model
from oriole.text.tokenizer import Tokenizer, train_tokenizer
from oriole.train import distill, teacher
from oriole.train.batch import IGNORE, Batch
from oriole.train.stage import run_stage
from oriole.train.task import parent_of

LARGER = SHAPE | {"dim": 48, "num_heads": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a pretrained and a fine-tuned student, and a wider teacher of the same tokenizer; to be copied."""
    folder = tmp_path_factory.mktemp("base")
    data = write_data(folder / "data")
    for stage in ("pretrain", "sft"):
        run_stage(recipe(stage, data, folder / "run", tokens=256, checkpoint={"every": 50}))
    run_stage(
        recipe("pretrain", data, folder / "teacher", model={**LARGER}, checkpoint={"every": 50}, lr=2e-2,
               tokenizer={"path": str(folder / "run" / "tokenizer")})
    )  # fmt: skip
    return folder


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Any:
    """make(distill keys…, train={…}) -> the recipe of the stage in a copy of the run."""
    shutil.copytree(base / "run", tmp_path / "run")

    def made(stage: str = "distill", train: dict[str, Any] | None = None, **table: Any) -> Any:
        parts = {"chat": {"files": ["chat.jsonl"], "val": ["chat.jsonl"]},
                 "zh": {"files": ["zh.txt"], "val": ["zh.txt"], "format": "text"}}  # fmt: skip
        keys = {"teacher": base / "teacher" / "pretrain" / "model"} | table
        settings = {"parts": parts, "checkpoint": {"every": 5, "keep": 9}} | (train or {})
        out = recipe(stage, base / "data", tmp_path / "run", distill=keys, **settings)
        return out.model_copy(update={"parts": {k: v for k, v in out.parts.items() if k in settings["parts"]}})

    return made


def records(made: Any, event: str) -> list[dict[str, Any]]:
    lines = (made.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def built(made: Any) -> Any:
    init = parent_of(made)
    assert init is not None
    return distill.build(made, Tokenizer.load(init), init)


@pytest.mark.parametrize("table", [{}, {"top_k": 8}, {"divergence": "reverse", "temperature": 2.0}], ids=str)
def test_a_student_comes_nearer_to_its_teacher(make: Any, table: dict[str, Any]) -> None:
    made = make(train={"lr": 1e-2, "log_every": 1, "tokens": 40 * 4 * 32}, lm_weight=0.0, **table)
    done = run_stage(made)
    steps = records(made, "step")
    assert steps[-1]["kl"] < 0.6 * steps[0]["kl"]
    tau = table.get("temperature", 1.0)
    assert all(s["loss"] == pytest.approx(tau**2 * s["kl"], rel=1e-4) and s["lm_loss"] > 0 for s in steps)
    first, *others = records(made, "eval")
    assert first["teacher_bpb"].keys() == done["bpb"].keys() == {"chat", "zh"}
    assert not any("teacher_bpb" in record for record in others)
    assert load_model(made.folder / "model").config == load_model(made.run / "sft" / "model").config


def test_cached_answers_are_the_live_ones_at_every_trained_position(make: Any, base: Path) -> None:
    made = make(top_k=299)  # of 300: nothing is left out but the sum of one
    task = built(made)
    batch = Batch.joined([next(task.data) for _ in range(8)])
    model = load_model(base / "teacher" / "pretrain" / "model")
    with torch.inference_mode():
        exact = model.head("logits", model(batch.tokens, batch.doc, batch.pos).h).log_softmax(-1)
    trained = batch.targets != IGNORE
    assert trained.any(1).all() and not trained.all()
    top, log_probs = batch.extra[teacher.TOP][trained], batch.extra[teacher.LOG_PROBS][trained]
    torch.testing.assert_close(log_probs[:, :-1].float(), exact[trained].gather(-1, top), rtol=2e-3, atol=2e-3)
    assert (log_probs.float().exp().sum(-1) - 1).abs().max() < 1e-2
    live = built(make(top_k=0))
    student = live.lm.eval()
    with torch.inference_mode():
        one, other = task.objective(student, batch), live.objective(student, batch)
    assert float(one.sum) == pytest.approx(float(other.sum), rel=1e-3)
    assert float(one.metrics["lm_loss"]) == pytest.approx(float(other.metrics["lm_loss"]), rel=1e-6)


def test_the_teacher_is_asked_once_whatever_the_epochs(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(top_k=8)
    with console.capture() as said:
        task = built(made)
    text = " ".join(said.get().split())
    (folder,) = (made.run / "shards").glob("teacher-*")
    size = sum(file.stat().st_size for file in folder.glob("*.bin"))
    assert f"of which it keeps the 8 likeliest: {size / 1e6:.3g} MB" in text
    while task.data.state_dict()["stream"]["parts"]["zh"]["epoch"] < 2:  # packed differently each time
        assert next(task.data).extra[teacher.LOG_PROBS].any()

    monkeypatch.setattr(teacher, "_fill", lambda *given: pytest.fail("the teacher was asked again"))
    again = built(made)
    assert np.array_equal(next(again.data).extra[teacher.TOP], next(built(made).data).extra[teacher.TOP])
    monkeypatch.undo()
    for change in ({"top_k": 9}, {"top_k": 8, "temperature": 2.0}):
        built(make(**change))
    assert len(list((made.run / "shards").glob("teacher-*"))) == 3


@pytest.mark.parametrize("train", [{}, {"lora": {"rank": 2, "dropout": 0.1}, "optimizer": "muon"}], ids=str)
def test_a_resumed_stage_equals_the_unbroken_one(make: Any, train: dict[str, Any]) -> None:
    made = make(train=train, top_k=8)
    run_stage(made)
    unbroken = (made.folder / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(made.folder / "model")
    for step in (15, 20):
        shutil.rmtree(made.folder / "checkpoints" / f"step-{step}")
    run_stage(made)
    assert [record["step"] for record in records(made, "start")] == [0, 10]
    assert (made.folder / "model" / "model.safetensors").read_bytes() == unbroken


def test_what_cannot_be_is_named(make: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    shutil.copytree(base / "teacher" / "pretrain" / "model", other)
    train_tokenizer([("en", "another text, and so another tokenizer")], vocab_size=275).save(other, chat=False)
    with pytest.raises(ModelError, match=r"the teacher .*other has another tokenizer than the student"):
        built(make(teacher=other))
    with pytest.raises(ConfigError, match=r"train\.length=65 is beyond the model's context of 64"):
        built(make(train={"length": 65}))
    longer = {"rope_scaling": "yarn", "rope_factor": 2.0}
    with pytest.raises(ModelError, match=r"reads 64 tokens at most; lower train\.length \(65\)"):
        built(make(train={"length": 65, "model": longer}))
    with pytest.raises(ConfigError, match=r"distill\.top_k=300 is all of 300 tokens; use 0"):
        built(make(top_k=300))
    with pytest.raises(ConfigError, match=r"stage distill, and no other, has a table \[distill\]"):
        make("sft")
    with pytest.raises(ModelError, match="no model to start distill from at "):
        parent_of(make().model_copy(update={"run": tmp_path / "empty"}))
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 100))
    with pytest.raises(
        ResourceError, match=r"the teacher's answers take .* MB in .*, where 0\.0001 MB are free; lower"
    ):
        built(make(top_k=8))
    assert not list((tmp_path / "run" / "shards").glob("*teacher-*"))


def test_damaged_answers_are_named(make: Any) -> None:
    made = make(top_k=8)
    task = built(made)
    batch = next(task.data.data)
    batch.tokens[0, 0] += 1
    with pytest.raises(DataError, match="the teacher was not asked about a piece of the data"):
        task.data.answers.beside(batch)
    (folder,) = (made.run / "shards").glob("teacher-*")
    (folder / "top.bin").write_bytes(b"half")
    with pytest.raises(DataError, match=r"the teacher's answers in .* are damaged \(.*\); remove that folder"):
        built(made)
