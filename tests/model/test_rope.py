"""Positions for contexts longer than the model was trained with."""

import math

import pytest
import torch
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from oriole.config import validate
from oriole.errors import ConfigError
from oriole.model.config import ModelConfig, preset
from oriole.model.lm import LM
from oriole.model.rope import frequencies, stretched_frequencies


def scaled(**changes: object) -> ModelConfig:
    return validate(ModelConfig, {"preset": "demo", **changes}, "here")


@pytest.mark.parametrize("scaling", ["linear", "yarn"])
@pytest.mark.parametrize("factor", [1.5, 4.0, 40.0])
@pytest.mark.parametrize(("head_dim", "theta", "context"), [(64, 1e5, 2048), (128, 1e6, 131_072), (16, 500.0, 240)])
def test_frequencies_are_those_of_transformers(
    scaling: str, factor: float, head_dim: int, theta: float, context: int
) -> None:
    config = scaled(
        rope_scaling=scaling, rope_factor=factor, head_dim=head_dim, rope_theta=theta, context=round(context * factor)
    )
    assert config.trained_context == context
    rope = {"rope_type": scaling, "factor": factor, "rope_theta": theta}
    if scaling == "yarn":
        rope |= {"original_max_position_embeddings": context}
    theirs = Qwen3Config(head_dim=head_dim, max_position_embeddings=config.context, rope_parameters=rope)
    reference, scale = ROPE_INIT_FUNCTIONS[scaling](theirs)
    mine, my_scale = stretched_frequencies(config)
    torch.testing.assert_close(mine.float(), reference, atol=1e-6, rtol=1e-6)
    assert my_scale == pytest.approx(scale, abs=1e-6)


def test_ntk_interpolates_the_slowest_pair_and_leaves_the_fastest() -> None:
    config = scaled(rope_scaling="ntk", rope_factor=8.0)
    mine, scale = stretched_frequencies(config)
    plain = frequencies(config.head_dim, config.rope_theta)
    assert scale == 1.0
    assert mine[0] == plain[0] == 1
    assert float(plain[-1] / mine[-1]) == pytest.approx(8.0, rel=1e-9)


def test_yarn_keeps_fast_pairs_interpolates_slow_ones_and_sharpens() -> None:
    config = scaled(rope_scaling="yarn", rope_factor=4.0, context=8192)
    mine, scale = stretched_frequencies(config)
    ratio = frequencies(config.head_dim, config.rope_theta) / mine
    turns = 2048 * frequencies(config.head_dim, config.rope_theta) / (2 * math.pi)
    assert (ratio[turns > 40] == 1).all()
    torch.testing.assert_close(ratio[turns < 0.8], torch.full_like(ratio[turns < 0.8], 4.0))
    assert (ratio.diff() >= 0).all()
    assert scale == pytest.approx(0.1 * math.log(4) + 1)
    model = LM(config.model_copy(update={"num_layers": 1, "vocab_size": 8}))
    assert float(model.angles.cos[0, 0]) == pytest.approx(scale)


def test_linear_gives_every_fourth_place_the_old_angles() -> None:
    small = {"num_layers": 1, "vocab_size": 8}
    plain, linear = LM(scaled(**small)), LM(scaled(**small, rope_scaling="linear", rope_factor=4.0, context=2048))
    torch.testing.assert_close(linear.angles.cos[::4], plain.angles.cos, atol=1e-6, rtol=0)


def test_the_tables_are_made_anew_when_a_model_moves() -> None:
    model = LM(scaled(num_layers=1, vocab_size=8, rope_scaling="yarn", rope_factor=2.0))
    before = model.angles.cos.clone()
    assert torch.equal(model.to(torch.bfloat16).angles.cos, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_factor": 4.0}, "a longer context needs both"),
        ({"rope_scaling": "yarn"}, "a longer context needs both"),
        ({"rope_scaling": "ntk", "rope_factor": 2.0, "head_dim": 2}, "no pair to stretch"),
        ({"rope_scaling": "dynamic", "rope_factor": 2.0}, "rope_scaling"),
    ],
)
def test_what_cannot_be_stretched_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scaled(**changes)


def test_a_stretched_shape_is_stretched_anew_not_twice() -> None:
    plain = preset("demo")
    once = plain.stretched("yarn", 4.0)
    assert (once.context, once.trained_context, once.rope_factor) == (2048, 512, 4.0)
    assert once.stretched("yarn", 4.0) == once
    assert once.stretched("linear", 2.5).context == 1280
    with pytest.raises(ConfigError, match="needs both"):
        plain.stretched("ntk", 1.0)
