"""Files of model folders: JSON and safetensors, written whole or not at all, read with errors that say what to do."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from oriole.errors import ModelError, raise_for_os_error

__all__ = ["copy_tensor", "opened", "read_json", "write_folder"]


def write_folder(
    folder: Path,
    weights: str,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    objects: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write copies of the tensors in `dtype` into the file `weights`, then the objects as JSON into the files that are
    their names, each in one atomic step.

    `ResourceError` when the disk is full or the folder not writable.
    """
    # Views that share one fused matrix do not overlap, which is all that safetensors asks for.
    on_disk = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _replacing(folder / weights) as temporary:
            save_file(on_disk, temporary, metadata={"format": "pt"})
        for name, data in objects.items():
            with _replacing(folder / name) as temporary:
                temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except SafetensorError as error:  # the library gives the system's error as text only: "… (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise_for_os_error(OSError(int(number[1]), str(error)), "writing", folder / weights)
    except OSError as error:
        raise_for_os_error(error, "writing", folder)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to; takes the place of `path` when the block ends well, and is removed otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file to read from; `ModelError` when it is missing or broken."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ModelError(f"{path} is truncated or broken ({error}); copy or download it again") from error
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing; copy or download the folder again") from error
    except OSError as error:
        raise_for_os_error(error, "reading", path)


def copy_tensor(target: Tensor, source: Tensor, what: str, config: str) -> None:
    """Fill `target`; `ModelError` names `what` it was to be filled with and the `config` file that it does not fit."""
    if source.shape != target.shape:
        raise ModelError(
            f"{what} has shape {tuple(source.shape)}, {config} says {tuple(target.shape)}; "
            "weights and config belong to different models"
        )
    if source.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ModelError(f"{what} is {source.dtype}, which Oriole cannot compute with; use weights in 16 or 32 bits")
    with torch.no_grad():
        target.copy_(source)


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """The object in a file; `ModelError`, with the `hint` where it is missing."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"no {path.name} in {path.parent}; {hint}") from error
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are both ValueErrors
        _broken(path, error)
    except OSError as error:
        raise_for_os_error(error, "reading", path)
    if not isinstance(data, dict):
        _broken(path, "not an object")
    return data


def _broken(path: Path, why: object) -> NoReturn:
    raise ModelError(f"{path} is not valid JSON ({why}); copy or download it again")
