"""Checkpoints that survive a kill at any moment, a full disk and a damaged file.

    root/step-120/   model.safetensors optimizer.safetensors … state.json   what `save` was given
                     manifest.json   {"schema": 1, "files": {name: {"sha256", "size"}}}

A checkpoint is written beside its place, flushed to the disk, and only then renamed into it; before anything is used,
every file is compared with the manifest. Tensors are safetensors, the rest is JSON: reading one runs no code. Which of
them stay follows from their own state.json, so that no list beside them can be wrong.

Processes that hold only rows of a tensor write these, each into a file of its own: model-00001-of-00002.safetensors.
Its header says under "rows" which ones they are: {name: [first, of how many]}. They are put together again, or cut
differently, when they are read.
"""

import hashlib
import json
import math
import os
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from oriole.errors import CheckpointError, raise_for_os_error
from oriole.log import say

__all__ = [
    "Checkpoint",
    "Entry",
    "Keep",
    "Rows",
    "Wanted",
    "best",
    "latest_valid",
    "load",
    "peek",
    "restore_rng",
    "rng_state",
    "save",
    "save_part",
    "steps",
    "write_json",
]

SCHEMA = 1
TEMPORARY = ".tmp"
"""Suffix of what is being written; whatever still has it was not finished."""


Entry = dict[str, Any]
"""A file's line in the manifest: {"sha256", "size"}."""
Rows = Mapping[str, Mapping[str, tuple[int, int]]]
"""By file stem and tensor: the first of the rows that are there, and how many there are in all."""
Wanted = Callable[[str, str, Sequence[int]], tuple[int, int] | None]
"""Of a file stem, a tensor and its shape: the first row wanted and the one after the last, or None for all."""


def _all_rows(stem: str, name: str, shape: Sequence[int]) -> None:
    """All rows of all tensors."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    path: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    """By file stem, then by name; on the CPU."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay on disk; one that any of the three wants does."""

    last: int = 2
    """How many of the newest."""
    best: int = 0
    """How many of those with the lowest "score" in their state."""
    every: int = 0
    """All of every so many steps; 0: none."""

    def among(self, scores: Mapping[int, float | None]) -> set[int]:
        """The steps that stay, of all there are with their scores (None: has none). Of equal scores the earlier."""
        scored = sorted((score, step) for step, score in scores.items() if score is not None)
        kept = set(sorted(scores)[-self.last :]) | {step for _, step in scored[: self.best]}
        return kept | {step for step in scores if self.every and step > 0 and step % self.every == 0}


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: Keep = Keep(),
    *,
    rows: Rows | None = None,
    ready: Callable[[], None] = lambda: None,
    others: Callable[[], Mapping[str, Entry]] = dict,
) -> Path:
    """Write `root/step-<step>` so that it is either whole or absent; then delete those that `keep` does not want.

    Checkpoints of later steps are always deleted: they belong to a branch that was left by resuming from before them.
    `rows` says of which tensors these are only some rows. `ready` is called when there is a folder for the `save_part`
    of other processes; `others` waits for them and gives what they returned.
    Raises `ResourceError` when the disk is full; earlier checkpoints are then as they were.
    """
    target = root / f"step-{step}"
    temporary = _temporary(root, step)
    try:
        _remove_leftovers(root)
        temporary.mkdir(parents=True)
        ready()
        files = _write_all(temporary, tensors, rows)
        _write_text(temporary / "state.json", json.dumps({"step": step, **state}, ensure_ascii=False))
        files |= {"state.json": _entry(temporary / "state.json")} | dict(others())
        _write_text(temporary / "manifest.json", json.dumps({"schema": SCHEMA, "files": files}, indent=1))
        _sync(temporary)
        if target.exists():  # the same step again: the old one stays until the new one is whole
            os.replace(target, root / f"step-{step}.old{TEMPORARY}")
        os.replace(temporary, target)
        _sync(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise_for_os_error(error, "saving the checkpoint", target)
    _remove_leftovers(root)
    kept = keep.among({old: _score(root / f"step-{old}") for old in steps(root) if old <= step})
    for old in set(steps(root)) - kept:
        shutil.rmtree(root / f"step-{old}", ignore_errors=True)
    return target


def save_part(root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], rows: Rows) -> dict[str, Entry]:
    """Write this process's files into the folder that `save` has made in another; their lines of the manifest."""
    try:
        return _write_all(_temporary(root, step), tensors, rows)
    except OSError as error:
        raise_for_os_error(error, "saving the checkpoint", root / f"step-{step}")


def _temporary(root: Path, step: int) -> Path:
    return root / f"step-{step}{TEMPORARY}"


def _write_all(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], rows: Rows | None) -> dict[str, Entry]:
    files = {}
    for stem, named in tensors.items():
        path = folder / f"{stem}.safetensors"
        _write_tensors(path, named, {} if rows is None else rows.get(stem, {}))
        files[path.name] = _entry(path)
    return files


def _entry(path: Path) -> Entry:
    return {"sha256": _sha256(path), "size": path.stat().st_size}


def peek(path: Path) -> dict[str, Any]:
    """The state of a checkpoint without its tensors, unchecked; empty where it cannot be read."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _score(path: Path) -> float | None:
    """What a checkpoint's state says under "score"; None where it says nothing or is damaged."""
    score = peek(path).get("score")
    return score if isinstance(score, float) and math.isfinite(score) else None


