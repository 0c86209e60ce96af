"""Training steps per second: forward, loss, backward, clip, AdamW, beside Hugging Face's model in the same process.

    python -m bench.train preset=demo batch=16 seq=256
    python -m bench.train preset=26m batch=8 seq=512 peer=hf json=/tmp/bench.json

The peer is transformers' Qwen3ForCausalLM of the same shape on the same tokens with bf16 autocast and fused AdamW, with
and without torch.compile; the two run in turn, pair by pair.
"""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.record import ratio, save, settings, wait
from oriole.model.config import ModelConfig, preset
from oriole.model.costs import flops_per_token
from oriole.model.lm import LM
from oriole.train.batch import Batch
from oriole.train.device import choose_device, choose_dtype
from oriole.train.objectives import LMObjective
from oriole.train.optim import OptimConfig, Optimizer

DEFAULTS = {
    "preset": "demo", "batch": 16, "seq": 256, "steps": 7, "compile": True, "peer": "", "device": "auto", "json": "",
}  # fmt: skip


def main() -> None:
    """Measure and print."""
    chosen = settings(DEFAULTS)
    shape = preset(str(chosen["preset"]))
    batch, length = int(chosen["batch"]), int(chosen["seq"])
    device = choose_device(str(chosen["device"]))
    dtype, _ = choose_dtype(device, "auto")
    result = measure(
        shape, batch, length, device, dtype,
        compiled=bool(chosen["compile"]), peer=str(chosen["peer"]), steps=int(chosen["steps"]),
    )  # fmt: skip
    seconds, flops, peak = result["seconds"], result["flops_per_token"], result["matmul_peak_flops"]
    save("train", chosen, result, str(chosen["json"]) or None)

    table = Table(title=f"{chosen['preset']}, batch {batch} x {length}, {dtype}, {device}")
    for column in ("", "ms a step", "tokens/s", "MFU"):
        table.add_column(column, justify="right" if column else "left")
    for name, samples in seconds.items():
        median = statistics.median(samples)
        rate = batch * length / median
        table.add_row(name, f"{1e3 * median:.0f}", f"{rate:,.0f}", f"{rate * flops / peak:.1%}")
    console = Console()
    console.print(table)
    for key in ("ratio_compiled", "ratio_eager"):
        if key in result:
            r = result[key]
            console.print(
                f"{key}: {r['median']:.2f} (quartiles {r['low']:.2f} … {r['high']:.2f}; above 1: Oriole faster)"
            )
    memory = result["peak_memory_bytes"] / 1e9
    console.print(f"ceiling by its own products: MFU {result['mfu_ceiling']:.1%}; peak memory {memory:.2f} GB")
    console.print(
        f"MFU = tokens/s x {flops:.3g} FLOP/token / {peak / 1e12:.2f} TFLOP/s (4096³ matrix product, this run)"
    )


def measure(
    shape: ModelConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype, *, compiled: bool,
    peer: str = "", steps: int = 7,
) -> dict[str, Any]:  # fmt: skip
    """The case's record: seconds of every step by side, tokens a second, MFU, memory, ratios to the peers."""
    torch.manual_seed(0)
    tokens = torch.randint(0, shape.vocab_size, (batch, length + 1), device=device)
    ours = oriole_step(shape, tokens, device, dtype, compiled)
    ours(), ours()
    memory = _peak_memory(ours, device)
    runs = {"oriole": ours}
    if peer == "hf":
        runs["hf compiled"] = _hf(shape, tokens, device, dtype, True)
        runs["hf eager"] = _hf(shape, tokens, device, dtype, False)
    for step in runs.values():
        step(), step()  # compiling and warming up
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps):
        for name, step in runs.items():
            start = time.perf_counter()
            step()
            wait(device)
            seconds[name].append(time.perf_counter() - start)

    peak = peak_product(device, dtype)
    flops = flops_per_token(shape, length)
    rate = batch * length / statistics.median(seconds["oriole"])
    result: dict[str, Any] = {
        "seconds": seconds,
        "tokens_per_second": rate,
        "mfu": rate * flops / peak,
        "mfu_ceiling": flops * batch * length / _products(shape, batch, length, device, dtype, peak) / peak,
        "peak_memory_bytes": memory,
        "matmul_peak_flops": peak,
        "flops_per_token": flops,
        "dtype": str(dtype),
        "parameters": shape.num_params(),
    }
    for name in ("compiled", "eager"):
        if f"hf {name}" in seconds:
            result[f"ratio_{name}"] = ratio(seconds["oriole"], seconds[f"hf {name}"])
    return result


