"""What a sliding window is worth on long texts: prefill, decoding and the cache of patterns L, LLLG and G.

python -m bench.window preset=demo patterns=L,LLLG,G lengths=4096,8192,16384,32768 window=512 runs=3
"""

import itertools
import time

import torch
from rich.console import Console
from rich.table import Table

from bench.record import save, settings
from oriole.config import validate
from oriole.infer.engine import PREFILL_TOKENS
from oriole.model.config import ModelConfig
from oriole.model.costs import kv_cache_bytes
from oriole.model.lm import LM, Cache

DEFAULTS = {
    "preset": "demo", "patterns": "L,LLLG,G", "lengths": "4096,8192,16384,32768", "window": 512, "new": 32, "runs": 3,
    "dtype": "float32", "json": "",
}  # fmt: skip


def main() -> None:
    """Measure and print."""
    chosen = settings(DEFAULTS)
    patterns, lengths = _words(chosen["patterns"]), [int(n) for n in _words(chosen["lengths"])]
    new, dtype = int(chosen["new"]), getattr(torch, str(chosen["dtype"]))
    cases: list[dict[str, object]] = []
    models = {pattern: _model(chosen, pattern, max(lengths) + new).to(dtype).eval() for pattern in patterns}
    for model in models.values():
        _seconds(model, lengths[0], new)  # the first pass of all is slower
    # Rounds of all patterns and lengths, so that a machine that slows down slows all of them.
    samples: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _, pattern, length in itertools.product(range(int(chosen["runs"])), patterns, lengths):
        samples.setdefault((pattern, length), []).append(_seconds(models[pattern], length, new))
    for (pattern, length), times in samples.items():
        bytes_ = kv_cache_bytes(models[pattern].config, 1, length + new, dtype.itemsize)
        prefill, decode = ([pair[i] for pair in times] for i in (0, 1))
        cases.append(
            {
                "pattern": pattern,
                "length": length,
                "prefill_seconds": prefill,
                "decode_tokens_per_second": [new / s for s in decode],
                "cache_bytes": bytes_,
            }
        )
    growth = {pattern: _growth(samples, pattern, lengths) for pattern in patterns}
    save("window", chosen, {"cases": cases, "growth_over_linear": growth}, str(chosen["json"]) or None)
    _print(chosen, samples, models, new, dtype.itemsize)
    for pattern, factor in growth.items():
        Console().print(f"{pattern}: prefill from {lengths[0]:,} to {lengths[-1]:,} tokens grows {factor:.2f} x linear")


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
    ids = torch.randint(16, model.config.vocab_size, (1, length + new))
    cache = Cache(model.config, 1, length + new, dtype=model.embedding.weight.dtype)
    start = time.perf_counter()
    for place in range(0, length, PREFILL_TOKENS):
        model(ids[:, place : min(place + PREFILL_TOKENS, length)], cache=cache)
    middle = time.perf_counter()
    for place in range(length, length + new):
        model.head("logits", model(ids[:, place : place + 1], cache=cache).h)
    return middle - start, time.perf_counter() - middle


def _growth(samples: dict[tuple[str, int], list[tuple[float, float]]], pattern: str, lengths: list[int]) -> float:
    """How much longer the longest prompt takes than the shortest, as a multiple of the ratio of their lengths."""
    first, last = (min(seconds for seconds, _ in samples[pattern, n]) for n in (lengths[0], lengths[-1]))
    return last / first / (lengths[-1] / lengths[0])


def _print(
    chosen: dict[str, object],
    samples: dict[tuple[str, int], list[tuple[float, float]]],
    models: dict[str, LM],
    new: int,
    width: int,
) -> None:
    table = Table(
        title=f"{chosen['preset']}, window {chosen['window']}, {chosen['dtype']}, cpu, best of {chosen['runs']}"
    )
    for name in ("pattern", "tokens", "prefill s", "decoded tokens/s", "cache MB"):
        table.add_column(name, justify="right")
    for (pattern, length), times in samples.items():
        table.add_row(
            pattern,
            f"{length:,}",
            f"{min(t[0] for t in times):.2f}",
            f"{new / min(t[1] for t in times):,.1f}",
            f"{kv_cache_bytes(models[pattern].config, 1, length + new, width) / 1e6:,.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
