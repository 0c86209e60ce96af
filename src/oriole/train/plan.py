"""What a stage will take before it is started: tokens, FLOPs, memory by part, time and cost. No torch.

`plan_here` reckons with what a probe has measured on this machine, `plan_there` with the model of `costs`.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from oriole.config import Config
from oriole.model.config import KEPT, ModelConfig
from oriole.model.costs import flops_per_token, kv_cache_bytes, training_memory
from oriole.train.accelerators import Cluster
from oriole.train.costs import (
    BEST_MFU,
    CONTEXT_BYTES,
    WIDTH,
    Load,
    Strategy,
    device_memory,
    launch_seconds,
    step_cost,
)
from oriole.train.recipe import Recipe
from oriole.train.workload import Tokens, measured_parts, preparing_seconds, schedule_counts, steps_of, trained_share

if TYPE_CHECKING:
    from oriole.train.probe import Probe

__all__ = ["ROOM", "StagePlan", "plan_here", "plan_there"]

ASKED_AT_ONCE = 32
"""Questions that are answered together (`batch_size` of apps.generate)."""
ROOM = 0.92
"""Share of a device's memory that a plan may fill before it says that the stage does not fit."""
GAIN = 1.15
"""Tokens/s of the double batch over the recipe's from which a plan says that the batch is too small."""
COMPILE_S, SAVE_BYTES_S, WAKE_S, CORES = 60.0, 1e9, 20.0, 8
"""On a machine that is not at hand: seconds of compiling, bytes/s of saving with its checksums, seconds of starting,
cores that read the data."""


class StagePlan(Config):
    """What one stage takes. Seconds, bytes, FLOPs."""

    name: str
    """The recipe's name."""
    stage: str
    """pretrain, sft …"""
    device: str
    """This machine's device, or the cluster that was asked for."""
    basis: Literal["measured", "modelled"]
    """measured: a probe on this machine; modelled: docs/plan.md."""
    strategy: Strategy
    """How several GPUs share the work."""
    gpus: int
    """How many GPUs."""
    dtype: str
    """Arithmetic of the matrix products."""
    parameters: int
    """Weights in all."""
    active_parameters: int
    """Those that a token meets: fewer where there are experts."""
    tokens: Tokens
    """What is trained on."""
    steps: int
    """Optimizer steps."""
    step_tokens: int
    """Tokens of one step on all devices."""
    rows: int
    """Rows of a device's micro-batch."""
    accumulate: int
    """Micro-batches of a device in one step."""
    length: int
    """Tokens of a row."""
    flops: float
    """Training FLOPs of the model in all."""
    tokens_per_second: float
    """Of all devices, while stepping."""
    mfu: float | None
    """Of the devices' peak; None where no peak is known."""
    seconds: dict[str, float]
    """By part: preparing (roughly), training, compiling, evaluating, saving."""
    memory: dict[str, int]
    """Of one device, by part; their sum is the peak."""
    memory_limit: int
    """What one device has."""
    fits: bool
    """Whether the peak stays below the limit."""
    disk: int
    """Checkpoints and model."""
    price: float | None = None
    """Of an hour, in whatever currency."""
    cost: float | None = None
    """Of the stage at that price."""
    notes: tuple[str, ...] = ()
    """What is worth changing or knowing."""

    @property
    def total_seconds(self) -> float:
        """All parts together."""
        return sum(self.seconds.values())

    @property
    def peak(self) -> int:
        """Bytes of one device at the highest."""
        return sum(self.memory.values())


# --- this machine ----------------------------------------------------------------------------------------------------


