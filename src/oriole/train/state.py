"""Where a run stands, and how that is saved and taken up again."""

import functools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from oriole.errors import CheckpointError, OrioleError
from oriole.log import say
from oriole.model.config import ModelConfig
from oriole.train import checkpoint, dist
from oriole.train.gauges import Clock
from oriole.train.guard import Background
from oriole.train.optim import BY_ROWS, OptimConfig, Optimizer
from oriole.train.parallel import local, span
from oriole.train.recipe import TrainTable

__all__ = ["Progress", "Saver", "Stateful", "flat", "refuse_others"]

RECIPE_KEYS = {"train.kind": "train.optimizer", "train.betas": "train.beta2"}
"""Keys of the fingerprint that a recipe calls otherwise."""

_Tensors = dict[str, dict[str, Tensor]]
_Work = Callable[..., Any]


class Stateful(Protocol):
    """What a checkpoint can hold beside tensors: its state is made for JSON."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Progress:
    """How far a run has come, counted over all its resumed pieces."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Positions of the batches that were trained on."""
    clock: Clock = field(default_factory=Clock)
    """All of `fit`."""
    stepping: Clock = field(default_factory=Clock)
    """`fit` without evaluations and checkpoints."""
    evaluated_at: int = -1
    """The step of the last evaluation, -1 before the first."""
    loss: float = math.nan
    """Mean of the steps of the last record."""
    bpb_before: Any = None
    """Bits per byte by part before the first step."""
    bpb: Any = None
    """Bits per byte by part at the last evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.clock.seconds,
            "stepping_seconds": self.stepping.seconds,
            "evaluated_at": self.evaluated_at,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "bpb_before": self.bpb_before,
            "bpb": self.bpb,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state_dict` was taken. The clocks go on: what they show is the caller's to add."""
        self.step, self.tokens, self.evaluated_at = state["step"], state["tokens"], state["evaluated_at"]
        self.loss = math.nan if state["loss"] is None else state["loss"]
        self.bpb_before, self.bpb = state["bpb_before"], state["bpb"]

    @property
    def score(self) -> float | None:
        """Bits per byte of the present weights, the mean over the parts; None where they were not evaluated."""
        if self.evaluated_at != self.step or not isinstance(self.bpb, dict) or not self.bpb:
            return None
        mean = float(sum(self.bpb.values()) / len(self.bpb))
        return mean if math.isfinite(mean) else None


