"""The one training loop. It knows no stage: a stage is an objective and an iterator of batches.

`Trainer.fit` reads as the story of a run: prepare, resume, then evaluate, step, log, save, until the steps are done or
a signal comes.
"""

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from oriole.config import Config
from oriole.errors import CheckpointError, ConfigError, Interrupted, OrioleError, ResourceError
from oriole.log import Metrics, Tracker, say, track
from oriole.train import checkpoint, dist
from oriole.train.batch import Batch
from oriole.train.device import Dtype, choose_compile, choose_device, choose_dtype
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
    """An infinite iterator of batches that knows where it is. It may have `observe(metrics)`, called after every step."""

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
        self._fingerprint = _flat(fingerprint or {})
        self._forward: Any = model  # what training calls: the model or its compiled form

        # What a checkpoint carries beside tensors and random numbers.
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.train_seconds = 0.0
        self.evaluated_at = -1
        self.loss = float("nan")
        self.bpb_before: Any = None
        self.bpb: Any = None

        self._saved_at = -1
        self._signal: int | None = None
        self._breakable = False
        self._window = _Window(self.device)

    def fit(self) -> dict[str, Any]:
        """Train to the end; returns {"seconds", "tokens", "bpb_before", "bpb", "loss", "skipped", "tokens_per_second",
        "device", "dtype"}, counted over all resumed pieces. Seconds include evaluations, tokens_per_second does not.

        Raises `Interrupted` after saving when SIGINT or SIGTERM comes; a second signal acts at once.
        """
        with self._signals(), _memory_errors():
            self._seed()
            self._resume()
            self._announce()
            self._started = time.monotonic() - self.seconds
            self._evaluate_if_due()
            self._stop_if_asked()
            if self.step < self.config.steps:
                self._train()
            if self._saved_at != self.step:
                self._save()
        return self._summary()

    def _train(self) -> None:
        micro, wait = self._fetch()
        total = self.tokens + (self.config.steps - self.step) * sum(b.tokens.numel() for b in micro)
        self._window.start(self.tokens)
        with track("training", total=total, unit="tok", done=self.tokens) as bar:
            while True:
                self._step(micro, wait)
                bar.update(sum(b.tokens.numel() for b in micro))
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    self._log(bar)
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

    def _step(self, micro: list[Batch], wait: float) -> None:
        total = dist.sum(torch.stack([self.objective.weight(b) for b in micro]).sum())  # before any forward
        loss = torch.zeros((), device=self.device)
        sums: dict[str, Tensor] = {}
        for batch in micro:
            part = self._backward(batch, total)
            loss += part.sum.detach() / total
            for name, value in part.metrics.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / total
        norm, skipped = self.optimizer.step(self.step, loss)
        self.step += 1
        self.tokens += sum(b.tokens.numel() for b in micro)
        self._window.add(loss, norm, skipped, sums, wait)
        if hasattr(self.data, "observe"):
            self.data.observe(sums)

    def _backward(self, batch: Batch, total: Tensor) -> Loss:
        """Forward and backward of one micro-batch: gradients of its share of the loss are added."""
        try:
            return self._forward_backward(batch, total)
        except Exception as error:
            # A compiler may be there and yet not work. Only the first call compiles, when no gradient exists yet.
            first_call = self._forward is not self.model and not self._window.compiled_once
            if not (first_call and _from_compiler(error)):
                raise
            say(f"torch.compile failed ({_first_line(error)}); going on without it", "yellow")
            self._compile(False)
            self.model.zero_grad()
            return self._forward_backward(batch, total)
        finally:
            self._window.compiled_once = True

    def _forward_backward(self, batch: Batch, total: Tensor) -> Loss:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.objective(self._forward, batch)
        share = loss.sum * dist.world() / total
        (share if self.optimizer.scale is None else share * self.optimizer.scale).backward()
        return loss
