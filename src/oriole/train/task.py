"""What a stage is to the loop: an objective over an endless iterator of batches, and how to look at the result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oriole.errors import ConfigError, ModelError
from oriole.log import judged_worse
from oriole.model.adapter import is_adapter, load_adapted
from oriole.model.config import preset
from oriole.model.folder import load_model
from oriole.model.lm import LM
from oriole.model.seq2seq import Seq2Seq
from oriole.model.seq2seqconfig import Seq2SeqConfig
from oriole.text.tokenizer import Tokenizer
from oriole.train.gradients import Objective
from oriole.train.loop import Data
from oriole.train.recipe import Recipe

__all__ = ["PARENTS", "Task", "identity", "load_parent", "model_for", "parent_of", "supervised"]


@dataclass(frozen=True)
class Task:
    """One stage, ready to be trained."""

    lm: LM | Seq2Seq
    """The language model: its shape is what is reported."""
    model: nn.Module
    """What the optimizer updates: `lm`, or a module that holds it."""
    objective: Objective
    data: Data
    steps: int
    """Optimizer steps in all."""
    evaluate: Callable[[int], dict[str, Any]]
    """What is measured before, during and after training; its "bpb" are bits per byte by part."""
    save: Callable[[Path], None]
    """Writes the stage's model folder."""
    fingerprint: Mapping[str, Any]
    """What a checkpoint must share with this call if going on is to equal the unbroken run: `identity` and more."""
    validation: Mapping[str, str]
    """Fingerprints of the held-out parts."""
    have: str
    """The data in words, for the line that announces the stage."""
    flops: float = 0.0
    """Training FLOPs of a position; 0: as the language model's shape says."""


PARENTS = {
    "sft": ("pretrain",),
    "reward": ("sft",),
    "dpo": ("sft",),
    "ppo": ("dpo", "sft"),
    "grpo": ("ppo", "dpo", "sft"),
    "distill": ("sft",),
}
"""The stages that a stage may start from: the first that is there and came out no worse than its own parent."""


def parent_of(recipe: Recipe) -> Path | None:
    """The folder whose weights the stage starts from, None for random weights."""
    match recipe.stage, recipe.init:
        case (_, "random") | ("pretrain" | "seq2seq", ""):
            return None
        case (stage, ""):
            for name in PARENTS[stage]:
                folder = recipe.run / name
                if (folder / "model").exists() and not judged_worse(folder):
                    return folder / "model"
            raise ModelError(
                f"no model to start {stage} from at {recipe.run / PARENTS[stage][-1] / 'model'}; train it first, or "
                "name one: init=FOLDER, init=random"
            )
        case _:
            return Path(recipe.init)


def load_parent(folder: Path) -> LM:
    """The language model of a model folder, or of adapters with the model that they belong to."""
    return load_adapted(folder) if is_adapter(folder) else load_model(folder)


def model_for(recipe: Recipe, tokenizer: Tokenizer, init: Path | None) -> LM:
    """The parent's weights or new ones, with the recipe's dropouts."""
    torch.manual_seed(recipe.train.seed)
    if init is not None:
        model = load_parent(init)
        model.config = recipe.lengthened(model.config)
        model.angles.reset(model.config)
    else:
        shape = preset(recipe.model) if isinstance(recipe.model, str) else recipe.model
        assert not isinstance(shape, Seq2SeqConfig), "recipe.py refuses it in other stages"
        model = LM(shape.model_copy(update={"vocab_size": tokenizer.vocab_size}))
    if problem := recipe.too_long_for(model.config):
        raise ConfigError(problem)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ModelError(
            f"{init} has {model.config.vocab_size} embeddings but its tokenizer {tokenizer.vocab_size} ids; "
            "they belong to different models"
        )
    if model.reasoning is not None:
        # What never gets a gradient would hold up a group of processes.
        if recipe.stage not in ("pretrain", "sft"):  # other losses say nothing about being right
            model.reasoning.confidence_head.requires_grad_(False)
        for part in model.reasoning.looking_beside():  # at a context, which no stage gives
            part.requires_grad_(False)
    model.set_dropout(**recipe.train.dropouts)
    model.recompute = recipe.train.recompute
    return model


def supervised(recipe: Recipe, model: LM) -> LM:
    """The model, with what the recipe's table [deep] adds to it for training."""
    if recipe.deep is not None:
        model.supervise(recipe.deep, recipe.train.seed)
    return model


def identity(recipe: Recipe, lm: LM | Seq2Seq, tokenizer: Tokenizer, data: Mapping[str, str]) -> dict[str, Any]:
    """The fingerprint that every stage has; `data` are the fingerprints of the training parts."""
    table = recipe.train
    return {
        "stage": recipe.stage,
        "model": lm.config.model_dump(mode="json"),
        "tokenizer": tokenizer.fingerprint(),
        "data": dict(data),
        "parts": {name: {"weight": p.weight, "sources": p.sources} for name, p in recipe.parts.items()},
        "train": {
            "batch_size": table.batch_size,
            "length": table.length,
            "dropout": table.dropout,
            "head_dropout": table.head_dropout,
            "dropout_depth": table.dropout_depth,
        },
        **({} if recipe.deep is None else {"deep": recipe.deep.model_dump(mode="json")}),
    }
