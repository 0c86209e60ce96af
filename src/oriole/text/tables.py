"""Rows of .csv, .tsv, .parquet and .arrow files as records, with column names taken as JSON keys are.

Names are matched without regard to case (`INSTRUCTION` is `instruction`); the few Chinese ones that old files use are
translated. Rows come in small batches, so memory does not grow with the file.
"""

import csv
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oriole.errors import raise_for_os_error
from oriole.text.files import LONGEST_LINE, BrokenFile, Skipped, file_kind, head, lines, refuse

__all__ = ["header", "rows", "tsv_cells", "tsv_rows"]

BATCH = 128
"""Rows of a parquet file that are in memory at a time."""

QUOTED_LINES = 1000
"""Lines that one quoted cell of a .tsv file may span; more means that the quotation mark was only a mark."""

_BAD = "\ufdd0\n"  # a code point that no text has: what stands for a line that was counted as bad already
_CHINESE = {
    "问题": "question",
    "提问": "question",
    "回答": "answer",
    "答案": "answer",
    "文本": "text",
    "来源": "source",
}
_NOTE = re.compile(r"\s*#.*")
_QUOTED = re.compile(r'\s*"((?:[^"]|"")*)"\s*')

Row = tuple[str, dict[str, Any]]
"""The place of a row in its file and its cells by column name."""


def rows(path: Path, known: frozenset[str], skip_bad: Skipped | None = None) -> Iterator[Row]:
    """The rows of a table; of a parquet or arrow file only the columns with a `known` name, where it has any."""
    match file_kind(path):
        case "csv":
            yield from _csv_rows(path, skip_bad)
        case "tsv" | "text":
            yield from _tsv_rows(path, skip_bad)
        case "parquet":
            yield from _parquet_rows(path, known)
        case _:
            yield from _arrow_rows(path)


def header(path: Path) -> list[str]:
    """The names that the first line of a .tsv file gives its columns; where it gives none, its first row."""
    first = next((line for line in head(path).splitlines() if line.strip()), "")
    return [_name(cell) for cell in first.split("\t")]


def _name(cell: str) -> str:
    name = _NOTE.sub("", cell).strip().strip('"').lower()  # "回答    #not for training" has been seen
    return _CHINESE.get(name, name)


# --- text tables -----------------------------------------------------------------------------------------------------


def _csv_rows(path: Path, skip_bad: Skipped | None) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_LINE)
    first = next((line for line in head(path).splitlines() if line.strip()), "")
    comma = max(",;\t", key=first.count)  # the comma where there is none of the others
    reader = csv.reader((line for _, line in lines(path, skip_bad, filler=_BAD)), delimiter=comma)
    names: list[str] = []
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise BrokenFile(f"{path}, line {line}: no valid csv ({error}); is a quotation mark not closed?") from error
        if cells is None:
            return
        where, line = f"line {line}", reader.line_num + 1
        if not cells or any(_BAD[0] in cell for cell in cells):
            continue
        if not names:
            names = _checked(path, cells)
        elif len(cells) != len(names):
            why = f"{len(cells)} cells where the first line names {len(names)}; quote cells that hold a '{comma}'"
            refuse(path, where, why, skip_bad)
        else:
            yield where, dict(zip(names, cells, strict=True))


def _checked(path: Path, cells: Sequence[str]) -> list[str]:
    names = [_name(cell) for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise BrokenFile(f"{path}, line 1: two columns are named '{name}'; rename one")
    return names


def _tsv_rows(path: Path, skip_bad: Skipped | None) -> Iterator[Row]:
    names: list[str] = []
    for number, cells in tsv_cells(path, skip_bad):
        if not any(cells):
            continue
        if not names:
            names = _checked(path, cells)
        elif len(cells) != len(names):
            why = f"{len(cells)} cells where the first line names {len(names)}; put one tab between two cells"
            refuse(path, f"line {number}", why, skip_bad)
        else:
            yield f"line {number}", dict(zip(names, cells, strict=True))


def tsv_cells(path: Path, skip_bad: Skipped | None) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row of a .tsv file."""
    return tsv_rows(lines(path, skip_bad, filler=_BAD))


def tsv_rows(source: Iterator[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row. A cell in quotation marks may span lines, as spreadsheets write it."""
    ahead: deque[tuple[int, str]] = deque()

    def take() -> tuple[int, str] | None:
        return ahead.popleft() if ahead else next(source, None)

    while item := take():
        number, line = item
        if _is_open(line):
            more: list[tuple[int, str]] = []
            size, is_open = len(line), True
            while is_open and len(more) < QUOTED_LINES and size < LONGEST_LINE and (item := take()):
                more.append(item)
                size += len(item[1])
                is_open ^= item[1].count('"') % 2 == 1
            text = line + "".join(next_line for _, next_line in more)
            if any("\n" in cell and _QUOTED.fullmatch(cell) for cell in text.rstrip("\r\n").split("\t")):
                line = text
            else:  # the quotation mark was only a mark
                ahead.extendleft(reversed(more))
        if _BAD[0] not in line:
            yield number, [_unquoted(cell) for cell in line.rstrip("\r\n").split("\t")]


def _is_open(line: str) -> bool:
    """Whether a cell of the line begins with a quotation mark that nothing closes."""
    return line.count('"') % 2 == 1 and any(cell.lstrip(" ").startswith('"') for cell in line.split("\t"))


def _unquoted(cell: str) -> str:
    whole = _QUOTED.fullmatch(cell)
    return (whole[1].replace('""', '"') if whole else cell).strip()


# --- Arrow's tables --------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path, known: frozenset[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with _faults(path, "parquet"), pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        names = file.schema_arrow.names
        chosen = [name for name in names if _name(name) in known] or names
        yield from _numbered(file.iter_batches(batch_size=BATCH, columns=chosen, use_threads=False))


def _arrow_rows(path: Path) -> Iterator[Row]:
    import pyarrow

    with _faults(path, "arrow"), pyarrow.OSFile(str(path)) as file:
        if file.read(6) == b"ARROW1":
            table = pyarrow.ipc.open_file(file)
            yield from _numbered(table.get_batch(i) for i in range(table.num_record_batches))
        else:
            file.seek(0)
            yield from _numbered(iter(pyarrow.ipc.open_stream(file)))


def _numbered(batches: Iterator[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            for row in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield f"row {number}", {_name(name): value for name, value in row.items()}


@contextmanager
def _faults(path: Path, kind: str) -> Iterator[None]:
    """Arrow's errors as ours: what is wrong with the file, or with the disk."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, pyarrow.ArrowException):
            raise_for_os_error(error, "reading", path)
        why = str(error).partition("\n")[0][:120]
        raise BrokenFile(
            f"{path} is no valid {kind} file ({why}); copy or download it again, or mend its name"
        ) from error
