"""Reinforcement learning as a loader: the policy answers prompts, the answers are judged, and become batches.

A rollout is a number of answers and, for each of their tokens, the columns that an objective wants: log-probabilities
of the policy that wrote them, advantages, and what else its `Estimator` finds. `Rollouts` hands it to the loop as
micro-batches of packed documents, some epochs long; then comes the next, written by the policy as it is by then.

The old log-probabilities come from a forward pass over the very micro-batches of the first epoch, in the loop's own
arithmetic, and not from the engine: so the ratio of new to old is exactly 1 until the first update.
"""

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from oriole.infer.engine import Engine
from oriole.infer.sample import Sampling
from oriole.model.lm import LM
from oriole.text.tokenizer import END_OF_TEXT, IM_END, Tokenizer
from oriole.train import dist
from oriole.train.batch import IGNORE, Batch, BestFit, Rows, shifted
from oriole.train.objectives import head_weight, token_log_probs
from oriole.train.prompts import PromptStream, Question
from oriole.train.rewards import Answer, Rewards
from oriole.train.tables import RolloutTable

__all__ = [
    "LEFT_OUT", "STOP", "Estimator", "Forward", "Plan", "Rollout", "Rollouts", "Written", "action_log_probs",
    "action_values", "generate", "pack",
]  # fmt: skip

STOP = (END_OF_TEXT, IM_END)


# --- answers ---------------------------------------------------------------------------------------------------------


class Written(NamedTuple):
    """One answer: its ids, the end mark included, and whether that came."""

    ids: list[int]
    ended: bool


def generate(
    model: LM, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], *, max_batch: int, vocab_size: int
) -> list[Written]:
    """An answer to each prompt, written by the engine, many at a time; the longest prompts first, which pads least."""
    engine = Engine(model, max_batch=max_batch, vocab_size=vocab_size)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    place = {engine.submit(prompts[i], samplings[i]): i for i in order}
    ids: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    while engine:
        for event in engine.step():
            ids[place[event.request]].append(event.token)
            ended[place[event.request]] = event.finish == "stop"
    return [Written(*one) for one in zip(ids, ended, strict=True)]


@dataclass(frozen=True)
class Rollout:
    """N answers, at most A tokens each."""

    places: list[tuple[str, int]]
    """Where the prompt of each stands in the stream."""
    questions: list[Question]
    written: list[Written]
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """(N, A) by name, fp32, on the host."""

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.written), max(len(one.ids) for one in self.written)

    @property
    def mask(self) -> Tensor:
        """(N, A), True on the tokens of the answers."""
        lengths = torch.tensor([len(one.ids) for one in self.written])
        return torch.arange(self.shape[1]) < lengths[:, None]

    @property
    def ended(self) -> Tensor:
        """(N,), True where the end mark came."""
        return torch.tensor([one.ended for one in self.written])


