"""The presets' sizes are those the documentation states, and those of the real tensors."""

import pytest
import torch

from oriole.config import validate
from oriole.errors import ConfigError
from oriole.model.config import PRESETS, ModelConfig, preset
from oriole.model.costs import flops_per_token, kv_cache_bytes
from oriole.model.lm import LM

MILLIONS = {"demo": 5.5, "26m": 25.8, "64m": 63.9, "110m": 109.3, "120m": 119.6, "200m": 189, "1b": 1050}


@pytest.mark.parametrize("name", PRESETS)
def test_num_params_is_what_the_table_says_and_the_tensors_have(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        real = sum(p.numel() for p in LM(config).parameters())
    assert config.num_params() == real
    assert config.num_params() / 1e6 == pytest.approx(MILLIONS[name], rel=0.005)


def test_larger_vocabularies_of_the_table() -> None:
    assert preset("26m", vocab_size=16_384).num_params() / 1e6 == pytest.approx(30.9, abs=0.05)
    assert preset("64m", vocab_size=16_384).num_params() / 1e6 == pytest.approx(71.6, abs=0.05)


def test_flops_count_the_head_once_and_the_input_embedding_never() -> None:
    tied = preset("demo")
    untied = tied.model_copy(update={"tie_embeddings": False})
    assert flops_per_token(tied, 256) == flops_per_token(untied, 256)
    assert flops_per_token(tied, 256) == 6 * tied.num_params() + 6 * 6 * 256 * 256
    without = 6 * (tied.num_params() - tied.vocab_size * tied.dim) + 6 * 6 * 256 * 256
    assert flops_per_token(tied, 256, logits=False) == flops_per_token(untied, 256, logits=False) == without


def test_kv_cache_bytes_are_those_of_the_real_cache() -> None:
    from oriole.model.lm import Cache

    config = preset("demo")
    cache = Cache(config, 3, 100, dtype=torch.bfloat16)
    real = sum(t.numel() * t.element_size() for t in (*cache.keys, *cache.values))
    assert kv_cache_bytes(config, 3, 100) == real


def test_a_misspelt_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean '26m'"):
        preset("25m")


@pytest.mark.parametrize(
    ("change", "message"), [({"num_kv_heads": 3}, "not a multiple"), ({"head_dim": 63}, "must be even")]
)
def test_impossible_shapes_are_refused(change: dict[str, int], message: str) -> None:
    table = preset("demo").model_dump() | change
    with pytest.raises(ConfigError, match=message):
        validate(ModelConfig, table, "here")
