"""The GPU set: two commands of under eight minutes each, both into one JSON.

    make bench-gpu                              both, one after the other
    python -m bench.gpu part=1 json=F           matrix peak, training at three sizes beside Hugging Face, attention
    python -m bench.gpu part=2 json=F           decoding, windows, experts, packed beside padded rows, learning
    python -m bench.gpu part=1 sizes=demo batch=2 seq=128       a dry run on a CPU; part=2 likewise

Nothing is needed but PyTorch and the checkout: packages that the machine lacks are taken from the wheels in `wheels`
(`make gpu-wheels` puts them there). MFU is given of the card's data sheet and of the product measured here. A case that
fails is written down with its error, and one for which no time is left as such.
"""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT_S = 450.0
"""A case is not begun when less than a minute of this is left."""


def _take_wheels(folder: Path) -> None:
    """Put the wheels' packages behind those that are installed; children of this process find them as well."""
    import importlib.util
    import os

    if importlib.util.find_spec("pydantic") or not folder.is_dir():
        return
    place = Path(tempfile.mkdtemp(prefix="oriole-wheels-"))
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
    sys.path.append(str(place))
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(place)]).strip(os.pathsep)


_take_wheels(Path(next((word[7:] for word in sys.argv if word.startswith("wheels=")), ".wheels")))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from bench import moe, window  # noqa: E402
from bench.record import device_name, save, settings, stamped, wait  # noqa: E402
from bench.train import measure, peak_product  # noqa: E402
from oriole.infer.engine import Engine  # noqa: E402
from oriole.infer.sample import Sampling  # noqa: E402
from oriole.model.attention import Backend, attend, mask_for  # noqa: E402
from oriole.model.config import preset  # noqa: E402
from oriole.model.lm import LM  # noqa: E402
from oriole.train.batch import IGNORE, Batch, Packer  # noqa: E402
from oriole.train.device import choose_device, choose_dtype  # noqa: E402
from oriole.train.machine import peak_flops  # noqa: E402
from oriole.train.objectives import LMObjective  # noqa: E402
from oriole.train.optim import OptimConfig, Optimizer  # noqa: E402

DEFAULTS = {
    "part": 1, "sizes": "26m,110m,1b", "batch": 0, "seq": 0, "learn_s": 180, "wheels": ".wheels", "json": "gpu.json",
}  # fmt: skip

ROWS = {"26m": (64, 1024), "110m": (32, 1024), "1b": (8, 2048)}
"""Batch and length of a size: what 80 GB hold."""


def main() -> None:
    """Run the cases of a part, each as soon as the one before it is done, and save after every one."""
    chosen = settings(DEFAULTS)
    device = choose_device("auto")
    dtype, _ = choose_dtype(device, "auto")
    torch.set_float32_matmul_precision("high")
    cases = _first(chosen, device, dtype) if int(chosen["part"]) == 1 else _second(chosen, device, dtype)
    target = Path(str(chosen["json"]))
    result: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    result["run"] = {"device": device_name(), **stamped("gpu", {}, {})}
    begin = time.monotonic()
    for name, case in cases.items():
        if time.monotonic() - begin > LIMIT_S - 60:
            result[name] = {"left_out": "no time was left"}
        else:
            start = time.monotonic()
            try:
                result[name] = case()
            except Exception as error:
                result[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]}
            result[name]["case_seconds"] = round(time.monotonic() - start, 1)
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        target.write_text(json.dumps(result, indent=1) + "\n")
        Console().print(name, {k: v for k, v in result[name].items() if k not in ("trace", "seconds")})
    save(f"gpu-part-{chosen['part']}", chosen, result)


# --- the first part --------------------------------------------------------------------------------------------------


def _first(chosen: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], dict[str, Any]]]:
    sizes = str(chosen["sizes"]).split(",")
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "peak": lambda: {
            "product": peak_product(device, dtype, 8192 if device.type == "cuda" else 1024),
            "data_sheet": peak_flops(device, dtype).flops,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        }
    }
    for size in sizes:
        batch, seq = ROWS.get(size, (8, 256))
        peer = "hf" if size == "110m" else ""
        cases[f"train_{size}"] = _training(
            size, int(chosen["batch"]) or batch, int(chosen["seq"]) or seq, device, dtype, peer
        )
    length = int(chosen["seq"]) or 2048
    cases["attention"] = lambda: _attention(device, dtype, length)
    return cases


