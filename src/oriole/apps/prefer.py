"""Preference pairs from a model's own answers: `oriole data prefer`.

Prompts come from chats. With `chosen = "data"` the chat's own answer is preferred to one that a weaker model gives (an
earlier checkpoint, as Phi2-mini-Chinese does); with `chosen = "best"` the best of several samples to the worst. Who is
better says a judge: the rules of text.judge, or a reward model. Pairs of answers that are nearly the same, or equally
good, teach nothing and are dropped and counted.

The output grows by whole lines, and OUTPUT.report.json says how far it is; a second call goes on there.
"""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from oriole.apps.api import Generation, Oriole, Placement
from oriole.apps.evaluate import Answer, each_answer
from oriole.apps.gate import Score, rewards
from oriole.config import read_toml
from oriole.errors import DataError, raise_for_os_error
from oriole.log import track
from oriole.text.formats import Skipped, expand, read_chats
from oriole.text.judge import judge
from oriole.text.ruleschat import dice_of_pairs
from oriole.text.shards import held_out
from oriole.text.template import Chat, Message, message_dict, render

__all__ = ["PreferConfig", "bias", "prefer", "report", "summary"]

SCHEMA = 1

CHUNK = 8
"""Batches of answers between two times that the output is written."""

BIASED = 0.65
"""From this share of pairs with the longer (or the shorter) answer chosen, length is said to be a hint."""


class PreferConfig(Generation, Placement):
    """The keys of `oriole data prefer`."""

    input: list[str] = Field(default_factory=list)
    """Files or globs of chats; by default those that the run's sft stage was trained on, without what it held out."""
    output: Path | None = None
    """Where the pairs go, as JSON Lines; by default preference.jsonl in the run. A file that is there is continued."""
    checkpoint: str = ""
    """Who answers: a model, stage, or training checkpoint ("step-40" is one of the run's sft stage). Default: with
    chosen = "data" the earliest checkpoint of sft that was kept, else the run's newest chat model."""
    chosen: Literal["data", "best"] = "data"
    """The preferred answer: the chat's own, or the best of the samples."""
    samples: int = Field(0, ge=0)
    """Answers to each prompt; 0: one with chosen = "data", else eight."""
    judge: Literal["rules", "reward"] = "rules"
    """Who says which answer is better: rules (right, language, repetition, form) or a reward model."""
    reward_model: Path | None = None
    """The reward model's folder; by default that of the run's stage reward."""
    similarity: float = Field(0.9, gt=0)
    """Pairs at least this similar are dropped: Dice of the sets of pairs of neighbouring characters."""
    limit: int = Field(0, ge=0)
    """At most so many chats, from all files in turn; 0: all."""
    skip_bad: bool = False
    """Count records that cannot be read and go on, instead of stopping at the first."""
    batch_size: int = Field(64, ge=1)
    """Answers that are generated side by side."""
    max_new_tokens: int = 256
    """Longest answer, its end mark included."""
    seed: int | None = 0
    """Of the answers; each has its own from it."""

    @property
    def count(self) -> int:
        """Answers to each prompt."""
        return self.samples or (1 if self.chosen == "data" else 8)

    def generation(self, seed: int) -> Generation:
        """How the answers are made, `seed` later than the first."""
        keys = self.model_dump(include=set(Generation.model_fields))
        return Generation(**keys | {"seed": None if self.seed is None else self.seed + seed})


@dataclass(frozen=True)
class _Row:
    """A chat: what is asked, and what the data answers."""

    prompt: tuple[Message, ...]
    answer: str
    source: str
    lang: str


# --- the work --------------------------------------------------------------------------------------------------------


