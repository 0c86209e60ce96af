"""What a sliding window is worth on long texts: prefill, decoding and the cache of patterns L, LLLG and G.

python -m bench.window preset=demo patterns=L,LLLG,G lengths=4096,8192,16384,32768 window=512 runs=3
"""

import itertools
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.record import save, settings, wait
from oriole.config import validate
from oriole.infer.engine import PREFILL_TOKENS
from oriole.model.config import ModelConfig
from oriole.model.costs import kv_cache_bytes
from oriole.model.lm import LM
from oriole.train.device import choose_device

DEFAULTS = {
    "preset": "demo", "patterns": "L,LLLG,G", "lengths": "4096,8192,16384,32768", "window": 512, "new": 32, "runs": 3,
    "device": "cpu", "dtype": "float32", "json": "",
}  # fmt: skip


def main() -> None:
    """Measure and print."""
    chosen = settings(DEFAULTS)
    result = measure(chosen)
    save("window", chosen, result, str(chosen["json"]) or None)
    _print(chosen, result)


def measure(chosen: dict[str, Any]) -> dict[str, Any]:
    """The case's record: seconds of every prefill, tokens a second and the cache's bytes, by pattern and length."""
    patterns, lengths = _words(chosen["patterns"]), [int(n) for n in _words(chosen["lengths"])]
    new, dtype, device = int(chosen["new"]), getattr(torch, str(chosen["dtype"])), choose_device(str(chosen["device"]))
    models = {name: _model(chosen, name, max(lengths) + new).to(device, dtype).eval() for name in patterns}
    for model in models.values():
        _seconds(model, lengths[0], new)  # the first pass of all is slower
    # Rounds of all patterns and lengths, so that a machine that slows down slows all of them.
    samples: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _, pattern, length in itertools.product(range(int(chosen["runs"])), patterns, lengths):
        samples.setdefault((pattern, length), []).append(_seconds(models[pattern], length, new))
    cases = [
        {
            "pattern": pattern,
            "length": length,
            "prefill_seconds": [prefill for prefill, _ in times],
            "decode_tokens_per_second": [new / decode for _, decode in times],
            "cache_bytes": kv_cache_bytes(models[pattern].config, 1, length + new, dtype.itemsize),
        }
        for (pattern, length), times in samples.items()
    ]
    return {"cases": cases, "growth_over_linear": {name: _growth(samples, name, lengths) for name in patterns}}


def _words(value: object) -> list[str]:
    """ "a,b" or a list, as the command line gives them."""
    return [str(word) for word in value] if isinstance(value, list) else str(value).split(",")


def _model(chosen: dict[str, object], pattern: str, context: int) -> LM:
    torch.manual_seed(0)
    shape = {key: chosen[key] for key in ("preset", "window")} | {"pattern": pattern, "context": context}
    return LM(validate(ModelConfig, shape, "bench"))


@torch.inference_mode()
def _seconds(model: LM, length: int, new: int) -> tuple[float, float]:
    """Seconds to read `length` tokens in the engine's pieces into a cache, and for `new` more tokens, one by one."""
    cache = model.new_cache(1, length + new)
    ids = torch.randint(16, model.config.vocab_size, (1, length + new), device=model.embedding.weight.device)
    wait(ids.device)
    start = time.perf_counter()
    for place in range(0, length, PREFILL_TOKENS):
        model(ids[:, place : min(place + PREFILL_TOKENS, length)], cache=cache)
    wait(ids.device)
    middle = time.perf_counter()
    for place in range(length, length + new):
        model.head("logits", model(ids[:, place : place + 1], cache=cache).h)
    wait(ids.device)
    return middle - start, time.perf_counter() - middle


def _growth(samples: dict[tuple[str, int], list[tuple[float, float]]], pattern: str, lengths: list[int]) -> float:
    """How much longer the longest prompt takes than the shortest, as a multiple of the ratio of their lengths."""
    first, last = (min(seconds for seconds, _ in samples[pattern, n]) for n in (lengths[0], lengths[-1]))
    return last / first / (lengths[-1] / lengths[0])


def _print(chosen: dict[str, Any], result: dict[str, Any]) -> None:
    how = (f"{chosen[key]}" for key in ("preset", "dtype", "device"))
    table = Table(title=f"{', '.join(how)}, window {chosen['window']}, best of {chosen['runs']}")
    for name in ("pattern", "tokens", "prefill s", "decoded tokens/s", "cache MB"):
        table.add_column(name, justify="right")
    for case in result["cases"]:
        table.add_row(
            case["pattern"],
            f"{case['length']:,}",
            f"{min(case['prefill_seconds']):.2f}",
            f"{max(case['decode_tokens_per_second']):,.1f}",
            f"{case['cache_bytes'] / 1e6:,.2f}",
        )
    Console().print(table)
    for pattern, factor in result["growth_over_linear"].items():
        Console().print(f"{pattern}: prefill from the shortest to the longest grows {factor:.2f} x linear")


if __name__ == "__main__":
    main()
