"""The one training loop. It knows no stage: a stage is an objective and an iterator of batches.

`Trainer.fit` reads as the story of a run: prepare, resume, then evaluate, step, log, save, until the steps are done or
a signal comes.
"""

import functools
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from pydantic import Field
from torch import nn

from oriole.config import Config
from oriole.errors import ConfigError, Interrupted, OrioleError
from oriole.log import Metrics, Tracker, say, track
from oriole.train import dist
from oriole.train.batch import Batch
from oriole.train.checkpoint import Keep
from oriole.train.device import DTYPE_NAMES, Dtype, choose_device, choose_dtype
from oriole.train.gauges import DataWait, Window
from oriole.train.gradients import Gradients, Objective
from oriole.train.guard import StopRequest, memory_errors, undisturbed
from oriole.train.lock import alone_in
from oriole.train.machine import Mfu, peak_flops
from oriole.train.microbatch import memory_of
from oriole.train.optim import OptimConfig, Optimizer
from oriole.train.parallel import Kind, Parallel
from oriole.train.pilot import Pilot
from oriole.train.skipped import PATIENCE, Skipped
from oriole.train.smart import SmartConfig
from oriole.train.state import Progress, Saver, Stateful, flat

__all__ = ["Data", "TrainConfig", "Trainer", "fingerprint_of"]


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
    keep_best: int = Field(0, ge=0)
    """How many of the best by validation stay as well; above 0, every evaluation is followed by a checkpoint."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints of every so many steps stay for ever; 0: none."""
    parallel: Kind = "auto"
    """With several processes: ddp (each holds the model), fsdp (each holds a part of it); auto: ddp."""
    resume: str = "auto"
    """auto: from the newest whole checkpoint in `folder`; no: afresh; or the path of a checkpoint."""


class Data(Stateful, Protocol):
    """An infinite iterator of batches that knows where it is; its `observe(metrics)`, if any, is called every step.

    With an attribute `computes` that is true, batches are made by the device, and the time that takes is no waiting.
    """

    def __iter__(self) -> Self: ...
    def __next__(self) -> Batch: ...


