"""Looks this machine over: what is there, what Oriole will use and why, and what to mend."""

import os
import platform
import re
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import oriole
from oriole.train.accelerators import find_accelerator
from oriole.train.device import DTYPE_NAMES, choose_compile, choose_device, choose_dtype
from oriole.train.machine import host_memory, peak_flops, usable_cores

__all__ = ["EXTRAS", "Item", "examine"]

Verdict = Literal["ok", "note", "problem"]


class Item(NamedTuple):
    """One finding."""

    name: str
    verdict: Verdict
    """ok; note: works, but could be better; problem: mend this first."""
    found: str
    """What there is."""
    advice: str = ""
    """What to do; empty where there is nothing to do."""


EXTRAS: dict[str, tuple[str, str]] = {
    "hf": ("transformers", "Hugging Face as a peer in benchmarks and tests"),
    "gguf": ("gguf", "GGUF files and llama.cpp"),
    "track": ("tensorboard", "TensorBoard and trackio beside metrics.jsonl"),
    "pdf": ("pypdf", "text out of PDF files"),
    "wiki": ("mwxml", "MediaWiki dumps"),
    "cluster": ("ray", "data cleaning on many machines"),
}
"""What the optional extras bring, and a module by which they are recognised."""

LOW_MEMORY, LOW_DISK = 3 << 30, 5 << 30
"""Bytes below which even the demo, or a small run with its checkpoints, may not fit."""


def examine(runs: Path) -> list[Item]:
    """All findings about this machine; `runs` is where run folders will lie."""
    looks: tuple[Callable[[], list[Item]], ...] = (
        _versions, _processor, _memory, lambda: [_disk(runs)], _gpus, _compiler, _choices, _extras,
    )  # fmt: skip
    return [item for look in looks for item in look()]


# --- software --------------------------------------------------------------------------------------------------------


def _versions() -> list[Item]:
    python = platform.python_version()
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    if hip := getattr(torch.version, "hip", None):
        built = f"ROCm {hip}"
    old = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < (2, 11)
    return [
        Item("Oriole", "ok", f"{oriole.__version__}, Python {python}, {platform.system()} {platform.machine()}"),
        Item("PyTorch", "problem" if old else "ok", f"{torch.__version__} ({built})", "pip install -U torch" * old),
    ]


def _extras() -> list[Item]:
    have = {name: find_spec(module) is not None for name, (module, _) in EXTRAS.items()}
    there = [name for name, found in have.items() if found]
    missing = [f"[{name}] {EXTRAS[name][1]}" for name, found in have.items() if not found]
    advice = "pip install 'oriole-lm[NAME]' adds " + "; ".join(missing) if missing else ""
    return [Item("extras", "ok", ", ".join(there) or "none, and none is needed", advice)]


# --- processor -------------------------------------------------------------------------------------------------------