def _training(
    size: str, batch: int, length: int, device: torch.device, dtype: torch.dtype, peer: str
) -> Callable[[], dict[str, Any]]:
    def case() -> dict[str, Any]:
        shape = preset(size)
        result = measure(shape, batch, length, device, dtype, compiled=True, peer=peer, steps=7)
        rate = result["tokens_per_second"]
        sheet = peak_flops(device, dtype).flops
        return {
            **result,
            "batch": batch,
            "length": length,
            "mfu_of_data_sheet": rate * result["flops_per_token"] / sheet,
        }

    return case


def _attention(device: torch.device, dtype: torch.dtype, length: int) -> dict[str, Any]:
    """Milliseconds forward and backward of 16 heads of 64 over rows packed with documents of about 400 tokens."""
    torch.manual_seed(0)
    batch, heads, kv, width = 8, 16, 4, 64
    ends = torch.randint(100, 700, (batch, length // 50 + 2)).cumsum(1)
    doc = torch.searchsorted(ends, torch.arange(length).expand(batch, length).contiguous(), right=True).int().to(device)
    backends: tuple[Backend, ...] = ("sdpa", "flex") if device.type == "cuda" else ("sdpa", "grouped")
    out: dict[str, Any] = {"shape": [batch, heads, kv, length, width]}
    for backend in backends:
        call = torch.compile(attend, dynamic=False)
        mask = mask_for(doc, backend)
        q, k, v = (
            torch.randn(batch, n, length, width, device=device, dtype=dtype, requires_grad=True)
            for n in (heads, kv, kv)
        )
        seconds = []
        for _ in range(8):
            wait(device)
            start = time.perf_counter()
            call(q, k, v, mask, backend=backend).square().sum().backward()
            wait(device)
            seconds.append(time.perf_counter() - start)
        out[backend] = [round(1e3 * s, 3) for s in seconds[3:]]
    return out


# --- the second part -------------------------------------------------------------------------------------------------


def _second(
    chosen: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], dict[str, Any]]]:
    size = [*str(chosen["sizes"]).split(","), ""][1] or str(chosen["sizes"])
    rows = int(chosen["batch"]) or 16
    length = int(chosen["seq"]) or 1024
    return {
        "decode": lambda: _decode(size, device, dtype),
        "window": lambda: _window(size, length, device, dtype),
        "experts": lambda: _experts(size, rows, length, device),
        "packing": lambda: _packing(size, rows, length, device, dtype),
        "learning": lambda: _learning(float(chosen["learn_s"])),
    }


