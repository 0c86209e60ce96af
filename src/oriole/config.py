"""Recipes: TOML plus `key=value` overrides, validated into frozen pydantic models.

A config model lives beside the code that reads it and derives from `Config`. Unknown keys are errors that name the
nearest known one; nothing is ever dropped silently.
"""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from oriole.errors import ConfigError

__all__ = ["Config", "apply_overrides", "flat", "load", "parse_overrides", "read_toml", "to_toml", "validate"]

T = TypeVar("T", bound="Config")

NAMED = ("model",)
"""Tables that may be given as the name of a preset; a dotted key then changes that preset."""


class Config(BaseModel):
    """Base of every config: frozen, unknown keys refused, a docstring under each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


def load(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read the TOML file at `path`, apply `key=value` overrides (dotted keys), validate as `cls`."""
    data = read_toml(path)
    apply_overrides(data, parse_overrides(overrides))
    return validate(cls, data, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file; `ConfigError` with line and column when it does not parse."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no recipe at {path}; `oriole --help` lists the built-in ones") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """`["train.lr=3e-4", "run=/tmp/x"]` -> `{"train.lr": 0.0003, "run": "/tmp/x"}`.

    A value is read as TOML (number, true/false, list, quoted string, inline table) and otherwise taken as plain text.
    """
    out: dict[str, Any] = {}
    for word in words:
        key, sep, value = word.partition("=")
        if not sep or not key:
            raise ConfigError(f"'{word}' is not key=value; write for example train.lr=3e-4")
        out[key.strip()] = _parse_value(value.strip())
    return out


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return (
            float(text) if any(c in text for c in "0123456789") else text
        )  # TOML has no `3e6` without a dot before 1.0
    except ValueError:
        return text


def apply_overrides(data: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Set dotted keys in a nested table, in place."""
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        table = data
        for name in parents:
            child = table.setdefault(name, {})
            if name in NAMED and isinstance(child, str):
                child = table[name] = {"preset": child}
            if not isinstance(child, dict):
                raise ConfigError(f"{dotted}: '{name}' is a value ({child!r}), not a table; set {name}=… instead")
            table = child
        table[last] = value


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A table of tables as one: {"train": {"lr": 1}} is {"train.lr": 1}."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def validate(cls: type[T], data: dict[str, Any], where: str) -> T:
    """`data` as a `cls`, or a `ConfigError` that names the key, the problem and the nearest known key."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(cls, e, where) for e in error.errors())) from error


def _explain(cls: type[Config], error: Any, where: str) -> str:
    path = [str(p) for p in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _field_names(cls, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(sorted(known))}"
        return f"{where}: unknown key '{key}'; {hint}"
    if error["type"] == "missing":
        return f"{where}: '{key}' is missing; add it to the recipe or pass {key}=…"
    problem = error["msg"].removeprefix("Value error, ")
    # A rule of the whole table would have to show all of it; what it says names the keys.
    given = f"{key} = {error['input']!r}: " if key else ""
    return f"{where}: {given}{problem[:1].lower()}{problem[1:]}"


def _field_names(cls: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The field names of the model found by walking `path` from `cls` (through Optional and Union members)."""
    for name in path:
        field = cls.model_fields.get(name)
        if field is None:
            continue
        options = [field.annotation, *get_args(field.annotation)]
        nested = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if nested:
            cls = nested[0]
    return list(cls.model_fields)


def to_toml(config: Config) -> str:
    """The config as TOML text that `load` reads back to an equal config (`None` values are left out)."""
    lines: list[str] = []
    _write_table(config.model_dump(mode="json", exclude_none=True), (), lines)
    return "\n".join(lines).strip() + "\n"


def _write_table(table: dict[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    if path and (plain or not table):
        lines += ["", f"[{'.'.join(_toml_key(p) for p in path)}]"]
    lines += [f"{_toml_key(k)} = {_toml_value(v)}" for k, v in plain.items()]
    for key, value in table.items():
        if isinstance(value, dict):
            _write_table(value, (*path, key), lines)


def _toml_key(key: str) -> str:
    return key if key and all((c.isalnum() and c.isascii()) or c in "-_" for c in key) else _toml_string(key)


def _toml_string(text: str) -> str:
    # JSON's escapes are a subset of TOML's, but TOML also wants DEL escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return _toml_string(value)
        case list():
            return "[" + ", ".join(_toml_value(v) for v in value) + "]"
        case dict():
            return "{ " + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + " }"
        case _:
            return repr(value)
