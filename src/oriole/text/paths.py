"""Which files a pattern means and of what kind each is; and what is said of those that cannot be read."""

import contextlib
import difflib
import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

from oriole.errors import DataError
from oriole.log import say

__all__ = [
    "COMPRESSED", "DESCRIPTION", "HELDOUT", "WORKING", "BrokenFile", "Skipped", "expand", "file_kind", "names_sets",
    "plain_name", "plain_stem", "refuse",
]  # fmt: skip

Kind = Literal["json", "tsv", "csv", "parquet", "arrow", "text", "html", "pdf"]

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
DESCRIPTION = "dataset_info.json"
"""LLaMA-Factory's description of data sets; a folder means the sets it names by themselves, without it."""
HELDOUT = "heldout"
"""Documents set apart before anything was learnt: a folder that `oriole data clean` made means the others; name
FOLDER/heldout to read these."""
WORKING = ".done"
"""The folder of working state by which a folder that `oriole data clean` made is known."""
_READABLE = "jsonl, json, csv, tsv, parquet, txt, md, html or pdf; text also as .gz, .bz2, .xz or .zst"
_EXAMPLES = 20
_LISTED = 6


class BrokenFile(DataError):
    """A file that cannot be read to its end, or not at all; what came before the fault may have been fine."""


@final
@dataclass
class Skipped:
    """What was left out because it could not be read: how much, where, and the first twenty reasons."""

    total: int = 0
    files: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    converted: dict[str, str] = field(default_factory=dict)
    """Files that were not UTF-8, with the encoding that they were read in."""

    def add(self, path: Path, reason: str) -> None:
        """Count one bad record of `path`."""
        self.total += 1
        self.files[str(path)] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(reason)


def refuse(path: Path, where: str, why: str, skip_bad: Skipped | None) -> None:
    """Raise a `DataError` about one record, or count it in `skip_bad` when that is given."""
    reason = f"{path}, {where}: {why}" if where else f"{path} {why}"
    if skip_bad is None:
        raise DataError(reason)
    skip_bad.add(path, reason)


# --- kinds -----------------------------------------------------------------------------------------------------------


def file_kind(path: Path) -> Kind:
    """What a file holds, by its name; `DataError` for a kind that is not read."""
    match plain_name(path).suffix.lower():
        case ".jsonl" | ".ndjson" | ".json":
            kind: Kind = "json"
        case ".tsv":
            kind = "tsv"
        case ".csv":
            kind = "csv"
        case ".parquet" | ".pq":
            kind = "parquet"
        case ".arrow":
            kind = "arrow"
        case ".txt" | ".md" | ".markdown":
            kind = "text"
        case ".html" | ".htm" | ".xhtml":
            kind = "html"
        case ".pdf":
            kind = "pdf"
        case ".pt" | ".pth":
            raise DataError(f"{path} holds tensors; if they are tokens, oriole import makes text of them first")
        case ".pkl" | ".pickle":
            raise DataError(f"{path} is a pickle, which can run any program when it is read, so it is not; {_RESAVE}")
        case _:
            raise DataError(f"{path} is of no kind that is read; give {_READABLE}")
    if kind in ("parquet", "arrow", "pdf") and plain_name(path) != path:
        raise DataError(f"{path} is a packed {kind} file, which is read from its end; unpack it first")
    return kind


_RESAVE = "save its tensors with torch.save or its rows as jsonl, where you trust the file"


def plain_stem(path: Path) -> str:
    """`data/pretrain_zh.jsonl.xz` -> `pretrain_zh`."""
    return plain_name(path).stem


def plain_name(path: Path) -> Path:
    """`data/pretrain_zh.jsonl.xz` -> `data/pretrain_zh.jsonl`."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


# --- patterns --------------------------------------------------------------------------------------------------------


def expand(
    patterns: str | Path | Iterable[str | Path], root: Path | None = None, *, skip_bad: Skipped | None = None
) -> list[Path]:
    """The files that paths, folders and globs mean, sorted, each once; relative ones start from `root` where given.

    A folder means every readable file in it at any depth, hidden ones left out; `**` in a glob crosses folders. Links
    to folders are followed, each folder once; a loop of links is named. `DataError` when a pattern matches nothing, or
    when a folder may not be read; `skip_bad` counts the latter, and loops, instead.
    """
    found: dict[Path, Path] = {}
    for pattern in [patterns] if isinstance(patterns, str | Path) else patterns:
        given = Path(pattern).expanduser()
        full = root / given if root is not None else given
        if full.is_file() or names_sets(full):
            matches = [full]
        elif full.is_dir():
            matches = _inside(full, skip_bad)
        else:
            if "**" in given.parts:  # a glob passes over folders that it may not read; this names them
                for _ in _walk(_fixed(full), set(), skip_bad):
                    pass
            hits = [Path(root or "", hit) for hit in glob.glob(str(given), root_dir=root, recursive=True)]
            matches = [file for hit in hits for file in ([hit] if hit.is_file() else _inside(hit, skip_bad))]
            if not matches:
                raise DataError(_nothing_matches(full))
        for path in matches:
            found.setdefault(path.resolve(), path)
    if not found:
        raise DataError(f"no files were named; give files, folders or globs of {_READABLE}")
    return sorted(found.values())


def names_sets(path: Path) -> bool:
    """Whether a path is `dataset_info.json#name,name`: some of the sets that LLaMA-Factory's description names."""
    return path.name.startswith(f"{DESCRIPTION}#") and path.with_name(DESCRIPTION).is_file()


