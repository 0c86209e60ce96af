"""A mixture of experts beside the dense model in which a token meets as many weights: training speed, and the load.

    python -m bench.moe preset=demo batch=16 seq=256
    python -m bench.moe what=balance steps=500 seeds=3 json=FILE

Speed: both in one process, in turn, a step as `bench.train` has it (forward, loss, backward, clip, AdamW). Balance: a
small model learns the built-in corpus, once with each way of balancing and once with none; the table has the load of
the busiest expert over the mean, in the layer where that is highest, over the 65,536 tokens that training would have
read next and over 16,384 held-out ones, and bits per byte.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.record import ratio, save, settings, wait
from bench.smart import LANGS, Records, demo_shards
from bench.train import oriole_step
from oriole.config import validate
from oriole.log import console
from oriole.model.config import ModelConfig, preset
from oriole.model.lm import LM
from oriole.text.mixture import Mixture
from oriole.text.shards import Shards
from oriole.train.batch import Batch, Packer
from oriole.train.device import choose_device, choose_dtype
from oriole.train.loop import TrainConfig, Trainer
from oriole.train.objectives import LMObjective
from oriole.train.optim import OptimConfig
from oriole.train.validate import bits_per_byte

DEFAULTS = {
    "what": "speed", "preset": "demo", "pattern": "Ge", "experts": 8, "active": 2, "batch": 16, "seq": 256, "pairs": 7,
    "compile": True, "device": "auto", "dtype": "auto", "steps": 500, "seeds": 1, "dim": 128, "layers": 4, "lr": 4e-3,
    "json": "",
}  # fmt: skip

NEXT, HELD_OUT = 65_536, 16_384
"""Tokens by which the load is judged: of the training stream as it goes on, and held out."""

BALANCES: dict[str, dict[str, Any]] = {
    "loss": {"balance": "loss"}, "loss, 0.01": {"balance": "loss", "balance_weight": 0.01},
    "bias": {"balance": "bias"}, "none": {"balance": "loss", "balance_weight": 0.0},
}  # fmt: skip


def main() -> None:
    """Measure and print."""
    chosen = settings(DEFAULTS)
    match chosen["what"]:
        case "speed":
            result = speed(chosen)
        case "balance":
            result = _balance(chosen)
        case other:
            raise SystemExit(f"what={other} is neither speed nor balance")
    save("moe", chosen, result, str(chosen["json"]) or None)


def speed(chosen: dict[str, Any]) -> dict[str, Any]:
    """The case's record: seconds of every step of either model, and their ratio."""
    dense = preset(str(chosen["preset"]))
    table = {"pattern": chosen["pattern"], "moe": {"experts": chosen["experts"], "active": chosen["active"]}}
    mixture = validate(ModelConfig, dense.model_dump() | table, "the mixture")
    device = choose_device(str(chosen["device"]))
    dtype, _ = choose_dtype(device, chosen["dtype"])
    rows, length = int(chosen["batch"]), int(chosen["seq"])
    torch.manual_seed(0)
    tokens = torch.randint(0, dense.vocab_size, (rows, length + 1), device=device)
    shapes = {"dense": dense, "experts": mixture}
    steps = {n: oriole_step(shape, tokens, device, dtype, bool(chosen["compile"])) for n, shape in shapes.items()}
    for step in steps.values():
        step(), step(), step()  # compiling and warming up
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(int(chosen["pairs"])):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            wait(device)
            seconds[name].append(time.perf_counter() - start)

    shown = Table(title=f"{chosen['preset']}, batch {rows} x {length}, {dtype}, {device}")
    for column in ("", "parameters", "for each token", "ms a step", "tokens/s"):
        shown.add_column(column, justify="right" if column else "left")
    for name, shape in shapes.items():
        median = statistics.median(seconds[name])
        counts = (f"{shape.num_params(active=active) / 1e6:.2f}M" for active in (False, True))
        shown.add_row(name, *counts, f"{1e3 * median:.0f}", f"{rows * length / median:,.0f}")
    share = ratio(seconds["experts"], seconds["dense"])
    out = Console()
    out.print(shown)
    out.print(f"experts / dense: {share['median']:.2f} (quartiles {share['low']:.2f} … {share['high']:.2f}) tokens/s")
    counts = {n: [shape.num_params(), shape.num_params(active=True)] for n, shape in shapes.items()}
    return {"seconds": seconds, "ratio": share, "parameters": counts, "dtype": str(dtype)}


