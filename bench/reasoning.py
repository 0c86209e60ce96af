"""What it is worth to apply a block several times before answering: chains of relations and long sums.

    python -m bench.reasoning
    python -m bench.reasoning steps=4000 dim=192 layers=3 seeds=3 json=/tmp/reasoning.json

Three models learn the questions of `oriole.demo.hops`, which take one step to `hops`, in the same order and with the
same optimizer: with a latent block applied `iterations` times; a plain one of equal parameters (a block more instead);
and a deeper plain one that does as much arithmetic for a token. Questions of one step are all shown, of the longer ones
`held` are held out. An answer is right when every token of it, the end mark included, is the likeliest one, which is
exact match of the greedy answer.

The tables: exact match on held-out questions by their steps, for each number of iterations in use; how sure the model
is and how often it is right (ECE, of tokens and of whole answers); and what halting saves at each threshold.
"""

import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.record import save, settings
from oriole.demo.hops import Question, chains, split_questions, sums
from oriole.demo.world import build_world
from oriole.infer.calibration import calibration_error
from oriole.model.config import ModelConfig
from oriole.model.lm import LM
from oriole.model.reasoning import Pondering
from oriole.text.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer
from oriole.train.batch import IGNORE, Batch
from oriole.train.objectives import LMObjective
from oriole.train.optim import OptimConfig, Optimizer

DEFAULTS = {
    "steps": 2000, "seeds": 1, "first_seed": 0, "dim": 128, "layers": 1, "latent": 1, "iterations": 4, "hops": 4,
    "families": 28, "sums": 4000, "held": 0.1, "batch": 96, "lr": 4e-3, "muon_lr": 0.02, "vocab": 512, "tested": 400,
    "kinds": "chain,sum", "lang": "en", "sides": "reasoning,plain,deep", "step_embedding": False, "json": "",
}  # fmt: skip

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


class Data(NamedTuple):
    """Questions as ids, padded: (N, T) each."""

    questions: list[Question]
    tokens: Tensor
    targets: Tensor
    doc: Tensor

    def batch(self, rows: Tensor | slice) -> Batch:
        tokens, doc = self.tokens[rows], self.doc[rows]
        longest = int((doc >= 0).sum(1).max())
        pos = torch.arange(longest).expand(len(tokens), longest)
        return Batch(tokens[:, :longest], self.targets[rows][:, :longest], doc[:, :longest], pos)


def main() -> None:
    """Train, measure and print."""
    chosen = settings(DEFAULTS)
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(int(chosen["first_seed"]), int(chosen["first_seed"]) + int(chosen["seeds"])):
        train, held, tokenizer = _questions(chosen, seed)
        for side in str(chosen["sides"]).split(","):
            torch.manual_seed(seed)
            model = LM(_shape(side, tokenizer.vocab_size, train.tokens.shape[1], chosen))
            start = time.perf_counter()
            loss = _fit(model, train, chosen, seed)
            seconds = time.perf_counter() - start
            result = _measure(model, held) | {"loss": loss, "seconds": seconds, "parameters": model.config.num_params()}
            results.setdefault(side, []).append(result)
            print(
                f"{side}, seed {seed}: loss {loss:.3f}, {seconds:.0f} s; {result['exact']}", file=sys.stderr, flush=True
            )
    for table in _tables(results):
        Console(width=140).print(table)
    save("reasoning", chosen, {"runs": results}, str(chosen["json"]))


def _questions(chosen: Mapping[str, Any], seed: int) -> tuple[Data, Data, Tokenizer]:
    """What is trained on, what is tested, and the tokenizer of both."""
    rng = random.Random(f"hops {seed}")
    world = build_world(seed, 0.0, int(chosen["families"]))
    train: list[Question] = []
    held: list[Question] = []
    for kind in str(chosen["kinds"]).split(","):
        every = [
            q
            for steps in range(1, int(chosen["hops"]) + 1)
            for q in (
                chains(world, steps, chosen["lang"]) if kind == "chain" else sums(steps, int(chosen["sums"]), rng)
            )
        ]
        shown, hidden = split_questions(every, float(chosen["held"]), rng)
        train += shown
        for steps in range(2, int(chosen["hops"]) + 1):
            fitting = [q for q in hidden if q.steps == steps]
            held += rng.sample(fitting, min(len(fitting), int(chosen["tested"])))
    texts = ((str(chosen["lang"]), f"{q.text}\n{q.answer}") for q in train)
    tokenizer = train_tokenizer(texts, int(chosen["vocab"]))
    return _encoded(train, tokenizer), _encoded(held, tokenizer), tokenizer


