"""What each switch of smart training is worth under the disturbance that it is meant for, and when nothing is wrong.

    python -m bench.smart steps=400 seeds=3
    python -m bench.smart cases=clean,overfitting seeds=1 json=/tmp/smart.json

A small model learns the built-in corpus, once for each seed and setting; all settings of a case share their data, steps
and learning rate. The table: bits per byte of validation at the end (mean of the languages; mean and range over the
seeds), tokens trained and how many of them were given up by rollbacks, and what was decided.
"""

import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.record import save, settings
from oriole.demo.corpus import write_corpus
from oriole.errors import Interrupted, OrioleError
from oriole.log import console
from oriole.model.config import ModelConfig
from oriole.model.lm import LM
from oriole.text.formats import read_docs
from oriole.text.mixture import Mixture
from oriole.text.shards import Shards, View, encode_docs, write_shards
from oriole.text.tokenizer import train_tokenizer
from oriole.train.batch import IGNORE, Batch, Packer
from oriole.train.loop import TrainConfig, Trainer
from oriole.train.objectives import LMObjective, Loss
from oriole.train.optim import OptimConfig
from oriole.train.smart import SmartConfig
from oriole.train.validate import bits_per_byte

DEFAULTS = {
    "cases": "", "steps": 400, "seeds": 3, "dim": 128, "layers": 4, "batch": 16, "seq": 128, "vocab": 1024,
    "lr": 4e-3, "evals": 25, "dtype": "fp32", "json": "",
}  # fmt: skip

LANGS = ("zh", "en")


@dataclass(frozen=True)
class Case:
    """One disturbance, and the settings that meet it; the first of them has every switch off."""

    what: str
    sides: Mapping[str, Mapping[str, Any]]
    """By name: keys of `SmartConfig`, `clip`, and `narrow`: more rows than a quarter of the batch do not fit."""
    lr: float = 1.0
    """Factor of the learning rate."""
    schedule: str = "cosine"
    noise: bool = False
    """Bursts of batches with random tokens."""
    nan: bool = False
    """Bursts of batches whose loss is not a number."""
    wreck: bool = False
    """Once the weights turn into nan."""
    documents: int | None = None
    """So few documents to learn from, over and over."""


OFF: dict[str, Any] = {}
COOL = {"cool": True}
BACK = {"rollback": True}
BOTH = {"rollback": True, "cool": True}
AUTO = {"clip": "auto"}
STOP = {"early_stop": True, "early_stop_patience": 5}
PLATEAU = {"plateau": True, "plateau_patience": 2}
ALL = {**BOTH, **AUTO, **PLATEAU, "early_stop": True, "early_stop_patience": 8, "micro_batch": True}
SPIKES = {"off": OFF, "cool": COOL, "rollback": BACK, "rollback + cool": BOTH, "clip auto": AUTO, "all": ALL}

CASES: dict[str, Case] = {
    "clean": Case("nothing is wrong", {"off": OFF, "clip auto": AUTO, "all": ALL}),
    "high lr": Case(
        "10 times the learning rate, and it never falls",
        {"off": OFF, "plateau": PLATEAU, "clip auto": AUTO, "all": ALL},
        lr=10,
        schedule="constant",
    ),
    "noise": Case("3 bursts of 8 batches of random tokens", SPIKES, noise=True),
    "nan loss": Case("3 bursts of 8 losses that are nan", {"off": OFF, "rollback": BACK, "all": ALL}, nan=True),
    "nan weights": Case("once the weights turn into nan", {"off": OFF, "rollback": BACK, "all": ALL}, wreck=True),
    "overfitting": Case(
        "60 documents a language, over and over",
        {"off": OFF, "early stop": STOP, "plateau": PLATEAU, "all": ALL},
        documents=60,
    ),
    "memory": Case(
        "room for a quarter of the batch",
        {"enough memory": OFF, "back-off": {"narrow": True}},
    ),
}


