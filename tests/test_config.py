"""Recipes: overrides, errors that name the nearest key, and TOML that survives a round trip."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oriole.config import Config, apply_overrides, load, parse_overrides, to_toml, validate
from oriole.errors import ConfigError


class Inner(Config):
    lr: float = 1e-3
    names: list[str] = []  # noqa: RUF012 - pydantic copies defaults
    label: str = "a"


class Outer(Config):
    run: str
    train: Inner = Inner()
    weights: dict[str, float] = {}  # noqa: RUF012


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_are_typed_and_dotted(tmp_path: Path) -> None:
    path = write(tmp_path / "r.toml", 'run = "a"\n[train]\nlr = 1\n')
    made = load(Outer, path, ["train.lr=3e-4", 'train.names=["x", "y"]', "run=/tmp/a b", "weights={ zh = 0.5 }"])
    assert made == Outer(run="/tmp/a b", train=Inner(lr=3e-4, names=["x", "y"]), weights={"zh": 0.5})


@pytest.mark.parametrize("text", ["3e6", "1.5e-3", "7", "0.5", "-2"])
def test_numbers_without_a_dot_are_numbers(text: str) -> None:
    assert parse_overrides([f"a={text}"]) == {"a": float(text)}


@pytest.mark.parametrize("text", ["runs/demo", "26m", "a=b", "今天", "step-3"])
def test_anything_else_is_text(text: str) -> None:
    assert parse_overrides([f"a={text}"]) == {"a": text}


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "r.toml", 'run = "a"\n')
    with pytest.raises(ConfigError, match=r"unknown key 'train.lrr'; did you mean 'lr'\?"):
        load(Outer, path, ["train.lrr=1"])
    with pytest.raises(ConfigError, match="unknown key 'zzz'; known here: run, train, weights"):
        load(Outer, path, ["zzz=1"])


def test_wrong_values_and_missing_keys_say_where(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"r.toml: train.lr = 'fast'"):
        load(Outer, write(tmp_path / "r.toml", 'run = "a"\n[train]\nlr = "fast"\n'))
    with pytest.raises(ConfigError, match="'run' is missing"):
        load(Outer, write(tmp_path / "r.toml", ""))
    with pytest.raises(ConfigError, match="not key=value"):
        parse_overrides(["train.lr"])
    with pytest.raises(ConfigError, match="'run' is a value"):
        apply_overrides({"run": "a"}, {"run.x": 1})
    with pytest.raises(ConfigError, match=r"not valid TOML.*line 1"):
        load(Outer, write(tmp_path / "r.toml", 'run = "a" b\n'))
    with pytest.raises(ConfigError, match="no recipe at"):
        load(Outer, tmp_path / "nothing.toml")


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Outer(run="a").run = "b"  # type: ignore[misc]


@given(
    st.builds(
        Outer,
        run=st.text(st.characters(exclude_categories=["Cs"])),
        train=st.builds(Inner, lr=st.floats(allow_nan=False), label=st.text(st.characters(exclude_categories=["Cs"]))),
        weights=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 1)),
    )
)
def test_toml_round_trip(config: Outer) -> None:
    import tomllib

    assert validate(Outer, tomllib.loads(to_toml(config)), "x") == config