def plan_here(
    name: str,
    recipe: Recipe,
    shape: ModelConfig,
    tokens: Tokens,
    probe: "Probe",
    *,
    peak_flops: float,
    memory_limit: int,
    cores: float,
    price: float | None = None,
) -> StagePlan:
    """The plan of a stage on this machine from what a probe has measured."""
    table = recipe.train
    steps = steps_of(recipe, tokens.count)
    step_tokens = table.batch_size * table.length * table.accumulate
    counts = schedule_counts(recipe, steps)
    step = table.accumulate * probe.micro_seconds + probe.optimizer_seconds
    evaluation = measured_parts(recipe) * recipe.eval.tokens * probe.eval_token_seconds + probe.sample_seconds
    seconds = {
        "preparing": preparing_seconds(recipe, tokens, cores),
        "training": steps * step,
        "compiling": probe.compile_seconds,
        "evaluating": counts.evaluations * evaluation,
        "saving": counts.checkpoints * probe.save_seconds,
    }
    flops = flops_per_token(shape, table.length, recipe.deep)
    rate = step_tokens / step
    cpu = not probe.device_is_gpu
    parts = training_memory(
        shape,
        table.batch_size,
        table.length,
        4 if probe.dtype == "float32" else 2,
        recipe.deep,
        optimizer=recipe.train.optimizer,
        whole_scores=cpu and table.length <= KEPT,
        compiled=probe.compiled,
        recompute=table.recompute,
    )
    share = trained_share(recipe, shape)
    parts |= {name: int(share * parts[name]) for name in ("gradients", "optimizer")}
    notes = _notes_here(recipe, probe, memory_limit)
    return StagePlan(
        name=name,
        stage=recipe.stage,
        device=probe.device,
        basis="measured",
        strategy="one",
        gpus=0 if cpu else 1,
        dtype=probe.dtype,
        parameters=shape.num_params(),
        active_parameters=shape.num_params(active=True),
        tokens=tokens,
        steps=steps,
        step_tokens=step_tokens,
        rows=table.batch_size,
        accumulate=table.accumulate,
        length=table.length,
        flops=flops * steps * step_tokens,
        tokens_per_second=rate,
        mfu=rate * flops / peak_flops,
        seconds=seconds,
        memory=_measured_memory(parts, probe, copy=cpu and counts.checkpoints > 1) | _asking(recipe, shape, cpu),
        memory_limit=memory_limit,
        fits=_within(probe, memory_limit),
        disk=_disk(recipe, probe.save_bytes, shape),
        price=price,
        cost=_cost(price, seconds),
        notes=(*_notes_on_tokens(tokens), *notes),
    )


def _measured_memory(parts: Mapping[str, int], probe: "Probe", copy: bool) -> dict[str, int]:
    """The measured peak by part: tensors by the formula, libraries as measured, the copy that a checkpoint is written
    from, and the rest (compiler, buffers). Where the formula gives more than was measured, it is scaled down."""
    known = dict(parts)
    if not probe.device_is_gpu:
        known |= {"libraries": probe.base_bytes, "checkpoint": probe.save_bytes if copy else 0}
    scale = min(1.0, probe.peak_bytes / sum(known.values()))
    known = {name: int(scale * n) for name, n in known.items()}
    return known | {"rest": probe.peak_bytes - sum(known.values())}


def _asking(recipe: Recipe, shape: ModelConfig, cpu: bool) -> dict[str, int]:
    """On a CPU the process that has trained asks the questions too: the keys and values of as many answers at once. (A
    GPU has freed the activations by then.)"""
    if not cpu or not recipe.eval.questions:
        return {}
    return {"questions": kv_cache_bytes(shape, ASKED_AT_ONCE, shape.context, 4)}


def _within(probe: "Probe", limit: int) -> bool:
    """Whether the measured peak fits; on a GPU with what driver and libraries hold beside torch's allocations."""
    return probe.peak_bytes + (CONTEXT_BYTES if probe.device_is_gpu else 0) <= limit