class Bursts(Packer):
    """The packer, with random tokens in the batches numbered in `bad`."""

    def __init__(self, *args: Any, bad: set[int], vocab: int) -> None:
        super().__init__(*args)
        self.bad, self.vocab, self.given = bad, vocab, 0

    def __next__(self) -> Batch:
        batch = super().__next__()
        self.given += 1
        if self.given in self.bad:
            noise = torch.Generator().manual_seed(self.given)
            random = torch.randint(16, self.vocab, batch.tokens.shape, generator=noise)
            targets = torch.where(batch.targets == IGNORE, IGNORE, random.roll(-1, 1))
            batch = dataclasses.replace(batch, tokens=random, targets=targets)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"packer": super().state_dict(), "given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["packer"])
        self.given = state["given"]


class Disturbed(LMObjective):
    """Next-token cross-entropy that loses its loss or breaks the weights at some calls, or has little memory."""

    def __init__(self, nan: set[int], wreck: int, rows: int) -> None:
        super().__init__()
        self.nan, self.wreck, self.rows, self.calls = nan, wreck, rows, 0

    def __call__(self, model: LM, batch: Batch) -> Loss:
        if self.rows and len(batch.tokens) > self.rows:
            raise torch.OutOfMemoryError("more rows than there is room for")
        self.calls += 1
        if self.calls == self.wreck:
            with torch.no_grad():
                model.norm.weight.fill_(math.nan)
        loss = super().__call__(model, batch)
        return loss._replace(sum=loss.sum * math.nan) if self.calls in self.nan else loss


@dataclass
class Result:
    """One run."""

    bpb: float
    tokens: int
    wasted: int
    seconds: float
    decisions: list[str]
    ended: str = ""
    """The error that ended it, if one did."""
    curve: list[tuple[int, float]] = field(default_factory=list)


class Records(list[dict[str, Any]]):
    """Keeps the records that a run would write to metrics.jsonl."""

    def write(self, record: Mapping[str, Any]) -> None:
        self.append(dict(record))


