"""A model folder of a tiny random model: it answers in a jumble of both languages, with broken characters among it."""

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from oriole.apps.api import Oriole
from oriole.model.config import ModelConfig
from oriole.model.folder import save_model
from oriole.model.lm import LM
from oriole.text.tokenizer import Tokenizer, train_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))  # toy_stage, which several folders share

ZH = "两个黄鹂鸣翠柳一行白鹭上青天窗含西岭千秋雪门泊东吴万里船"
EN = "two golden orioles sing amid the green willows while a line of white egrets flies into the blue sky".split()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    rng = random.Random(3)
    texts = [("zh", "".join(rng.choices(ZH, k=20)) + "。\n") for _ in range(200)]
    texts += [("en", " ".join(rng.choices(EN, k=9)) + ".\n") for _ in range(200)]
    return train_tokenizer(texts, vocab_size=500)


def save(folder: Path, tokenizer: Tokenizer, *, chat: bool = True, seed: int = 0, context: int = 160) -> Path:
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48,
        context=context, init_std=0.4, tie_embeddings=False,
    )  # fmt: skip
    save_model(LM(config), folder, chat=chat)
    tokenizer.save(folder, chat=chat, context=context)
    return folder


@pytest.fixture(scope="session")
def save_tiny(tokenizer: Tokenizer) -> Callable[..., Path]:
    """`save_tiny(folder, chat=…, seed=…)` writes a model folder and gives its path."""
    return lambda folder, **options: save(folder, tokenizer, **options)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return save(tmp_path_factory.mktemp("tiny") / "model", tokenizer)


@pytest.fixture(scope="session")
def oriole(model_folder: Path) -> Oriole:
    return Oriole(model_folder)
