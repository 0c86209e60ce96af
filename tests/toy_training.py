"""A model, a stream and a trainer small enough for a step to take milliseconds."""

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oriole.model.config import ModelConfig
from oriole.model.lm import LM
from oriole.train.batch import Batch, Packer
from oriole.train.loop import TrainConfig, Trainer
from oriole.train.objectives import LMObjective, Loss
from oriole.train.optim import OptimConfig

VOCAB = 64
SHAPE = ModelConfig(
    vocab_size=VOCAB, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, context=64
)


class Counting:
    """Documents that count upwards in steps of three, from a random start; the state is how many were given."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.given = seed, 0

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.seed, self.given))
        self.given += 1
        n = int(rng.integers(5, 40))
        mask = (rng.random(n) < 0.8).astype(np.uint8)
        return (np.arange(n) * 3 + rng.integers(VOCAB)) % VOCAB, mask

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]


class Records(list[dict[str, Any]]):
    """Stands in for `oriole.log.Metrics`: keeps the records instead of writing them."""

    def write(self, record: dict[str, Any]) -> None:
        self.append(dict(record))

    def of(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self if record["event"] == event]


class StopsInCall(LMObjective):
    """A signal comes in the middle of a step: in one of the forward passes, counted from 1."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.left = call

    def __call__(self, lm: LM, batch: Batch) -> Loss:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(lm, batch)


def model(dropout: float = 0.0, seed: int = 1, pattern: str = "G") -> LM:
    torch.manual_seed(seed)
    made = LM(SHAPE.model_copy(update={"pattern": pattern}))
    made.set_dropout(dropout)
    return made


def trainer(
    folder: Path, *, dropout: float = 0.1, lr: float = 1e-2, lm: LM | None = None, more: dict[str, Any] | None = None,
    **config: Any,
) -> Trainer:  # fmt: skip
    """A trainer on the CPU in fp32; `config` are fields of TrainConfig, `more` other arguments of Trainer."""
    settings = {"steps": 12, "device": "cpu", "dtype": "fp32", "compile": False, "log_every": 4} | config
    arguments: dict[str, Any] = {
        "objective": LMObjective(),
        "data": Packer(Counting(), 4, 32),
        "metrics": Records(),
        "optim": OptimConfig(lr=lr),
    } | (more or {})
    return Trainer(
        lm or model(dropout),
        config=TrainConfig(**settings),
        folder=folder,
        **arguments,
    )


def digest(lm: torch.nn.Module) -> str:
    """sha256 over all weights, bit for bit."""
    out = hashlib.sha256()
    for name, tensor in sorted(lm.state_dict().items()):
        out.update(name.encode() + tensor.numpy().tobytes())
    return out.hexdigest()
