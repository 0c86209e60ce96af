"""Continuous batching: requests join and leave the running batch between steps. Ids in, ids out.

The running requests are rows 0 … n-1 of one cache, without gaps: who joins is appended, and when a row is done the
last one moves into its place. The idea of scheduling each step anew: Yu et al. 2022 (Orca, OSDI); the shape of `step`:
GeeeekExplorer/nano-vllm.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from oriole.errors import ModelError
from oriole.infer.sample import Sampling, sample
from oriole.model.lm import LM, NO_CONTEXT, NO_REASONING, Out
from oriole.model.reasoning import Context, Pondering
from oriole.model.seq2seq import Seq2Seq

__all__ = ["Completion", "Constraint", "Engine", "Event", "Finish", "Pondered"]

Finish = Literal["stop", "length"]
"""stop: an id of `stop_ids` came; length: `max_new_tokens` or the context is used up."""

Constraint = Callable[[Sequence[int]], Tensor | None]
"""From the new ids so far to a boolean mask (V,) of the ids that may follow; None allows all."""

PREFILL_TOKENS = 4096
"""At most so many padded positions in one prefill; a prompt that alone has more is read in pieces of so many. Bounds
the memory of a forward pass."""

ROUND = 64
"""Cache lengths are rounded up to it, so that a slightly longer request does not mean a new cache."""


class Pondered(NamedTuple):
    """How a model with a latent block came to an id."""

    steps: int
    """Iterations made."""
    confidence: float
    """The probability that the likeliest id was the right one, as the model sees it."""


class Event(NamedTuple):
    """One new id of one request. With `finish` it is the last; "stop" says that the id itself is the stop id."""

    request: int
    token: int
    finish: Finish | None
    pondered: Pondered | None = None
    """None for a model without a latent block."""


class Completion(NamedTuple):
    """A finished request: its place in the input, its new ids without the stop id, and why it ended."""

    place: int
    ids: list[int]
    finish: Finish
    pondered: list[Pondered]
    """How each id and the stop id were come by; empty for a model without a latent block."""


@dataclass(eq=False)
class _Request:
    number: int
    ids: list[int]
    """The prompt and what was generated."""
    prompt_length: int
    limit: int
    """Length of `ids` at which the request ends, whatever comes."""
    sampling: Sampling
    generator: torch.Generator
    constraint: Constraint | None = field(default=None)


@final
class Engine:
    """Generates for many requests at once; a request's ids do not depend on which others run beside it.

    Greedy ids are those of the model run without cache on one sequence, up to the rounding of the arithmetic. A model
    has `new_cache`, `prefill` for prompts, which an encoder-decoder reads as sources, and a call for what follows.
    """

    def __init__(
        self,
        model: LM | Seq2Seq,
        max_batch: int = 8,
        context: int | None = None,
        vocab_size: int | None = None,
        pondering: Pondering | None = None,
        beside: Context | None = None,
    ) -> None:
        """At most `max_batch` requests run at a time, the others wait. `context` may shorten the model's own.

        Ids from `vocab_size` on never come: for embeddings that were padded beyond the tokenizer. `pondering` says how
        long a model with a latent block thinks over each id, by default as its config does; `beside`, one row of
        context, is what it looks at in all requests.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch = {max_batch}: at least one request must be able to run")
        self.model = model
        self.max_batch = max_batch
        self.context = min(context or model.config.context, model.config.context)
        self.vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
        r = model.config.reasoning if isinstance(model, LM) else None
        if pondering is not None and r is None:
            raise ModelError(NO_REASONING)
        if beside is not None and (r is None or not r.cross):
            raise ModelError(NO_CONTEXT)
        self.beside = beside
        self.pondering = pondering or (Pondering(r.steps, r.threshold) if r is not None else None)
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._cache: Any = None  # a Cache, or a Seq2SeqCache for that model
        self._submitted = 0

    def submit(self, ids: Sequence[int], sampling: Sampling, constraint: Constraint | None = None) -> int:
        """Queue a prompt; the number under which its events come. `ModelError` for a prompt that leaves no room."""
        ids = list(ids)
        if not ids:
            raise ModelError("the prompt is empty; give the model at least one token to go on from")
        if len(ids) >= self.context:
            raise ModelError(
                f"prompt has {len(ids):,} tokens, the model's context is {self.context:,}; "
                "shorten it or clear the history"
            )
        if max(ids) >= self.vocab_size or min(ids) < 0:
            raise ModelError(
                f"the prompt has an id outside the vocabulary of {self.vocab_size:,}; model and tokenizer differ"
            )
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        limit = min(len(ids) + sampling.max_new_tokens, self.context)
        request = _Request(self._submitted, ids, len(ids), limit, sampling, generator, constraint)
        self._waiting.append(request)
        self._submitted += 1
        return request.number

    @torch.inference_mode()
    def cancel(self, request: int) -> None:
        """Forget a request and free its row; nothing happens if it is finished already."""
        self._waiting = deque(r for r in self._waiting if r.number != request)
        for row, running in enumerate(self._running):
            if running.number == request:
                return self._free(row)

    def __bool__(self) -> bool:
        """Whether anything is waiting or running."""
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> int:
        """Requests that have not started yet."""
        return len(self._waiting)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward pass: the prompts of those who join, or else the next id of everyone. One event for each row."""
        with _evaluating(self.model):
            joining = self._schedule()
            first = len(self._running) - joining if joining else 0
            rows = self._running[first:]
            if not rows:
                return []
            logits, pondered = self._prefill(first) if joining else self._decode()
            return self._settle(first, self._sample(logits[:, : self.vocab_size], rows), pondered)

    def complete(self, requests: Iterable[tuple[Sequence[int], Sampling]]) -> Iterator[Completion]:
        """All the requests, each given when it is finished; the longest prompts go first, which pads least."""
        numbered = sorted(enumerate(requests), key=lambda r: len(r[1][0]), reverse=True)
        place: dict[int, int] = {}
        try:
            for i, (prompt, sampling) in numbered:
                place[self.submit(prompt, sampling)] = i
            ids: dict[int, list[int]] = {request: [] for request in place}
            pondered: dict[int, list[Pondered]] = {request: [] for request in place}
            while place:
                for event in self.step():
                    if event.request not in place:
                        continue  # somebody else's
                    if event.finish != "stop":
                        ids[event.request].append(event.token)
                    if event.pondered is not None:
                        pondered[event.request].append(event.pondered)
                    if event.finish is not None:
                        request = event.request
                        yield Completion(place.pop(request), ids.pop(request), event.finish, pondered.pop(request))
        finally:
            for request in place:
                self.cancel(request)

    def run(self, requests: Iterable[tuple[Sequence[int], Sampling]]) -> list[list[int]]:
        """The new ids of each request without the stop id, in the order of the requests."""
        return [c.ids for c in sorted(self.complete(requests))]

    # --- the parts of a step -----------------------------------------------------------------------------------------

    def _schedule(self) -> int:
        """Let the first in the queue join while there are rows for them; how many did."""
        joining: list[_Request] = []
        longest = 0
        while self._waiting and len(self._running) + len(joining) < self.max_batch:
            longest = max(longest, self._waiting[0].prompt_length)
            if joining and longest * (len(joining) + 1) > PREFILL_TOKENS:
                break
            joining.append(self._waiting.popleft())
        self._running += joining
        if joining:
            self._reserve(len(self._running), max(r.limit for r in self._running))
        return len(joining)

    def _prefill(self, first: int) -> tuple[Tensor, list[Pondered | None]]:
        """Logits (B, V) after the prompts of the rows from `first` on, and how they were come by."""
        assert self._cache is not None
        prompts = [r.ids for r in self._running[first:]]
        lengths = torch.tensor([len(p) for p in prompts], device=self._device)
        width = max(map(len, prompts))
        tokens = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=self._device)
        cache = self._cache.rows(first, len(self._running))
        if isinstance(self.model, Seq2Seq):
            out = self.model.prefill(tokens, lengths, cache)
        else:
            out = self.model.prefill(tokens, lengths, cache, most=PREFILL_TOKENS, **self._thinking(len(prompts)))
        self._cache.keep(first, cache)
        return self.model.head("logits", out.h[:, -1]), _pondered(out)

    def _decode(self) -> tuple[Tensor, list[Pondered | None]]:
        """Logits (B, V) after the last id of every running row, and how they were come by."""
        assert self._cache is not None
        count = len(self._running)
        cache = self._cache.rows(0, count)
        tokens = torch.tensor([[r.ids[-1]] for r in self._running])
        out = self.model(tokens.to(self._device), cache=cache, **self._thinking(count))
        self._cache.keep(0, cache)
        return self.model.head("logits", out.h[:, -1]), _pondered(out)

    def _thinking(self, rows: int) -> dict[str, Any]:
        """How a model with a latent block is called, for so many rows."""
        beside = self.beside and Context(*(x.expand(rows, *x.shape[1:]) for x in self.beside))
        return {} if self.pondering is None else {"pondering": self.pondering, "context": beside}

    def _sample(self, logits: Tensor, rows: list[_Request]) -> list[int]:
        masks = None
        if any(r.constraint for r in rows):
            masks = [r.constraint(r.ids[r.prompt_length :]) if r.constraint else None for r in rows]
        ids = sample(logits, [r.sampling for r in rows], [r.ids for r in rows], [r.generator for r in rows], masks)
        return [int(i) for i in ids.tolist()]

    def _settle(self, first: int, ids: list[int], pondered: list[Pondered | None]) -> list[Event]:
        """Note the new ids of the rows from `first` on and free the rows that are done."""
        events = []
        done = []
        for row, (token, how) in enumerate(zip(ids, pondered, strict=True), first):
            request = self._running[row]
            request.ids.append(token)
            finish: Finish | None = None
            if token in request.sampling.stop_ids:
                finish = "stop"
            elif len(request.ids) >= request.limit:
                finish = "length"
            events.append(Event(request.number, token, finish, how))
            if finish is not None:
                done.append(row)
        for row in reversed(done):  # from the end, so that the row that moves up is never one that is done
            self._free(row)
        return events

    def _free(self, row: int) -> None:
        """Give row `row` to the last running request."""
        last = self._running.pop()
        if row < len(self._running):
            assert self._cache is not None
            self._cache.move(len(self._running), row)
            self._running[row] = last

    def _reserve(self, rows: int, length: int) -> None:
        """A cache of at least so many rows and tokens a row; a larger one takes over what the old one holds."""
        length = min(-(-length // ROUND) * ROUND, self.context)
        old = self._cache
        if old is not None and rows <= len(old.lengths) and length <= old.capacity:
            return
        held = len(old.lengths) if old is not None else 0
        capacity = max(length, old.capacity if old is not None else 0)
        # Doubling keeps the copies few when requests trickle in.
        new = self.model.new_cache(max(held, min(self.max_batch, max(rows, 2 * held))), capacity)
        if old is not None:
            new.take_over(old)
        self._cache = new

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device


def _pondered(out: Out) -> list[Pondered | None]:
    """What became of the last token of each row."""
    if out.thought is None:
        return [None] * len(out.h)
    steps, sure = (x[:, -1].tolist() for x in out.thought)
    return [Pondered(*each) for each in zip(steps, sure, strict=True)]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, whatever the model was doing before."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
