"""The one training loop. It knows no stage: a stage is an objective and an iterator of batches.

`Trainer.fit` reads as the story of a run: prepare, resume, then evaluate, step, log, save, until the steps are done or
a signal comes.
"""

import copy
import functools
import math
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from oriole.config import Config
from oriole.errors import CheckpointError, ConfigError, Interrupted, OrioleError
from oriole.log import Metrics, Tracker, say, track
from oriole.train import checkpoint, dist
from oriole.train.batch import Batch
from oriole.train.device import DTYPE_NAMES, Dtype, choose_compile, choose_device, choose_dtype
from oriole.train.gauges import Clock, Window
from oriole.train.guard import StopRequest, from_compiler, memory_errors, undisturbed
from oriole.train.objectives import Loss
from oriole.train.optim import OptimConfig, Optimizer, lr_at

__all__ = ["Data", "Objective", "TrainConfig", "Trainer"]

PATIENCE = 20
"""Skipped updates in a row after which a run gives up: by then fp16's loss scale would have found its place."""


class TrainConfig(Config):
    """How long to train, on what, and how often to look and to save."""

    steps: int = Field(ge=1)
    """Optimizer steps in all."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches summed for one step."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Dtype = "auto"
    """Arithmetic of the matrix products; weights, gradients and moments stay fp32."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile; auto: with a compiler at hand and 150 steps or more to do."""
    seed: int = 1337
    """Seed of dropout and whatever else draws random numbers while training."""
    log_every: int = Field(10, ge=1)
    """Steps between two records of metrics.jsonl; also how often the host waits for the device."""
    eval_every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before the first step and after the last."""
    checkpoint_every: int = Field(0, ge=0)
    """Steps between checkpoints; 0: only after the last step (and when interrupted)."""
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints stay on disk."""
    resume: str = "auto"
    """auto: from the newest whole checkpoint in `folder`; no: afresh; or the path of a checkpoint."""


