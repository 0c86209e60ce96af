"""What a run may decide by itself: a lower learning rate, a way back from a loss spike, an end before the last step.

Nothing in here touches a tensor: losses and bits per byte come in as numbers, decisions go out, and the loop, which
asks at fixed places, carries them out. All of the state is in the checkpoint, so that a resumed run decides as the
unbroken one would have.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from oriole.config import Config

__all__ = ["Decision", "Smart", "SmartConfig", "outlying"]

ENOUGH = 32
"""Losses that must have been seen before one can be called outlying."""

LEAST_SPREAD = 0.01
"""The spread of the losses is taken for at least this share of their median: a quiet stretch is no reason to panic."""


class SmartConfig(Config):
    """What a run decides by itself; everything is off by default."""

    plateau: bool = False
    """Lower the learning rate when validation stops improving."""
    plateau_patience: int = Field(2, ge=1)
    """Evaluations without an improvement before the learning rate is lowered."""
    plateau_factor: float = Field(0.5, gt=0, lt=1)
    """What the learning rate is multiplied by then."""
    plateau_min: float = Field(0.05, gt=0, le=1)
    """The lowest that plateaus may bring the learning rate to, as a share of the schedule's."""
    early_stop: bool = False
    """End the stage when validation has stopped improving; the model is that of the best evaluation."""
    early_stop_patience: int = Field(4, ge=1)
    """Evaluations without an improvement before the stage ends."""
    min_delta: float = Field(0.001, ge=0)
    """Bits per byte (the mean of the parts) by which an evaluation must be better than the best to count as better."""
    cool: bool = False
    """After a loss spike, lower the learning rate and warm it up again."""
    cool_factor: float = Field(0.5, gt=0, lt=1)
    """What the learning rate is multiplied by after a spike."""
    cool_steps: int = Field(100, ge=1)
    """Steps until it has come back: to where it was after the first spike, to `cool_factor` of that after each other
    one, for the first may be the fault of the data, and the second is that of the rate."""
    rollback: bool = False
    """After a loss spike, go back to the last checkpoint from before it and on with data that was not seen yet."""
    max_rollbacks: int = Field(5, ge=1)
    """How often a stage may go back."""
    spike_window: int = Field(128, ge=ENOUGH)
    """Good losses that the next one is compared with."""
    spike_threshold: float = Field(6.0, gt=0)
    """Robust standard deviations above the median from which a loss is outlying."""
    spike_confirm: int = Field(3, ge=1)
    """Outlying or non-finite losses in a row that make a spike; a single one is a hard batch."""
    spike_look: int = Field(10, ge=1)
    """Steps between two looks at the losses: the host waits for the device then."""
    micro_batch: bool = False
    """Choose the rows of one forward pass by the free memory. The step is the same: its batch, its loss, its data."""

    @property
    def watches(self) -> bool:
        """Whether losses are looked at."""
        return self.cool or self.rollback

    @property
    def compares(self) -> bool:
        """Whether evaluations are compared with each other."""
        return self.plateau or self.early_stop

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share; nothing where nothing is on that could change the result."""
        return self.model_dump(mode="json", exclude={"micro_batch"}) if self.watches or self.compares else {}


What = Literal["lower_lr", "cool", "rollback", "no_rollback", "early_stop", "best", "micro_batch", "back_off"]


@dataclass(frozen=True)
class Decision:
    """One thing decided, for the record and for whoever watches."""

    what: What
    why: str
    numbers: dict[str, Any] = field(default_factory=dict)

    def record(self, step: int) -> dict[str, Any]:
        """The line of metrics.jsonl."""
        return {"event": "smart", "step": step, "what": self.what, "why": self.why, **self.numbers}


@dataclass(frozen=True)
class Spike:
    """Losses that left the others behind."""

    first: int
    """The step (counted from 1) of its first loss."""
    loss: float
    """The last of its losses."""
    usual: float
    """The median of the losses before it, nan when there were too few."""

    def __str__(self) -> str:
        if not math.isfinite(self.loss):
            return f"the loss is not finite since step {self.first}"
        return f"the loss is {self.loss:.3f} instead of {self.usual:.3f} since step {self.first}"


def outlying(loss: float, window: Sequence[float]) -> float:
    """How many robust standard deviations `loss` lies above the median of `window`; inf for nan and inf.

    The deviation is 1.4826 times the median absolute deviation (Huber 1981, section 5.1), which neither a spike nor
    the slope of a falling loss can inflate as they do the plain one; OLMo's SkipStep uses mean + 6 sigma over 128
    steps (Groeneveld et al. 2024). 0 with fewer than ENOUGH losses to compare with.
    """
    if not math.isfinite(loss):
        return math.inf
    if len(window) < ENOUGH:
        return 0.0
    median = statistics.median(window)
    spread = 1.4826 * statistics.median(abs(x - median) for x in window)
    return (loss - median) / max(spread, LEAST_SPREAD * abs(median), 1e-9)


class SpikeWatch:
    """Follows the losses one by one; outlying ones stay out of the window that the next are compared with."""

    def __init__(self, config: SmartConfig) -> None:
        self.config = config
        self.window: list[float] = []
        self.in_a_row = 0

    def look(self, step: int, loss: float) -> Spike | None:
        """Take in the loss of step `step` (counted from 1); a spike once enough outlying ones came in a row."""
        if outlying(loss, self.window) <= self.config.spike_threshold:
            self.in_a_row = 0
            self.window = [*self.window, loss][-self.config.spike_window :]
            return None
        self.in_a_row += 1
        if self.in_a_row < self.config.spike_confirm:
            return None
        usual = statistics.median(self.window) if self.window else math.nan
        spike = Spike(step - self.in_a_row + 1, loss, usual)
        self.in_a_row = 0
        return spike

    def forget(self) -> None:
        """Judge what follows by itself."""
        self.window, self.in_a_row = [], 0


@dataclass
class Patience:
    """How long ago validation was better than ever before."""

    best: float = math.inf
    step: int = -1
    since: int = 0
    """Evaluations since."""

    def better(self, step: int, value: float, min_delta: float) -> bool:
        """Take in one evaluation; whether it is the best so far by more than `min_delta` (nan never is)."""
        if value < self.best - min_delta:
            self.best, self.step, self.since = value, step, 0
            return True
        self.since += 1
        return False


@dataclass
class Cooling:
    """The learning rate after a spike: down at once, and back in a straight line."""

    spikes: int = 0
    start: int = 0
    low: float = 1.0
    high: float = 1.0

    def scale(self, step: int, steps: int) -> float:
        """The factor for step `step` (counted from 0) when it comes back within `steps` steps."""
        return self.low + (self.high - self.low) * min(1.0, max(0, step - self.start) / steps)

    def spike(self, step: int, factor: float, steps: int) -> None:
        """Cool down before step `step`."""
        self.low = self.scale(step, steps) * factor
        self.high *= factor if self.spikes else 1.0
        self.spikes, self.start = self.spikes + 1, step


class Smart:
    """All decisions of one run, and what they rest on."""

    def __init__(self, config: SmartConfig) -> None:
        self.config = config
        self.watch = SpikeWatch(config)
        self.patience = Patience()
        self.plateau_scale = 1.0
        self._plateau_since = 0  # evaluations since the last improvement or lowering
        self.cooling = Cooling()
        self.stopped = False
        """Whether the stage is to end here."""
        self.rollbacks: list[int] = []
        """The steps that were gone back to."""
        self.wasted_tokens = 0
        """Tokens of the steps that were given up."""

    def lr_scale(self, step: int) -> float:
        """What the schedule's learning rate is multiplied by at step `step` (counted from 0)."""
        return self.plateau_scale * self.cooling.scale(step, self.config.cool_steps)

    # --- losses ------------------------------------------------------------------------------------------------------

    def spike(self, losses: Iterable[tuple[int, float]]) -> Spike | None:
        """The first spike in (step, loss), steps counted from 1; what comes after it is not looked at."""
        for step, loss in losses:
            if (found := self.watch.look(step, loss)) is not None:
                return found
        return None

    def go_back_to(self, spike: Spike, saved: Iterable[int]) -> int | None:
        """Which of the `saved` steps to go back to: the newest from before the spike; None to go on.

        Weights saved after the step before the spike may already be its cause. When the newest has been gone back to
        before, it may be as well, and the one before it is taken, if there is one. Chowdhery et al. 2022 (section 5.1)
        go back about 100 steps and skip 200 to 500 batches: the same batches did no harm from other weights.
        """
        if len(self.rollbacks) >= self.config.max_rollbacks:
            return None
        before = sorted(step for step in saved if step < spike.first - 1)
        if len(before) > 1 and before[-1] in self.rollbacks:
            before.pop()
        return before[-1] if before else None

    def rolled_back(self, to: int, state: Mapping[str, Any], wasted: int) -> None:
        """Stand where the checkpoint of step `to`, whose `state` this is, stood; but know that it was gone back to."""
        rollbacks, wasted_tokens, cooling = [*self.rollbacks, to], self.wasted_tokens + wasted, self.cooling
        self.load_state_dict(state)
        self.rollbacks, self.wasted_tokens, self.cooling = rollbacks, wasted_tokens, cooling

    def stayed(self) -> None:
        """A spike was not gone back from: what follows is another landscape."""
        self.watch.forget()

    def cool(self, step: int, why: str) -> Decision:
        """Lower the learning rate from step `step` (counted from 0) on."""
        config = self.config
        self.cooling.spike(step, config.cool_factor, config.cool_steps)
        numbers = {"lr_scale": self.lr_scale(step), "back_to": self.plateau_scale * self.cooling.high}
        return Decision(
            "cool",
            f"{why}: learning rate times {numbers['lr_scale']:.3g}, "
            f"back to {numbers['back_to']:.3g} within {config.cool_steps} steps",
            numbers,
        )

    # --- validation --------------------------------------------------------------------------------------------------

    def validated(self, step: int, bpb: float) -> list[Decision]:
        """Take in the bits per byte (mean of the parts) after `step` steps."""
        config, patience = self.config, self.patience
        if patience.better(step, bpb, config.min_delta):
            self._plateau_since = 0
            return []
        self._plateau_since += 1
        why = f"no evaluation was better than step {patience.step}'s {patience.best:.4f} bits per byte"
        numbers = {"best_step": patience.step, "best": patience.best, "bpb": bpb}
        if config.early_stop and patience.since >= config.early_stop_patience:
            self.stopped = True
            return [Decision("early_stop", f"{why} {_times(patience.since)} in a row: the stage ends", numbers)]
        lower = max(config.plateau_min, self.plateau_scale * config.plateau_factor)
        if config.plateau and self._plateau_since >= config.plateau_patience and lower < self.plateau_scale:
            why = f"{why} {_times(self._plateau_since)} in a row"
            self.plateau_scale, self._plateau_since = lower, 0
            return [Decision("lower_lr", f"{why}: learning rate times {lower:.3g}", numbers | {"lr_scale": lower})]
        return []

    # --- checkpoints and the closing record --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything the next decisions rest on, for JSON."""
        return {
            "window": self.watch.window,
            "in_a_row": self.watch.in_a_row,
            "patience": [None if math.isinf(self.patience.best) else self.patience.best, self.patience.step,
                         self.patience.since],
            "plateau": [self.plateau_scale, self._plateau_since],
            "cooling": [self.cooling.spikes, self.cooling.start, self.cooling.low, self.cooling.high],
            "stopped": self.stopped,
            "rollbacks": self.rollbacks,
            "wasted_tokens": self.wasted_tokens,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self.watch.window, self.watch.in_a_row = list(state["window"]), state["in_a_row"]
        best, *rest = state["patience"]
        self.patience = Patience(math.inf if best is None else best, *rest)
        self.plateau_scale, self._plateau_since = state["plateau"]
        self.cooling = Cooling(*state["cooling"])
        self.stopped = state["stopped"]
        self.rollbacks, self.wasted_tokens = list(state["rollbacks"]), state["wasted_tokens"]

    def summary(self, step: int) -> dict[str, Any]:
        """What of it belongs into the closing record, {} where nothing was on."""
        if not self.config.watches and not self.config.compares:
            return {}
        return {
            "smart": {
                "lr_scale": self.lr_scale(step),
                "spikes": self.cooling.spikes,
                "rollbacks": len(self.rollbacks),
                "wasted_tokens": self.wasted_tokens,
                "best_step": self.patience.step,
                "stopped_early": self.stopped,
            }
        }


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"
