"""What this machine can do: device, arithmetic and compiler, each with the reason in words."""

import os
import shutil
from importlib.util import find_spec
from typing import Literal

import torch

from oriole.errors import ConfigError, ResourceError

__all__ = ["COMPILE_STEPS", "DTYPE_NAMES", "Dtype", "choose_compile", "choose_device", "choose_dtype"]

Dtype = Literal["auto", "fp32", "bf16", "fp16"]

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

COMPILE_STEPS = 150
"""Steps from which "auto" compiles: it costs about 45 s once on two cores, and a step gains about a fifth."""


def choose_device(wanted: str) -> torch.device:
    """`auto`: CUDA, else Apple's GPU, else the CPU. `ResourceError` when the wanted device is not there."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"train.device={wanted} is no device; use auto, cpu, cuda, cuda:1 or mps") from error
    there = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type, 0)
    if (device.index or 0) >= there:
        raise ResourceError(f"train.device={wanted}: this machine has no such device; use train.device=auto")
    return device


def choose_dtype(device: torch.device, wanted: Dtype) -> tuple[torch.dtype, str]:
    """The dtype of the matrix products and why; the weights are fp32 in any case."""
    if wanted != "auto":
        return next(d for d, name in DTYPE_NAMES.items() if name == wanted), f"as asked by train.dtype={wanted}"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU has bf16 units"
        return torch.float16, "this GPU has no bf16 units; the loss is scaled"
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        units = [name for name in ("amx_bf16", "avx512_bf16") if features.get(name)]
        # oneDNN must agree: it is what multiplies.
        if units and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return torch.bfloat16, f"this CPU has {units[0]}" + ("" if units[0] == "amx_bf16" else ", though no AMX")
        return torch.float32, "this CPU has neither AMX nor AVX512-BF16, so bf16 would not be faster"
    return torch.float32, f"bf16 on {device.type} is not tested"


def choose_compile(device: torch.device, wanted: bool | Literal["auto"], steps: int) -> tuple[bool, str]:
    """Whether to use torch.compile and why."""
    if wanted != "auto":
        return wanted, f"as asked by train.compile={str(wanted).lower()}"
    if steps < COMPILE_STEPS:
        return False, f"{steps} steps are too few to pay for compiling"
    # The order in which torch itself looks for a C++ compiler.
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None)
    match device.type:
        case "cpu" if compiler:
            return True, f"{os.path.basename(compiler)} is there"
        case "cpu":
            return False, "no C++ compiler; g++ would make training about a fifth faster"
        case "cuda" if find_spec("triton") and (compiler or shutil.which("gcc") or shutil.which("cc")):
            return True, "triton is there"
        case "cuda":
            return False, "triton or a C compiler is missing; they would make training faster"
        case _:
            return False, f"not tested on {device.type}"