def _encoded(questions: list[Question], tokenizer: Tokenizer) -> Data:
    pairs = [(tokenizer.encode(q.text + "\n"), [*tokenizer.encode(q.answer), END_OF_TEXT]) for q in questions]
    longest = max(len(asked) + len(answer) for asked, answer in pairs) - 1
    tokens = torch.zeros(len(pairs), longest, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORE)
    doc = torch.full_like(tokens, -1, dtype=torch.int32)
    for row, (asked, answer) in enumerate(pairs):
        ids = torch.tensor(asked + answer)
        n = len(ids) - 1
        tokens[row, :n], doc[row, :n] = ids[:-1], 0
        targets[row, len(asked) - 1 : n] = ids[len(asked) :]
    return Data(questions, tokens, targets, doc)


def _shape(side: str, vocab: int, context: int, chosen: Mapping[str, Any]) -> ModelConfig:
    dim, latent, iterations = int(chosen["dim"]), int(chosen["latent"]), int(chosen["iterations"])
    layers = int(chosen["layers"]) + {"reasoning": 0, "plain": latent, "deep": latent * iterations}[side]
    table = {"steps": iterations, "layers": latent, "step_embedding": bool(chosen["step_embedding"])}
    return ModelConfig.model_validate({
        "vocab_size": vocab, "dim": dim, "num_layers": layers, "num_heads": dim // 32, "num_kv_heads": dim // 32,
        "head_dim": 32, "ffn_dim": dim * 8 // 3 // 16 * 16, "context": context + 1,
        "reasoning": table if side == "reasoning" else None,
    })  # fmt: skip


def _fit(model: LM, train: Data, chosen: Mapping[str, Any], seed: int) -> float:
    """Train on batches in which every kind and number of steps is as frequent as any other; the last losses' mean."""
    steps, objective = int(chosen["steps"]), LMObjective()
    config = OptimConfig(kind="muon", lr=float(chosen["lr"]), muon_lr=float(chosen["muon_lr"]), betas=(0.9, 0.98),
                         weight_decay=0.05, min_lr=0.0)  # fmt: skip
    optimizer = Optimizer(model, config, steps)
    groups: dict[tuple[str, int], list[int]] = {}
    for place, q in enumerate(train.questions):
        groups.setdefault((q.kind, q.steps), []).append(place)
    pools = [torch.tensor(places) for places in groups.values()]
    draw = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    model.train()
    for step in range(steps):
        counts = torch.bincount(
            torch.randint(len(pools), (int(chosen["batch"]),), generator=draw), minlength=len(pools)
        )
        rows = [p[torch.randint(len(p), (n,), generator=draw)] for p, n in zip(pools, counts.tolist(), strict=True)]
        batch = train.batch(torch.cat(rows))
        loss = objective(model, batch)
        mean = loss.sum / objective.weight(batch)
        mean.backward()  # type: ignore[no-untyped-call]
        optimizer.step(step, mean.detach())
        last = loss.metrics.get("last_loss", loss.sum.detach()) / objective.weight(batch)
        losses.append(float(last))
        if step % 250 == 249:
            print(f"  step {step + 1}: {statistics.fmean(losses[-50:]):.3f}", file=sys.stderr, flush=True)
    model.eval()
    return statistics.fmean(losses[-50:])


class Seen(NamedTuple):
    """What a model does with N questions of T tokens; (N, T) but for the first."""

    exact: Tensor
    """Whether the whole answer is right (N,)."""
    right: Tensor
    asked: Tensor
    """Whether it is a token of an answer."""
    steps: Tensor
    sure: Tensor


