"""Makes tests/toy_training.py importable, which several folders share, and keeps tiny models to one thread."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on matrices this small only wait for each other; and sums in one order are the same everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
