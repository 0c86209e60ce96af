"""The stage of the encoder-decoder: cross-entropy of targets beside their sources, packed; answers and mended text."""

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from oriole.errors import ModelError
from oriole.infer.engine import Engine
from oriole.infer.sample import Sampling
from oriole.log import human, say
from oriole.model.costs import seq2seq_flops_per_token
from oriole.model.seq2seq import Seq2Seq
from oriole.model.seq2seqconfig import Seq2SeqConfig
from oriole.model.seq2seqfolder import load_seq2seq, save_seq2seq
from oriole.text.mixture import Mixture
from oriole.text.shards import Shards, View
from oriole.text.template import Message, render
from oriole.text.tokenizer import END_OF_TEXT, IM_END, Tokenizer
from oriole.train import dist
from oriole.train.batch import IGNORE, Batch
from oriole.train.objectives import Loss, cross_entropy, cross_entropy_chunk, smoothed_chunk, token_log_probs
from oriole.train.prepare import make_shards, weighted
from oriole.train.recipe import Recipe
from oriole.train.seq2seqdata import Pair, PairStream, Seq2SeqPacker, answers, corrupted, documents, filled
from oriole.train.task import Task, identity

__all__ = ["Seq2SeqObjective", "build", "target_bits_per_byte"]

SAMPLE = 2_000
"""Pairs that are looked at to find how long sources and targets are."""
STEP = 8
"""Lengths of rows are multiples of it."""


class Seq2SeqObjective:
    """Next-token cross-entropy over the targets of a batch, which has the sources in `extra`."""

    def __init__(self, smoothing: float = 0.0) -> None:
        """`smoothing`: the share of each target's probability that all tokens get alike."""
        self._chunk = smoothed_chunk(smoothing) if smoothing else cross_entropy_chunk

    def compile(self) -> None:
        """Compile the loss and its gradient."""
        self._chunk = torch.compile(self._chunk)

    def weight(self, batch: Batch) -> torch.Tensor:
        """Trained tokens of the batch, 0-dim int64."""
        return (batch.targets != IGNORE).sum()

    def __call__(self, model: Any, batch: Batch) -> Loss:
        h = model(batch.tokens, batch.doc, batch.pos, **batch.extra).h.flatten(0, 1)
        return Loss(cross_entropy(h, model.embedding.weight, batch.targets.flatten(), batch.rows, self._chunk), {})


def build(recipe: Recipe, tokenizer: Tokenizer, init: Path | None) -> Task:
    """The stage, with its shards made where they are missing."""
    table, settings = recipe.train, recipe.seq2seq
    train, val = make_shards(recipe, tokenizer)
    model = _model(recipe, tokenizer, init)
    chats = any(recipe.format_of(part) != "text" for part in recipe.parts.values())
    source_length = _source_length(recipe, model.config, train)

    def packer() -> Seq2SeqPacker:
        return _packer(recipe, model.config, train, source_length)

    def save(folder: Path) -> None:
        save_seq2seq(model, folder, chat=chats)
        tokenizer.save(folder, chat=chats)

    pairs = {name: _measurable(recipe, model.config, shards, name) for name, shards in val.items()}

    def evaluate(step: int) -> dict[str, Any]:
        bpb = {name: round(_measure(recipe, model, some, val[name]), 4) for name, some in pairs.items()}
        return {"bpb": bpb, "samples": _samples(recipe, model, tokenizer) if dist.rank() == 0 else []}

    own = {"seq2seq": settings.model_dump(mode="json") | {"source_length": source_length}}
    return Task(
        lm=model,
        model=model,
        objective=Seq2SeqObjective(settings.label_smoothing),
        data=packer(),
        steps=_steps(recipe, packer(), train),
        evaluate=evaluate,
        save=save,
        fingerprint=identity(recipe, model, tokenizer, {name: s.fingerprint for name, s in train.items()}) | own,
        validation={name: s.fingerprint for name, s in val.items()},
        have=", ".join(f"{name} {human(s.num_tokens)}" for name, s in train.items())
        + f"; sources of {source_length} tokens a row",
        flops=seq2seq_flops_per_token(model.config, table.length, source_length),
    )