def pack(rollout: Rollout, members: Sequence[int], length: int) -> tuple[Batch, Tensor]:
    """The prompts and answers of `members`, packed into as few rows of `length` tokens as best fit finds.

    The longest documents go first. Returns the batch with no `extra`, and where each position's target stands in the
    flattened columns (R, length), -1 where nothing is trained. Rows are a multiple of the number of processes.
    """
    width = rollout.shape[1]
    room: BestFit[int] = BestFit()
    size = {i: len(rollout.questions[i].ids) + len(rollout.written[i].ids) - 1 for i in members}
    for i in sorted(members, key=lambda i: size[i], reverse=True):  # stable: ties in the given order
        room.add(size[i], i)
    chosen: list[list[int]] = []
    while room.tokens:
        chosen.append(list(room.row(length)))
    count = -(-len(chosen) // dist.world()) * dist.world()
    rows, place = Rows(count, length), np.full((count, length), -1, np.int64)
    for row, some in enumerate(chosen):
        for i in some:
            asked, answer = rollout.questions[i].ids, rollout.written[i].ids
            mask = np.array([0] * len(asked) + [1] * len(answer), np.uint8)
            end = rows.add(row, *shifted(np.array([*asked, *answer], np.int64), mask)).stop
            place[row, end - len(answer) : end] = i * width + np.arange(len(answer))
    return rows.batch(), torch.from_numpy(place)


# --- forward passes --------------------------------------------------------------------------------------------------


def action_log_probs(model: LM, batch: Batch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability and entropy (n,) at the n targets of a batch, and the auxiliary loss of a unit (0-dim).

    Both are those of the distribution that answers are drawn from: of the logits divided by `temperature`.
    """
    out = model(batch.tokens, batch.doc, batch.pos)
    h = out.h.flatten(0, 1)[batch.rows] / temperature
    log_probs, entropy = token_log_probs(h, head_weight(model), batch.targets.flatten()[batch.rows])
    return log_probs, entropy, out.aux


class Forward:
    """Passes over the micro-batches of a rollout, without gradients, in the arithmetic of training."""

    def __init__(self, device: torch.device, dtype: torch.dtype, temperature: float) -> None:
        self.device, self.dtype, self.temperature = device, dtype, temperature

    def log_probs(self, model: LM, packed: Sequence[tuple[Batch, Tensor]], shape: tuple[int, int]) -> Tensor:
        """The log-probability (N, A) of every token of the answers under `model`, fp32."""
        return self._columns(lambda batch: action_log_probs(model, batch, self.temperature)[0], model, packed, shape)

    def values(self, model: LM, packed: Sequence[tuple[Batch, Tensor]], shape: tuple[int, int]) -> Tensor:
        """The value (N, A) that `model` gives the state before every token of the answers, fp32."""
        return self._columns(lambda batch: action_values(model, batch), model, packed, shape)

    @torch.no_grad()
    def _columns(
        self,
        ask: Callable[[Batch], Tensor],
        model: LM,
        packed: Sequence[tuple[Batch, Tensor]],
        shape: tuple[int, int],
    ) -> Tensor:
        was_training = model.training
        model.eval()
        out = torch.zeros(shape[0] * shape[1])
        # Several processes share the work; adding up their zeros changes no bit.
        for batch, place in packed[dist.rank() :: dist.world()]:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                asked = ask(batch.to(self.device))
            out[place.flatten()[batch.rows]] = asked.float().cpu()
        model.train(was_training)
        return dist.sum(out).view(shape)


def action_values(model: LM, batch: Batch) -> Tensor:
    """The value (n,) of the states before the n targets of a batch."""
    h = model(batch.tokens, batch.doc, batch.pos).h.flatten(0, 1)[batch.rows]
    with torch.autocast(h.device.type, enabled=False):  # three digits are too few for a value
        return model.head("value", h.to(torch.promote_types(h.dtype, torch.float32)))


# --- the iterator ----------------------------------------------------------------------------------------------------


class Estimator(Protocol):
    """What a method makes of scored answers."""

    def columns(
        self, rollout: Rollout, scores: Tensor, packed: Sequence[tuple[Batch, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Columns (N, A) and figures of the rollout; `scores` (N,) are fp64, nan where an answer is left out."""
        ...

    def observe(self, metrics: Mapping[str, Tensor]) -> bool:
        """Take note of a step's metrics; whether the rest of the rollout is to be left."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Plan(NamedTuple):
    """How a rollout is divided."""

    samples: int
    """Answers to each prompt."""
    epochs: int
    """Passes over the answers."""
    batch_size: int
    """Answers of a micro-batch."""
    accumulate: int
    """Micro-batches of a step."""
    length: int
    """Tokens of a row."""
    seed: int


class Rollouts:
    """An endless iterator of micro-batches; `gauges` are figures of the rollout that the last one belongs to."""

    computes = True

    def __init__(
        self,
        policy: LM,
        tokenizer: Tokenizer,
        prompts: PromptStream,
        rewards: Rewards,
        estimator: Estimator,
        forward: Forward,
        table: RolloutTable,
        plan: Plan,
    ) -> None:
        self.policy, self.tokenizer, self.prompts, self.rewards = policy, tokenizer, prompts, rewards
        self.estimator, self.forward, self.table, self.plan = estimator, forward, table, plan
        self.gauges: dict[str, float] = {}
        self.rollout: Rollout | None = None
        self._number = -1  # of the rollout
        self._cursor = 0  # micro-batches given of it
        self._answers = 0  # in all
        self._tokens = 0  # of prompts and answers in all
        self._since = time.monotonic()

    @property
    def micro_batches(self) -> int:
        """Of one pass over a rollout."""
        return self.table.prompts * self.plan.samples // self.plan.batch_size

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self.rollout is None or self._cursor == self.micro_batches * self.plan.epochs:
            self._roll_out()
        assert self.rollout is not None
        batch, place = pack(self.rollout, self._members(self._cursor), self.plan.length)
        self._cursor += 1
        columns = {name: column.flatten() for name, column in self.rollout.columns.items()}
        extra = {name: torch.where(place >= 0, c[place.clamp(min=0)], 0.0) for name, c in columns.items()}
        left_out = extra.pop(LEFT_OUT) > 0
        return Batch(batch.tokens, batch.targets.masked_fill(left_out, IGNORE), batch.doc, batch.pos, extra=extra)

    def _members(self, cursor: int) -> list[int]:
        """The answers of a micro-batch; after the first epoch in an order drawn anew."""
        epoch, micro = divmod(cursor, self.micro_batches)
        count = self.micro_batches * self.plan.batch_size
        order = np.arange(count)
        if epoch:
            raw = np.random.PCG64(np.random.SeedSequence((self.plan.seed, self._number, epoch))).random_raw(count)
            order = np.argsort(raw, kind="stable")
        return [int(i) for i in order[micro * self.plan.batch_size : (micro + 1) * self.plan.batch_size]]

    def observe(self, metrics: Mapping[str, Tensor]) -> None:
        """Let the estimator see a step's metrics; it may end the rollout."""
        if self.estimator.observe(metrics):
            self._cursor = self.micro_batches * self.plan.epochs

    # --- a rollout ---------------------------------------------------------------------------------------------------

    def _roll_out(self) -> None:
        self._number += 1
        self._cursor = 0
        asked = [next(self.prompts) for _ in range(self.table.prompts)]
        places = [place for place in asked for _ in range(self.plan.samples)]
        questions = [self.prompts[place] for place in places]
        rollout = Rollout(places, questions, self._write(questions))
        scores, by_name = self.rewards(
            [
                Answer(question.prompt, self._text(one.ids), one.ended)
                for question, one in zip(questions, rollout.written, strict=True)
            ]
        )
        packed = [pack(rollout, self._members(i), self.plan.length) for i in range(self.micro_batches)]
        log_probs = self.forward.log_probs(self.policy, packed, rollout.shape)
        rollout = replace(rollout, columns={"old_log_probs": log_probs})
        columns, figures = self.estimator.columns(rollout, scores, packed)
        left_out = scores.isnan().float()[:, None].expand(rollout.shape).clone()
        self.rollout = replace(rollout, columns={LEFT_OUT: left_out, **rollout.columns, **columns})
        self.gauges = self._figures(rollout, by_name, scores) | figures

    def _write(self, questions: Sequence[Question]) -> list[Written]:
        """The policy's answers; of several processes each writes its share."""
        seeds = np.random.SeedSequence((self.plan.seed, self._number)).generate_state(len(questions), np.uint32)
        samplings = [
            Sampling(
                max_new_tokens=self.table.max_new_tokens, temperature=self.table.temperature, top_k=0, top_p=1.0,
                stop_ids=STOP, seed=int(seed),
            )
            for seed in seeds
        ]  # fmt: skip
        own = range(dist.rank(), len(questions), dist.world())
        written = generate(
            self.policy,
            [questions[i].ids for i in own],
            [samplings[i] for i in own],
            max_batch=self.table.max_batch,
            vocab_size=self.tokenizer.vocab_size,
        )
        if dist.world() == 1:
            return written
        # One row an answer: whether it ended, its length, its ids.
        sheet = torch.zeros(len(questions), self.table.max_new_tokens + 2, dtype=torch.int64)
        for i, one in zip(own, written, strict=True):
            sheet[i, : len(one.ids) + 2] = torch.tensor([one.ended, len(one.ids), *one.ids])
        return [Written(row[2 : row[1] + 2], bool(row[0])) for row in dist.sum(sheet).tolist()]

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i not in STOP])

    def _figures(self, rollout: Rollout, by_name: Mapping[str, Tensor], scores: Tensor) -> dict[str, float]:
        """What TRL calls completions/…, rewards/… and so on."""
        lengths, ended = rollout.mask.sum(1).double(), rollout.ended
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        self._answers += len(lengths)
        self._tokens += int(lengths.sum()) + sum(len(q.ids) for q in rollout.questions)
        out = {
            "episode": float(self._answers),
            "eps": len(lengths) / max(seconds, 1e-9),
            "step_time": seconds / self.micro_batches / self.plan.epochs * self.plan.accumulate,
            "num_tokens": float(self._tokens),
            "completions/clipped_ratio": float((~ended).double().mean()),
            "rewards/left_out": float(scores.isnan().double().sum()),
        }
        for name, chosen in (("length", lengths), ("terminated_length", lengths[ended])):
            kinds = {"mean": chosen.mean(), "min": chosen.amin(), "max": chosen.amax()} if len(chosen) else {}
            out |= {f"completions/{kind}_{name}": float(kinds.get(kind, 0.0)) for kind in ("mean", "min", "max")}
        for name, column in by_name.items():
            known = column[column.isfinite()]
            if len(known):
                out[f"rewards/{name}/mean"] = float(known.mean())
                out[f"rewards/{name}/std"] = float(known.std()) if len(known) > 1 else 0.0
        return out

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the prompts stand and the rollout in work, bit for bit, for JSON."""
        out: dict[str, Any] = {
            "prompts": self.prompts.state_dict(),
            "estimator": self.estimator.state_dict(),
            "number": self._number,
            "cursor": self._cursor,
            "answers": self._answers,
            "tokens": self._tokens,
            "gauges": self.gauges,
            "rollout": None,
        }
        if self.rollout is not None:
            out["rollout"] = {
                "places": [list(place) for place in self.rollout.places],
                "written": [[one.ids, one.ended] for one in self.rollout.written],
                "columns": {name: _to_text(column) for name, column in self.rollout.columns.items()},
            }
        return out

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, in the middle of a rollout's epochs if need be."""
        self.prompts.load_state_dict(state["prompts"])
        self.estimator.load_state_dict(state["estimator"])
        self._number, self._cursor = state["number"], state["cursor"]
        self._answers, self._tokens, self.gauges = state["answers"], state["tokens"], state["gauges"]
        self.rollout = None
        if (saved := state["rollout"]) is not None:
            places = [(str(name), int(number)) for name, number in saved["places"]]
            rollout = Rollout(
                places, [self.prompts[place] for place in places], [Written(*one) for one in saved["written"]]
            )
            columns = {name: _from_text(text).view(rollout.shape) for name, text in saved["columns"].items()}
            self.rollout = replace(rollout, columns=columns)


LEFT_OUT = "left_out"
"""The column that is 1 for answers from which nothing is learnt."""


def _to_text(column: Tensor) -> str:
    """fp32 numbers as text, without rounding and at a third more than their size."""
    return base64.b64encode(column.float().contiguous().numpy().tobytes()).decode("ascii")


def _from_text(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.float32).copy())