def oriole_step(
    shape: ModelConfig, tokens: torch.Tensor, device: torch.device, dtype: torch.dtype, compiled: bool
) -> Callable[[], None]:
    model = LM(shape).to(device)
    objective = LMObjective()
    call = model
    if compiled:
        call = torch.compile(model)
        objective.compile()
    length = tokens.shape[1] - 1
    pos = torch.arange(length, device=device).expand(len(tokens), length).contiguous()
    batch = Batch(
        tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros_like(pos, dtype=torch.int32), pos
    )

    def loss() -> torch.Tensor:
        return objective(call, batch).sum / objective.weight(batch)

    optimizer = Optimizer(model, OptimConfig(), 1_000_000)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step(1, value.detach())

    return step


def _hf(
    shape: ModelConfig, tokens: torch.Tensor, device: torch.device, dtype: torch.dtype, compiled: bool
) -> Callable[[], None]:
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError as error:
        raise SystemExit("peer=hf needs transformers: pip install 'oriole-lm[hf]'") from error
    config = Qwen3Config(
        vocab_size=shape.vocab_size, hidden_size=shape.dim, intermediate_size=shape.ffn_dim, head_dim=shape.head_dim,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, tie_word_embeddings=shape.tie_embeddings, use_cache=False,
        max_position_embeddings=shape.context,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(device)
    call = torch.compile(model) if compiled else model
    x = tokens[:, :-1].contiguous()
    labels = tokens[:, 1:].contiguous()

    def loss() -> torch.Tensor:
        logits = call(input_ids=x).logits
        out: torch.Tensor = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return out

    return _step(model, loss, device, dtype)


def _step(
    model: torch.nn.Module, loss: Callable[[], torch.Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _peak_memory(step: Callable[[], None], device: torch.device) -> int:
    """Bytes at the highest moment of two steps; 0 where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step(), step()
        return torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        step(), step()
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except OSError:
        return 0


def _products(
    shape: ModelConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype, peak: float
) -> float:
    """Seconds of all matrix products of a step, forward and backward, each timed alone; attention's at the peak."""
    rows = batch * length
    heads = shape.num_heads + 2 * shape.num_kv_heads
    layer = [
        (shape.dim, heads * shape.head_dim), (shape.num_heads * shape.head_dim, shape.dim),
        (shape.dim, 2 * shape.ffn_dim), (shape.ffn_dim, shape.dim),
    ]  # fmt: skip
    seconds = 0.0
    for count, (inner, outer) in [*((shape.num_layers, m) for m in layer), (1, (shape.dim, shape.vocab_size))]:
        x = torch.randn(rows, inner, device=device, dtype=dtype)
        w = torch.randn(outer, inner, device=device, dtype=dtype)
        g = torch.randn(rows, outer, device=device, dtype=dtype)
        seconds += count * sum(_best(a, b, device) for a, b in ((x, w.T), (g, w), (g.T, x)))
    attention = rows * (flops_per_token(shape, length) - flops_per_token(shape, 0))
    return seconds + attention / peak


def _best(a: torch.Tensor, b: torch.Tensor, device: torch.device) -> float:
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def peak_product(device: torch.device, dtype: torch.dtype, size: int = 4096) -> float:
    """FLOP/s of the best of four matrix products of that size."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _best(a, a, device)


if __name__ == "__main__":
    main()
