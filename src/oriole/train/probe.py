"""A few steps of the real trainer on made-up batches, in a process of their own: what a stage costs on this machine.

`probe` starts `python -m oriole.train.probe`; the other side runs `Trainer.fit` on the recipe's shape, an evaluation, a
continuation and a checkpoint, and prints what they took. A process of its own, because only its highest memory is
that of the training.
"""

import gc
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from oriole.config import Config
from oriole.errors import OrioleError, ResourceError
from oriole.infer.engine import Engine
from oriole.infer.sample import Sampling
from oriole.log import Metrics
from oriole.model.config import ModelConfig
from oriole.model.costs import flops_per_token, num_params, training_memory
from oriole.model.lm import LM
from oriole.model.lora import attach
from oriole.text.shards import Shards
from oriole.train import checkpoint
from oriole.train.batch import IGNORE, Batch
from oriole.train.device import choose_device, choose_dtype
from oriole.train.guard import memory_errors
from oriole.train.loop import Trainer
from oriole.train.machine import peak_flops
from oriole.train.microbatch import Memory, free_memory, memory_of
from oriole.train.objectives import LMObjective
from oriole.train.recipe import Recipe
from oriole.train.stage import optim_config, train_config
from oriole.train.validate import bits_per_byte
from oriole.train.workload import trained_share

__all__ = ["Probe", "peak_rss", "probe"]

CHAT_TRAINED = 0.6
"""Share of a chat's tokens that are the assistant's, as in the demo's dialogues."""
MIN_STEPS, MAX_STEPS, WARM_UP = 3, 60, 2
"""Steps that are timed, after those in which everything is compiled and allocated."""
SAVED_BYTES = 1 << 30
"""Checkpoints up to this size are really written; larger ones are reckoned from a part."""
AFTER_SAVING = 2
"""Steps that follow the saving of a checkpoint, so that the copy that is being written counts in the memory."""
LONGEST_S = 2.5
"""A forward and backward pass that would take longer is measured with fewer rows, and reckoned up."""
IMPOSSIBLE = 1.5
"""A batch that is reckoned to take so many times the free memory is not tried."""
USUAL_MFU = 0.5
"""What is made of the device's matrix products, for a guess at that."""
DOUBLE_WITHIN_S = 2.0
"""A step may take this long for the double batch to be tried beside it."""


class Probe(Config):
    """What a stage's parts took on this machine; seconds and bytes."""

    device: str
    """Name of the device."""
    device_is_gpu: bool
    """Whether `peak_bytes` is the GPU's."""
    dtype: str
    """Arithmetic of the matrix products."""
    compiled: bool
    """Whether torch.compile was used."""
    compile_seconds: float
    """What the first steps took beyond steady ones."""
    micro_seconds: float
    """Forward and backward pass of one micro-batch, without the optimizer."""
    optimizer_seconds: float
    """One update of the weights."""
    steps: int
    """How many steps were timed."""
    eval_token_seconds: float
    """Evaluation, by token."""
    sample_seconds: float
    """The recipe's prompts, continued once."""
    save_seconds: float
    """One checkpoint."""
    save_bytes: int
    """Its size."""
    step_bytes: int
    """Highest memory after the training steps alone."""
    peak_bytes: int
    """Highest memory of the process (CPU) or highest allocation on the device (GPU)."""
    host_bytes: int
    """Highest memory of the process, on whatever device it trains."""
    rows: int
    """Rows of the batches that were measured; where the recipe has more, times and bytes are reckoned up."""
    base_bytes: int
    """Memory of a process in which only the libraries are loaded."""
    batch_gain: float | None = Field(None)
    """Tokens/s with twice the rows over tokens/s with the recipe's, both uncompiled; None: not tried."""


