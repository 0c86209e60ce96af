"""LLaMA-Factory's `dataset_info.json`: each data set it describes, read with the columns and roles it names.

Every set with a file beside the description is read; sets that lie on a hub only are named, not fetched.
`dataset_info.json#name,name` chooses some.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from oriole.errors import DataError, raise_for_os_error
from oriole.log import say
from oriole.text.paths import DESCRIPTION, expand, names_sets
from oriole.text.turns import Misfit, kind

__all__ = ["DataSet", "data_sets", "is_description"]

_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
_SHAREGPT = {"messages": "conversations"}
_OWN = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_ROLES = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "function_call",
    "system_tag": "system",
}  # fmt: skip


def is_description(path: Path) -> bool:
    """Whether the path is a `dataset_info.json`, with or without chosen sets."""
    return path.name == DESCRIPTION or names_sets(path)


@final
@dataclass(frozen=True)
class DataSet:
    """One described set: its files, and how to read its records as the readers of `text.records` expect them."""

    name: str
    files: tuple[Path, ...]
    holds: Literal["doc", "chat", "preference", "feedback"]
    columns: Mapping[str, str]
    """LLaMA-Factory's name of each column -> the file's."""
    tags: Mapping[str, str]

    def record(self, value: Any) -> Any:
        """The record under the names that `text.records` knows."""
        if not isinstance(value, dict):
            return value
        if self.holds == "doc":
            return {"text": value.get(self.columns["prompt"])}
        out = {_OWN.get(name, name): value.get(column) for name, column in self.columns.items()}
        for key in ("conversations", "chosen", "rejected"):
            if out.get(key) is not None:
                out[key] = self._turns(out[key])
        return {key: item for key, item in out.items() if item is not None}

    def _turns(self, value: Any) -> Any:
        """Turns with this set's names for roles; texts, as Alpaca's pairs are, stay."""
        if isinstance(value, dict):
            return self._turns([value])
        if not isinstance(value, list):
            return value
        roles = {self.tags[tag]: role for tag, role in _ROLES.items()}
        out = []
        for turn in value:
            if not isinstance(turn, dict):
                raise Misfit(f"a message is {kind(turn)}; it must be an object with '{self.tags['role_tag']}'")
            role = str(turn.get(self.tags["role_tag"]))
            out.append(turn | {"role": roles.get(role, role), "content": turn.get(self.tags["content_tag"])})
        return out


def data_sets(path: Path) -> list[DataSet]:
    """The sets that a description names and that have a file; `DataError` when it, or a chosen set, cannot be used."""
    file, _, chosen = str(path).partition("#")
    try:
        table = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise_for_os_error(error, "reading", file)
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON ({error}); mend the file") from error
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        raise DataError(f"{file} must be an object of data sets, each an object with 'file_name'")
    names = [name.strip() for name in chosen.split(",")] if chosen else list(table)
    for name in names:
        if name not in table:
            raise DataError(f"{file} describes no data set '{name}'; it has {', '.join(list(table)[:8])}")
    found, remote = [], []
    for name in names:
        entry = table[name]
        local = Path(file).parent / str(entry.get("file_name") or "")
        if entry.get("file_name") and local.exists():
            found.append(_data_set(name, entry, tuple(expand(local))))
        else:
            remote.append(name)
    if remote and (chosen or not found):
        raise DataError(f"{file}: {', '.join(remote[:8])} has no file beside it; fetch the data first")
    if remote:
        more = f" and {len(remote) - 8} more" if len(remote) > 8 else ""
        say(f"{file} also names sets without a file here, which are left out: {', '.join(remote[:8])}{more}", "yellow")
    return found


def _data_set(name: str, entry: dict[str, Any], files: tuple[Path, ...]) -> DataSet:
    columns = entry.get("columns") or {}
    shared = entry.get("formatting") == "sharegpt"
    if not isinstance(columns, dict) or not isinstance(entry.get("tags") or {}, dict):
        raise DataError(f"{DESCRIPTION}: 'columns' and 'tags' of '{name}' must be objects")
    if entry.get("ranking"):
        holds: Literal["doc", "chat", "preference", "feedback"] = "preference"
    elif "kto_tag" in columns:
        holds = "feedback"
    elif "prompt" in columns and "response" not in columns and not shared:
        holds = "doc"
    else:
        holds = "chat"
    usual = _SHAREGPT if shared else _ALPACA
    tags = _TAGS | (entry.get("tags") or {})
    return DataSet(name, files, holds, (usual if not columns or shared else {}) | columns, tags)
