"""The update of the weights: a schedule, one global clip and a finite check that never waits for the device.

The fused AdamW kernels divide every gradient by `optimizer.grad_scale` and do nothing at all where
`optimizer.found_inf` is 1; `torch.amp.GradScaler` talks to them in this way. Here the same two tensors carry the
clipping, the loss scale of fp16 and the check for NaN, so that a step costs one pass over the gradients (their norm)
and no host synchronisation.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from oriole.config import Config
from oriole.errors import CheckpointError
from oriole.model.costs import OptimizerName
from oriole.train import schedules
from oriole.train.clipping import NormWindow
from oriole.train.groups import groups_of
from oriole.train.muon import Muon
from oriole.train.orthogonal import Method
from oriole.train.parallel import as_rows_of, local, whole
from oriole.train.schedules import Schedule, lr_at

__all__ = ["OptimConfig", "Optimizer"]

BY_ROWS = ("exp_avg", "exp_avg_sq", "momentum")
"""State of which a process holds the rows that it holds of the parameter; it has the whole of all other."""

FUSED_SKIPS = ("cpu", "cuda")
"""Devices whose fused kernel honours grad_scale and found_inf; elsewhere the host looks at the norm itself."""

FIRST_LOSS_SCALE = 2.0**16
LOSS_SCALE_GROWTH_STEPS = 2000

Positive = Annotated[float, Field(gt=0)]


class OptimConfig(Config):
    """The optimizer and its learning rate."""

    kind: OptimizerName = "adamw"
    """adamw (Loshchilov & Hutter 2019) or adafactor (Shazeer & Stern 2018) for everything; muon or normuon for the
    matrices, with adamw for embeddings, head and norms (muon.py)."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW; of Adafactor, whose steps are relative to the size of a weight, 1e-2 is usual."""
    muon_lr: float = Field(0.02, gt=0)
    """Peak learning rate of Muon, on the same schedule."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of the matrices that are not embeddings (with muon: nor heads)."""
    orthogonalise: Method = "polar-express"
    """muon and normuon only: the polynomials that make an update orthogonal (orthogonal.py)."""
    cautious: bool = False
    """muon and normuon only: decay a weight only where the update, too, brings it nearer to zero."""
    schedule: Schedule = "cosine"
    """Learning rate after the warmup (schedules.py); `plateau` is constant, for smart.plateau to lower it."""
    warmup: float = Field(0.02, ge=0)
    """Linear warmup: below 1 a share of all steps, else a number of steps (not used by `onecycle`)."""
    min_lr: float = Field(0.1, ge=0, le=1)
    """Learning rate of the last step as a share of the peak (not used by `constant` and `plateau`)."""
    decay: float = Field(0.4, gt=0, le=1)
    """`wsd` only: the share of all steps, at the end, that decay linearly."""
    cycles: int = Field(3, ge=1)
    """`sgdr` only: how many cosines."""
    cycle_mult: float = Field(2.0, ge=1)
    """`sgdr` only: length of a cosine, as a multiple of the one before."""
    rise: float = Field(0.3, gt=0, lt=1)
    """`onecycle` only: the share of all steps that rise to the peak."""
    clip: Positive | Literal["auto"] = 1.0
    """Global gradient norm above which gradients are scaled down to it; auto: the 0.9 quantile of the last 128 finite
    norms (clipping.py)."""

    @model_validator(mode="after")
    def _reaches_its_end(self) -> "OptimConfig":
        schedules.check(self.schedule, self.min_lr)
        return self


@runtime_checkable
class HasFusedRows(Protocol):
    """A model, or several in one, that says which of its matrices are fused ones, and of how many rows each."""

    def fused_rows(self) -> dict[str, tuple[int, ...]]: ...


@runtime_checkable
class HasSignSteps(Protocol):
    """A model, or several in one, that says which parameters move by the sign of their gradient, and how far."""

    def sign_steps(self) -> dict[str, float]: ...


class _AdamW(torch.optim.AdamW):
    """AdamW with the two tensors that its fused kernels look for."""

    grad_scale: Tensor
    found_inf: Tensor


