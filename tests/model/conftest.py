"""A small model whose every weight matters: random norms and matrices far from their initial values."""

import pytest
import torch

from oriole.model.config import ModelConfig
from oriole.model.lm import LM

MIXED = "GctrLgsz"
"""Two layers with every gate, temperature and residual scale between them."""


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


@pytest.fixture(params=[(4, 2, "G"), (4, 4, "G"), (4, 1, "G"), (4, 2, MIXED)], ids=["gqa", "mha", "mqa", "options"])
def model(request: pytest.FixtureRequest) -> LM:
    heads, kv, pattern = request.param
    return shaken(shape(num_heads=heads, num_kv_heads=kv, pattern=pattern, window=5))


@pytest.fixture
def small() -> LM:
    return shaken(shape())


@pytest.fixture
def make():  # type: ignore[no-untyped-def]
    """make(**changes of the shape) -> LM."""
    return lambda **changes: shaken(shape(**changes))