class Saver:
    """Saves model, optimizer, random numbers, `progress` and the `stateful` rest of a run, and takes them up again.

    `save` copies everything and returns; a thread writes the copy while training goes on. `check`, `wait`, the next
    `save` and the end of the `with` block raise what went wrong there. `fingerprint` (flat) says what a checkpoint must
    share with this run; `dtype` is the arithmetic's name.
    Weights that are frozen are not saved: they come from where the stage got them.
    Of several processes the first writes; where each holds only some rows of the weights, every one writes its own.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: Optimizer,
        progress: Progress,
        stateful: Mapping[str, Stateful],
        *,
        device: torch.device,
        dtype: str,
        fingerprint: Mapping[str, Any],
        keep: checkpoint.Keep,
    ) -> None:
        self.folder = folder
        self.model, self.optimizer, self.progress, self.stateful = model, optimizer, progress, stateful
        self.device, self.fingerprint, self.keep = device, fingerprint, keep
        self._setting = {"dtype": dtype, "torch": torch.__version__}
        self._writing = Background("oriole-saving")
        self._saved = (-1, -1)
        self._copies: _Tensors = {}
        self._spans = {n: (*span(p), len(p)) for n, p in model.named_parameters() if local(p) is not p}
        """First row, last + 1 and number of all rows of the parameters of which this process holds only some."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Wait for a checkpoint that is being written, except where a second signal says not to."""
        if isinstance(error, KeyboardInterrupt):
            return
        try:
            self.wait()
        except OrioleError as own:
            if error is None:
                raise
            say(str(own), "yellow")  # the error on its way out is the first one

    def save(self) -> None:
        """Begin a checkpoint of this step unless there is one that knows the same evaluations.

        Raises `ResourceError` when the disk was full at the checkpoint before.
        """
        self.wait()
        step, evaluated_at = self.progress.step, self.progress.evaluated_at
        if self._saved == (step, evaluated_at):
            return
        if dist.rank() > 0 and not self._spans:
            self._saved = (step, evaluated_at)
            return
        plain_rng, rng = checkpoint.rng_state(self.device)
        state = self.progress.state_dict() | {name: one.state_dict() for name, one in self.stateful.items()}
        state |= {"score": self.progress.score, "rng": plain_rng, "fingerprint": self.fingerprint, **self._setting}
        tensors = {"model": self._trained(), "optimizer": self.optimizer.tensors(), "rng": rng}
        # Nothing of the copy may change while it is written: not the tensors, not the lists inside the states.
        state = json.loads(json.dumps(state))
        copy, rows = _own_parts(tensors, self._copies)
        self._copies = copy
        write: _Work = functools.partial(checkpoint.save, self.folder, step, copy, state, self.keep)
        if self._spans:
            write = self._together(step, copy, rows, write)

        def run() -> None:
            write()
            self._saved = (step, evaluated_at)

        self._writing.start(run)

    def _together(self, step: int, copy: _Tensors, rows: checkpoint.Rows, write: _Work) -> _Work:
        """The part of this process in a checkpoint that all write: the first makes the folder and the manifest."""
        made, done = dist.key("checkpoint made"), dist.key("checkpoint written")
        if dist.rank() == 0:

            def others() -> dict[str, checkpoint.Entry]:
                return {k: v for n in range(1, dist.world()) for k, v in dist.awaited(f"{done}/{n}").items()}

            return functools.partial(write, rows=rows, ready=lambda: dist.publish(made, None), others=others)

        def write_part() -> None:
            dist.awaited(made)
            dist.publish(f"{done}/{dist.rank()}", checkpoint.save_part(self.folder, step, copy, rows))

        return write_part

    def check(self) -> None:
        """Raise the `ResourceError` of a checkpoint that could not be written; waits for nothing."""
        self._writing.check()

    def wait(self) -> None:
        """Return when what was saved is on the disk. Raises `ResourceError` when that was full."""
        self._writing.wait()

    def resume(self, how: str) -> Path | None:
        """Go on from the checkpoint that `how` (auto, no, or a path) means; its path, None when there is none.

        Raises `CheckpointError` when it is damaged or belongs to another run.
        """
        self.wait()
        found = self.find(how)
        if found is None:
            return None
        self.load(found)
        self.progress.clock.add(found.state["seconds"])
        self.progress.stepping.add(found.state["stepping_seconds"])
        for what, now in self._setting.items():
            if found.state[what] != now:
                say(
                    f"the checkpoint was made with {what} {found.state[what]}, now it is {now}: "
                    "not bit for bit the same",
                    "yellow",
                )
        return found.path

    def find(self, how: str) -> checkpoint.Checkpoint | None:
        """The checkpoint that `how` (auto, no, or a path) means, read and found whole; `no` deletes what there is.

        The first process chooses; the others read what it has found.
        """
        found: checkpoint.Checkpoint | None = None

        def choose() -> str | None:
            nonlocal found
            match how:
                case "no":
                    shutil.rmtree(self.folder, ignore_errors=True)
                case "auto":
                    found = checkpoint.latest_valid(self.folder, self._wanted)
                case path:
                    found = checkpoint.load(Path(path), self._wanted)
            return None if found is None else str(found.path)

        chosen = dist.told(choose)
        if chosen is None or found is not None:
            return found
        try:
            return checkpoint.load(Path(chosen), self._wanted, verify=False)
        except CheckpointError as error:
            raise CheckpointError(
                f"process {dist.rank()} cannot read what the first one reads ({error}); "
                "give the run a folder that all machines share"
            ) from error

    def _wanted(self, stem: str, name: str, shape: Sequence[int]) -> tuple[int, int] | None:
        """The rows of a tensor that this process holds; None for all."""
        owner, _, key = name.rpartition(".")
        owner = name if stem == "model" else owner if key in BY_ROWS else ""
        first, last, rows = self._spans.get(owner, (0, 0, -1))
        return (first, last) if shape and shape[0] == rows else None

    def load(self, found: checkpoint.Checkpoint) -> None:
        """Put everything but the clocks into the state of a checkpoint, after checking that it belongs to this run."""
        self._load_tensors(found)
        state = found.state
        for name, one in self.stateful.items():
            if name in state:  # an older Oriole did not have all of them; what is new begins anew
                one.load_state_dict(state[name])
        checkpoint.restore_rng(state["rng"], found.tensors["rng"], self.device)
        self.progress.load_state_dict(state)
        if found.path.resolve().parent == self.folder.resolve():
            self._saved = (found.step, self.progress.evaluated_at)

    def go_back(self, found: checkpoint.Checkpoint) -> None:
        """Weights, optimizer and progress of a checkpoint; all else, data and clocks among it, goes on from here."""
        self._load_tensors(found)
        self.progress.load_state_dict(found.state)
        self._saved = (-1, -1)

    def _load_tensors(self, found: checkpoint.Checkpoint) -> None:
        """Model and optimizer."""
        _check_fingerprint(found.path, found.state["fingerprint"], self.fingerprint)
        self.load_model(found)
        self.optimizer.load(found.tensors["optimizer"])

    def _trained(self) -> dict[str, Tensor]:
        """The model's state without what is frozen."""
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in frozen}

    def load_model(self, found: checkpoint.Checkpoint) -> None:
        """Take the weights of a checkpoint; `CheckpointError` when they have another shape."""
        loaded, own = found.tensors["model"], self._trained()
        try:
            if not self._spans:
                self.model.load_state_dict(
                    {**self.model.state_dict(), **loaded} if loaded.keys() == own.keys() else loaded
                )
                return
            for name in loaded.keys() | own.keys():
                if name not in loaded or name not in own or loaded[name].shape != local(own[name]).shape:
                    raise RuntimeError(f"not the same shape: {name}")
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise CheckpointError(
                f"{found.path} holds a model of another shape ({lines[min(1, len(lines) - 1)]}); "
                "give the model the old shape or start afresh with train.resume=no"
            ) from error
        for name, tensor in own.items():
            local(tensor).copy_(loaded[name])


