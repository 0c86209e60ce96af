"""One stage of a run, from its files to a model folder: tokenizer, shards, model, training, saving.

`run_stage(recipe)` reads as the story of a run. Whatever is already there and still fits is used again.
"""

import json
import math
import os
import platform
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import oriole
from oriole.config import read_toml, to_toml, validate
from oriole.errors import ConfigError, ModelError
from oriole.log import Metrics, Sink, human, say
from oriole.model.config import ModelConfig, preset
from oriole.model.folder import load_model, save_model
from oriole.model.lm import LM
from oriole.text.mixture import Mixture
from oriole.text.shards import Shards, View
from oriole.text.tokenizer import Tokenizer
from oriole.train import dist, reference, track
from oriole.train.batch import Packer
from oriole.train.checkpoint import write_json
from oriole.train.lock import alone_in
from oriole.train.loop import TrainConfig, Trainer, fingerprint_of
from oriole.train.objectives import LMObjective
from oriole.train.optim import OptimConfig
from oriole.train.prepare import make_shards, make_tokenizer, weighted
from oriole.train.recipe import Recipe
from oriole.train.state import refuse_others
from oriole.train.validate import bits_per_byte, continuations

__all__ = ["commit", "optim_config", "run_stage", "train_config"]


def run_stage(recipe: Recipe) -> dict[str, Any]:
    """Train one stage and write `runs/<name>/<stage>/`; returns its closing record, which also ends metrics.jsonl.

    The record: `{"event": "done", "stage", "seconds", "tokens", "parameters", "device", "bpb_before": {part: x},
    "bpb": {part: x}}`; seconds are those of training and its evaluations, over all resumed pieces.
    """
    with alone_in(recipe.run):
        return _run(recipe)


def _run(recipe: Recipe) -> dict[str, Any]:
    if done := dist.told(lambda: _finished(recipe)):
        say(f"{recipe.folder} is finished; nothing to do (train.resume=no trains it afresh)", "green")
        return done
    dist.rows_each(recipe.train.batch_size * recipe.train.accumulate)
    with dist.first() as is_first:
        if is_first and recipe.train.resume == "no" and recipe.folder.exists():
            shutil.rmtree(recipe.folder)
        recipe.folder.mkdir(parents=True, exist_ok=True)
        also: list[Sink] = track.sinks(recipe) if is_first else []
        init = _init_folder(recipe)
        tokenizer = make_tokenizer(recipe, init)
        train, val = make_shards(recipe, tokenizer)
    model = _model(recipe, tokenizer, init)
    steps = _steps(recipe, train)
    config, optim = train_config(recipe, steps), optim_config(recipe)
    fingerprint = _fingerprint(recipe, model.config, tokenizer, train)
    with dist.first():
        if is_first:
            # A call that is refused leaves the folder as it was.
            whole = fingerprint_of(config, optim, recipe.smart, fingerprint)
            refuse_others(recipe.folder / "checkpoints", config.resume, whole)
            _write_identity(recipe, tokenizer, train)
            also += _expected(recipe, model.config, tokenizer, train, val)
    _describe(recipe, model.config, train, steps)

    stream = Mixture(*weighted(recipe, train), seed=recipe.train.seed, length=recipe.train.length)
    data = Packer(stream, recipe.train.batch_size, recipe.train.length)
    metrics = Metrics(recipe.folder / "metrics.jsonl" if is_first else Path(os.devnull), also)
    evaluation = _evaluation(recipe, model, tokenizer, val)
    trainer = Trainer(
        model,
        LMObjective(),
        data,
        config,
        optim,
        recipe.folder,
        metrics=metrics,
        evaluate=evaluation,
        fingerprint=fingerprint,
        flops_per_token=model.config.flops_per_token(recipe.train.length),
        smart=recipe.smart,
    )
    try:
        summary = trainer.fit()
    except BaseException:  # an interruption too: a dashboard is to have what was recorded
        metrics.close()
        raise

    with trainer.parallel.gathered(), dist.first():
        if is_first:
            chat, target = recipe.stage == "sft", recipe.folder / "model"
            save_model(model, target, chat=chat)
            tokenizer.save(target, chat=chat)
    done = {"event": "done", "stage": recipe.stage, "parameters": model.config.num_params(), **summary}
    metrics.write(done)
    metrics.close()
    return done


# --- what is there already -------------------------------------------------------------------------------------------


