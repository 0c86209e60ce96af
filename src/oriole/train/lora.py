"""Any stage with LoRA: the adapters are put on before training, written beside the model and merged into it after."""

import dataclasses
import shutil
from pathlib import Path

from oriole.errors import ConfigError
from oriole.log import human
from oriole.model import lora
from oriole.model.adapter import save_adapter
from oriole.model.config import LoraConfig
from oriole.model.lm import LM
from oriole.train.recipe import Recipe
from oriole.train.task import Task
from oriole.train.teacher import digest

__all__ = ["adapted", "save", "saving"]

STATE_BYTES = {"adamw": 12, "muon": 8, "normuon": 8, "adafactor": 4}
"""Bytes of gradient and moments for each trained number of a matrix, in fp32."""


def adapted(task: Task, recipe: Recipe, config: LoraConfig, init: Path | None) -> Task:
    """The task with adapters on its language model, in place; of that model they alone train, and its new heads.

    `ConfigError` where the stage starts from random weights: frozen, they would learn nothing.
    """
    if init is None:
        raise ConfigError("[lora] adapts a trained model, but this stage starts from random weights; give init=FOLDER")
    lm = _decoder(task)
    base = digest(lm)  # a checkpoint holds what trains, so that it belongs to these very weights
    lora.attach(lm, config, recipe.train.seed)
    return dataclasses.replace(
        task, fingerprint={**task.fingerprint, "lora": config.model_dump(mode="json") | {"base": base}}
    )


def saving(task: Task, recipe: Recipe) -> str:
    """How many numbers train, and what gradients and moments take because of it, in words."""
    trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    added = sum(p.numel() for adapter in lora.adapters(_decoder(task)).values() for p in adapter.parameters())
    without = sum(p.numel() for p in task.model.parameters()) - added
    each = STATE_BYTES[recipe.train.optimizer]
    return (
        f"lora: {human(trained)} of {human(without + added)} parameters train; gradients and optimizer take "
        f"{each * trained / 1e6:.3g} MB instead of {each * without / 1e6:.3g} MB"
    )


def save(task: Task, recipe: Recipe, init: Path | None) -> None:
    """Write the adapters to the stage's `adapter`, a PEFT folder that loads by itself, and merge them into the model,
    which is then saved as any other."""
    folder, model = recipe.folder / "adapter", recipe.folder / "model"
    save_adapter(_decoder(task), folder, str(init))
    lora.merge(_decoder(task))
    task.save(model)
    for file in model.iterdir():  # tokenizer, template, end marks
        if file.name != "config.json" and file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, folder / file.name)


def _decoder(task: Task) -> LM:
    assert isinstance(task.lm, LM), "a recipe of stage seq2seq has no table [lora]"
    return task.lm