def prefer(run: Path, oriole: Oriole, how: PreferConfig, reward: Score | None = None) -> dict[str, Any]:
    """Write the pairs; the report says how many there are, what was dropped and why, and what length gives away.

    `oriole` answers; `reward` judges, where it is given. `DataError` when the output belongs to other settings, another
    model or other files.
    """
    oriole.require_chat()
    output = how.output or run / "preference.jsonl"
    files = _files(run, how)
    total = sum(1 for _ in _rows(run, files, how))
    if not total:
        raise DataError(f"{', '.join(map(str, files))}: no chat ends with an answer in plain text; name other files")
    made_from = _made_from(oriole, how, files)
    counts = _take_up(output, made_from)
    rows = itertools.islice(_rows(run, files, how), counts.rows, None)
    try:
        with output.open("ab") as file, track("answering", total, "chats", counts.rows) as bar:
            while some := list(itertools.islice(rows, max(1, CHUNK * how.batch_size // how.count))):
                for record in _pairs(oriole, some, how, reward, counts):
                    counts.bytes += file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
                file.flush()
                counts.rows += len(some)
                _write(_report_path(output), made_from, counts)
                bar.update(len(some), pairs=f"{counts.pairs:,}")
    except OSError as error:
        raise_for_os_error(error, "writing", output)
    return {"output": str(output), **report(counts)}


def _pairs(
    oriole: Oriole, rows: Sequence[_Row], how: PreferConfig, reward: Score | None, counts: "_Counts"
) -> Iterator[dict[str, Any]]:
    """The pairs that these chats give, in their order; what gives none is counted."""
    # Every chat has its own seeds, so that the pairs do not depend on where the work was taken up.
    one = how.generation(counts.rows * how.count)
    fitting = [(place, row) for place, row in enumerate(rows) if _fits(oriole, row, how)]
    seeds = [place * how.count + n for place, _ in fitting for n in range(how.count)]
    said: list[list[Answer]] = [[] for _ in fitting]
    prompts = [row.prompt for _, row in fitting for _ in range(how.count)]
    answers = dict(each_answer(oriole, prompts, one, how.batch_size, seeds))
    for n in range(len(prompts)):
        said[n // how.count].append(answers[n])
    for _ in range(len(rows) - len(fitting)):
        counts.drop("prompt too long")
    kept = [row for _, row in fitting]
    for row, own, scores in zip(kept, said, _scores(kept, said, how, reward), strict=True):
        pair = _pair(row, own, scores, how)
        if isinstance(pair, str):
            counts.drop(pair)
            continue
        sizes = [len(oriole.tokenizer.encode(pair[side])) for side in ("chosen", "rejected")]
        counts.add(pair, *sizes)
        yield pair


def _fits(oriole: Oriole, row: _Row, how: PreferConfig) -> bool:
    """Whether the whole prompt leaves room for an answer."""
    prompt = len(render(row.prompt, oriole.tokenizer, generation=True)[0])
    return prompt + min(how.max_new_tokens, oriole.context // 4) <= oriole.context


def _scores(
    rows: Sequence[_Row], said: Sequence[Sequence[Answer]], how: PreferConfig, reward: Score | None
) -> list[list[float]]:
    """Of each chat's samples and, behind them, of the data's own answer where that is the chosen one."""
    own = how.chosen == "data"
    if reward is None:
        return [
            [judge(row.prompt, a.text, accepted=[row.answer], ended=a.ended).score for a in answers]
            + [judge(row.prompt, row.answer, accepted=[row.answer]).score] * own
            for row, answers in zip(rows, said, strict=True)
        ]
    asked = [
        (row.prompt, text)
        for row, answers in zip(rows, said, strict=True)
        for text in [*(a.text for a in answers), *[row.answer] * own]
    ]
    given = iter(rewards(reward, asked))
    return [list(itertools.islice(given, len(answers) + own)) for answers in said]


def _pair(row: _Row, answers: Sequence[Answer], scores: Sequence[float], how: PreferConfig) -> dict[str, Any] | str:
    """The record of a pair, or why there is none."""
    texts = [*(a.text for a in answers), row.answer]
    places = [i for i, answer in enumerate(answers) if answer.text.strip()]
    if not places:
        return "empty answer"
    worst = min(places, key=lambda i: scores[i])
    best = len(answers) if how.chosen == "data" else max(places, key=lambda i: scores[i])
    if not scores[worst] < scores[best]:
        return "as good"
    similarity = dice_of_pairs(texts[best], texts[worst])
    if similarity >= how.similarity:
        return "too similar"
    return {
        "prompt": [message_dict(m) for m in row.prompt],
        "chosen": texts[best],
        "rejected": texts[worst],
        **({"source": row.source} if row.source else {}),
        **({"lang": row.lang} if row.lang else {}),
        "scores": [round(scores[best], 4), round(scores[worst], 4)],
        "similarity": round(similarity, 4),
    }


# --- chats -----------------------------------------------------------------------------------------------------------


def _files(run: Path, how: PreferConfig) -> list[Path]:
    """The files that are named, or those of the run's sft stage."""
    if how.input:
        return expand(how.input, Path())
    table = _sft_recipe(run)
    root = Path(table["data"])
    if not root.is_dir() and (run / "data").is_dir():  # the built-in corpus of a run that was moved
        root = run / "data"
    globs = [
        glob
        for part in table.get("parts", {}).values()
        if part.get("format") != "text"
        for glob in part.get("files", ())
    ]
    if not globs:
        raise DataError(f"the sft stage of {run} names no files of chats; say which to use with input=FILE.jsonl")
    return expand(globs, root)


def _sft_recipe(run: Path) -> dict[str, Any]:
    path = run / "sft" / "recipe.toml"
    if not path.exists():
        raise DataError(f"{run} has no sft stage whose chats could be used; name some with input=FILE.jsonl")
    return read_toml(path)


def _rows(run: Path, files: Sequence[Path], how: PreferConfig) -> Iterator[_Row]:
    """The chats of all files in turn that end with an answer in plain text; those that sft held out are passed over."""
    holdout = 0.0
    if not how.input:
        table = _sft_recipe(run)
        if not all(part.get("val") for part in table["parts"].values() if part.get("format") != "text"):
            holdout = float(table.get("eval", {}).get("holdout", 0.005))
    skipped = Skipped() if how.skip_bad else None
    streams = [read_chats(path, skip_bad=skipped) for path in files]
    in_turn = (chat for turn in itertools.zip_longest(*streams) for chat in turn if chat is not None)
    usable = (row for chat in in_turn if (row := _row(chat, holdout)) is not None)
    return itertools.islice(usable, how.limit or None)


def _row(chat: Chat, holdout: float) -> _Row | None:
    *prompt, last = chat.messages
    if not prompt or prompt[-1].role not in ("user", "tool") or last.role != "assistant" or chat.tools:
        return None
    if last.tool_calls or last.reasoning is not None or not last.content.strip():
        return None
    if any(m.tool_calls or m.role == "tool" for m in prompt):
        return None
    if holdout and held_out("\x00".join(m.content for m in chat.messages), holdout):
        return None
    return _Row(tuple(prompt), last.content, chat.source, chat.lang)


# --- how far it is, and what it says ---------------------------------------------------------------------------------


@dataclass
class _Counts:
    """What was done; kept beside the output."""

    rows: int = 0
    """Chats that are done with."""
    bytes: int = 0
    """Length of the output after them."""
    pairs: int = 0
    longer: int = 0
    """Pairs whose chosen answer has more tokens."""
    equal: int = 0
    """Pairs whose answers have the same number of tokens."""
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    """Of all chosen and of all rejected answers."""
    scores: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Sums over the chosen and the rejected answers."""
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, why: str) -> None:
        self.dropped[why] = self.dropped.get(why, 0) + 1

    def add(self, pair: Mapping[str, Any], chosen: int, rejected: int) -> None:
        self.pairs += 1
        self.longer += chosen > rejected
        self.equal += chosen == rejected
        self.tokens = [self.tokens[0] + chosen, self.tokens[1] + rejected]
        self.scores = [a + b for a, b in zip(self.scores, pair["scores"], strict=True)]


def report(counts: _Counts) -> dict[str, Any]:
    """The counts as a person wants them; `chosen_longer` is a share of the pairs of different length."""
    n = max(1, counts.pairs)
    return {
        "chats": counts.rows,
        "pairs": counts.pairs,
        "dropped": dict(sorted(counts.dropped.items())),
        "mean_tokens": {"chosen": round(counts.tokens[0] / n, 2), "rejected": round(counts.tokens[1] / n, 2)},
        "chosen_longer": round(counts.longer / (counts.pairs - counts.equal), 4)
        if counts.pairs > counts.equal
        else None,
        "mean_score": {"chosen": round(counts.scores[0] / n, 4), "rejected": round(counts.scores[1] / n, 4)},
    }


def summary(made: Mapping[str, Any]) -> str:
    """The report of `prefer` in words."""
    lines = [f"{made['pairs']:,} pairs of {made['chats']:,} chats in {made['output']}"]
    if made["dropped"]:
        lines.append("dropped: " + ", ".join(f"{n:,} {why}" for why, n in made["dropped"].items()))
    if made["pairs"]:
        size, score = made["mean_tokens"], made["mean_score"]
        lines.append(f"mean score: chosen {score['chosen']:.3f}, rejected {score['rejected']:.3f}")
        lines.append(f"mean length: chosen {size['chosen']:.1f} tokens, rejected {size['rejected']:.1f}; {bias(made)}")
    return "\n".join(lines)


def bias(made: Mapping[str, Any]) -> str:
    """How far length alone tells the chosen answer, in words."""
    longer = made["chosen_longer"]
    if longer is None:
        return "all pairs are of equal length"
    said = f"of answers of different length the longer one is chosen in {100 * longer:.0f} %"
    if 1 - BIASED < longer < BIASED:
        return said
    return f"{said}: length gives away which is better, and a model may learn that instead"


def _made_from(oriole: Oriole, how: PreferConfig, files: Sequence[Path]) -> dict[str, Any]:
    """What the pairs depend on."""
    free = {"input", "output", "limit", "batch_size", "device", "dtype"}
    weights = sum(float(tensor.double().abs().sum()) for tensor in oriole.model.state_dict().values())
    return {
        "settings": how.model_dump(mode="json", exclude=free),
        "model": f"{weights:.9g}",
        "files": [[path.name, path.stat().st_size] for path in files],
    }


def _report_path(output: Path) -> Path:
    return output.with_name(output.name.removesuffix(".jsonl") + ".report.json")


def _take_up(output: Path, made_from: Mapping[str, Any]) -> _Counts:
    """The counts of an output that is to be continued, which is cut to its last whole chunk; else new ones."""
    path = _report_path(output)
    try:
        if not path.exists():
            if output.exists() and output.stat().st_size:
                raise DataError(f"{output} is there already, but was not made here: choose another output")
            output.parent.mkdir(parents=True, exist_ok=True)
            return _Counts()
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("schema") != SCHEMA:
            raise DataError(
                f"{path} has schema {found.get('schema')}, this Oriole reads {SCHEMA}; choose another output"
            )
        changed = [key for key in made_from if found["made_from"].get(key) != made_from[key]]
        if changed:
            raise DataError(
                f"{output} was made from other {' and '.join(changed)}: choose another output, or remove it together "
                f"with {path.name}"
            )
        counts = _Counts(**found["counts"])
        with output.open("r+b") as file:
            file.truncate(counts.bytes)
        return counts
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is broken ({error}); remove it together with {output}") from error
    except OSError as error:
        raise_for_os_error(error, "reading", output)


def _write(path: Path, made_from: Mapping[str, Any], counts: _Counts) -> None:
    """Replace the file, so that it is whole whenever it is read."""
    table = {"schema": SCHEMA, "made_from": made_from, "counts": asdict(counts), "report": report(counts)}
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    part.write_text(json.dumps(table, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