def _balance(chosen: dict[str, Any]) -> dict[str, Any]:
    console.quiet = True  # the runs' own remarks
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in BALANCES}
    with tempfile.TemporaryDirectory() as folder:
        shards = demo_shards(Path(folder), 1024)
        for seed in range(int(chosen["seeds"])):
            for name, table in BALANCES.items():
                runs[name].append(_run(table, seed, shards, Path(folder), chosen))
                print(f"{name}, seed {seed}: {runs[name][-1]}", file=sys.stderr, flush=True)
    shown = Table(title=f"{chosen['experts']} experts, {chosen['active']} for each token, {chosen['steps']} steps")
    for column in ("balance", "load", "load, held out", "dead", "entropy", "bits per byte"):
        shown.add_column(column, justify="left" if column == "balance" else "right")
    for name, some in runs.items():
        shown.add_row(name, *(f"{statistics.mean(r[key] for r in some):.3f}" for key in some[0]))
    Console().print(shown)
    return {"runs": runs}


def _run(
    table: dict[str, Any], seed: int, shards: dict[str, dict[str, Shards]], folder: Path, chosen: dict[str, Any]
) -> dict[str, float]:
    dim, rows, length = int(chosen["dim"]), int(chosen["batch"]), int(chosen["seq"])
    shape = {
        "vocab_size": 1024, "dim": dim, "num_layers": chosen["layers"], "num_heads": dim // 64, "num_kv_heads": 1,
        "head_dim": 64, "ffn_dim": dim * 8 // 3 // 16 * 16, "context": length, "pattern": chosen["pattern"],
        "moe": {"experts": chosen["experts"], "active": chosen["active"]} | table,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LM(validate(ModelConfig, shape, "the mixture"))
    halves = dict.fromkeys(LANGS, 0.5)
    stream = Packer(Mixture(shards["pretrain"], halves, seed=seed, length=length), rows, length)
    with tempfile.TemporaryDirectory(dir=folder) as run:
        Trainer(
            model,
            LMObjective(),
            stream,
            TrainConfig(steps=int(chosen["steps"]), seed=seed, compile=False, device="cpu", dtype=chosen["dtype"]),
            OptimConfig(lr=float(chosen["lr"])),
            Path(run),
            metrics=Records(),
        ).fit()
    model.eval()
    # The stream as it goes on, not from its start: a packer's first rows are not like the later ones.
    coming = _joined([next(stream) for _ in range(NEXT // (rows * length))])
    held_out = next(Packer(Mixture(shards["val"], halves, seed=0, length=length), HELD_OUT // length, length))
    with torch.inference_mode():
        metrics, other = (model(batch.tokens, batch.doc, batch.pos).metrics for batch in (coming, held_out))
    figures = {
        "expert_load": float(metrics["expert_load"]),
        "held_out_load": float(other["expert_load"]),
        "dead_experts": float(metrics["dead_experts"]),
        "router_entropy": float(metrics["router_entropy"]),
    }
    parts = [bits_per_byte(model, shards["val"][lang], length=length, max_tokens=4000) for lang in LANGS]
    return figures | {"bpb": sum(parts) / len(parts)}


def _joined(batches: list[Batch]) -> Batch:
    """The rows of all batches as one batch."""
    return Batch(*(torch.cat([getattr(b, name) for b in batches]) for name in ("tokens", "targets", "doc", "pos")))


if __name__ == "__main__":
    main()