def _finished(recipe: Recipe) -> dict[str, Any] | None:
    """The closing record of a stage that was finished with this very recipe, else None."""
    path = recipe.folder / "metrics.jsonl"
    if recipe.train.resume == "no" or not path.exists() or not (recipe.folder / "model" / "model.safetensors").exists():
        return None
    record = _last_record(path)
    if record.get("event") != "done":
        return None
    written = recipe.folder / "recipe.toml"
    # Read as a recipe, so that a key which did not exist then stands at its default.
    before, now = _identity(validate(Recipe, read_toml(written), str(written))), _identity(recipe)
    for table in (before, now):  # where and how chattily a stage ran changes nothing about what it is
        for key in ("device", "compile", "log_every", "recompute", "parallel"):
            table.get("train", {}).pop(key, None)
        table.get("smart", {}).pop("micro_batch", None)
    keys = ("train", "smart", "parts", "model", "init", "data", "tokenizer")
    changed = [key for key in keys if before.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            f"{recipe.folder} was finished with another recipe ({', '.join(changed)} differ, see its recipe.toml); "
            "choose another folder with run=… or train it afresh with train.resume=no"
        )
    return dict(record)


def _last_record(metrics: Path) -> dict[str, Any]:
    """The last record that training wrote; the questions that may have been asked afterwards are passed over."""
    for line in reversed(metrics.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            record: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            return {}
        if record.get("event") != "questions":
            return record
    return {}


def _identity(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it stands in recipe.toml, without the key that says how to resume."""
    table = tomllib.loads(to_toml(recipe))
    table.get("train", {}).pop("resume", None)
    return table


def _write_identity(recipe: Recipe, tokenizer: Tokenizer, train: dict[str, Shards | View]) -> None:
    settled = recipe.model_copy(update={"train": recipe.train.model_copy(update={"resume": "auto"})})
    text = to_toml(settled)
    # `resume` says how this call began, not what the run is.
    (recipe.folder / "recipe.toml").write_text(text.replace('resume = "auto"\n', ""), encoding="utf-8")
    write_json(
        recipe.folder / "env.json",
        {
            "schema": 1,
            "oriole": oriole.__version__,
            "commit": commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "tokenizer": tokenizer.fingerprint(),
            "data": {name: shards.fingerprint for name, shards in train.items()},
        },
    )


def _expected(
    recipe: Recipe,
    shape: ModelConfig,
    tokenizer: Tokenizer,
    train: dict[str, Shards | View],
    val: dict[str, Shards | View],
) -> list[Sink]:
    """What this run is (identity.json), and who compares it with what is known of such runs (reference.json)."""
    data = ({name: shards.fingerprint for name, shards in parts.items()} for parts in (train, val))
    identity = reference.identity(recipe, shape, tokenizer.fingerprint(), *data)
    write_json(recipe.folder / "identity.json", {"schema": 1, "identity": identity})
    known = reference.find(recipe, identity)
    if known is None:
        (recipe.folder / "reference.json").unlink(missing_ok=True)
        return []
    write_json(recipe.folder / "reference.json", {"schema": reference.SCHEMA, **known.model_dump(mode="json")})
    return [reference.Watch(known)]


def commit() -> str:
    """The commit of the source tree Oriole runs from ("+" marks uncommitted changes), or "" outside of one."""
    git = shutil.which("git")
    if git is None:
        return ""
    here = Path(__file__).parent

    def ask(*words: str) -> str:
        done = subprocess.run([git, "-C", str(here), *words], capture_output=True, text=True, timeout=10)  # noqa: S603
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = ask("rev-parse", "--short=12", "HEAD")
        return head + "+" if head and ask("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.TimeoutExpired):
        return ""


# --- model and trainer -----------------------------------------------------------------------------------------------


def _init_folder(recipe: Recipe) -> Path | None:
    """The folder whose weights the stage starts from, None for random weights."""
    match recipe.stage, recipe.init:
        case (_, "random") | ("pretrain", ""):
            return None
        case ("sft", ""):
            parent = recipe.run / "pretrain" / "model"
            if not parent.exists():
                raise ModelError(
                    f"no pretrained model at {parent}; train it first, or name one: init=FOLDER, init=random"
                )
            return parent
        case _:
            return Path(recipe.init)


def _model(recipe: Recipe, tokenizer: Tokenizer, init: Path | None) -> LM:
    torch.manual_seed(recipe.train.seed)
    if init is not None:
        model = load_model(init)
    else:
        shape = preset(recipe.model) if isinstance(recipe.model, str) else recipe.model
        model = LM(shape.model_copy(update={"vocab_size": tokenizer.vocab_size}))
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ModelError(
            f"{init} has {model.config.vocab_size} embeddings but its tokenizer {tokenizer.vocab_size} ids; "
            "they belong to different models"
        )
    model.set_dropout(recipe.train.dropout)
    model.recompute = recipe.train.recompute
    return model


def train_config(recipe: Recipe, steps: int) -> TrainConfig:
    """What the loop is told by a recipe."""
    table = recipe.train
    return TrainConfig(
        steps=steps,
        accumulate=table.accumulate,
        device=table.device,
        dtype=table.dtype,
        compile=table.compile,
        seed=table.seed,
        parallel=table.parallel,
        log_every=table.log_every,
        eval_every=recipe.eval.every or max(1, math.ceil(steps / 5)),
        checkpoint_every=recipe.checkpoint.every or max(1, math.ceil(steps / 10)),
        keep=recipe.checkpoint.keep,
        keep_best=recipe.checkpoint.keep_best,
        keep_every=recipe.checkpoint.keep_every,
        resume="auto" if table.resume == "no" else table.resume,  # "no" has removed the folder already
    )


def optim_config(recipe: Recipe) -> OptimConfig:
    """What the optimizer is told by a recipe."""
    table = recipe.train
    return OptimConfig(
        kind=table.optimizer,
        lr=table.lr,
        muon_lr=table.muon_lr,
        orthogonalise=table.orthogonalise,
        cautious=table.cautious,
        betas=(0.9, table.beta2),
        weight_decay=table.weight_decay,
        schedule=table.schedule,
        warmup=table.warmup,
        min_lr=table.min_lr,
        decay=table.decay,
        cycles=table.cycles,
        cycle_mult=table.cycle_mult,
        rise=table.rise,
        clip=table.clip,
    )


def _fingerprint(
    recipe: Recipe, shape: ModelConfig, tokenizer: Tokenizer, train: dict[str, Shards | View]
) -> dict[str, Any]:
    """What a checkpoint must share with this call for the resumed run to equal the unbroken one."""
    table = recipe.train
    return {
        "stage": recipe.stage,
        "model": shape.model_dump(mode="json"),
        "tokenizer": tokenizer.fingerprint(),
        "data": {name: shards.fingerprint for name, shards in train.items()},
        "parts": {name: {"weight": p.weight, "sources": p.sources} for name, p in recipe.parts.items()},
        "train": {"batch_size": table.batch_size, "length": table.length, "dropout": table.dropout},
    }


def _steps(recipe: Recipe, train: dict[str, Shards | View]) -> int:
    table = recipe.train
    tokens = table.tokens or (table.epochs or 0) * sum(s.num_tokens for s in train.values())
    return max(1, math.ceil(tokens / (table.batch_size * table.length * table.accumulate)))


def _evaluation(
    recipe: Recipe, model: LM, tokenizer: Tokenizer, val: dict[str, Shards | View]
) -> Callable[[int], dict[str, Any]]:
    def evaluate(step: int) -> dict[str, Any]:
        """Bits per byte of every part and the fixed prompts' continuations."""
        bpb = {
            name: round(
                bits_per_byte(
                    model, s, length=recipe.eval.length or recipe.train.length, max_tokens=recipe.eval.tokens
                ),
                4,
            )
            for name, s in val.items()
        }
        # The first process's are those that are kept.
        prompts = recipe.eval.prompts if dist.rank() == 0 else ()
        samples = continuations(model, tokenizer, prompts, chat=recipe.stage == "sft")
        return {"bpb": bpb, "samples": samples}

    return evaluate


def _describe(recipe: Recipe, shape: ModelConfig, train: dict[str, Shards | View], steps: int) -> None:
    table = recipe.train
    tokens = steps * table.batch_size * table.length * table.accumulate
    have = ", ".join(f"{name} {human(s.num_tokens)}" for name, s in train.items())
    say(
        f"{recipe.stage}: {human(shape.num_params())} parameters, {steps:,} steps of "
        f"{table.batch_size * table.accumulate} x {table.length} = {human(tokens)} tokens (data: {have})"
    )
    if recipe.derived:
        say("derived: " + "; ".join(f"{key} {value}" for key, value in recipe.derived.items()))
