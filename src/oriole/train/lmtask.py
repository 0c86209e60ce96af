"""Pretraining and SFT: next-token cross-entropy over packed documents or chats."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oriole.log import human, say
from oriole.model.folder import save_model
from oriole.model.lm import LM
from oriole.text.mixture import Mixture
from oriole.text.shards import Shards, View
from oriole.text.tokenizer import Tokenizer
from oriole.train import dist
from oriole.train.batch import Packer
from oriole.train.objectives import LMObjective
from oriole.train.prepare import make_shards, weighted
from oriole.train.recipe import Recipe
from oriole.train.task import Task, identity, model_for, supervised
from oriole.train.validate import acceptance, bits_per_byte, continuations

__all__ = ["build", "measure", "say_what_is_cut", "steps"]


def build(recipe: Recipe, tokenizer: Tokenizer, init: Path | None) -> Task:
    """The stage, with its shards made where they are missing."""
    model = supervised(recipe, model_for(recipe, tokenizer, init))
    train, val = make_shards(recipe, tokenizer)
    say_what_is_cut(recipe, train)
    chat = recipe.stage == "sft"
    stream = Mixture(*weighted(recipe, train), seed=recipe.train.seed, length=recipe.train.length)

    def save(folder: Path) -> None:
        save_model(model, folder, chat=chat)
        tokenizer.save(folder, chat=chat)

    return Task(
        lm=model,
        model=model,
        objective=LMObjective(),
        data=Packer(stream, recipe.train.batch_size, recipe.train.length),
        steps=steps(recipe, train),
        evaluate=lambda step: measure(recipe, model, tokenizer, val, chat=chat),
        save=save,
        fingerprint=identity(recipe, model, tokenizer, {name: s.fingerprint for name, s in train.items()}),
        validation={name: s.fingerprint for name, s in val.items()},
        have=", ".join(f"{name} {human(s.num_tokens)}" for name, s in train.items()),
    )


def steps(recipe: Recipe, train: Mapping[str, Shards | View]) -> int:
    """Optimizer steps for the recipe's tokens or epochs."""
    table = recipe.train
    tokens = table.tokens or (table.epochs or 0) * sum(s.num_tokens for s in train.values())
    return max(1, math.ceil(tokens / (table.batch_size * table.length * table.accumulate)))


def say_what_is_cut(recipe: Recipe, train: Mapping[str, Shards | View]) -> None:
    """Of running text every piece is as good as another; of a conversation all pieces but the first lack its beginning,
    often the question, so that whoever has such conversations is told how many."""
    lengths = [s.lengths for name, s in train.items() if recipe.format_of(recipe.parts[name]) == "chat"]
    cut = sum(int((each > recipe.train.length + 1).sum()) for each in lengths)
    if cut:
        say(
            f"{cut:,} of {sum(map(len, lengths)):,} conversations are longer than train.length={recipe.train.length}; "
            "they are cut into pieces that do not see one another",
            "yellow",
        )


def measure(
    recipe: Recipe, model: LM, tokenizer: Tokenizer, val: Mapping[str, Shards | View], *, chat: bool
) -> dict[str, Any]:
    """Bits per byte of every part and the fixed prompts' continuations; where further tokens are predicted, how often
    each of them would be accepted as a draft (`acceptance`)."""
    length, tokens = recipe.window(model.config), recipe.eval.tokens
    bpb = {name: round(bits_per_byte(model, s, length=length, max_tokens=tokens), 4) for name, s in val.items()}
    more: dict[str, Any] = {}
    if model.deep is not None and len(model.deep.ahead):
        more["acceptance"] = {n: acceptance(model, s, length=length, max_tokens=tokens) for n, s in val.items()}
    # The first process's are those that are kept.
    prompts = recipe.eval.prompts if dist.rank() == 0 else ()
    return {"bpb": bpb, **more, "samples": continuations(model, tokenizer, prompts, chat=chat)}
