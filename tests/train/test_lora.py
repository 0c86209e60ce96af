"""A stage with a [lora] table: only adapters train, are saved, resumed, merged and written beside the model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_stage import recipe, write_data

from oriole.apps.api import Oriole
from oriole.errors import CheckpointError, ConfigError
from oriole.log import console
from oriole.train.stage import run_stage
from oriole.train.task import model_for

RANK = 3
LORA = {"rank": RANK, "alpha": 6, "dropout": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a pretrained model, to be copied."""
    folder = tmp_path_factory.mktemp("base")
    run_stage(recipe("pretrain", write_data(folder / "data"), folder / "run"))
    return folder


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Any:
    """tuned(**train) -> the recipe of fine-tuning with adapters in a copy of the run."""
    shutil.copytree(base / "run", tmp_path / "run")

    def make(**train: Any) -> Any:
        tables = {"lora": LORA, "checkpoint": {"every": 5, "keep": 9}} | train
        return recipe("sft", base / "data", tmp_path / "run", **tables)

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_adapters_train_and_the_model_has_them_merged_in(base: Path, tuned: Any, optimizer: str) -> None:
    made = tuned(optimizer=optimizer)
    run_stage(made)
    before, after = weights(base / "run" / "pretrain"), weights(made.folder)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        change = tensor - before[name]
        if name.endswith("_proj.weight"):  # the product of two narrow matrices, and not nothing
            assert torch.linalg.matrix_rank(change, rtol=1e-3) == RANK, name
        else:
            assert not change.any(), name
    (last,) = [f for f in (made.folder / "checkpoints").iterdir() if f.name == "step-20"]
    state = load_file(last / "optimizer.safetensors")
    owners = {name.rpartition(".")[0] for name in state} - {"oriole"}
    assert owners and all(".adapters." in name for name in owners)
    assert len(owners) == 2 * 2 * 7  # A and B of seven matrices in two layers
    assert load_file(last / "model.safetensors").keys() == owners


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_stage_equals_the_unbroken_one(tuned: Any, optimizer: str) -> None:
    made = tuned(optimizer=optimizer)
    run_stage(made)
    unbroken = (made.folder / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(made.folder / "model")
    for step in (15, 20):
        shutil.rmtree(made.folder / "checkpoints" / f"step-{step}")
    run_stage(made)
    records = map(json.loads, (made.folder / "metrics.jsonl").read_text().splitlines())
    starts = [r for r in records if r["event"] == "start"]
    assert [r["step"] for r in starts] == [0, 10]
    assert (made.folder / "model" / "model.safetensors").read_bytes() == unbroken


def test_the_adapters_lie_beside_the_model_and_stand_for_it(tuned: Any, tmp_path: Path) -> None:
    made = tuned()
    run_stage(made)
    whole, adapted = Oriole(made.folder), Oriole(made.folder / "adapter")
    assert not (made.folder / "adapter" / "config.json").exists()
    assert adapted.can_chat and adapted.tokenizer.fingerprint() == whole.tokenizer.fingerprint()
    for name, tensor in adapted.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name
    begins = model_for(made, whole.tokenizer, made.folder / "adapter")  # and a stage can start from them
    assert torch.equal(begins.blocks[1].mlp.down.weight, whole.model.blocks[1].mlp.down.weight)


def test_a_checkpoint_belongs_to_the_weights_that_were_adapted(tuned: Any) -> None:
    made = tuned()
    run_stage(made)
    shutil.rmtree(made.folder / "model")
    file = made.run / "pretrain" / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"belongs to another run \(lora\.base was "):
        run_stage(made)


def test_the_saving_is_said(tuned: Any) -> None:
    made = tuned()
    with console.capture() as said:
        run_stage(made)
    text = " ".join(said.get().split())
    # 2 layers of q (32 + 32) k, v (32 + 16 each) o (32 + 32) gate, up, down (32 + 48 each), times the rank
    adapters = 2 * RANK * (64 + 2 * 48 + 64 + 3 * 80)
    whole = 12 * made.model.num_params() / 1e6
    assert f"lora: {adapters / 1e3:.3g}k of " in text
    assert f"take {12 * adapters / 1e6:.3g} MB instead of {whole:.3g} MB" in text


def test_what_cannot_be_is_named(tuned: Any, base: Path, tmp_path: Path) -> None:
    random = recipe("pretrain", base / "data", tmp_path / "other", lora=LORA)
    with pytest.raises(
        ConfigError, match=r"\[lora\] adapts a trained model, but this stage starts from random weights"
    ):
        run_stage(random)
    with pytest.raises(ConfigError, match=r"lora\.targets.*q_proj"):
        tuned(lora={"targets": ["qkv"]})
    with pytest.raises(ConfigError, match="name at least one of q_proj"):
        tuned(lora={"targets": []})
    run_stage(tuned())
    with pytest.raises(ConfigError, match=r"was finished with another recipe \(lora differ"):
        run_stage(tuned(lora={"rank": 2}))