class Data(Protocol):
    """An infinite iterator of batches that knows where it is; its `observe(metrics)`, if any, is called every step."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Objective(Protocol):
    """A loss as a sum over units, and the number of units. It may have `compile()`."""

    def weight(self, batch: Batch) -> Tensor: ...
    def __call__(self, model: Any, batch: Batch) -> Loss: ...


class Trainer:
    """Trains `model` in place; checkpoints go to `folder/checkpoints`, records to `metrics`.

    `evaluate(step)` is called before the first step, every `eval_every` steps and after the last; its dict may have
    "bpb" (bits per byte by part) and goes to `metrics` as it is. It cannot disturb training: random numbers and the
    modules' modes are put back afterwards. `fingerprint` says what a checkpoint must share with this run to be resumed.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        data: Data,
        config: TrainConfig,
        optim: OptimConfig,
        folder: Path,
        *,
        metrics: Metrics,
        evaluate: Callable[[int], dict[str, Any]] | None = None,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        if dist.world() > 1:
            raise ConfigError("training with several processes is not possible yet; start one process")
        self.objective, self.data, self.config, self.metrics = objective, data, config, metrics
        self.checkpoints = folder / "checkpoints"
        self.device = choose_device(config.device)
        self.dtype, self._why_dtype = choose_dtype(self.device, config.dtype)
        self.model = model.to(self.device)
        self.optim_config = optim
        self.optimizer = Optimizer(model, optim, config.steps, loss_scale=self.dtype == torch.float16)
        self._evaluate = evaluate
        own = {"steps": config.steps, "accumulate": config.accumulate, "seed": config.seed}
        self._fingerprint = _flat({"train": own | optim.model_dump(mode="json")}) | _flat(fingerprint or {})
        self._compiled, self._why_compile = False, ""
        self._untried_compiler = False
        self._model_call: Any = model  # what training calls: the model, or its compiled form
        self._objective_call = objective

        # What a checkpoint carries beside tensors and random numbers.
        self.step = 0
        self.tokens = 0
        self.clock = Clock()  # all of fit()
        self.stepping = Clock()  # without evaluations and checkpoints
        self.evaluated_at = -1
        self.loss = math.nan
        self.bpb_before: Any = None
        self.bpb: Any = None

        self._saved_at = -1
        self._stop = StopRequest()

    def fit(self) -> dict[str, Any]:
        """Train to the end; returns {"seconds", "tokens", "bpb_before", "bpb", "loss", "skipped", "tokens_per_second",
        "device", "dtype"}, counted over all resumed pieces. Seconds include evaluations, tokens_per_second does not.

        Raises `Interrupted` after saving when SIGINT or SIGTERM comes; a second signal acts at once.
        """
        with self._stop.listening(), memory_errors():
            self.clock.start()
            self._seed()
            self._resume()
            self._choose_compile()
            self._announce()
            self._evaluate_if_due()
            self._stop_if_asked()
            if self.step < self.config.steps:
                self._train()
            self._save()
        return self._summary()

    def _train(self) -> None:
        micro, wait = self._fetch()
        total = self.tokens + (self.config.steps - self.step) * sum(b.tokens.numel() for b in micro)
        window = Window(self.optimizer, self.tokens, self.stepping.seconds)
        self.model.train()
        self.stepping.start()
        with track("training", total=total, unit="tok", done=self.tokens) as bar:
            while True:
                self._step(micro, wait, window)
                bar.update(sum(b.tokens.numel() for b in micro))
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    self._log(window, bar)
                    window = Window(self.optimizer, self.tokens, self.stepping.seconds)
                self._evaluate_if_due()
                if _due(self.step, self.config.checkpoint_every):
                    self._save()
                self._stop_if_asked()
                if self.step == self.config.steps:
                    return
                micro, wait = self._fetch()

    # --- one step ----------------------------------------------------------------------------------------------------

    def _fetch(self) -> tuple[list[Batch], float]:
        """The micro-batches of one step, on the device, and the seconds the host waited for them."""
        start = time.monotonic()
        micro = [next(self.data).to(self.device) for _ in range(self.config.accumulate)]
        return micro, time.monotonic() - start

    def _step(self, micro: list[Batch], wait: float, window: Window) -> None:
        total = dist.sum(torch.stack([self.objective.weight(b) for b in micro]).sum())  # before any forward
        total = total + (total == 0)  # a step without a trained unit has loss 0, not 0 / 0
        loss = torch.zeros((), device=self.device)
        sums: dict[str, Tensor] = {}
        for batch in micro:
            part = self._backward(batch, total)
            loss += part.sum.detach() / total
            for name, value in part.metrics.items():
                sums[name] = sums.get(name, torch.zeros_like(loss)) + value.detach() / total
        norm, skipped = self.optimizer.step(self.step, loss)
        self.step += 1
        self.tokens += sum(b.tokens.numel() for b in micro)
        window.add({"loss": loss, "grad_norm": norm, **sums}, skipped, wait)
        if observe := getattr(self.data, "observe", None):
            observe({"loss": loss, **sums})

    def _backward(self, batch: Batch, total: Tensor) -> Loss:
        """Forward and backward of one micro-batch; its gradients are added to those of the others."""
        try:
            loss = self._forward_backward(batch, total)
        except Exception as error:
            # A compiler may be there and yet not work; it is used first when no gradient exists yet.
            if not self._untried_compiler or not from_compiler(error):
                raise
            say(f"torch.compile failed ({_first_line(error)}); going on without it", "yellow")
            self._compiled, self._model_call, self._objective_call = False, self.model, self.objective
            self.model.zero_grad()
            loss = self._forward_backward(batch, total)
        self._untried_compiler = False
        return loss

    def _forward_backward(self, batch: Batch, total: Tensor) -> Loss:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self._objective_call(self._model_call, batch)
        share = loss.sum * dist.world() / total
        (share if self.optimizer.scale is None else share * self.optimizer.scale).backward()  # type: ignore[no-untyped-call]
        return loss

    # --- looking -----------------------------------------------------------------------------------------------------

    def _log(self, window: Window, bar: Tracker) -> None:
        """One record of the steps since the last; the only place where the host waits for the device."""
        means, skipped, in_a_row = window.read()
        self.loss = means["loss"]
        record = {
            "event": "step",
            "step": self.step,
            "tokens": self.tokens,
            **means,
            "lr": lr_at(self.step - 1, self.config.steps, self.optim_config),
            "tokens_per_second": round((self.tokens - window.tokens) / (self.stepping.seconds - window.seconds), 1),
            "data_wait": round(window.wait / (self.stepping.seconds - window.seconds), 4),
            "skipped": skipped,
        }
        self.metrics.write(record)
        bar.update(loss=f"{self.loss:.3f}")
        if skipped:
            bar.update(skipped=str(skipped))
        if in_a_row >= PATIENCE:
            raise OrioleError(
                f"the last {in_a_row} updates up to step {self.step} were all skipped, because loss or gradients were "
                "not finite; lower train.lr, use train.dtype=fp32, or look for broken data"
            )

    def _evaluate_if_due(self) -> None:
        due = self.step in (0, self.config.steps) or _due(self.step, self.config.eval_every)
        if self._evaluate is None or not due or self.evaluated_at == self.step:
            return
        evaluate = functools.partial(self._evaluate, self.step)
        with self.stepping.paused(), undisturbed(self.model, self.device):
            result = self._stop.breakable(evaluate)
        if result is None:  # broken off by a signal; done again after the resume
            return
        self.evaluated_at = self.step
        self.bpb = result.get("bpb")
        if self.step == 0:
            self.bpb_before = self.bpb
        self.metrics.write({"event": "eval", "step": self.step, **result})
        if isinstance(self.bpb, dict):
            say(f"step {self.step}: bits per byte " + ", ".join(f"{k} {v:.3f}" for k, v in self.bpb.items()))

    def _announce(self) -> None:
        dtype = DTYPE_NAMES[self.dtype]
        compiled = "compiled" if self._compiled else "not compiled"
        say(f"on {self.device} in {dtype} ({self._why_dtype}), {compiled} ({self._why_compile})")
        self.metrics.write(
            {
                "event": "start",
                "step": self.step,
                "device": self._device_name(),
                "dtype": dtype,
                "dtype_why": self._why_dtype,
                "compile": self._compiled,
                "compile_why": self._why_compile,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)

    def _summary(self) -> dict[str, Any]:
        return {
            "seconds": round(self.clock.seconds, 2),
            "tokens": self.tokens,
            "bpb_before": self.bpb_before,
            "bpb": self.bpb,
            "loss": self.loss,
            "skipped": int(self.optimizer.skipped),
            "tokens_per_second": round(self.tokens / max(1e-9, self.stepping.seconds), 1),
            "device": self._device_name(),
            "dtype": DTYPE_NAMES[self.dtype],
        }

    # --- starting, saving, stopping ----------------------------------------------------------------------------------

    def _seed(self) -> None:
        random.seed(self.config.seed)
        np.random.seed(self.config.seed % 2**32)
        torch.manual_seed(self.config.seed)

    def _choose_compile(self) -> None:
        left = self.config.steps - self.step
        self._compiled, self._why_compile = choose_compile(self.device, self.config.compile, left)
        self._untried_compiler = self._compiled
        if self._compiled:
            # Evaluation and generation keep calling the plain model: their shapes would be compiled one by one.
            self._model_call = torch.compile(self.model, dynamic=False)
            if hasattr(self.objective, "compile"):
                self._objective_call = copy.copy(self.objective)
                self._objective_call.compile()

    def _save(self) -> None:
        if self._saved_at == self.step:
            return
        with self.stepping.paused():
            plain_rng, rng = checkpoint.rng_state(self.device)
            state = {
                "tokens": self.tokens,
                "seconds": self.clock.seconds,
                "stepping_seconds": self.stepping.seconds,
                "evaluated_at": self.evaluated_at,
                "loss": self.loss if math.isfinite(self.loss) else None,
                "bpb_before": self.bpb_before,
                "bpb": self.bpb,
                "data": self.data.state_dict(),
                "rng": plain_rng,
                "fingerprint": self._fingerprint,
                "dtype": DTYPE_NAMES[self.dtype],
                "torch": torch.__version__,
            }
            tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.tensors(), "rng": rng}
            checkpoint.save(self.checkpoints, self.step, tensors, state, keep=self.config.keep)
        self._saved_at = self.step

    def _resume(self) -> None:
        """Go on from the checkpoint that `config.resume` means, if there is one."""
        match self.config.resume:
            case "no":
                shutil.rmtree(self.checkpoints, ignore_errors=True)
                return
            case "auto":
                found = checkpoint.latest_valid(self.checkpoints)
                if found is None:
                    return
            case path:
                found = checkpoint.load(Path(path))
        self._check_fingerprint(found)
        state = found.state
        try:
            self.model.load_state_dict(found.tensors["model"])
        except RuntimeError as error:
            raise CheckpointError(
                f"{found.path} holds a model of another shape ({_first_line(error, 1)}); "
                "give the model the old shape or start afresh with train.resume=no"
            ) from error
        self.optimizer.load(found.tensors["optimizer"])
        self.data.load_state_dict(state["data"])
        checkpoint.restore_rng(state["rng"], found.tensors["rng"], self.device)
        self.step = found.step
        if found.path.resolve().parent == self.checkpoints.resolve():
            self._saved_at = found.step
        self.tokens, self.evaluated_at = state["tokens"], state["evaluated_at"]
        self.clock.add(state["seconds"])
        self.stepping.add(state["stepping_seconds"])
        self.loss = math.nan if state["loss"] is None else state["loss"]
        self.bpb_before, self.bpb = state["bpb_before"], state["bpb"]
        say(f"going on from step {self.step} of {self.config.steps} ({found.path})", "green")
        for what, now in (("dtype", DTYPE_NAMES[self.dtype]), ("torch", torch.__version__)):
            if state[what] != now:
                say(
                    f"the checkpoint was made with {what} {state[what]}, now it is {now}: not bit for bit the same",
                    "yellow",
                )

    def _check_fingerprint(self, found: checkpoint.Checkpoint) -> None:
        before, now = found.state["fingerprint"], self._fingerprint
        absent = "nothing"
        differ = [
            f"{key} was {before.get(key, absent)}, is {now.get(key, absent)}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key, absent) != now.get(key, absent)
        ]
        if differ:
            raise CheckpointError(
                f"{found.path} belongs to another run ({'; '.join(differ[:4])}); "
                "set that back, choose another folder with run=…, or start afresh with train.resume=no"
            )

    def _stop_if_asked(self) -> None:
        if self._stop.signum is not None:
            self._save()
            name = signal.Signals(self._stop.signum).name
            raise Interrupted(
                f"stopped by {name} after step {self.step} of {self.config.steps}; all is saved in {self.checkpoints}, "
                "and the same command goes on from there",
                self._stop.signum,
            )


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}, so that a difference can be named by its key."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def _first_line(error: BaseException, line: int = 0) -> str:
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return lines[min(line, len(lines) - 1)] if lines else type(error).__name__
