"""Carries out what smart.py decides: the questions that the loop asks at fixed places, and the tensors behind them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from oriole.errors import CheckpointError
from oriole.log import Metrics, say
from oriole.train import checkpoint, dist
from oriole.train.batch import Batch
from oriole.train.guard import out_of_memory
from oriole.train.microbatch import Memory, MicroBatches
from oriole.train.smart import Decision, Smart, SmartConfig, Spike
from oriole.train.state import Saver

__all__ = ["Pilot"]


class Pilot:
    """Learning rate, rollback, early end and micro-batches of one run; all of its state is in the checkpoint.

    With every switch of `SmartConfig` off nothing is decided but one thing: a step that does not fit in the memory is
    done again in smaller pieces.
    """

    def __init__(self, config: SmartConfig, metrics: Metrics, *, regular: int) -> None:
        """`regular`: steps between checkpoints; only these are gone back to, whatever an interruption has saved."""
        self.config, self.smart, self.micro = config, Smart(config), MicroBatches()
        self._metrics, self._regular = metrics, regular
        self._unseen: list[tuple[int, Tensor]] = []  # losses still on the device
        self._last_unseen: list[tuple[int, float]] = []  # those of an interrupted process

    @property
    def stopped(self) -> bool:
        """Whether the stage is to end although steps are left."""
        return self.smart.stopped

    def _say(self, decision: Decision, step: int) -> None:
        self._metrics.write(decision.record(step))
        say(f"step {step}: {decision.why}", "yellow")

    # --- around a step -----------------------------------------------------------------------------------------------

    def prepare(self, step: int, micro: Sequence[Batch], memory: Memory | None, device: torch.device) -> None:
        """Before the first step of a process: choose the rows, where that is wanted and was not done before."""
        if self.config.micro_batch and self.micro.rows is None and memory is not None:
            decision = self.micro.choose(micro, memory, device)
            # Of several processes that go through a step together, the one with the least memory decides.
            self.micro.rows = -dist.agree(-(self.micro.rows or 0)) or None
            if decision is not None:
                self._say(decision, step)

    def smaller(self, error: BaseException, step: int, micro: Sequence[Batch]) -> bool:
        """Whether the step that failed with `error` is worth another try, now in smaller pieces."""
        if not out_of_memory(error):
            return False
        decision = self.micro.back_off(micro)
        if decision is not None:
            self._say(decision, step)
        return decision is not None

    def lr_scale(self, step: int) -> float:
        """Factor of the learning rate at step `step`, counted from 0."""
        return self.smart.lr_scale(step)

    def note(self, step: int, loss: Tensor) -> None:
        """Keep the loss of step `step`, counted from 1, until the next look; it stays on the device."""
        if self.config.watches:
            self._unseen.append((step, loss.detach().clone()))

    # --- looking at the losses ---------------------------------------------------------------------------------------

    def look(self, step: int, due: bool, saver: Saver) -> bool:
        """Whether a spike was found after `step` steps and the run now stands at an earlier one.

        Looks every `spike_look` steps and where `due`; the host waits for the device then.
        """
        if not self.config.watches or not (due or step % self.config.spike_look == 0):
            return False
        spike = self.smart.spike(self._losses())
        self._last_unseen, self._unseen = [], []
        if spike is None:
            return False
        back = self._roll_back(spike, step, saver) if self.config.rollback else False
        now = saver.progress.step
        if not back:
            self.smart.stayed()
        # A step whose loss is not finite was not taken: a lower rate would change nothing.
        if self.config.cool and (back or math.isfinite(spike.loss)):
            self._say(self.smart.cool(now, str(spike)), now)
        if back:
            saver.save()
        return back

    def _losses(self) -> list[tuple[int, float]]:
        values = torch.stack([loss for _, loss in self._unseen]).tolist() if self._unseen else []
        return [*self._last_unseen, *zip((step for step, _ in self._unseen), values, strict=True)]

    def _roll_back(self, spike: Spike, step: int, saver: Saver) -> bool:
        """Weights, optimizer and progress of an earlier checkpoint; data and random numbers go on from here."""
        saver.wait()
        saved = dist.told(lambda: checkpoint.steps(saver.folder))
        # An interruption saved in between; a run that was not interrupted has only the regular ones.
        regular = [s for s in saved if self._regular and s % self._regular == 0]
        while saved:
            to = self.smart.go_back_to(spike, regular)
            to = self.smart.go_back_to(spike, saved) if to is None else to
            if to is None:
                break
            try:
                found = saver.find(str(saver.folder / f"step-{to}"))
            except CheckpointError as error:
                say(f"checkpoint step-{to} is not used: {error}", "yellow")
                saved, regular = [s for s in saved if s != to], [s for s in regular if s != to]
                continue
            assert found is not None, "a path is found or refused"
            wasted = saver.progress.tokens - found.state["tokens"]
            saver.go_back(found)
            self.smart.rolled_back(to, found.state["pilot"]["smart"], wasted)
            n, most = len(self.smart.rollbacks), self.config.max_rollbacks
            why = f"{spike}: back to step {to} and on with data not seen yet (rollback {n} of {most})"
            self._say(Decision("rollback", why, {"to": to, "wasted_tokens": wasted}), step)
            return True
        n = len(self.smart.rollbacks)
        why = f"the {n} rollbacks are used up" if n >= self.config.max_rollbacks else "no checkpoint from before it"
        self._say(Decision("no_rollback", f"{spike}: going on, for there is {why}", {}), step)
        return False

    # --- validation --------------------------------------------------------------------------------------------------

    def validated(self, step: int, bpb: float | None) -> None:
        """Take in an evaluation's bits per byte, the mean of the parts; None: it had none."""
        if self.config.compares and bpb is not None:
            for decision in self.smart.validated(step, bpb):
                self._say(decision, step)

    def take_best(self, saver: Saver) -> None:
        """At the end, where a stage may stop early: the weights of the best evaluation instead of the last step's."""
        best = dist.told(lambda: checkpoint.best(saver.folder)) if self.config.early_stop else None
        if best is None or best == saver.progress.step:
            return
        found = saver.find(str(saver.folder / f"step-{best}"))
        assert found is not None, "a path is found or refused"
        saver.load_model(found)
        saver.progress.bpb, score = found.state["bpb"], found.state["score"]
        why = f"the model is that of step {best}, with {score:.4f} bits per byte the best of the stage"
        self._say(Decision("best", why, {"best_step": best, "best": score}), saver.progress.step)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything, for JSON; the host waits for the device."""
        unseen = [(step, loss if math.isfinite(loss) else None) for step, loss in self._losses()]
        return {"smart": self.smart.state_dict(), "micro": self.micro.state_dict(), "unseen": unseen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self.smart.load_state_dict(state["smart"])
        self.micro.load_state_dict(state["micro"])
        self._last_unseen = [(step, math.nan if loss is None else loss) for step, loss in state["unseen"]]
        self._unseen = []