def main() -> None:
    """Train, measure and print."""
    chosen = settings(DEFAULTS)
    names = [name for name in str(chosen["cases"]).split(",") if name] or list(CASES)
    if unknown := set(names) - set(CASES):
        raise SystemExit(f"no case {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    console.quiet = True  # the runs' own remarks
    results: dict[str, dict[str, list[Result]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        shards = demo_shards(Path(folder), int(chosen["vocab"]))
        for name in names:
            for side, switches in CASES[name].sides.items():
                for seed in range(int(chosen["seeds"])):
                    made = _run(CASES[name], switches, seed, shards, Path(folder), chosen)
                    results.setdefault(name, {}).setdefault(side, []).append(made)
                    told = made.ended or f"{made.bpb:.4f} bits per byte, {made.seconds:.0f} s"
                    print(f"{name}, {side}, seed {seed}: {told}; {made.decisions}", file=sys.stderr, flush=True)
    Console(width=150).print(_table(results))
    runs = {name: {side: [vars(r) for r in some] for side, some in sides.items()} for name, sides in results.items()}
    save("smart", chosen, {"runs": runs}, str(chosen["json"]))


def demo_shards(folder: Path, vocab: int) -> dict[str, dict[str, Shards]]:
    """Training and validation shards of each language of the built-in corpus."""
    write_corpus(folder / "corpus")
    files = {
        (split, lang): folder / "corpus" / f"{split}_{lang}.jsonl" for split in ("pretrain", "val") for lang in LANGS
    }
    texts = ((lang, doc.text) for lang in LANGS for doc in read_docs([files["pretrain", lang]]))
    tok = train_tokenizer(texts, vocab, sample_bytes=2_000_000)
    made: dict[str, dict[str, Shards]] = {"pretrain": {}, "val": {}}
    for (split, lang), path in files.items():
        made[split][lang] = write_shards(encode_docs(read_docs([path]), tok), tok, folder / f"{split}-{lang}")
    return made


def _run(
    case: Case, switches: Mapping[str, Any], seed: int, shards: dict[str, dict[str, Shards]], folder: Path,
    chosen: Mapping[str, Any],
) -> Result:  # fmt: skip
    steps, length, rows = int(chosen["steps"]), int(chosen["seq"]), int(chosen["batch"])
    bursts = {int(share * steps) + n for share in (0.35, 0.6, 0.8) for n in range(1, 9)}
    config = {key: value for key, value in switches.items() if key not in ("clip", "narrow")}
    parts = {
        lang: View(some, torch.arange(min(len(some), case.documents or len(some))).numpy())
        for lang, some in shards["pretrain"].items()
    }
    stream = Mixture(parts, dict.fromkeys(LANGS, 0.5), seed=seed, length=length)
    vocab = int(chosen["vocab"])
    torch.manual_seed(seed)
    dim = int(chosen["dim"])
    shape = ModelConfig(
        vocab_size=vocab, dim=dim, num_layers=int(chosen["layers"]), num_heads=dim // 64, num_kv_heads=1, head_dim=64,
        ffn_dim=dim * 8 // 3 // 16 * 16, context=length,
    )  # fmt: skip
    model = LM(shape)

    def evaluate(step: int) -> dict[str, Any]:
        return {
            "bpb": {lang: bits_per_byte(model, shards["val"][lang], length=length, max_tokens=4000) for lang in LANGS}
        }

    records = Records()
    every = max(1, steps // int(chosen["evals"]))
    with tempfile.TemporaryDirectory(dir=folder) as run:
        trainer = Trainer(
            model,
            Disturbed(bursts if case.nan else set(), int(0.6 * steps) if case.wreck else 0,
                      rows // 4 if switches.get("narrow") else 0),
            Bursts(stream, rows, length, bad=bursts if case.noise else set(), vocab=vocab),
            TrainConfig(steps=steps, seed=seed, eval_every=every, checkpoint_every=every, compile=False, device="cpu",
                        dtype=chosen["dtype"]),
            OptimConfig(lr=float(chosen["lr"]) * case.lr, clip=switches.get("clip", 1.0), schedule=case.schedule),
            Path(run),
            metrics=records,
            evaluate=evaluate,
            smart=SmartConfig.model_validate(config),
        )  # fmt: skip
        start = time.perf_counter()
        ended = ""
        try:
            trainer.fit()
        except Interrupted:
            raise
        except OrioleError as error:
            ended = str(error)
    curve = [(r["step"], sum(r["bpb"].values()) / len(LANGS)) for r in records if r["event"] == "eval"]
    bpb = trainer.now.bpb or {}
    return Result(
        bpb=sum(bpb.values()) / len(LANGS) if not ended else math.nan,
        tokens=trainer.now.tokens + trainer.pilot.smart.wasted_tokens,
        wasted=trainer.pilot.smart.wasted_tokens,
        seconds=time.perf_counter() - start,
        decisions=[r["what"] for r in records if r["event"] == "smart"],
        ended=ended,
        curve=curve,
    )


def _table(results: Mapping[str, Mapping[str, list[Result]]]) -> Table:
    table = Table()
    for column in ("disturbance", "switches", "bits per byte", "range", "M tokens", "given up", "decided"):
        table.add_column(column, justify="left" if column in ("disturbance", "switches", "decided") else "right")
    for name, sides in results.items():
        for side, some in sides.items():
            good = [r.bpb for r in some if not r.ended and math.isfinite(r.bpb)]
            decided = Counter(what for r in some for what in r.decisions)
            told = ", ".join(f"{what} {n / len(some):.3g}" for what, n in decided.items())
            ended = sum(bool(r.ended) for r in some)
            table.add_row(
                CASES[name].what if side == next(iter(sides)) else "",
                side,
                f"{statistics.mean(good):.4f}" if good else "none",
                f"{min(good):.3f}–{max(good):.3f}" if good else "",
                f"{statistics.mean(r.tokens for r in some) / 1e6:.2f}",
                f"{statistics.mean(r.wasted for r in some) / 1e6:.2f}",
                told + (f"; {ended} of {len(some)} gave up" if ended else ""),
            )
        table.add_section()
    return table


if __name__ == "__main__":
    main()