def _model(recipe: Recipe, tokenizer: Tokenizer, init: Path | None) -> Seq2Seq:
    """The parent's weights or new ones, with the recipe's dropout."""
    torch.manual_seed(recipe.train.seed)
    source = "question" if any(recipe.format_of(p) == "question" for p in recipe.parts.values()) else "chat"
    if init is not None:
        model = load_seq2seq(init).train()
        if model.config.vocab_size < tokenizer.vocab_size:
            raise ModelError(f"{init} has fewer embeddings than its tokenizer has ids; they belong to different models")
        model.config = model.config.model_copy(update={"source": source})
    else:
        assert isinstance(recipe.model, Seq2SeqConfig), "recipe.py makes it one"
        changes = {"vocab_size": tokenizer.vocab_size, "source": source}
        model = Seq2Seq(recipe.model.model_copy(update=changes))
    model.set_dropout(recipe.train.dropout)
    model.recompute = recipe.train.recompute
    return model


# --- data ------------------------------------------------------------------------------------------------------------


def _stream(
    recipe: Recipe, config: Seq2SeqConfig, train: Mapping[str, Shards | View], source_length: int
) -> PairStream:
    """The pairs of the recipe's mixture that fit into rows and the model's context."""
    parts, shares = weighted(recipe, train)
    mixture = Mixture(documents(parts, recipe.seq2seq.piece), shares, recipe.train.seed)
    source, target = min(source_length, config.context), min(recipe.train.length, config.context)
    return PairStream(mixture, recipe.seq2seq, recipe.train.seed, source, target)


def _packer(
    recipe: Recipe, config: Seq2SeqConfig, train: Mapping[str, Shards | View], source_length: int
) -> Seq2SeqPacker:
    stream = _stream(recipe, config, train, source_length)
    return Seq2SeqPacker(stream, recipe.train.batch_size, source_length, recipe.train.length)


def _source_length(recipe: Recipe, config: Seq2SeqConfig, train: Mapping[str, Shards | View]) -> int:
    """S: what the recipe says, or so that sources and targets fill their rows alike, at least what the longest but few
    need. Says how many pairs are left out because they fit nowhere."""
    given = recipe.seq2seq.source_length
    stream = _stream(recipe, config, train, given or config.context)
    pairs: list[Pair] = []
    while len(pairs) < SAMPLE:
        pairs += next(stream)
    sources = sorted(len(source) for source, _ in pairs)
    ratio = sum(sources) / sum(len(target) for _, target in pairs)
    wanted = max(recipe.train.length * ratio, sources[int(0.999 * (len(sources) - 1))])
    if stream.left_out:
        say(
            f"{stream.left_out} of {stream.left_out + stream.given} pairs are left out: a source is longer than "
            f"{stream.source} tokens, or a target than {stream.target}, which is what a row and the model's context of "
            f"{config.context} hold",
            "yellow",
        )
    if given:
        return given
    return math.ceil(wanted / STEP) * STEP


def _steps(recipe: Recipe, packer: Seq2SeqPacker, train: Mapping[str, Shards | View]) -> int:
    """Optimizer steps: by positions of targets, or by passes over the documents, as many as its first rows take."""
    table = recipe.train
    if table.tokens is not None:
        rows = table.tokens / table.length
    else:
        count = packed = 0
        while packed < SAMPLE:
            packed += len(packer.row())
            count += 1
        whole = sum(len(part) for part in documents(train, recipe.seq2seq.piece).values())
        # So many rows as hold all pairs, by those that came first.
        pairs = (table.epochs or 0) * whole * packer.stream.given / packer.stream.drawn
        rows = pairs * count / packed
    return max(1, math.ceil(rows / (table.batch_size * table.accumulate)))