def _processor() -> list[Item]:
    logical = os.cpu_count() or 1
    physical = _physical_cores()
    allowed, quota = usable_cores()
    found = f"{_cpu_name()}, {physical or logical} cores"
    found += f" ({logical} threads)" if physical and physical != logical else ""
    advice = ""
    worth = min(allowed, quota or allowed)
    threads = torch.get_num_threads()
    if worth < logical:
        found += f", of which this process may use {worth:g}"
    if threads > max(1, worth):
        advice = f"torch would start {threads} threads for {worth:g} cores; set OMP_NUM_THREADS={max(1, int(worth))}"
    units = _units()
    widest = ", ".join(units) or "none that matter here"
    slow = platform.machine().lower() in ("x86_64", "amd64") and not {"avx2", "avx512f"} & set(units)
    simd = Item(
        "vector units",
        "problem" if slow else "ok",
        f"{widest}; torch uses {torch.backends.cpu.get_cpu_capability()}",
        "without AVX2 training takes many times as long; use another machine" if slow else "",
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = load > max(1.0, 0.7 * worth)
    others = Item(
        "load",
        "note" if busy else "ok",
        f"{load:.1f} processes want {worth:g} cores" if busy else f"{load:.1f} (one minute's average)",
        "other programs are working: training would be slow, and so is all that is measured now" if busy else "",
    )
    parallel = bool(torch.backends.openmp.is_available())  # type: ignore[no-untyped-call]
    onednn = ", oneDNN" if torch.backends.mkldnn.is_available() else ""  # type: ignore[no-untyped-call]
    openmp = Item(
        "threads",
        "ok" if parallel else "note",
        f"{threads} with {'OpenMP' if parallel else 'no OpenMP'}{onednn}",
        "" if parallel else "this torch uses one core; install the public wheel",
    )
    return [Item("processor", "note" if advice else "ok", found, advice), simd, openmp, others]


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace") if path.exists() else ""


def _cpu_name() -> str:
    match = re.search(r"model name\s*:\s*(.+)", _cpuinfo())
    return match[1].strip() if match else platform.processor() or platform.machine()


def _physical_cores() -> int | None:
    pairs = set(re.findall(r"physical id\s*:\s*(\d+)[\s\S]*?core id\s*:\s*(\d+)", _cpuinfo()))
    return len(pairs) or None


def _units() -> list[str]:
    """What the kernel or torch says there is, widest first."""
    told = {name for name, there in torch.cpu.get_capabilities().items() if there is True}
    names = ("amx_bf16", "amx_tile", "avx512_bf16", "avx512f", "avx512_vnni", "avx2", "neon", "sve")
    return [name for name in names if name in told | _flags()]


def _flags() -> set[str]:
    match = re.search(r"^flags\s*:\s*(.+)$", _cpuinfo(), flags=re.M)
    return set(match[1].split()) if match else set()


# --- memory, disk, GPUs ----------------------------------------------------------------------------------------------


def _memory() -> list[Item]:
    memory = host_memory()
    if memory.total is None:
        return [Item("memory", "note", "unknown: this system does not say")]
    free = min(n for n in (memory.available, memory.limit, memory.total) if n is not None)
    found = f"{_gb(memory.total)}, {_gb(free)} to be had"
    if memory.limit is not None:
        found += f"; this container may use {_gb(memory.limit)}"
    low = free < LOW_MEMORY
    return [
        Item(
            "memory",
            "problem" if low else "ok",
            found,
            "the demo needs about 1 GB and 26m about 3 GB; end other programs or take a larger machine" if low else "",
        )
    ]


def _disk(runs: Path) -> Item:
    folder = next(p for p in (runs.absolute(), *runs.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Item("disk", "problem", f"{folder} cannot be written", "choose another folder with run=FOLDER")
    low = free < LOW_DISK
    advice = "checkpoints of a 26m run take 1 GB, of a 1b run 50 GB; free some space or give run=FOLDER" if low else ""
    return Item("disk", "problem" if low else "ok", f"{_gb(free)} free in {folder}", advice)


def _gpus() -> list[Item]:
    if torch.cuda.is_available():
        return [_gpu(n) for n in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        return [Item("GPU", "note", "Apple's (mps), in fp32; not tested")]
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        why = "this torch is the CPU wheel" if torch.version.cuda is None else "torch cannot reach it"
        return [
            Item(
                "GPU",
                "problem",
                f"an NVIDIA driver is there, but {why}",
                "pip install torch from its default index; then the driver must be as new as its CUDA"
                if torch.version.cuda is None
                else "compare the driver's CUDA (nvidia-smi) with torch's; in a container, start it with its GPUs",
            )
        ]
    return [Item("GPU", "ok", "none; training runs on the CPU")]


def _gpu(number: int) -> Item:
    properties = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    known = find_accelerator(properties.name)
    peak = f", {known.tflops:g} TFLOP/s" if known else ", peak unknown (measured when training starts)"
    found = (
        f"{properties.name}, {_gb(total)} ({_gb(free)} free), compute capability {properties.major}.{properties.minor}"
        f"{peak}, driver {_driver()}"
    )
    if free < 0.5 * total:
        return Item(f"GPU {number}", "note", found, "another program holds half of its memory; see nvidia-smi")
    return Item(f"GPU {number}", "ok", found)


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", path.read_text()) if path.exists() else None
    return match[1] if match else "of unknown version"


# --- what will be used -----------------------------------------------------------------------------------------------


def _compiler() -> list[Item]:
    names = [os.environ.get("CXX"), "g++", "clang++"]
    paths = [name for name in names if name and shutil.which(name)]
    triton = _version("triton")
    found = f"C++ compiler {os.path.basename(paths[0])}" if paths else "no C++ compiler"
    if torch.cuda.is_available():
        found += f", triton {triton}" if triton else ", no triton"
    used, why = choose_compile(choose_device("auto"), "auto", 10**6)
    advice = "" if used or not why.startswith("no C++") else "install g++ (apt install g++): a fifth faster"
    return [Item("compiler", "ok" if used else "note", found, advice)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _choices() -> list[Item]:
    """What training will use, and why."""
    device = choose_device("auto")
    dtype, why_dtype = choose_dtype(device, "auto")
    compiled, why_compile = choose_compile(device, "auto", 10**6)
    peak = peak_flops(device, dtype)
    attention = "PyTorch's fused kernels (sdpa)"
    if device.type == "cpu":
        attention = "plain matrix products in blocks of queries, with a backward pass of their own"
    return [
        Item("device", "ok", f"{device}: {peak.flops / 1e12:.3g} TFLOP/s in {DTYPE_NAMES[dtype]} ({peak.source})"),
        Item("arithmetic", "ok", f"{DTYPE_NAMES[dtype]}: {why_dtype}; weights stay fp32"),
        Item("torch.compile", "ok", f"{'yes' if compiled else 'no'}: {why_compile} (from 150 steps on)"),
        Item("attention", "ok", attention),
        Item("processes", "ok", _processes(device)),
    ]


def _processes(device: torch.device) -> str:
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        return "one"
    return f"torchrun --nproc_per_node {torch.cuda.device_count()} uses all GPUs"


def _gb(n: float) -> str:
    return f"{n / 1e9:.1f} GB"