class Optimizer:
    """The weights' update: schedule, clip, finite check; Muon for its matrices, AdamW or Adafactor for the rest.

    `loss_scale` is for fp16: multiply the loss by `scale` before the backward pass; it halves whenever a gradient
    overflows and doubles after 2,000 good steps (Micikevicius et al. 2018).
    """

    def __init__(self, model: nn.Module, config: OptimConfig, total: int, *, loss_scale: bool = False) -> None:
        self.config, self.total = config, total
        self.lr_scale = 1.0
        """Factor of all learning rates beside the schedule; part of the saved state."""
        self._names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        steps = model.sign_steps() if isinstance(model, HasSignSteps) else {}
        groups = groups_of(model, muon=config.kind in ("muon", "normuon"), signed=steps)
        self._signed = [(model.get_parameter(name), steps[name]) for name in groups.signed]
        """Parameters that move by the sign of their gradient, and how far."""
        self._parameters = [p for name, p in model.named_parameters() if p.requires_grad and name not in groups.signed]
        device = self._parameters[0].device
        # Adafactor has no kernel that skips: torch's looks at several norms on the host anyway.
        self._fused_skips = device.type in FUSED_SKIPS and config.kind != "adafactor"
        self._muon = _muon(model, groups.muon, config) if groups.muon else None
        self._inner = _inner(
            [
                {"params": [model.get_parameter(n) for n in groups.decayed], "weight_decay": config.weight_decay},
                {"params": [model.get_parameter(n) for n in groups.plain], "weight_decay": 0.0},
            ],
            config,
            fused=self._fused_skips,
        )
        self.scale: Tensor | None = torch.full((), FIRST_LOSS_SCALE, device=device) if loss_scale else None
        """Factor of the loss (fp16 only)."""
        self._window = NormWindow(device) if config.clip == "auto" else None
        self.clip = torch.tensor(0.0 if config.clip == "auto" else config.clip, device=device)
        """The norm at which the last step was clipped, on the device."""
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        """Updates left out so far, on the device."""
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        """Updates left out since the last good one, on the device."""

    def rate(self, step: int) -> float:
        """Learning rate of AdamW or Adafactor in step `step`: the schedule's, times `lr_scale`."""
        return self.lr_scale * lr_at(step, self.total, self.config)

    def step(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Update the weights by their gradients and forget those; returns (gradient norm, 1.0 if skipped).

        Both stay on the device. Nothing is updated, not even moments and step counts, when the norm or the
        `loss` is not finite.
        """
        grads = [p.grad for p in self._parameters if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(grads))
        scale = self.scale if self.scale is not None else torch.ones_like(norm)
        norm = norm / scale
        bad = (~(norm.isfinite() & loss.isfinite())).float()
        if self._window is not None:
            self.clip = self._window.threshold()
            self._window.add(norm, bad)
        divisor = scale * ((norm + 1e-6) / self.clip).clamp(min=1.0)

        share = self.rate(step) / self.config.lr
        for group in self._inner.param_groups:
            group["lr"] = self.config.lr * share
        if self._muon is not None:
            self._muon.step(self.config.muon_lr * share, self.config.weight_decay, divisor, bad)
        if isinstance(self._inner, _AdamW) and self._fused_skips:
            self._inner.grad_scale, self._inner.found_inf = divisor, bad
            self._inner.step()
        elif not bad:
            torch._foreach_div_(grads, divisor)
            self._inner.step()
        for parameter, length in self._signed:
            if parameter.grad is not None:
                local(parameter).data.sub_(local(parameter.grad).sign() * (length * (1 - bad)))
        for parameter in (*self._parameters, *(p for p, _ in self._signed)):
            parameter.grad = None

        if self.scale is not None:
            torch._amp_update_scale_(self.scale, self._good_steps, bad, 2.0, 0.5, LOSS_SCALE_GROWTH_STEPS)
        skipped = bad.to(torch.int64)
        self.skipped += skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped
        return norm, bad

    def gauges(self) -> dict[str, Tensor]:
        """What a record of the last step shows beside its gradient norm: the `clip` threshold where it moves."""
        return {} if self._window is None else {"clip": self.clip}

    def tensors(self) -> dict[str, Tensor]:
        """Everything to be saved: `<parameter>.<exp_avg|exp_avg_sq|momentum|…>` and the counters."""
        out = {
            f"{self._names[id(parameter)]}.{key}": value
            for parameter, state in self._inner.state.items()
            for key, value in state.items()
        }
        if self._muon is not None:
            out |= {f"{self._names[id(p)]}.{key}": tensor for p, key, tensor in self._muon.tensors()}
        out["oriole.lr_scale"] = torch.tensor(self.lr_scale, dtype=torch.float64)
        if self._window is not None:
            out["oriole.norms"] = self._window.norms
        out["oriole.skipped"] = self.skipped
        out["oriole.skipped_in_a_row"] = self.skipped_in_a_row
        if self.scale is not None:
            out |= {"oriole.scale": self.scale, "oriole.good_steps": self._good_steps}
        return out

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors()` gave; `CheckpointError` when a tensor is missing or has another shape.

        A loss scale is taken over where both sides have one: a run may go on in another dtype.
        """
        left = dict(tensors)
        for group in self._inner.param_groups:
            for parameter in group["params"]:
                name = self._names[id(parameter)]
                if f"{name}.step" in left:  # else it never had a gradient
                    self._inner.state[parameter] = self._state(parameter, name, left)
        if self._muon is not None:
            for parameter, key, tensor in self._muon.tensors():
                name = f"{self._names[id(parameter)]}.{key}"
                local(tensor).copy_(_take(left, name, local(tensor).shape))
        self.lr_scale = float(left.pop("oriole.lr_scale", torch.ones(())))  # absent before 2026-11-26
        device = self.skipped.device
        if self._window is not None:
            self._window.norms = _take(left, "oriole.norms", self._window.norms.shape).to(device)
        self.skipped = _take(left, "oriole.skipped", ()).to(device)
        self.skipped_in_a_row = _take(left, "oriole.skipped_in_a_row", ()).to(device)
        scale, good_steps = left.pop("oriole.scale", None), left.pop("oriole.good_steps", None)
        if self.scale is not None and scale is not None and good_steps is not None:
            self.scale, self._good_steps = scale.to(device), good_steps.to(device)
        if left:
            raise CheckpointError(f"the optimizer's state has {_some(left)}, which this model does not have")

    def _state(self, parameter: nn.Parameter, name: str, left: dict[str, Tensor]) -> dict[str, Tensor]:
        """What AdamW or Adafactor keeps of one parameter, taken out of `left`."""
        state = {
            key: as_rows_of(_take(left, f"{name}.{key}", shape).to(parameter.device, parameter.dtype), parameter)
            for key, shape in _state_shapes(local(parameter).shape, self.config.kind).items()
        }
        # The fused CUDA kernel of AdamW counts on the device, all others on the host.
        step = _take(left, f"{name}.step", ()).to(parameter.device if self._fused_skips else "cpu", torch.float32)
        return {"step": step, **state}


def _muon(model: nn.Module, names: tuple[str, ...], config: OptimConfig) -> Muon:
    fused = model.fused_rows() if isinstance(model, HasFusedRows) else {}
    return Muon(
        [model.get_parameter(name) for name in names],
        {place: fused[name] for place, name in enumerate(names) if name in fused},
        method=config.orthogonalise,
        normalise=config.kind == "normuon",
        cautious=config.cautious,
    )


def _inner(groups: list[dict[str, Any]], config: OptimConfig, *, fused: bool) -> "_AdamW | torch.optim.Adafactor":
    if config.kind == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.lr)
    return _AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _state_shapes(given: Iterable[int], kind: OptimizerName) -> dict[str, tuple[int, ...]]:
    shape = tuple(given)
    if kind != "adafactor":
        return {"exp_avg": shape, "exp_avg_sq": shape}
    if len(shape) < 2:
        return {"variance": shape}
    return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


def _take(tensors: dict[str, Tensor], name: str, shape: Iterable[int]) -> Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise CheckpointError(f"the optimizer's state lacks {name}")
    if tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(f"the optimizer's {name} has shape {tuple(tensor.shape)}, the model needs {tuple(shape)}")
    return tensor.clone()


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
