"""A small model whose every weight matters: random norms and matrices far from their initial values."""

import pytest
import torch

from oriole.model.config import ModelConfig
from oriole.model.lm import LM


def shape(**changes: object) -> ModelConfig:
    base = {
        "vocab_size": 97, "dim": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ffn_dim": 80,
        "context": 128,
    }  # fmt: skip
    return ModelConfig.model_validate(base | changes)


def shaken(config: ModelConfig, seed: int = 0) -> LM:
    torch.manual_seed(seed)
    model = LM(config).eval()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


@pytest.fixture(params=[(4, 2), (4, 4), (4, 1)], ids=["gqa", "mha", "mqa"])
def model(request: pytest.FixtureRequest) -> LM:
    heads, kv = request.param
    return shaken(shape(num_heads=heads, num_kv_heads=kv))


@pytest.fixture
def small() -> LM:
    return shaken(shape())


@pytest.fixture
def make():  # type: ignore[no-untyped-def]
    """make(**changes of the shape) -> LM."""
    return lambda **changes: shaken(shape(**changes))
