"""Stage distill: a model learns from a larger one of the same tokenizer, and from the data (Hinton et al. 2015)."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oriole.errors import ConfigError, ModelError
from oriole.log import human, say
from oriole.model.folder import load_model, save_model
from oriole.model.lm import LM
from oriole.text.mixture import Mixture
from oriole.text.shards import Shards, View
from oriole.text.tokenizer import Tokenizer
from oriole.train.batch import IGNORE, Batch, Packer
from oriole.train.device import choose_device, choose_dtype
from oriole.train.divergence import PLAIN, Cached, Chunks, Live, Mixed, distillation
from oriole.train.lmtask import measure, say_what_is_cut, steps
from oriole.train.loop import Data
from oriole.train.objectives import ChunkFunction, Loss, cross_entropy_chunk, head_weight, of_units, supervision
from oriole.train.prepare import make_shards, weighted
from oriole.train.recipe import Recipe
from oriole.train.tables import DistillTable
from oriole.train.task import Task, identity, model_for, supervised
from oriole.train.teacher import LOG_PROBS, SCHEMA, TOP, Answers, Asking, Taught, ask, digest
from oriole.train.validate import bits_per_byte

__all__ = ["DistillObjective", "build"]


class DistillObjective:
    """(1 - m) tau^2 KL + m CE over the trained tokens, with a teacher that is asked now or was asked before.

    Metrics: `kl`, at the temperature, and `lm_loss`, both in nats a token. Call it with a compiled model, but do not
    compile the call itself; `compile()` compiles what is worth it in here.
    """

    def __init__(self, mixed: Mixed, teacher: LM | None = None) -> None:
        """Without a teacher the batches bring its answers (teacher.Taught)."""
        self.mixed, self.teacher = mixed, teacher
        self._ask: Any = teacher
        self._chunks = PLAIN
        self._one: ChunkFunction = cross_entropy_chunk

    def compile(self) -> None:
        """Compile the teacher, and the loss with its gradient."""
        if self.teacher is not None:
            self._ask = torch.compile(self.teacher, dynamic=False)
        self._chunks = Chunks(torch.compile(PLAIN.live), torch.compile(PLAIN.cached))
        self._one = torch.compile(cross_entropy_chunk)

    def weight(self, batch: Batch) -> Tensor:
        """Trained tokens of the batch, 0-dim int64."""
        return (batch.targets != IGNORE).sum()

    def __call__(self, model: LM, batch: Batch) -> Loss:
        teacher = self._teacher(batch)
        out = model(batch.tokens, batch.doc, batch.pos)
        given = out.h.flatten(0, 1), head_weight(model), batch.targets.flatten(), batch.rows
        loss, kl, lm = distillation(*given, teacher, self.mixed, self._chunks)
        units = len(batch.rows)
        metrics = {"kl": kl, "lm_loss": lm} | of_units(out.metrics, units)
        if model.deep is not None:  # by the data's own tokens: a teacher's word is about the last layer
            more, parts = supervision(model.deep, out.mid, head_weight(model), batch, self._one)
            loss, metrics = loss + more, metrics | parts
        return Loss(loss + out.aux * units, metrics)

    @torch.no_grad()
    def _teacher(self, batch: Batch) -> Live | Cached:
        if self.teacher is None:
            return Cached(batch.extra[TOP].flatten(0, 1), batch.extra[LOG_PROBS].flatten(0, 1))
        self.teacher.to(batch.tokens.device)
        h = self._ask(batch.tokens, batch.doc, batch.pos).h.flatten(0, 1)
        head = self.teacher.lm_head
        return Live(h, self.teacher.embedding.weight if head is None else head.weight)


def build(recipe: Recipe, tokenizer: Tokenizer, init: Path | None) -> Task:
    """The stage: the student's parent is the recipe's, its data are texts or chats as in pretraining and SFT."""
    table = recipe.distill
    assert table is not None, "a recipe of this stage has the table"
    model = supervised(recipe, model_for(recipe, tokenizer, init))
    teacher = _teacher(recipe, table, model, tokenizer)
    train, val = make_shards(recipe, tokenizer)
    say_what_is_cut(recipe, train)
    parts, shares = weighted(recipe, train)
    chat = any(recipe.format_of(part) == "chat" for part in recipe.parts.values())
    stream = Mixture(parts, shares, seed=recipe.train.seed, length=recipe.train.length)
    data: Data = Packer(stream, recipe.train.batch_size, recipe.train.length)
    who = digest(teacher)
    if table.top_k:
        data = Taught(data, _answers(recipe, table, teacher, parts, who))
    mixed = Mixed(table.divergence == "reverse", table.temperature, table.lm_weight)

    def evaluate(step: int) -> dict[str, Any]:
        result = measure(recipe, model, tokenizer, val, chat=chat)
        if step == 0:  # what the student may hope for
            result["teacher_bpb"] = _bpb(recipe, table, next(model.parameters()).device, val)
        return result

    def save(folder: Path) -> None:
        save_model(model, folder, chat=chat)
        tokenizer.save(folder, chat=chat)

    known = identity(recipe, model, tokenizer, {name: s.fingerprint for name, s in train.items()})
    return Task(
        lm=model,
        model=model,
        objective=DistillObjective(mixed, None if table.top_k else teacher),
        data=data,
        steps=steps(recipe, train),
        evaluate=evaluate,
        save=save,
        fingerprint={**known, "distill": table.model_dump(mode="json", exclude={"teacher"}) | {"teacher": who}},
        validation={name: s.fingerprint for name, s in val.items()},
        have=", ".join(f"{name} {human(s.num_tokens)}" for name, s in train.items()),
    )


def _teacher(recipe: Recipe, table: DistillTable, student: LM, tokenizer: Tokenizer) -> LM:
    """The teacher, frozen; `ModelError` where it cannot teach this student."""
    where = f"the teacher {table.teacher}"
    if Tokenizer.load(table.teacher).fingerprint() != tokenizer.fingerprint():
        raise ModelError(
            f"{where} has another tokenizer than the student, so their tokens mean different things; distill from a "
            "model of the same tokenizer, or train the student with the teacher's: tokenizer.path=TEACHER"
        )
    teacher = load_model(table.teacher).requires_grad_(False)
    theirs, own = teacher.config.vocab_size, student.config.vocab_size
    if theirs != own:
        raise ModelError(f"{where} gives {theirs:,} logits, the student {own:,}; give both the same vocab_size")
    if teacher.config.context < recipe.train.length:
        raise ModelError(
            f"{where} reads {teacher.config.context} tokens at most; lower train.length ({recipe.train.length}) to that"
        )
    if table.top_k >= theirs:
        raise ConfigError(f"distill.top_k={table.top_k} is all of {theirs:,} tokens; use 0 to ask the teacher live")
    return teacher


def _answers(recipe: Recipe, table: DistillTable, teacher: LM, parts: Mapping[str, View | Shards], who: str) -> Answers:
    """The teacher's cached answers, beside the shards and named after all that they depend on."""
    device = choose_device(recipe.train.device)
    dtype, _ = choose_dtype(device, recipe.train.dtype)
    how = Asking(table.top_k, table.temperature, recipe.train.length, recipe.train.batch_size, device, dtype)
    data = {name: part.fingerprint for name, part in parts.items()}
    made_from = [SCHEMA, who, data, how.k, how.temperature, how.length, str(dtype)]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    return ask(teacher, parts, recipe.run / "shards" / f"teacher-{key}", how)


def _bpb(
    recipe: Recipe, table: DistillTable, device: torch.device, val: Mapping[str, Shards | View]
) -> dict[str, float]:
    """The teacher's bits per byte by part; it is loaded for this, for a cached teacher is gone by now."""
    teacher = load_model(table.teacher, device)
    length = recipe.window(teacher.config)
    bpb = {n: round(bits_per_byte(teacher, s, length=length, max_tokens=recipe.eval.tokens), 4) for n, s in val.items()}
    say("the teacher's bits per byte: " + ", ".join(f"{name} {value:.3f}" for name, value in bpb.items()))
    return bpb
