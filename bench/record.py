"""What every case shares: settings from the command line, and a record with raw samples, versions and load."""

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from oriole.config import parse_overrides
from oriole.train.stage import commit

RESULTS = Path(__file__).parent / "results"


def settings(defaults: dict[str, Any]) -> dict[str, Any]:
    """The defaults with `key=value` words of the command line applied; an unknown key ends the program."""
    given = parse_overrides(sys.argv[1:])
    unknown = given.keys() - defaults.keys()
    if unknown:
        raise SystemExit(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(defaults)}")
    return defaults | given


def device_name() -> str:
    """The accelerator's name, or the processor's with its widest matrix instructions."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "-")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    widest = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags), platform.machine())
    return f"cpu-{os.cpu_count()}x-{widest}"


def stamped(case: str, chosen: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The result with all that says where it comes from."""
    return {
        "case": case,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "commit": commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "settings": {key: _without_folders(value) for key, value in chosen.items()},
        **result,
    }


def _without_folders(value: Any) -> Any:
    """A setting without the place that it has on one machine: of an absolute path its last name."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def wait(device: torch.device) -> None:
    """Until a GPU has done all that it was given; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def save(case: str, chosen: dict[str, Any], result: dict[str, Any], also: str | None = None) -> None:
    """Append the result to bench/results/<device>.jsonl, and write it to the file `also` if one is named."""
    record = stamped(case, chosen, result)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{device_name()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    if also:
        Path(also).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median of the pairwise ratios with its quartiles; above 1 we are faster. The samples are seconds."""
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return {"median": statistics.median(ratios), "low": low, "high": high}