def _notes_here(recipe: Recipe, probe: "Probe", limit: int) -> list[str]:
    notes = []
    if not _within(probe, limit):
        notes.append(_smaller(recipe, max(1, recipe.train.batch_size // 2)))
        if not recipe.train.recompute:
            notes.append("train.recompute=true needs less memory too, for a third more arithmetic")
    if probe.batch_gain is not None and probe.batch_gain > GAIN:
        rows = 2 * recipe.train.batch_size
        notes.append(
            f"the batch starves the device: {rows} rows at once run {probe.batch_gain - 1:.0%} faster than "
            f"{recipe.train.batch_size}; try train.batch_size={rows}"
            + (f" train.accumulate={recipe.train.accumulate // 2}" if recipe.train.accumulate % 2 == 0 else "")
        )
    return notes


# --- a machine that is not here --------------------------------------------------------------------------------------


def plan_there(
    name: str,
    recipe: Recipe,
    shape: ModelConfig,
    tokens: Tokens,
    cluster: Cluster,
    *,
    network: float | None = None,
    price: float | None = None,
) -> StagePlan:
    """The plan of a stage on a cluster by the model of docs/plan.md; DDP where it fits, else FSDP2."""
    table = recipe.train
    steps = steps_of(recipe, tokens.count)
    step_tokens = table.batch_size * table.length * table.accumulate
    load = _share(recipe, shape, cluster)
    limit = int(cluster.gpu.memory * 1e9)
    strategy = _strategy(recipe, load, cluster, limit)
    memory = device_memory(load, cluster, strategy)
    cost = step_cost(load, cluster, strategy, network)
    counts = schedule_counts(recipe, steps)
    flops = flops_per_token(shape, table.length, recipe.deep)
    seconds = {
        "preparing": preparing_seconds(recipe, tokens, CORES),
        "training": steps * cost.total,
        "compiling": COMPILE_S + WAKE_S,
        "evaluating": counts.evaluations * _evaluation(recipe, shape, cluster),
        "saving": counts.checkpoints * _saved(recipe, shape) / SAVE_BYTES_S,
    }
    rate = step_tokens / cost.total
    fits = sum(memory.values()) <= ROOM * limit
    notes = [*_notes_on_tokens(tokens), *_notes_there(recipe, load, cluster, strategy, limit)]
    if cost.communication > 0.1 * cost.total:
        notes.append(
            f"{cost.communication / cost.total:.0%} of a step is communication that nothing hides; "
            "a larger train.accumulate for each GPU makes it rarer"
        )
    return StagePlan(
        name=name,
        stage=recipe.stage,
        device=str(cluster),
        basis="modelled",
        strategy=strategy,
        gpus=cluster.gpus,
        dtype="bfloat16" if cluster.gpu.bf16 else "float16",
        parameters=shape.num_params(),
        active_parameters=shape.num_params(active=True),
        tokens=tokens,
        steps=steps,
        step_tokens=step_tokens,
        rows=load.rows,
        accumulate=load.accumulate,
        length=table.length,
        flops=flops * steps * step_tokens,
        tokens_per_second=rate,
        mfu=rate * flops / (cluster.gpus * cluster.gpu.tflops * 1e12),
        seconds=seconds,
        memory=memory,
        memory_limit=limit,
        fits=fits,
        disk=_disk(recipe, _saved(recipe, shape), shape),
        price=price,
        cost=_cost(price, seconds),
        notes=tuple(notes),
    )


def _share(recipe: Recipe, shape: ModelConfig, cluster: Cluster) -> Load:
    """What one GPU does of a step: whole micro-batches where they can be dealt out, else fewer rows, as in training."""
    table = recipe.train
    rows, accumulate = table.batch_size, table.accumulate
    if accumulate % cluster.gpus == 0:
        accumulate //= cluster.gpus
    else:
        each = max(1, rows * accumulate // cluster.gpus)
        accumulate = next(n for n in range(-(-each // rows), each + 1) if each % n == 0)
        rows = each // accumulate
    return Load(shape, rows, table.length, accumulate, table.optimizer, recompute=table.recompute, deep=recipe.deep)


def _strategy(recipe: Recipe, load: Load, cluster: Cluster, limit: int) -> Strategy:
    """As `train.parallel` says; where it says nothing DDP if that fits, else FSDP2."""
    if cluster.gpus == 1:
        return "one"
    if recipe.train.parallel != "auto":
        return recipe.train.parallel
    return "ddp" if _fits(load, cluster, "ddp", limit) else "fsdp"


def _fits(load: Load, cluster: Cluster, strategy: Strategy, limit: int) -> bool:
    return sum(device_memory(load, cluster, strategy).values()) <= ROOM * limit


def _notes_there(recipe: Recipe, load: Load, cluster: Cluster, strategy: Strategy, limit: int) -> list[str]:
    """What to change where the stage does not fit, or where the batch is too small or does not divide."""
    table, gpus = recipe.train, cluster.gpus
    notes = []
    total = table.batch_size * table.accumulate
    if total % gpus:
        notes.append(f"a step's {total} rows do not divide among {gpus} GPUs; make batch_size x accumulate a multiple")
    if strategy == "fsdp" and table.parallel == "auto":
        notes.append("a whole copy of the model on every GPU does not fit: train with train.parallel=fsdp")
    if not _fits(load, cluster, strategy, limit):
        again = load._replace(recompute=True)
        fewer = (rows for rows in range(load.rows - 1, 0, -1) if load.rows % rows == 0)
        rows = next((r for r in fewer if _fits(load._replace(rows=r), cluster, strategy, limit)), None)
        if rows is not None:
            notes.append(_smaller(recipe, rows, load.rows))
        if not load.recompute and _fits(again, cluster, strategy, limit):
            notes.append("with train.recompute=true it fits as it is, for a third more arithmetic")
        elif rows is None:
            notes.append("not even one row fits: choose a smaller model, a shorter train.length, or more GPUs (FSDP2)")
    elif step_cost(load, cluster, strategy).launch_bound:
        need = _rows_to_fill(load, cluster)
        notes.append(
            f"the batch starves the GPU: {load.rows} rows are done before their kernels are launched; "
            f"from train.batch_size={need} the arithmetic sets the pace"
        )
    return notes


def _rows_to_fill(load: Load, cluster: Cluster) -> int:
    """Rows from which a micro-batch takes longer than launching its kernels."""
    shape = load.shape
    launching = launch_seconds(shape, load.deep)
    speed = cluster.gpu.tflops * 1e12 * BEST_MFU * shape.dim / (shape.dim + WIDTH)
    return math.ceil(launching * speed / (load.length * load.flops_per_token))


def _smaller(recipe: Recipe, rows: int, now: int | None = None) -> str:
    """Advice to run the same step in smaller micro-batches."""
    now = now or recipe.train.batch_size
    factor = max(1, now // rows)
    return (
        f"it does not fit: with train.batch_size={max(1, recipe.train.batch_size // factor)} "
        f"train.accumulate={recipe.train.accumulate * factor} the same step needs less memory"
    )


def _evaluation(recipe: Recipe, shape: ModelConfig, cluster: Cluster) -> float:
    """Seconds of one evaluation: a forward pass in fp32 at half of its peak, and 48 new tokens for the prompts."""
    forward = flops_per_token(shape, recipe.train.length) / 3
    scoring = measured_parts(recipe) * recipe.eval.tokens * forward / (0.5e12 * cluster.gpu.fp32)
    return scoring + 48 * launch_seconds(shape)


# --- both ------------------------------------------------------------------------------------------------------------


def _saved(recipe: Recipe, shape: ModelConfig) -> int:
    """Bytes of a checkpoint: weights and the optimizer's moments, fp32."""
    parts = training_memory(shape, 1, 1, deep=recipe.deep, optimizer=recipe.train.optimizer)
    return parts["weights"] + parts["optimizer"]


def _disk(recipe: Recipe, checkpoint: int, shape: ModelConfig) -> int:
    """Bytes of all checkpoints that stay, one more while it is written, and the model."""
    return (recipe.checkpoint.keep + 1) * checkpoint + 4 * shape.num_params()


def _cost(price: float | None, seconds: Mapping[str, float]) -> float | None:
    return None if price is None else price * sum(seconds.values()) / 3600


def _notes_on_tokens(tokens: Tokens) -> list[str]:
    return [] if tokens.known else [tokens.source]
