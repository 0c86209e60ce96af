"""A pattern says what each layer is; without one the model is the plain one."""

import pytest

from oriole.config import apply_overrides, validate
from oriole.errors import ConfigError
from oriole.model.config import Layer, ModelConfig, preset
from oriole.model.costs import flops_per_token


def shaped(**more: object) -> ModelConfig:
    return validate(ModelConfig, {"preset": "demo", **more}, "here")


def test_a_pattern_is_repeated_to_the_number_of_layers() -> None:
    windows = [layer.window for layer in shaped(pattern="LLLG", window=64).layers]
    assert windows == [64, 64, 64, None, 64, 64]
    assert shaped().layers == (Layer(),) * 6


def test_letters_after_a_layer_are_its_options() -> None:
    layers = shaped(pattern="GgtLcsrGze", num_layers=3).layers
    assert layers == (
        Layer(gate="head", temperature="query"),
        Layer(window=512, gate="channel", temperature="length", residual="scale"),
        Layer(residual="zero", experts=True),
    )


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("", "a layer is G"), ("gG", "a layer is G"), ("G L", "a layer is G"), ("Gx", "no option 'x'"), ("Ggc", "twice")],
)
def test_what_is_no_pattern_is_named(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shaped(pattern=pattern)


def test_a_preset_may_be_changed_in_a_table() -> None:
    assert shaped(pattern="LG", window=32) == preset("demo").model_copy(update={"pattern": "LG", "window": 32})
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        shaped(preset="dem")


def test_a_window_costs_less_attention() -> None:
    length, window = 512, 64
    plain, local = shaped(), shaped(pattern="L", window=window)
    keys = [min(query + 1, window) for query in range(length)]
    saved = flops_per_token(plain, length) - flops_per_token(local, length)
    per_key = 12 * plain.num_layers * plain.num_heads * plain.head_dim
    assert saved == pytest.approx(per_key * (length / 2 - sum(keys) / length), rel=0.02)
    assert flops_per_token(local, window) == flops_per_token(plain, window)


def test_a_dotted_key_changes_the_preset_of_a_recipe() -> None:
    table: dict[str, object] = {"model": "demo"}
    apply_overrides(table, {"model.pattern": "LG"})
    assert validate(ModelConfig, dict(table["model"]), "here") == shaped(pattern="LG")  # type: ignore[call-overload]


def test_without_any_keys_only_the_matrices_cost_something() -> None:
    assert flops_per_token(shaped(), 0) == 6 * shaped().num_params()