class Trainer:
    """Trains `model` in place; checkpoints go to `folder/checkpoints`, records to `metrics`.

    `evaluate(step)` is called before the first step, every `eval_every` steps and after the last; its dict may have
    "bpb" (bits per byte by part) and goes to `metrics` as it is. It cannot disturb training: random numbers and the
    modules' modes are put back afterwards. `fingerprint` says what a checkpoint must share with this run to be resumed.
    With `flops_per_token` the records have `mfu`.
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
        flops_per_token: float = 0.0,
        smart: SmartConfig | None = None,
    ) -> None:
        self.objective, self.data, self.config, self.metrics = objective, data, config, metrics
        self.folder = folder
        self.device = choose_device(config.device)
        self.dtype, self._why_dtype = choose_dtype(self.device, config.dtype)
        self.model = model.to(self.device)
        self.parallel = Parallel(model, config.parallel, self.device)
        self.optimizer = Optimizer(model, optim, config.steps, loss_scale=self.dtype == torch.float16)
        self._evaluate = evaluate
        if self.parallel.sharded and optim.kind == "adafactor":
            raise ConfigError(
                "train.optimizer=adafactor looks at whole matrices, of which train.parallel=fsdp leaves each process a "
                "part; use train.parallel=ddp or another optimizer"
            )
        self._data_wait = DataWait()
        self._mfu: Mfu | None = None
        if flops_per_token:
            self._mfu = Mfu(flops_per_token, peak_flops(self.device, self.dtype), dist.world())

        smart = smart or SmartConfig()
        self._keep_best = max(config.keep_best, int(smart.early_stop))
        self.now = Progress()
        self.pilot = Pilot(smart, metrics, regular=config.checkpoint_every)
        self.saver = Saver(
            folder / "checkpoints",
            model,
            self.optimizer,
            self.now,
            {"data": data, "pilot": self.pilot},
            device=self.device,
            dtype=DTYPE_NAMES[self.dtype],
            fingerprint=fingerprint_of(config, optim, smart, fingerprint or {}),
            keep=Keep(config.keep, self._keep_best, config.keep_every),
        )
        self.gradients = Gradients(model, objective, self.parallel, self.pilot, self.device, self.dtype)
        self._skipped = Skipped(folder / "skipped")
        self._stop = StopRequest()

    def fit(self) -> dict[str, Any]:
        """Train to the end; returns {"seconds", "tokens", "bpb_before", "bpb", "loss", "skipped", "tokens_per_second",
        "device", "dtype"}, counted over all resumed pieces. Seconds include evaluations, tokens_per_second does not.

        Raises `Interrupted` after saving when SIGINT or SIGTERM comes; a second signal acts at once.
        """
        with alone_in(self.folder), self._stop.listening(), memory_errors(), self.saver:
            self.now.clock.start()
            self._seed()
            if came_from := self.saver.resume(self.config.resume):
                say(f"going on from step {self.now.step} of {self.config.steps} ({came_from})", "green")
            self.gradients.choose_compile(self.config.compile, self.config.steps - self.now.step)
            self._announce()
            self._evaluate_if_due()
            if self._is_checkpoint_due():
                self._save()
            self._stop_if_asked()
            if self.now.step < self.config.steps and not self.pilot.stopped:
                self._train()
            self._save()
            self.saver.wait()
            self._stop_if_asked()  # a signal during the last save
            self.pilot.take_best(self.saver)
        return self._summary()

    def _train(self) -> None:
        micro, wait = self._fetch()
        memory = memory_of(
            self.model, self.optimizer.config.kind, self.device, self.dtype, compiled=self.gradients.compiled
        )
        self.pilot.prepare(self.now.step, micro, memory, self.device)
        total = self.now.tokens + (self.config.steps - self.now.step) * _tokens(micro)
        window = Window(self.optimizer, self.now.tokens, self.now.stepping.seconds)
        self.model.train()
        self.now.stepping.start()
        with track("training", total=total, unit="tok", done=self.now.tokens) as bar:
            while True:
                self._step(micro, wait, window)
                if self.now.step % self.config.log_every == 0 or self.now.step == self.config.steps:
                    self._log(window, bar)
                    window = Window(self.optimizer, self.now.tokens, self.now.stepping.seconds)
                if self._went_back():
                    window = Window(self.optimizer, self.now.tokens, self.now.stepping.seconds)
                bar.update(self.now.tokens - bar.done)
                self._evaluate_if_due()
                if self.pilot.stopped and window.tokens < self.now.tokens:
                    self._log(window, bar)
                if self._is_checkpoint_due():
                    self._save()
                self.saver.check()
                self._stop_if_asked()
                if self.now.step == self.config.steps or self.pilot.stopped:
                    return
                micro, wait = self._fetch()

    # --- one step ----------------------------------------------------------------------------------------------------

    def _fetch(self) -> tuple[list[Batch], float]:
        """The micro-batches of one step, on the device, and the seconds the host waited for them."""
        start = time.monotonic()
        batches = [next(self.data) for _ in range(self.config.accumulate)]
        # Every process reads all batches of a step, so that where the data stand is the same everywhere.
        pieces = self.pilot.micro.split(dist.share(batches))
        micro = [piece.to(self.device) for piece in pieces]
        return micro, 0.0 if getattr(self.data, "computes", False) else time.monotonic() - start

    def _step(self, micro: list[Batch], wait: float, window: Window) -> None:
        if dist.world() > 1:  # to each its own dropout, the same again after a resume by any number of processes
            dist.seed(self.config.seed, self.now.step)
        total = dist.sum(torch.stack([self.objective.weight(b) for b in micro]).sum())  # before any forward
        total = total + (total == 0)  # a step without a trained unit has loss 0, not 0 / 0
        pieces, losses, sums = self.gradients.of(micro, total, self.now.step, self.optimizer.scale)
        loss, *rest = dist.sum(torch.stack([torch.stack(losses).sum(), *sums.values()]))
        sums = dict(zip(sums, rest, strict=True))
        self.optimizer.lr_scale = self.pilot.lr_scale(self.now.step)
        norm, skipped = self.optimizer.step(self.now.step, loss)
        self.now.step += 1
        self._skipped.note(self.now.step, self.now.tokens, pieces, losses, norm, skipped)
        self.now.tokens += _tokens(micro)
        window.add({"loss": loss, "grad_norm": norm, **self.optimizer.gauges(), **sums}, skipped, wait)
        self.pilot.note(self.now.step, loss)
        if observe := getattr(self.data, "observe", None):
            observe({"loss": loss, **sums})

    # --- looking -----------------------------------------------------------------------------------------------------

    def _log(self, window: Window, bar: Tracker) -> None:
        """One record of the steps since the last; the only place where the host waits for the device."""
        means, skipped, in_a_row = window.read()
        self.now.loss = means["loss"]
        record: dict[str, Any] = {
            "event": "step",
            "step": self.now.step,
            "tokens": self.now.tokens,
            **means,
            "lr": self.optimizer.rate(self.now.step - 1),
            "tokens_per_second": round(
                (self.now.tokens - window.tokens) / (self.now.stepping.seconds - window.seconds), 1
            ),
            "data_wait": round(window.wait / (self.now.stepping.seconds - window.seconds), 4),
            "skipped": skipped,
        }
        if self._mfu is not None:
            record["mfu"] = round(self._mfu.of(record["tokens_per_second"]), 4)
            bar.update(mfu=f"{record['mfu']:.0%}")
        self.metrics.write(record)
        self._data_wait.note(self.now.step, record["data_wait"])
        bar.update(loss=f"{self.now.loss:.3f}")
        if skipped:
            bar.update(skipped=str(skipped))
        self._skipped.look(in_a_row, loss_scale=self.optimizer.scale is not None)
        if in_a_row >= PATIENCE:
            where = f" ({self._skipped.last} is such a batch)" if self._skipped.last else ""
            raise OrioleError(
                f"the last {in_a_row} updates up to step {self.now.step} were all skipped, because loss or gradients "
                f"were not finite; lower train.lr, use train.dtype=fp32, or look for broken data{where}"
            )

    def _went_back(self) -> bool:
        """Whether a spike was found in the losses and the run now stands at an earlier step."""
        # Nothing is evaluated or saved that was not looked at.
        due = self._evaluation_due() or _due(self.now.step, self.config.checkpoint_every)
        with self.now.stepping.paused():
            return self.pilot.look(self.now.step, due, self.saver)

    def _evaluation_due(self) -> bool:
        return self.now.step in (0, self.config.steps) or _due(self.now.step, self.config.eval_every)

    def _evaluate_if_due(self) -> None:
        if self._evaluate is None or not self._evaluation_due() or self.now.evaluated_at == self.now.step:
            return
        evaluate = functools.partial(self._evaluate, self.now.step)
        start = time.monotonic()
        with self.now.stepping.paused(), undisturbed(self.model, self.device), self.parallel.gathered():
            # Several processes evaluate together: none may leave the others in the middle.
            alone = dist.world() == 1
            result = self._stop.breakable(evaluate) if alone else _first_result(evaluate())
        if result is None:  # broken off by a signal; done again after the resume
            return
        self.now.evaluated_at = self.now.step
        self.now.bpb = result.get("bpb")
        if self.now.step == 0:
            self.now.bpb_before = self.now.bpb
        took = {"tokens": self.now.tokens, "seconds": round(time.monotonic() - start, 2)}
        self.metrics.write({"event": "eval", "step": self.now.step, **took, **result})
        if isinstance(self.now.bpb, dict):
            say(f"step {self.now.step}: bits per byte " + ", ".join(f"{k} {v:.3f}" for k, v in self.now.bpb.items()))
        self.pilot.validated(self.now.step, self.now.score)

    def _announce(self) -> None:
        dtype = DTYPE_NAMES[self.dtype]
        compiled = "compiled" if self.gradients.compiled else "not compiled"
        say(f"on {self.device} in {dtype} ({self._why_dtype}), {compiled} ({self.gradients.why}), {self.parallel.name}")
        if self._mfu is not None:
            say(f"MFU = {self._mfu}")
        self.metrics.write(
            {
                "event": "start",
                "step": self.now.step,
                "device": self._device_name(),
                "dtype": dtype,
                "dtype_why": self._why_dtype,
                "compile": self.gradients.compiled,
                "compile_why": self.gradients.why,
                "parallel": self.parallel.name,
                "processes": dist.world(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                **({} if self._mfu is None else self._mfu.record()),
            }
        )

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)

    def _summary(self) -> dict[str, Any]:
        return {
            "seconds": round(self.now.clock.seconds, 2),
            "tokens": self.now.tokens,
            "bpb_before": self.now.bpb_before,
            "bpb": self.now.bpb,
            "loss": self.now.loss,
            "skipped": int(self.optimizer.skipped),
            "tokens_per_second": round(self.now.tokens / max(1e-9, self.now.stepping.seconds), 1),
            "device": self._device_name(),
            "dtype": DTYPE_NAMES[self.dtype],
            **self.pilot.smart.summary(self.now.step),
        }

    # --- starting, saving, stopping ----------------------------------------------------------------------------------

    def _seed(self) -> None:
        random.seed(self.config.seed)
        np.random.seed(self.config.seed % 2**32)
        torch.manual_seed(self.config.seed)

    def _is_checkpoint_due(self) -> bool:
        return _due(self.now.step, self.config.checkpoint_every) or (self._keep_best > 0 and self.now.score is not None)

    def _save(self) -> None:
        start = time.monotonic()
        with self.now.stepping.paused():
            self.saver.save()
        # Only the time training stood still: the file itself is written beside it.
        self.metrics.write({"event": "save", "step": self.now.step, "seconds": round(time.monotonic() - start, 3)})

    def _stop_if_asked(self) -> None:
        signum = dist.agree(self._stop.signum or 0)  # whoever the signal was sent to, all stop after the same step
        if signum:
            self._save()
            self.saver.wait()
            dist.barrier()
            name = signal.Signals(signum).name
            raise Interrupted(
                f"stopped by {name} after step {self.now.step} of {self.config.steps}; all is saved in "
                f"{self.saver.folder}, and the same command goes on from there",
                signum,
            )


def fingerprint_of(
    config: TrainConfig, optim: OptimConfig, smart: SmartConfig, more: Mapping[str, Any]
) -> dict[str, Any]:
    """What a checkpoint must share with a run for the resumed run to equal the unbroken one, by the recipe's keys."""
    own = {"steps": config.steps, "accumulate": config.accumulate, "seed": config.seed}
    return flat({"train": own | optim.model_dump(mode="json"), "smart": smart.identity()}) | flat(more)


def _first_result(result: dict[str, Any]) -> dict[str, Any]:
    """The first process's result in all of them: what is decided by it must be decided alike."""
    return dist.told(lambda: result)


def _tokens(micro: Sequence[Batch]) -> int:
    """Positions of a step in all processes, of which `micro` is this one's equal share."""
    return dist.world() * sum(batch.tokens.numel() for batch in micro)


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