def _own_parts(tensors: Mapping[str, Mapping[str, Tensor]], old: _Tensors) -> tuple[_Tensors, checkpoint.Rows]:
    """Copies, by file stem, of what this process has to save, and which rows they are of tensors that are cut.

    What every process has is saved by the first. The memory of the `old` copies is used again: fresh pages cost many
    times what copying does.
    """
    copies: _Tensors = {}
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    for stem, named in tensors.items():
        cut = {name: tensor for name, tensor in named.items() if local(tensor) is not tensor}
        if cut:
            stem = f"{stem}-{dist.rank() + 1:05}-of-{dist.world():05}"
            rows[stem] = {name: (span(tensor)[0], len(tensor)) for name, tensor in cut.items()}
        before = old.get(stem, {})
        copy = {n: _copied(local(t), before.get(n)) for n, t in named.items() if n in cut or dist.rank() == 0}
        if copy:
            copies[stem] = copy
    return copies, rows


def _copied(tensor: Tensor, into: Tensor | None) -> Tensor:
    """The tensor's values on the host, in the memory of `into` where that fits."""
    if into is not None and (into.shape, into.dtype) == (tensor.shape, tensor.dtype):
        return into.copy_(tensor.detach())
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def refuse_others(folder: Path, how: str, fingerprint: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` already now where `Saver.resume(how)` will, as what it finds is another run's.

    Only the newest checkpoint's state is read; one that cannot be read is left to `resume`.
    """
    if how == "no":
        return
    path = Path(how) if how != "auto" else folder / f"step-{max(checkpoint.steps(folder), default=-1)}"
    if before := checkpoint.peek(path).get("fingerprint"):
        _check_fingerprint(path, before, fingerprint)


def _check_fingerprint(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    absent, meant = "nothing", _meant_before()
    differ = [
        f"{RECIPE_KEYS.get(key, key)} was {before.get(key, absent)}, is {now.get(key, absent)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, meant.get(key, absent)) != now.get(key, absent)
    ]
    if differ:
        raise CheckpointError(
            f"{path} belongs to another run ({'; '.join(differ[:4])}); "
            "set that back, choose another folder with run=…, or start afresh with train.resume=no"
        )


def _meant_before() -> dict[str, Any]:
    """What a key of the fingerprint that an older Oriole did not know had meant then: its default."""
    train = TrainTable().model_dump(mode="json") | OptimConfig().model_dump(mode="json")
    return flat({"train": train, "model": ModelConfig.defaults()})


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}, so that a difference can be named by its key."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out
