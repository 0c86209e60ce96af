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
from pathlib import Path
from typing import Any

import torch

import oriole
from oriole.config import read_toml, to_toml, validate
from oriole.errors import ConfigError
from oriole.log import Metrics, Sink, human, say
from oriole.model.config import ModelConfig
from oriole.model.costs import flops_per_token
from oriole.model.lm import LM
from oriole.text.tokenizer import Tokenizer
from oriole.train import dist, distill, dpo, grpo, lmtask, lora, ppo, reference, reward, seq2seq, track
from oriole.train.checkpoint import write_json
from oriole.train.lock import alone_in
from oriole.train.loop import TrainConfig, Trainer, fingerprint_of
from oriole.train.optim import OptimConfig
from oriole.train.prepare import make_tokenizer
from oriole.train.recipe import Recipe
from oriole.train.state import refuse_others
from oriole.train.task import Task, parent_of

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
        init = parent_of(recipe)
        tokenizer = make_tokenizer(recipe, init)
        task = _task(recipe, tokenizer, init)
        if recipe.lora is not None:
            task = lora.adapted(task, recipe, recipe.lora, init)
    config, optim = train_config(recipe, task.steps), optim_config(recipe)
    with dist.first():
        if is_first:
            # A call that is refused leaves the folder as it was.
            whole = fingerprint_of(config, optim, recipe.smart, task.fingerprint)
            refuse_others(recipe.folder / "checkpoints", config.resume, whole)
            _write_identity(recipe, task)
            also += _expected(recipe, task)
    _describe(recipe, task)

    metrics = Metrics(recipe.folder / "metrics.jsonl" if is_first else Path(os.devnull), also)
    trainer = Trainer(
        task.model,
        task.objective,
        task.data,
        config,
        optim,
        recipe.folder,
        metrics=metrics,
        evaluate=task.evaluate,
        fingerprint=task.fingerprint,
        flops_per_token=task.flops or _flops(recipe, task),
        smart=recipe.smart,
    )
    try:
        summary = trainer.fit()
    except BaseException:  # an interruption too: a dashboard is to have what was recorded
        metrics.close()
        raise

    with trainer.parallel.gathered(), dist.first():
        if is_first:
            if recipe.lora is not None:
                lora.save(task, recipe, init)
            else:
                task.save(recipe.folder / "model")
    done = {"event": "done", "stage": recipe.stage, "parameters": task.lm.config.num_params(), **summary}
    metrics.write(done)
    metrics.close()
    return done


def _flops(recipe: Recipe, task: Task) -> float:
    assert isinstance(task.lm, LM), "stages of other models say what theirs take"
    rewards = "reward" in task.lm.scalar_heads
    return flops_per_token(task.lm.config, recipe.train.length, recipe.deep, logits=not rewards)


def _task(recipe: Recipe, tokenizer: Tokenizer, init: Path | None) -> Task:
    """The objective and the batches of the stage that the recipe names."""
    match recipe.stage:
        case "pretrain" | "sft":
            return lmtask.build(recipe, tokenizer, init)
        case "distill":
            return distill.build(recipe, tokenizer, init)
        case "reward":
            return reward.build(recipe, tokenizer, init)
        case "dpo":
            return dpo.build(recipe, tokenizer, init)
        case "ppo":
            return ppo.build(recipe, tokenizer, init)
        case "grpo":
            return grpo.build(recipe, tokenizer, init)
        case "seq2seq":
            return seq2seq.build(recipe, tokenizer, init)


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
    tables = ("lora", "deep", "reward", "dpo", "rollout", "ppo", "grpo", "distill", "seq2seq")
    changed = [key for key in (*keys, *tables) if before.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            f"{recipe.folder} was finished with another recipe ({', '.join(changed)} differ, see its recipe.toml); "
            "choose another folder with run=… or train it afresh with train.resume=no"
        )
    return dict(record)


def _last_record(metrics: Path) -> dict[str, Any]:
    """The last record that training wrote; questions and gate, which may have come afterwards, are passed over."""
    for line in reversed(metrics.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            record: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            return {}
        if record.get("event") not in ("questions", "gate"):
            return record
    return {}


def _identity(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it stands in recipe.toml, without the key that says how to resume."""
    table = tomllib.loads(to_toml(recipe))
    table.get("train", {}).pop("resume", None)
    return table


def _write_identity(recipe: Recipe, task: Task) -> None:
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
            "tokenizer": task.fingerprint["tokenizer"],
            "data": task.fingerprint["data"],
            "parent": _parent(recipe),
        },
    )


def _parent(recipe: Recipe) -> str:
    """The folder that the stage starts from, as seen from the run's folder; "" for random weights."""
    parent = parent_of(recipe)
    if parent is None:
        return ""
    return str(parent.relative_to(recipe.run) if parent.is_relative_to(recipe.run) else parent.absolute())


def _expected(recipe: Recipe, task: Task) -> list[Sink]:
    """What this run is (identity.json), and who compares it with what is known of such runs (reference.json)."""
    parts = task.fingerprint["data"], task.validation
    identity = reference.identity(recipe, task.lm.config, task.fingerprint["tokenizer"], *parts)
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


def train_config(recipe: Recipe, steps: int) -> TrainConfig:
    """What the loop is told by a recipe."""
    table = recipe.train
    return TrainConfig(
        steps=steps,
        accumulate=table.accumulate,
        device=table.device,
        dtype=table.dtype,
        # Old and new log-probs of a rollout are compared bit for bit, so that both come from the same arithmetic.
        compile=False if recipe.stage in ("ppo", "grpo") else table.compile,
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
    same = {name: value for name, value in table.model_dump().items() if name in OptimConfig.model_fields}
    return OptimConfig.model_validate(same | {"kind": table.optimizer, "betas": (0.9, table.beta2)})


def _describe(recipe: Recipe, task: Task) -> None:
    table = recipe.train
    rows = table.batch_size * table.accumulate
    if recipe.stage in ("ppo", "grpo"):
        size = f"{rows} answers"
    else:
        size = f"{rows} x {table.length} = {human(task.steps * rows * table.length)} tokens"
    shape = task.lm.config
    every = shape.num_params()
    active = shape.num_params(active=True) if isinstance(shape, ModelConfig) else every
    met = "" if active == every else f" ({human(active)} for each token)"
    say(f"{recipe.stage}: {human(every)} parameters{met}, {task.steps:,} steps of {size} (data: {task.have})")
    if recipe.lora is not None:
        say(lora.saving(task, recipe))
    if recipe.derived:
        say("derived: " + "; ".join(f"{key} {value}" for key, value in recipe.derived.items()))
