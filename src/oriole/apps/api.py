"""The Python API: a model that answers in text.

from oriole import Oriole
m = Oriole("runs/demo").to(device="cuda", dtype=torch.bfloat16)
m.generate("你好！", [("Hi!", "Hello! What can I do for you?")], temperature=0.3)
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, Unpack, final

import torch
from pydantic import Field, field_validator

from oriole.apps.conversation import History, conversation, to_message, turn
from oriole.apps.found import find_model, stop_ids
from oriole.apps.thinking import AnswerText, Piece, Reasoned, budget
from oriole.config import Config, validate
from oriole.errors import ConfigError, DataError, ModelError, ResourceError
from oriole.infer.engine import Constraint, Engine
from oriole.infer.sample import Sampling
from oriole.model.adapter import is_adapter, load_adapted
from oriole.model.config import ReasoningConfig
from oriole.model.folder import load_model
from oriole.model.lm import LM
from oriole.model.reasoning import Context, Pondering
from oriole.model.seq2seq import Seq2Seq
from oriole.model.seq2seqfolder import is_seq2seq, load_seq2seq
from oriole.text.template import Message, render
from oriole.text.tokenizer import IM_END, Tokenizer

__all__ = ["Generation", "History", "Options", "Oriole", "Placement", "Reasoned", "to_message"]

BATCH = 32
"""Answers that are generated side by side."""

NOT_SAMPLED = {"stop", "thinking", "think_tokens"}
"""Fields of `Generation` that the engine's sampling does not know."""


class Generation(Config):
    """How an answer is made; the keyword arguments of every method below and the keys of `oriole chat`."""

    max_new_tokens: int = 512
    """At most this many tokens, the end mark among them."""
    temperature: float = 0.8
    """Randomness; 0 always takes the likeliest token (greedy)."""
    top_p: float = 0.95
    """Choose among the fewest likeliest tokens that together have this probability; 1 is off."""
    top_k: int = 50
    """Choose among this many likeliest tokens; 0 is off."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest one's probability; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred already become less likely; 1 is off."""
    no_repeat_ngram: int = 0
    """No sequence of this many tokens occurs twice in prompt and answer; 0 is off."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    seed: int | None = None
    """The same seed gives the same answer to the same prompt, alone or in a batch."""
    thinking: bool | None = None
    """false: no thoughts, in Qwen3's way: an empty `<think>` block begins the answer; else as the model likes."""
    think_tokens: int | None = Field(None, ge=1)
    """At most so many tokens in a `<think>` block, which is ended then; null: no limit of its own."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, stop: Any) -> Any:
        return (stop,) if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _no_empty_string(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty string stands everywhere; give strings of at least one character")
        return stop

    def sampling(self, stop_ids: tuple[int, ...]) -> Sampling:
        """The engine's settings; stop strings are not among them, because they are found in the text, nor is what is
        said of thoughts: the prompt begins the answer, and a constraint ends the block."""
        return Sampling(stop_ids=stop_ids, **self.model_dump(include=set(Generation.model_fields) - NOT_SAMPLED))


class Options(TypedDict, total=False):
    """The fields of `Generation`, for type checkers; `stop` may also be a single string."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    no_repeat_ngram: int
    stop: str | Sequence[str]
    seed: int | None
    thinking: bool | None
    think_tokens: int | None


class Placement(Config):
    """Where a model runs and in what arithmetic."""

    device: str = "auto"
    """auto (an accelerator if there is one), cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on an accelerator that has it, else fp32."""