@torch.inference_mode()
def _look(model: LM, held: Data, pondering: Pondering | None) -> Seen:
    parts = []
    for start in range(0, len(held.tokens), 256):
        at = slice(start, start + 256)
        out = model(held.tokens[at], held.doc[at], pondering=pondering)
        asked = held.targets[at] != IGNORE
        right = (model.head("logits", out.h).argmax(-1) == held.targets[at]) & asked
        steps, sure = out.thought or (torch.ones_like(held.tokens[at]), torch.ones(right.shape))
        parts.append(Seen((right | ~asked).all(1), right, asked, steps, sure))
    return Seen(*map(torch.cat, zip(*parts, strict=True)))


def _measure(model: LM, held: Data) -> dict[str, Any]:
    """Exact match by kind and steps for each number of iterations, calibration, halting."""
    r = model.config.reasoning
    if r is None:
        return {"exact": {"1": _by_steps(_look(model, held, None), held.questions)}}
    exact, ece = {}, {}
    for n in sorted({1, 2, r.steps, 2 * r.steps}):
        seen = _look(model, held, Pondering(n))
        exact[str(n)] = _by_steps(seen, held.questions)
        ece[str(n)] = _calibration(seen)
    halting = {}
    for threshold in THRESHOLDS:
        seen = _look(model, held, Pondering(r.steps, threshold))
        halting[str(threshold)] = {
            "steps": float(seen.steps[seen.asked].float().mean()),
            "exact": float(seen.exact.float().mean()),
            **_calibration(seen),
        }
    return {"exact": exact, "ece": ece, "halting": halting}


def _by_steps(seen: Seen, questions: Sequence[Question]) -> dict[str, float]:
    groups: dict[str, list[bool]] = {}
    for right, q in zip(seen.exact.tolist(), questions, strict=True):
        groups.setdefault(f"{q.kind} {q.steps}", []).append(right)
    return {name: round(statistics.fmean(some), 4) for name, some in groups.items()} | {
        "all": round(float(seen.exact.float().mean()), 4)
    }


def _calibration(seen: Seen) -> dict[str, float]:
    """ECE of single tokens and, with the product of its tokens' confidences, of whole answers."""
    whole = torch.where(seen.asked, seen.sure.double(), 1.0).prod(1)

    def numbers(x: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.asarray(x.double().numpy())

    return {
        "ece_token": calibration_error(numbers(seen.sure[seen.asked]), numbers(seen.right[seen.asked])),
        "ece_answer": calibration_error(numbers(whole), numbers(seen.exact)),
    }


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _tables(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Table]:
    exact = Table(title="exact match on held-out questions (mean of the seeds)")
    names = list(next(iter(results.values()))[0]["exact"]["1"])
    for column in ("model", "parameters", "iterations", *names, "ECE token", "ECE answer"):
        exact.add_column(column, justify="left" if column == "model" else "right")
    halting = Table(title="halting")
    for column in ("threshold", "steps", "saved", "exact match", "lost (points)", "ECE token", "ECE answer"):
        halting.add_column(column, justify="right")
    for side, runs in results.items():
        for n in runs[0]["exact"]:
            row = [f"{_mean([run['exact'][n][name] for run in runs]):.3f}" for name in names]
            sure = (
                [f"{_mean([run['ece'][n][k] for run in runs]):.3f}" for k in ("ece_token", "ece_answer")]
                if "ece" in runs[0]
                else ["", ""]
            )
            exact.add_row(side, f"{runs[0]['parameters']:,}", n, *row, *sure)
        if "halting" not in runs[0]:
            continue
        most = sorted(map(int, runs[0]["exact"]))[-2]  # as in training
        full = _mean([run["exact"][str(most)]["all"] for run in runs])
        for threshold in runs[0]["halting"]:
            steps, got, token, whole = (
                _mean([run["halting"][threshold][key] for run in runs])
                for key in ("steps", "exact", "ece_token", "ece_answer")
            )
            halting.add_row(threshold, f"{steps:.2f}", f"{1 - steps / most:.0%}", f"{got:.3f}",
                            f"{100 * (full - got):+.1f}", f"{token:.3f}", f"{whole:.3f}")  # fmt: skip
    return [exact, halting]


if __name__ == "__main__":
    main()