def probe(recipe: Recipe, shape: ModelConfig, steps: int, seconds: float = 20.0) -> Probe:
    """Measure one stage of `steps` steps; about `seconds` of it are spent on steady steps.

    Raises `ResourceError` when the stage does not fit this machine's memory.
    """
    task = {"recipe": recipe.model_dump(mode="json"), "shape": shape.model_dump(mode="json"), "steps": steps}
    folder = _writable(recipe.run)
    done = subprocess.run(
        [sys.executable, "-m", "oriole.train.probe"],
        input=json.dumps(task | {"seconds": seconds, "folder": str(folder)}),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode in (-9, 137):
        raise ResourceError(
            "the probe was killed, most likely for lack of memory; halve train.batch_size and double train.accumulate"
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        error = ResourceError if done.returncode == OrioleError.exit_code else OrioleError
        raise error(f"the probe failed: {lines[-1].removeprefix('oriole: ')}")
    return Probe.model_validate_json(done.stdout.splitlines()[-1])


def _writable(run: Path) -> Path:
    """The nearest folder above the run that exists: the disk where its checkpoints will lie."""
    for folder in (run.absolute(), *run.absolute().parents):
        if folder.is_dir():
            return folder
    return Path(tempfile.gettempdir())


def peak_rss() -> int:
    """Highest resident memory of this process so far, in bytes.

    Of Linux's two counters the one that starts anew with the program: `ru_maxrss` begins with what the parent held.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(match[1]) * 1024 if match else 0


# --- the other side --------------------------------------------------------------------------------------------------


class _Enough(Exception):
    """Ends `fit` when enough steps were timed."""


class _Synthetic:
    """Batches of random tokens that stop the loop when enough steps were timed. The loop calls `observe` every step."""

    def __init__(self, recipe: Recipe, shape: ModelConfig, rows: int, budget: float) -> None:
        self.budget = budget
        self.stamps = [time.monotonic()]
        self.save: Callable[[], None] | None = None
        """Begins a checkpoint, after the timed steps and before two more: it is written beside training."""
        self._timed, self._saving_since = 0, cast(float | None, None)
        random = torch.Generator().manual_seed(0)
        size = (rows, recipe.train.length)
        tokens = torch.randint(0, shape.vocab_size, size, generator=random)
        chats = sum(p.weight for p in recipe.parts.values() if recipe.format_of(p) == "chat")
        share = 1 - (1 - CHAT_TRAINED) * chats / sum(p.weight for p in recipe.parts.values())
        targets = tokens.roll(-1, 1).masked_fill(torch.rand(size, generator=random) >= share, IGNORE)
        half = recipe.train.length // 2
        column = torch.arange(recipe.train.length)
        doc = (column >= half).to(torch.int32).expand(size).contiguous()  # two documents in each row
        self._batch = Batch(tokens, targets, doc, (column % max(1, half)).expand(size).contiguous())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return self._batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def observe(self, metrics: dict[str, Tensor]) -> None:
        metrics["loss"].item()  # waits for the device
        self.stamps.append(time.monotonic())
        if self._saving_since is not None:
            if len(self.stamps) > self._timed + AFTER_SAVING:
                raise _Enough
            return
        timed = len(self.stamps) - 1 - WARM_UP
        spent = self.stamps[-1] - self.stamps[min(WARM_UP, len(self.stamps) - 1)]
        if (
            timed >= MAX_STEPS
            or (timed >= MIN_STEPS and spent > self.budget)
            or (timed > 0 and spent > 2 * self.budget)
        ):
            if self.save is None:
                raise _Enough
            self._timed, self._saving_since = len(self.stamps), time.monotonic()
            self.save()

    def steady(self) -> tuple[float, float, int]:
        """Seconds of a steady step, what the first ones took beyond that, and how many were timed."""
        spans = [b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False)][
            : self._timed - 1 if self._timed else None
        ]
        step = statistics.fmean(spans[WARM_UP:])
        return step, max(0.0, sum(spans[:WARM_UP]) - WARM_UP * step), len(spans) - WARM_UP

    def saving(self, wait: Callable[[], None]) -> float:
        """Seconds that a checkpoint took from the steps during which it was written."""
        if self._saving_since is None:
            return 0.0
        wait()
        return max(0.0, time.monotonic() - self._saving_since - AFTER_SAVING * self.steady()[0])


class _Words:
    """Stands in for shards of validation documents, each as long as a row."""

    def __init__(self, vocab_size: int, length: int, documents: int) -> None:
        rng = np.random.default_rng(0)
        self.byte_lengths = np.full(vocab_size, 3, np.int64)
        self._docs = rng.integers(0, vocab_size, (documents, length))
        self._mask = np.ones(length, np.uint8)

    def __len__(self) -> int:
        return len(self._docs)

    def doc(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self._docs[i], self._mask


def _trainer(recipe: Recipe, model: LM, data: _Synthetic, steps: int, folder: Path, **changes: Any) -> Trainer:
    config = train_config(recipe, steps).model_copy(
        update={
            "accumulate": min(2, recipe.train.accumulate),
            "resume": "no",
            "checkpoint_every": 0,
            "eval_every": 0,
            **changes,
        }
    )
    metrics = Metrics(folder / "metrics.jsonl")
    return Trainer(model, LMObjective(), data, config, optim_config(recipe), folder, metrics=metrics)


def _measure(recipe: Recipe, shape: ModelConfig, steps: int, seconds: float, folder: Path) -> Probe:
    base = peak_rss()
    model = LM(shape)
    model.set_dropout(**recipe.train.dropouts)
    model.recompute = recipe.train.recompute
    if recipe.deep is not None:
        model.supervise(recipe.deep, recipe.train.seed)
    if recipe.lora is not None:
        attach(model, recipe.lora)
    rows = _rows(recipe, shape)
    data = _Synthetic(recipe, shape, rows, seconds)
    trainer = _trainer(recipe, model, data, max(steps, MAX_STEPS + WARM_UP + 1), folder)
    compiled = trainer.config.compile
    if compiled == "auto" and steps < trainer.config.steps:  # the real run is shorter than the probe may be
        compiled = False
        trainer = _trainer(recipe, model, data, trainer.config.steps, folder, compile=False)
    if rows < recipe.train.batch_size:
        _refuse_impossible(trainer, recipe.train.batch_size, recipe.train.length)
    saved_bytes = int(trained_share(recipe, shape) * (4 * num_params(shape, recipe.deep) + _moments(recipe, shape)))
    if saved_bytes <= SAVED_BYTES:
        data.save = trainer.saver.save
    _fit(trainer)
    if data.save:  # steps differ among themselves, so that the difference may be more than saving alone would take
        saving = data.saving(trainer.saver.wait)
        saving = min(saving, _seconds(lambda: _save(trainer), 1))
    else:
        saving = _saving(folder, saved_bytes)
    apart = recipe.train.accumulate > 1 or rows < recipe.train.batch_size  # else an update is part of every pass
    step, compiling, timed = data.steady()
    on_gpu = trainer.device.type == "cuda"
    stepping = torch.cuda.max_memory_allocated(trainer.device) if on_gpu else peak_rss()
    updating = _seconds(lambda: _update(trainer), 3) if apart else 0.0

    length, device = recipe.train.length, trainer.device
    tokens = min(recipe.eval.tokens, 2 * 16 * length)
    words = _Words(shape.vocab_size, length, -(-tokens // length))
    evaluating = _seconds(lambda: bits_per_byte(model, cast(Shards, words), length=length, max_tokens=tokens), 1)
    model.eval()
    prompts = [([5] * min(8, shape.context // 2), Sampling(max_new_tokens=48, temperature=0.0))] * len(
        recipe.eval.prompts
    )
    sampling = _seconds(lambda: Engine(model, max_batch=max(1, len(prompts))).run(prompts), 1) if prompts else 0.0
    model.train()
    host = peak_rss()
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else host
    all_rows = recipe.train.batch_size
    gain = _batch_gain(recipe, shape, model, folder) if step < DOUBLE_WITHIN_S and rows == all_rows else None
    more = _more_memory(trainer, rows, all_rows, recipe.train.length)
    return Probe(
        device=torch.cuda.get_device_name(device) if on_gpu else str(device),
        device_is_gpu=on_gpu,
        dtype=str(trainer.dtype).removeprefix("torch."),
        compiled=trainer.gradients.compiled,
        compile_seconds=compiling,
        micro_seconds=(step - updating) / trainer.config.accumulate * all_rows / rows,
        optimizer_seconds=updating,
        steps=timed,
        eval_token_seconds=evaluating / tokens,
        sample_seconds=sampling,
        save_seconds=saving,
        save_bytes=saved_bytes,
        step_bytes=stepping + more,
        peak_bytes=max(peak, stepping + more),
        host_bytes=host if on_gpu else max(host, stepping + more),
        rows=rows,
        base_bytes=base,
        batch_gain=gain,
    )


def _rows(recipe: Recipe, shape: ModelConfig) -> int:
    """The recipe's rows, or so many of them that a pass takes about LONGEST_S."""
    device = choose_device(recipe.train.device)
    dtype, _ = choose_dtype(device, recipe.train.dtype)
    length, rows = recipe.train.length, recipe.train.batch_size
    row_seconds = flops_per_token(shape, length, recipe.deep) * length / (USUAL_MFU * peak_flops(device, dtype).flops)
    return max(1, min(rows, int(LONGEST_S / row_seconds)))


def _refuse_impossible(trainer: Trainer, rows: int, length: int) -> None:
    """Say at once that the whole batch does not fit, where it is far from it: the probe itself takes fewer rows."""
    memory, free = _memory(trainer), free_memory(trainer.device)
    if memory is None or free is None:
        return
    needed = sum(memory(rows, length).values())
    if needed > IMPOSSIBLE * free:
        raise ResourceError(
            f"the device has not enough memory: {rows:,} rows of {length:,} tokens take about {needed / 1e9:,.1f} GB, "
            f"and {free / 1e9:,.1f} GB are free; halve train.batch_size and double train.accumulate"
        )


def _more_memory(trainer: Trainer, rows: int, all_rows: int, length: int) -> int:
    """Bytes that `all_rows` take beyond `rows`, as reckoned by `model.costs.training_memory`."""
    memory = _memory(trainer)
    return 0 if memory is None else sum(memory(all_rows, length).values()) - sum(memory(rows, length).values())


def _memory(trainer: Trainer) -> Memory | None:
    kind, compiled = trainer.optimizer.config.kind, trainer.gradients.compiled
    return memory_of(trainer.model, kind, trainer.device, trainer.dtype, compiled=compiled)


def _fit(trainer: Trainer) -> None:
    try:
        trainer.fit()
    except _Enough:
        return
    raise OrioleError("the probe's steps ended before they were timed")


def _seconds(work: Callable[[], object], times: int) -> float:
    """Mean seconds of a call."""
    start = time.monotonic()
    for _ in range(times):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.monotonic() - start) / times


def _save(trainer: Trainer) -> None:
    trainer.saver.save()
    trainer.saver.wait()


def _update(trainer: Trainer) -> None:
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    trainer.optimizer.step(0, torch.zeros((), device=trainer.device))


def _moments(recipe: Recipe, shape: ModelConfig) -> int:
    """Bytes of the optimizer's state."""
    return training_memory(shape, 1, 1, deep=recipe.deep, optimizer=recipe.train.optimizer)["optimizer"]


def _saving(folder: Path, size: int) -> float:
    """Seconds that writing a checkpoint of `size` bytes takes, by a smaller one."""
    start = time.monotonic()
    checkpoint.save(folder / "part", 0, {"model": {"x": torch.zeros(SAVED_BYTES // 16)}}, {}, checkpoint.Keep())
    return (time.monotonic() - start) * size / (SAVED_BYTES // 4)


def _batch_gain(recipe: Recipe, shape: ModelConfig, model: LM, folder: Path) -> float | None:
    """Tokens/s with twice the rows over tokens/s with the recipe's; None when twice the rows do not fit."""
    rates = []
    for rows in (recipe.train.batch_size, 2 * recipe.train.batch_size):
        gc.collect()
        data = _Synthetic(recipe, shape, rows, 1.0)
        try:
            _fit(_trainer(recipe, model, data, MAX_STEPS + WARM_UP + 1, folder, compile=False))
        except ResourceError:
            return None
        rates.append(rows / data.steady()[0])
    return rates[1] / rates[0]


def main() -> None:
    """Read a task from stdin, print a `Probe` as the last line of stdout."""
    task = json.load(sys.stdin)
    recipe, shape = Recipe.model_validate(task["recipe"]), ModelConfig.model_validate(task["shape"])
    try:
        with tempfile.TemporaryDirectory(prefix=".oriole-probe-", dir=task["folder"]) as folder, memory_errors():
            print(_measure(recipe, shape, task["steps"], task["seconds"], Path(folder)).model_dump_json())
    except OrioleError as error:
        print(f"oriole: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