def _measurable(recipe: Recipe, config: Seq2SeqConfig, shards: Shards | View, name: str) -> list[Pair]:
    """Held-out pairs that the model can read, more than are looked at; says how many it cannot."""
    pairs = list(itertools.islice(_held_out(recipe, shards, name), recipe.eval.tokens))
    fitting = [pair for pair in pairs if max(map(len, pair)) <= config.context]
    if len(fitting) < len(pairs):
        say(
            f"{len(pairs) - len(fitting)} of {len(pairs)} held-out pairs of {name} are not measured: they are longer "
            f"than the model's context of {config.context}",
            "yellow",
        )
    return fitting


def _held_out(recipe: Recipe, shards: Shards | View, name: str) -> Iterator[Pair]:
    """The pairs of held-out documents, text corrupted in the same places at every look."""
    for number in range(len(shards)):
        ids, mask = shards.doc(number)
        if not mask[0]:
            yield from answers(ids.tolist(), mask.tolist())
            continue
        for start in range(0, len(ids), recipe.seq2seq.piece):
            key = xxhash.xxh3_128_intdigest(f"{name}\0{number}\0{start}".encode())
            pair = corrupted(ids[start : start + recipe.seq2seq.piece].tolist(), key, recipe.seq2seq)
            if pair is not None:
                yield pair


# --- looking ---------------------------------------------------------------------------------------------------------


def _measure(recipe: Recipe, model: Seq2Seq, pairs: list[Pair], shards: Shards | View) -> float:
    """Bits per byte of as many of the pairs as `eval.tokens` allows."""
    left, some = recipe.eval.tokens, list[Pair]()
    for pair in pairs:
        left -= len(pair[0]) + len(pair[1])
        if left < 0 and some:
            break
        some.append(pair)
    return target_bits_per_byte(model, some, torch.from_numpy(shards.byte_lengths.copy()))


@torch.inference_mode()
def target_bits_per_byte(model: Seq2Seq, pairs: list[Pair], byte_lengths: torch.Tensor, batch: int = 32) -> float:
    """Negative log2-likelihood of the targets, given their sources, over their UTF-8 bytes; `nan` for no byte.

    Reserved ids have no bytes and are not counted. Of several processes each takes its share; all get the same.
    """
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    byte_lengths = byte_lengths.to(device)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    total = torch.zeros((), dtype=torch.int64, device=device)
    mine = sorted(pairs, key=lambda pair: len(pair[0]))[dist.rank() :: dist.world()]
    for start in range(0, len(mine), batch):
        some = mine[start : start + batch]
        longest = max(len(source) for source, _ in some), max(len(target) for _, target in some)
        made = filled([[pair] for pair in some], *longest).to(device)
        h = model(made.tokens, made.doc, made.pos, **made.extra).h
        rows = made.targets != IGNORE
        targets = made.targets[rows]
        log_probs, _ = token_log_probs(h[rows], model.embedding.weight, targets)
        nats -= (log_probs * (byte_lengths[targets] > 0)).double().sum()
        total += byte_lengths[targets].sum()
    model.train(was_training)
    nats, total = dist.sum(nats), dist.sum(total)
    return float(nats / math.log(2) / total) if total > 0 else math.nan


def _samples(recipe: Recipe, model: Seq2Seq, tokenizer: Tokenizer, new_tokens: int = 48) -> list[dict[str, str]]:
    """The recipe's prompts, each answered greedily."""
    prompts = recipe.eval.prompts
    if model.config.source == "question":
        sources = [tokenizer.encode(prompt) for prompt in prompts]
    else:
        sources = [render([Message("user", prompt)], tokenizer, generation=True)[0] for prompt in prompts]
    sampling = Sampling(max_new_tokens=new_tokens, temperature=0.0, stop_ids=(END_OF_TEXT, IM_END))
    answered = Engine(model, max_batch=max(1, len(prompts))).run([(source, sampling) for source in sources])
    return [{"prompt": p, "text": tokenizer.decode(a)} for p, a in zip(prompts, answered, strict=True)]
