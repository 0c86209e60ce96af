"""A stage with a [deep] table: the losses by hand, resume, adapters, how often a guess is accepted, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy_stage
from safetensors.torch import load_file
from toy_stage import write_data
from toy_training import SHAPE, Counting, model, trainer

from oriole.apps.api import Oriole
from oriole.apps.prefer import PreferConfig
from oriole.cli.prefer import model_for
from oriole.errors import ConfigError
from oriole.model.config import LoraConfig, preset
from oriole.model.costs import flops_per_token
from oriole.model.deepconfig import DeepConfig
from oriole.model.lm import LM
from oriole.text.shards import Shards
from oriole.train.accelerators import parse_cluster
from oriole.train.batch import IGNORE, Batch, Packer
from oriole.train.costs import Load, device_memory, step_cost
from oriole.train.objectives import LMObjective, further
from oriole.train.recipe import Recipe
from oriole.train.stage import run_stage
from oriole.train.validate import acceptance
from oriole.train.workload import trained_share

TABLE = DeepConfig(depths=(1,), tokens_ahead=3, weight=0.5, ahead_weight=0.2)


def supervised(dropout: float = 0.0) -> LM:
    made = model(dropout)
    made.supervise(TABLE, seed=3)
    return made


def batch() -> Batch:
    return next(Packer(Counting(), 4, 32))


# --- the loss --------------------------------------------------------------------------------------------------------


def documents(whole: Batch) -> list[tuple[int, list[int], list[int], list[int]]]:
    """(row, columns, tokens with the one after the last, targets) of every document, told apart by hand."""
    out = []
    for row in range(len(whole.tokens)):
        for number in range(int(whole.doc[row].max()) + 1):
            at = (whole.doc[row] == number).nonzero().squeeze(-1).tolist()
            out.append((row, at, whole.tokens[row, at].tolist(), whole.targets[row, at].tolist()))
    return out


def test_the_loss_is_the_papers_with_targets_inside_the_document() -> None:
    lm, given = supervised().double(), batch()
    loss, metrics = LMObjective()(lm, given)
    out = lm(given.tokens, given.doc, given.pos)
    sums = dict.fromkeys(("lm", "depth_1", "ahead_2", "ahead_3"), torch.zeros((), dtype=torch.float64))
    states = dict(zip(sums, (out.h, *out.mid), strict=True))
    counts = dict.fromkeys(sums, 0)
    for row, at, _, targets in documents(given):
        for i in range(len(at)):
            for name, k in (("lm", 0), ("depth_1", 0), ("ahead_2", 1), ("ahead_3", 2)):
                if i + k < len(at) and targets[i + k] != IGNORE:
                    log_probs = F.linear(states[name][row, at[i]], lm.embedding.weight).log_softmax(-1)
                    sums[name] = sums[name] - log_probs[targets[i + k]]
                    counts[name] += 1
    assert counts["lm"] == len(given.rows) > counts["ahead_2"] > counts["ahead_3"] > 0
    wanted = sums["lm"] + 0.5 * sums["depth_1"] + 0.1 * sums["ahead_2"] + 0.1 * sums["ahead_3"]
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    assert {n: float(m) for n, m in metrics.items()} == pytest.approx(
        {f"{name}_loss": float(one.detach()) for name, one in sums.items()}, rel=1e-6
    )
    loss.backward()
    got = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    wanted.backward()
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("k", [1, 2, 31])
def test_rows_hold_every_further_target_once(k: int) -> None:
    given = batch()
    targets, rows = further(given, k)
    assert rows.unique().numel() == rows.numel() == given.rows.numel()
    assert set((targets.flatten() != IGNORE).nonzero().squeeze(-1).tolist()) <= set(rows.tolist())
    assert k == 31 or bool((targets != IGNORE).any())


def test_without_the_table_loss_and_metrics_are_the_plain_ones() -> None:
    lm, given = model(), batch()
    plain = LMObjective()(lm, given)
    assert plain.metrics == {}
    lm.supervise(TABLE, seed=3)
    assert torch.equal(LMObjective()(lm, given).metrics["lm_loss"], plain.sum.detach())


def test_both_kinds_of_loss_fall(tmp_path: Path) -> None:
    made = trainer(tmp_path, lm=supervised(0.0), steps=40, lr=2e-2, log_every=1)
    made.fit()
    records = cast(Any, made.metrics).of("step")
    for name in ("lm_loss", "depth_1_loss", "ahead_2_loss", "ahead_3_loss"):
        assert records[-1][name] < 0.7 * records[0][name], name
    last = records[-1]
    parts = last["lm_loss"] + 0.5 * last["depth_1_loss"] + 0.1 * (last["ahead_2_loss"] + last["ahead_3_loss"])
    assert last["loss"] == pytest.approx(parts, rel=1e-5)


# --- a stage ---------------------------------------------------------------------------------------------------------

DEEP = {"depths": [1], "tokens_ahead": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def recipe(stage: str, data: Path, run: Path, **train: Any) -> Recipe:
    return toy_stage.recipe(stage, data, run, **{"checkpoint": {"every": 5, "keep": 9}, "deep": DEEP} | train)


def records(made: Recipe, event: str) -> list[dict[str, Any]]:
    lines = (made.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def weights(made: Recipe) -> bytes:
    return (made.folder / "model" / "model.safetensors").read_bytes()


def broken_off_and_resumed(made: Recipe) -> bytes:
    """The weights that the stage ends with when it goes on from its tenth step."""
    shutil.rmtree(made.folder / "model")
    for step in (15, 20):
        shutil.rmtree(made.folder / "checkpoints" / f"step-{step}")
    run_stage(made)
    assert [record["step"] for record in records(made, "start")] == [0, 10]
    return weights(made)


def test_a_stage_is_resumed_to_the_bit_and_saved_without_what_was_added(data: Path, tmp_path: Path) -> None:
    made = recipe("pretrain", data, tmp_path / "run", optimizer="muon", recompute=True)
    run_stage(made)
    unbroken = weights(made)
    saved = load_file(made.folder / "checkpoints" / "step-20" / "model.safetensors")
    added = {name for name in saved if name.startswith("deep.")}
    assert added and {name.split(".")[1] for name in added} == {"norms", "ahead"}
    assert not any("deep" in name for name in load_file(made.folder / "model" / "model.safetensors"))
    moments = load_file(made.folder / "checkpoints" / "step-20" / "optimizer.safetensors")
    assert {name.rpartition(".")[0] for name in moments} >= added
    (start,) = records(made, "start")
    assert start["flops_per_token"] == flops_per_token(Oriole(made.folder).model.config, 32, made.deep)
    for record in records(made, "eval"):
        assert record["acceptance"].keys() == record["bpb"].keys()
        assert all(0 <= share["2"] <= 1 for share in record["acceptance"].values())
    assert records(made, "eval")[-1]["acceptance"]["zh"]["2"] > records(made, "eval")[0]["acceptance"]["zh"]["2"]
    assert broken_off_and_resumed(made) == unbroken
    tuned = recipe("sft", data, tmp_path / "run", lora={"rank": 2}, deep={"tokens_ahead": 2})
    run_stage(tuned)  # what was added does not come from the parent, and trains beside adapters
    assert broken_off_and_resumed(tuned) == weights(tuned)
    kept = load_file(tuned.folder / "checkpoints" / "step-20" / "model.safetensors")
    assert all(name.startswith("deep.ahead.") or ".adapters." in name for name in kept)

    # A checkpoint of a stage with further losses can answer, as its model can.
    early = PreferConfig(checkpoint=str(made.folder / "checkpoints" / "step-20"))
    assert model_for(made.run, early).model.deep is None

    other = made.model_copy(update={"deep": DeepConfig(depths=(1,))})
    with pytest.raises(ConfigError, match=r"another recipe \(deep differ"):
        run_stage(other)


def test_distillation_takes_it_too(data: Path, tmp_path: Path) -> None:
    run_stage(recipe("pretrain", data, tmp_path / "run", tokens=128, eval={"every": 50}, checkpoint={"every": 50}))
    parent = str(tmp_path / "run" / "pretrain" / "model")
    short: dict[str, Any] = {"tokens": 256, "log_every": 1, "eval": {"every": 50}, "checkpoint": {"every": 50}}
    made = recipe("distill", data, tmp_path / "run", distill={"teacher": parent}, **short)
    parts = {name: part.model_copy(update={"format": "text"}) for name, part in made.parts.items()}
    made = made.model_copy(update={"init": parent, "parts": parts})
    run_stage(made)
    step = records(made, "step")[0]
    more = 0.3 * step["depth_1_loss"] + 0.3 * step["ahead_2_loss"]
    assert step["loss"] == pytest.approx(0.5 * step["kl"] + 0.5 * step["lm_loss"] + more, rel=1e-4)


@pytest.mark.parametrize("stage", ["reward", "dpo", "ppo", "grpo"])
def test_stages_about_whole_answers_refuse_it(data: Path, tmp_path: Path, stage: str) -> None:
    with pytest.raises(ConfigError, match=rf'stage = "{stage}" has no \[deep\]: .*use it in pretrain, sft or distill'):
        recipe(stage, data, tmp_path, epochs=1, tokens=None, dropout=0.0)


def test_a_depth_that_the_model_does_not_have_stops_the_stage(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deep\.depths has 2, but of the model's 2 blocks"):
        run_stage(recipe("pretrain", data, tmp_path / "run", deep={"depths": [2]}))


# --- acceptance ------------------------------------------------------------------------------------------------------


class Documents:
    """Stands in for shards: documents with loss masks."""

    byte_lengths = np.ones(64)

    def __init__(self, count: int) -> None:
        stream = Counting(5)
        self.docs = [next(stream) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.docs)

    def doc(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.docs[i]


def test_a_guess_is_accepted_where_it_is_the_models_own() -> None:
    lm, docs = supervised(), Documents(12)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    found = acceptance(lm, cast(Shards, docs), length=64, max_tokens=10_000, batch=5)
    hits, counts = np.zeros(2), np.zeros(2)
    with torch.inference_mode():
        for ids, mask in docs.docs:
            out = lm.eval()(torch.from_numpy(ids)[None])
            own = lm.head("logits", out.h)[0].argmax(-1)
            for k, state in enumerate(out.mid[1:], start=1):
                guess = lm.head("logits", state)[0].argmax(-1)
                for i in range(len(ids) - 1 - k):  # the guess at token i + 1 + k, which is in the document
                    if mask[i + 1 + k]:
                        hits[k - 1] += bool(guess[i] == own[i + k])
                        counts[k - 1] += 1
    assert found == pytest.approx({"2": hits[0] / counts[0], "3": hits[1] / counts[1]}, abs=1e-4)
    assert 0 < hits[0] < counts[0]


def test_a_module_that_knows_the_model_is_always_accepted() -> None:
    """Documents in which every token says the next, and heads that have learnt so."""
    made = trainer(Path("unused"), lm=supervised(), lr=2e-2, steps=1)
    for _ in range(60):
        loss = LMObjective()(made.model, next(made.data))
        (loss.sum / 100).backward()
        made.optimizer.step(0, loss.sum.detach())
    found = acceptance(cast(LM, made.model), cast(Shards, Documents(20)), length=64, max_tokens=10_000)
    assert min(found.values()) > 0.95


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_counts_what_is_added(data: Path, tmp_path: Path) -> None:
    shape, where = preset("110m"), parse_cluster("H100")
    plain = Load(shape, 16, 1024, 1, "muon")
    more = plain._replace(deep=DeepConfig(depths=(4, 8), tokens_ahead=2))
    ratio = more.flops_per_token / plain.flops_per_token
    assert 1.3 < ratio < 1.6
    assert step_cost(more, where, "one").compute == pytest.approx(ratio * step_cost(plain, where, "one").compute)
    before, after = device_memory(plain, where, "one"), device_memory(more, where, "one")
    assert all(after[part] > before[part] for part in ("weights", "optimizer", "activations", "logits"))
    tuned = recipe("sft", data, tmp_path, lora={"rank": 2})
    assert trained_share(recipe("sft", data, tmp_path), SHAPE) == 1.0
    assert tuned.deep is not None
    trained = LoraConfig(rank=2).num_params(SHAPE) + tuned.deep.num_params(SHAPE)
    assert trained_share(tuned, SHAPE) == trained / (SHAPE.num_params() + tuned.deep.num_params(SHAPE))