@final
class Oriole:
    """A model with its tokenizer. Safe to use from several threads, each call generates on its own."""

    def __init__(self, path: str | Path) -> None:
        """Load a run (its newest stage that can chat), a stage, or a model or adapter folder; fp32 on the CPU until
        `to`.

        `ModelError` when there is no model there or it does not fit its tokenizer.
        """
        self.folder = find_model(path)
        self.model: LM | Seq2Seq = _load(self.folder)
        self.tokenizer = Tokenizer.load(self.folder)
        self.stop_ids = stop_ids(self.folder)
        if self.tokenizer.vocab_size > self.model.config.vocab_size:
            raise ModelError(
                f"{self.folder} has a tokenizer of {self.tokenizer.vocab_size:,} ids but a model of "
                f"{self.model.config.vocab_size:,}; put the tokenizer there that the model was trained with"
            )

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the model to a device and cast it, in place. `ResourceError` for a device that is not here."""
        if device is not None:
            _require(torch.device(device))
        self.model.to(device=device, dtype=dtype)
        return self

    def place(self, placement: Placement) -> Self:
        """`to` with names and `auto`, as the commands take them."""
        device, dtype = _resolve(placement)
        return self.to(device, dtype)

    @property
    def can_chat(self) -> bool:
        """Whether the model was fine-tuned to answer; one that was only pretrained can but go on writing."""
        return IM_END in self.stop_ids

    @property
    def plain_questions(self) -> bool:
        """Whether the model reads the last question alone, without roles."""
        return isinstance(self.model, Seq2Seq) and self.model.config.source == "question"

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.model.config.context

    # --- answering ---------------------------------------------------------------------------------------------------

    def generate(
        self, query: str, history: History | None = None, *, system: str | None = None, **options: Unpack[Options]
    ) -> str:
        """The answer to `query` after `history`, which is not changed.

        `options` are the fields of `Generation`. When the conversation outgrows the context, its oldest turns are left
        out, so that a quarter of the context (or `max_new_tokens`, if less) is free for the answer; the system prompt
        stays. `ModelError` when the query alone is too long, or when the model cannot chat.
        """
        return self.batch_generate([query], [history or ()], system=system, **options)[0]

    def stream_generate(
        self, query: str, history: History | None = None, *, system: str | None = None, **options: Unpack[Options]
    ) -> Iterator[tuple[str, list[Any]]]:
        """`generate`, piece by piece: (answer so far, history with this turn), at least once.

        Only whole characters come, never a part of a stop string, and the last answer is that of `generate`. The new
        history has the form of the one given, pairs by default; messages keep what the model thought in a `<think>`
        block, which is no part of the answer. Closing the iterator ends the work.
        """
        how = _generation(options)
        prompt = self.prompt(conversation(query, history, system), how)
        past = list(history or ())

        def stream() -> Iterator[tuple[str, list[Any]]]:  # apart, so that mistakes are reported at the call
            answer, reasoning = "", None
            for _, piece in self.answers([prompt], how):
                if piece.thought:
                    reasoning = (reasoning or "") + piece.text
                else:
                    answer += piece.text
                if (piece.text and not piece.thought) or (piece.last and not answer):
                    yield answer, past + turn(query, answer, past, reasoning)

        return stream()

    def batch_generate(
        self,
        queries: Sequence[str],
        histories: Sequence[History | None] | None = None,
        *,
        system: str | None = None,
        **options: Unpack[Options],
    ) -> list[str]:
        """The answers to several queries, each after its own history; the same as one by one, only faster."""
        how = _generation(options)
        if histories is not None and len(histories) != len(queries):
            raise DataError(f"{len(queries)} queries but {len(histories)} histories; give one history for each query")
        prompts = [
            self.prompt(conversation(query, history, system), how)
            for query, history in zip(queries, histories or [None] * len(queries), strict=True)
        ]
        return self._texts(prompts, how)

    def generate_with_reasoning(
        self,
        query: str,
        history: History | None = None,
        *,
        system: str | None = None,
        passages: Sequence[str] = (),
        max_steps: int | None = None,
        threshold: float | None = None,
        **options: Unpack[Options],
    ) -> Reasoned:
        """`generate` for a model with a latent block, with the steps and the confidence of every token.

        The block is applied at most `max_steps` times for a token, and no more once the model is surer than `threshold`
        (1: it never halts before); both as in the model's config where they are not given. `passages` are no part of
        the conversation: a block that was trained to (`reasoning.cross`) looks at their states. `ModelError` for a
        model without such a block.
        """
        model = self.model
        table = model.config.reasoning if isinstance(model, LM) else None
        if table is None or not isinstance(model, LM):
            raise ModelError(
                f"{self.folder} holds a model without a latent block to reason with; train one with "
                "model.reasoning.steps=4, or call generate"
            )
        given = {"steps": max_steps, "threshold": threshold}
        table = validate(
            ReasoningConfig,
            table.model_dump() | {k: v for k, v in given.items() if v is not None},
            "max_steps, threshold",
        )
        how = _generation(options)
        beside = None
        if passages:
            with torch.inference_mode():
                beside = model.context_of([[self.tokenizer.encode(passage) for passage in passages]])
        engine = self.engine(1, Pondering(table.steps, table.threshold), beside)
        engine.submit(
            self.prompt(conversation(query, history, system), how), how.sampling(self.stop_ids), self._ends(how)
        )
        text = AnswerText(self.tokenizer, how.stop)
        events, pieces = [], []
        while not text.ended:
            events += engine.step()
            pieces.append(text.add(events[-1].token, events[-1].finish))
        pondered = [event.pondered for event in events if event.pondered is not None]
        return Reasoned(
            text="".join(piece.text for piece in pieces if not piece.thought),
            reasoning="".join(piece.text for piece in pieces if piece.thought),
            ids=tuple(event.token for event in events),
            steps=tuple(one.steps for one in pondered),
            confidence=tuple(one.confidence for one in pondered),
        )

    def text_generate(self, prompt: str, **options: Unpack[Options]) -> str:
        """What the model writes after `prompt`, the completion only; no roles, so that any model can do it."""
        if not prompt:
            raise DataError("the prompt is empty; give the model some text to go on from")
        return self._texts([self.tokenizer.encode(prompt)], _generation(options))[0]

    # --- below: ids, for the other apps ------------------------------------------------------------------------------

    def require_chat(self) -> None:
        """`ModelError` if the model cannot chat."""
        if not self.can_chat:
            raise ModelError(
                f"{self.folder} holds a pretrained model that cannot chat yet; fine-tune it first (oriole train "
                "RECIPE/sft), or let it go on writing with text_generate"
            )

    def prompt(self, messages: Sequence[Message], how: Generation) -> list[int]:
        """The ids of a conversation that waits for an answer, its oldest turns left out where it is too long."""
        self.require_chat()
        room = self.context - min(how.max_new_tokens, self.context // 4)
        system = [m for m in messages[:1] if m.role == "system"]
        rest = messages[len(system) :]
        turns = [i for i, m in enumerate(rest) if m.role == "user"] or [0]

        def rendered(turn: int) -> list[int]:
            return self.rendered([*system, *rest[turn:]], how.thinking)

        whole = rendered(0)
        if len(whole) <= room or len(turns) == 1:
            shortest = whole
        else:  # sizes fall as turns go, so the first turn that fits is found by halving
            fitting = bisect.bisect_left(turns, True, key=lambda turn: len(rendered(turn)) <= room)
            shortest = rendered(turns[min(fitting, len(turns) - 1)])
        if len(shortest) >= self.context:
            raise ModelError(
                f"the question has {len(shortest):,} tokens with its system prompt, the model's context is "
                f"{self.context:,}; shorten it"
            )
        return shortest

    def rendered(self, messages: Sequence[Message], thinking: bool | None = None) -> list[int]:
        """The ids of a whole conversation as the model reads it: in its roles, or the last question alone."""
        if self.plain_questions:
            return self.tokenizer.encode(messages[-1].content)
        return render(messages, self.tokenizer, generation=True, thinking=thinking)[0]

    def engine(self, batch: int, pondering: Pondering | None = None, beside: Context | None = None) -> Engine:
        """A fresh engine for the model that gives only ids the tokenizer knows; the rest as of `Engine`."""
        return Engine(self.model, batch, vocab_size=self.tokenizer.vocab_size, pondering=pondering, beside=beside)

    def _ends(self, how: Generation) -> Constraint | None:
        """What ends a `<think>` block when its budget is used up."""
        return None if how.think_tokens is None else budget(how.think_tokens, self.tokenizer.vocab_size)

    def answers(
        self, prompts: Iterable[Sequence[int]], how: Generation, batch: int = BATCH
    ) -> Iterator[tuple[int, Piece]]:
        """(place of the prompt, what is new) as the answers grow, several side by side.

        Prompts are taken from the iterable only when there is room for them.
        """
        sampling = how.sampling(self.stop_ids)
        engine, ends = self.engine(batch), self._ends(how)
        queue = enumerate(prompts)
        writing: dict[int, tuple[int, AnswerText]] = {}
        while True:
            while engine.waiting < batch and (following := next(queue, None)) is not None:
                place, ids = following
                writing[engine.submit(ids, sampling, ends)] = place, AnswerText(self.tokenizer, how.stop)
            if not writing:
                return
            for request, token, finish, _ in engine.step():
                place, text = writing[request]
                piece = text.add(token, finish)
                if text.ended:
                    engine.cancel(request)
                    del writing[request]
                yield place, piece

    def _texts(self, prompts: Sequence[Sequence[int]], how: Generation) -> list[str]:
        """Whole answers in the order of the prompts; the longest prompts go first, which pads least."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        texts = [""] * len(prompts)
        for place, piece in self.answers((prompts[i] for i in order), how):
            texts[order[place]] += "" if piece.thought else piece.text
        return texts


def _generation(options: Options) -> Generation:
    """The options as checked settings; `ConfigError` names an unknown one and the nearest known."""
    return validate(Generation, dict(options), "generate")


# --- folders and devices ---------------------------------------------------------------------------------------------


def _load(folder: Path) -> LM | Seq2Seq:
    """The model in a folder: adapters with what they belong to, an encoder-decoder, or a decoder alone."""
    if is_adapter(folder):
        return load_adapted(folder)
    return load_seq2seq(folder) if is_seq2seq(folder) else load_model(folder)


def _require(device: torch.device) -> None:
    here = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    if (device.index or 0) >= here.get(device.type, 1):
        names = ", ".join(name for name, count in here.items() if count)
        raise ResourceError(f"there is no device '{device}' here; use one of: {names}")


def _resolve(placement: Placement) -> tuple[torch.device, torch.dtype]:
    name = placement.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device = {name!r} is not a device; use auto, cpu, cuda, cuda:1 or mps") from error
    _require(device)
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    auto = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return device, names[auto if placement.dtype == "auto" else placement.dtype]