def best(root: Path) -> int | None:
    """The step of the checkpoint with the lowest score, None where none has one. Of equal scores the earlier."""
    scores = {step: _score(root / f"step-{step}") for step in steps(root)}
    return min(((score, step) for step, score in scores.items() if score is not None), default=(0, None))[1]


def load(path: Path, wanted: Wanted = _all_rows, *, verify: bool = True) -> Checkpoint:
    """Read a checkpoint after comparing every file with the manifest, unless another process has just done so.

    `wanted` says which of a tensor's rows are read, as first and last + 1, or None for all.
    Raises `CheckpointError` naming the file that is missing, cut short or changed.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise CheckpointError(
                f"{path} has schema {manifest['schema']}, but this Oriole reads {SCHEMA}; use the one it came from"
            )
        files = {str(name): (int(f["size"]), str(f["sha256"])) for name, f in manifest["files"].items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no checkpoint: it has no manifest.json") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}/manifest.json is damaged ({error})") from error
    if "state.json" not in files:
        raise CheckpointError(f"{path}/manifest.json is damaged (it does not list state.json)")
    if verify:
        for name, (size, sha256) in files.items():
            _check(path / name, size, sha256)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    tensors = _read_tensors(path, [name for name in files if name.endswith(".safetensors")], wanted)
    return Checkpoint(path, int(state["step"]), state, tensors)


def _read_tensors(folder: Path, names: Iterable[str], wanted: Wanted) -> dict[str, dict[str, Tensor]]:
    """The tensors of all files, by stem and name; those that lie in several files put together."""
    out: dict[str, dict[str, Tensor]] = {}
    pieces: dict[tuple[str, str], list[tuple[int, Tensor]]] = defaultdict(list)
    for file in sorted(names):
        stem = re.sub(r"-\d+-of-\d+$", "", Path(file).stem)
        into = out.setdefault(stem, {})
        with safe_open(folder / file, framework="pt") as handle:
            rows = json.loads((handle.metadata() or {}).get("rows", "{}"))
            for name in handle.keys():
                shape = handle.get_slice(name).get_shape()
                first, total = rows.get(name, (0, 0))
                span = wanted(stem, name, [total, *shape[1:]] if name in rows else shape)
                if span is None:
                    piece = handle.get_tensor(name)
                else:
                    low, high = (min(max(at - first, 0), shape[0]) for at in span)
                    piece = handle.get_slice(name)[low:high]
                if name in rows:
                    pieces[stem, name].append((first, piece))
                else:
                    into[name] = piece
    for (stem, name), found in pieces.items():
        out[stem][name] = torch.cat([piece for _, piece in sorted(found, key=lambda pair: pair[0])])
    return out


def latest_valid(root: Path, wanted: Wanted = _all_rows) -> Checkpoint | None:
    """The newest checkpoint below `root` that is whole, None when there is none at all.

    Every newer one that was refused is reported with the reason. Raises `CheckpointError` when there are checkpoints
    but all are damaged: to start afresh then is for the user to say.
    """
    _remove_leftovers(root)
    found = sorted(steps(root), reverse=True)
    for step in found:
        try:
            return load(root / f"step-{step}", wanted)
        except CheckpointError as error:
            say(f"checkpoint step-{step} is not used: {error}", "yellow")
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {root} is whole; restore one from a copy, "
            "or start afresh with train.resume=no"
        )
    return None


def steps(root: Path) -> list[int]:
    """The steps of the checkpoints below `root`, whole or not, in no order."""
    if not root.is_dir():
        return []
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in root.iterdir())
    return [int(match[1]) for match in names if match]


def _remove_leftovers(root: Path) -> None:
    """Delete what an earlier process left half written; one that was only put aside for its successor comes back."""
    for aside in root.glob(f"step-*.old{TEMPORARY}"):
        target = root / aside.name.removesuffix(f".old{TEMPORARY}")
        if not target.exists():
            os.replace(aside, target)
    for path in root.glob(f"step-*{TEMPORARY}"):
        shutil.rmtree(path, ignore_errors=True)


def _check(path: Path, size: int, sha256: str) -> None:
    try:
        found = path.stat().st_size
        if found != size:
            raise CheckpointError(f"{path} has {found:,} bytes instead of {size:,}")
        if _sha256(path) != sha256:
            raise CheckpointError(f"{path} is damaged (its sha256 is not the manifest's)")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], rows: Mapping[str, tuple[int, int]]) -> None:
    on_host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(on_host, path, metadata={"rows": json.dumps(rows)} if rows else None)
    except SafetensorError as error:
        # The library gives the system's error number only inside its text.
        if match := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(match[1]), os.strerror(int(match[1]))) from error
        raise
    _sync(path)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, obj: Any) -> None:
    """Write a JSON file so that readers see either the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_text(temporary, json.dumps(obj, ensure_ascii=False, indent=1) + "\n")
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise_for_os_error(error, "writing", path)


# --- random numbers --------------------------------------------------------------------------------------------------


def rng_state(device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The generators of Python and NumPy as JSON, those of torch (CPU, and `device` where it is a GPU) as tensors."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    plain = {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    tensors = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return plain, tensors


def restore_rng(plain: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Put all generators back to what `rng_state` gave; a GPU's only where both sides have one."""
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