def _inside(folder: Path, skip_bad: Skipped | None) -> list[Path]:
    before = skip_bad.total if skip_bad is not None else 0
    matches = [p for p in _walk(folder, set(), skip_bad) if _readable(p) and not _set_apart(p, folder)]
    if not matches and (skip_bad is None or skip_bad.total == before):
        raise DataError(f"{folder} holds no file that can be read{_contents(folder)}; give {_READABLE}")
    return matches


def _set_apart(path: Path, folder: Path) -> bool:
    """Whether a file below `folder` is the report or a held-out part of what `oriole data clean` made."""
    for made in path.parents:
        if not made.is_relative_to(folder):
            return False
        inside = path.relative_to(made).parts
        ours = inside[0] == HELDOUT or inside in (("report.json",), ("report.html",))
        if ours and (made / WORKING).is_dir():
            return True
    return False


def _readable(path: Path) -> bool:
    with contextlib.suppress(DataError):
        return bool(file_kind(path)) and path.name != DESCRIPTION
    return False


def _walk(folder: Path, seen: set[tuple[int, int]], skip_bad: Skipped | None) -> Iterator[Path]:
    """Every file below the folder that is not hidden; what cannot be entered is named once."""
    try:
        about = folder.stat()
        seen.add((about.st_dev, about.st_ino))
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        why = "no permission" if isinstance(error, PermissionError) else error.strerror or str(error)
        refuse(folder, "", f"cannot be read ({why}); change its mode or leave it out", skip_bad)
        return
    for path in (folder / name for name in names):
        try:
            about = path.stat()
        except OSError as error:
            _lost(path, error, skip_bad)
            continue
        if path.is_file():
            yield path
        elif path.is_dir():
            if (about.st_dev, about.st_ino) not in seen:
                yield from _walk(path, seen, skip_bad)
            elif path.is_symlink() and path.resolve() in [folder.resolve(), *folder.resolve().parents]:
                _remark(path, "is a link to a folder that it lies in; it is not followed", skip_bad)


def _lost(path: Path, error: OSError, skip_bad: Skipped | None) -> None:
    """A name in a folder that leads to nothing: a fault where it could be data, else no matter."""
    if path.is_symlink() and not path.suffix:
        _remark(path, "is a link that leads nowhere", skip_bad)
    elif _readable(path):
        why = "a link that leads nowhere" if path.is_symlink() else error.strerror or str(error)
        refuse(path, "", f"cannot be read ({why}); mend it or leave it out", skip_bad)


def _remark(path: Path, what: str, skip_bad: Skipped | None) -> None:
    """Something odd that loses no data: counted where faults are counted, said otherwise."""
    if skip_bad is None:
        say(f"{path} {what}", "yellow")
    else:
        skip_bad.add(path, f"{path} {what}")


def _fixed(pattern: Path) -> Path:
    """The folder before the first part of a glob that has a wildcard."""
    while glob.has_magic(str(pattern)):
        pattern = pattern.parent
    return pattern


def _nothing_matches(pattern: Path) -> str:
    parent = pattern.parent
    while glob.has_magic(parent.name):
        parent = parent.parent
    if not parent.is_dir():
        return f"no file or folder {pattern}: {parent} does not exist; check the path"
    what = "nothing matches" if glob.has_magic(str(pattern)) else "no file or folder"
    return f"{what} {pattern}{_contents(parent, pattern.name)}; check the name"


def _contents(folder: Path, like: str = "") -> str:
    """A few names in the folder, those most like `like` first."""
    try:
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        return f" ({folder} cannot be listed: {error.strerror or error})"
    if not names:
        return f" ({folder} is empty)"
    near = difflib.get_close_matches(like, names, n=_LISTED, cutoff=0.3) if like else []
    shown = [*near, *(name for name in names if name not in near)][:_LISTED]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f" ({folder} holds {', '.join(shown)}{more})"