def _decode(size: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Tokens a second of the engine, prefill of 128 tokens included, for 1, 8 and 32 users of 128 new tokens."""
    model = LM(preset(size)).to(device, dtype).eval()
    sampling = Sampling(max_new_tokens=128, temperature=0.0, stop_ids=())
    out: dict[str, Any] = {"size": size}
    for users in (1, 8, 32):
        ids = torch.randint(16, model.config.vocab_size, (users, 128)).tolist()
        rates = []
        for _ in range(3):
            start = time.perf_counter()
            Engine(model, max_batch=users).run([(row, sampling) for row in ids])
            wait(device)
            rates.append(users * 128 / (time.perf_counter() - start))
        out[f"users_{users}"] = [round(r, 1) for r in rates]
    return out


def _window(size: str, length: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Prompts of 4 and 32 times the length through the engine's pieces and a cache; and training on rows of 16 times
    the length, as one document, with windows and without."""
    chosen = {"patterns": "L,LLLG,G", "lengths": f"{4 * length},{32 * length}", "device": str(device)}
    chosen |= {"preset": size, "dtype": str(dtype).removeprefix("torch."), "window": length // 2}
    out = window.measure(window.DEFAULTS | chosen)
    row, steps = 16 * length, 5
    for pattern in ("L", "LLLG", "G"):
        changes = {"pattern": pattern, "window": length // 2, "context": row}
        result = measure(preset(size).model_copy(update=changes), 1, row, device, dtype, compiled=True, steps=steps)
        kept = ("seconds", "tokens_per_second", "peak_memory_bytes")
        out[f"training_{pattern}"] = {"length": row} | {key: result[key] for key in kept}
        torch.compiler.reset()
    return out


def _experts(size: str, rows: int, length: int, device: torch.device) -> dict[str, Any]:
    """Training with experts in every layer, two of eight for a token, beside the dense model of as many weights a
    token."""
    return moe.speed(moe.DEFAULTS | {"preset": size, "batch": rows, "seq": length, "device": str(device)})


class _Chats:
    """Chats of 40 to 1,000 tokens, most of them short, the later 60 % of each trained: random ids, real lengths."""

    def __init__(self, vocab: int, longest: int) -> None:
        self.random = torch.Generator().manual_seed(1)
        self.vocab, self.longest = vocab, longest

    def __next__(self) -> tuple[Any, Any]:
        import numpy as np

        n = int((torch.randn((), generator=self.random) * 0.7 + 5.2).exp().clamp(40, self.longest))
        mask = np.zeros(n, np.uint8)
        mask[int(0.4 * n) :] = 1
        return torch.randint(16, self.vocab, (n,), generator=self.random).numpy(), mask

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go back to: the stream is made for one measurement."""


def _packing(size: str, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Real tokens a second of rows packed with chats, and of rows with one chat each, padded to the length."""
    shape = preset(size)
    model = LM(shape).to(device)
    objective, call = LMObjective(), torch.compile(model, dynamic=False)
    objective.compile()
    optimizer = Optimizer(model, OptimConfig(), 1_000_000)
    out: dict[str, Any] = {"size": size, "rows": rows, "length": length}
    for name in ("packed", "padded"):
        chats = _Chats(shape.vocab_size, length)
        packer = Packer(chats, rows, length)
        rates = []
        for step in range(10):
            batch = next(packer) if name == "packed" else _padded(chats, rows, length)
            real = int((batch.doc >= 0).sum())
            wait(device)
            start = time.perf_counter()
            batch = batch.to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = objective(call, batch).sum / objective.weight(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step(1, loss.detach())
            wait(device)
            if step >= 3:
                rates.append(real / (time.perf_counter() - start))
        out[name] = [round(r, 1) for r in rates]
    return out


def _padded(chats: _Chats, rows: int, length: int) -> Batch:
    """`rows` chats, one a row."""
    tokens, pos = torch.zeros(rows, length, dtype=torch.int64), torch.zeros(rows, length, dtype=torch.int64)
    targets, doc = torch.full_like(tokens, IGNORE), torch.full_like(tokens, -1).int()
    for row in range(rows):
        ids, mask = (torch.from_numpy(x.astype("int64")) for x in next(chats))
        n = len(ids) - 1
        tokens[row, :n], doc[row, :n], pos[row, :n] = ids[:-1], 0, torch.arange(n)
        targets[row, :n] = torch.where(mask[1:] > 0, ids[1:], IGNORE)
    return Batch(tokens, targets, doc, pos)


def _learning(seconds: float) -> dict[str, Any]:
    """The demo's pretraining with the 26m shape through the real command, stopped by SIGINT after `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "demo/pretrain", f"run={folder}/run", "model=26m", "train.tokens=2e9", "train.batch_size=64"]
        words += ["train.length=512", "checkpoint.every=100000", "eval.every=200", "train.log_every=20"]
        process = subprocess.Popen([sys.executable, "-m", "oriole.cli", *words], stderr=subprocess.PIPE, text=True)
        said = ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            said = process.communicate(timeout=seconds)[1]
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1]
        path = Path(folder) / "run" / "pretrain" / "metrics.jsonl"
        if not path.exists():
            return {"error": said[-500:]}
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [r for r in records if r["event"] == "step"]
    return {
        "exit": process.returncode,
        "evaluations": [{"step": r["step"], "bpb": r.get("bpb")} for r in records if r["event"] == "eval"],
        "loss": [round(r["loss"], 4) for r in steps],
        "tokens_per_second": [r["tokens_per_second"] for r in steps],
        "mfu": [r.get("mfu") for r in steps],
        "data_wait": [r["data_wait"] for r in steps],
    }


if __name__ == "__main__":
    main()
