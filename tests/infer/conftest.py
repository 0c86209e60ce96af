"""Tiny random models whose greedy answers vary: wide initial weights keep them from repeating one id."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from oriole.model.config import ModelConfig
from oriole.model.lm import LM

VOCAB = 97


def tiny(context: int = 64, seed: int = 0, num_kv_heads: int = 2) -> LM:
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=VOCAB, dim=32, num_layers=2, num_heads=4, num_kv_heads=num_kv_heads, head_dim=8, ffn_dim=48,
        context=context, init_std=0.4, tie_embeddings=False,
    )  # fmt: skip
    return LM(config).eval()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_lm() -> Callable[..., LM]:
    return tiny


@pytest.fixture(scope="session")
def lm() -> LM:
    return tiny()


@torch.inference_mode()
def uncached(model: LM, prompt: Sequence[int], steps: int) -> list[int]:
    """Greedy ids by running the whole sequence through the model anew for each of them."""
    ids = list(prompt)
    for _ in range(steps):
        h = model(torch.tensor([ids])).h
        ids.append(int(model.head("logits", h[0, -1]).argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="session")
def greedy_reference() -> Callable[[LM, Sequence[int], int], list[int]]:
    return uncached
