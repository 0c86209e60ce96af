"""A policy, prompts and rewards small enough for a rollout to take milliseconds."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from toy_training import Records

from oriole.model.config import ModelConfig
from oriole.model.lm import LM
from oriole.text.template import Message, Prompt, render
from oriole.text.tokenizer import Tokenizer, train_tokenizer
from oriole.train.batch import Batch
from oriole.train.grpo import GRPOEstimator, GRPOObjective
from oriole.train.loop import TrainConfig, Trainer
from oriole.train.optim import OptimConfig
from oriole.train.ppo import ActorCritic, PPOEstimator, PPOObjective
from oriole.train.prompts import PromptStream, Question
from oriole.train.rewards import Answer, Rewards
from oriole.train.rollout import Forward, Plan, Rollouts
from oriole.train.tables import GRPOTable, PPOTable, RolloutTable

SHAPE = ModelConfig(
    vocab_size=280, dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=48, context=64
)


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([("en", "a willow and an oriole")], 280)


def policy(seed: int = 1, heads: Sequence[Any] = ()) -> LM:
    torch.manual_seed(seed)
    made = LM(SHAPE, heads=heads)
    if heads:
        made.lm_head = None
    return made


def questions(count: int = 12) -> list[Question]:
    """What is asked of a toy: prompts of unlike length."""
    prompts = [Prompt((Message("user", f"{i}{'?' * (i % 5)}"),), (str(i),)) for i in range(count)]
    return [Question(p, render(p.messages, tokenizer(), generation=True)[0]) for p in prompts]


def letters(answers: Sequence[Answer]) -> list[float | None]:
    """The share of Latin letters among the characters of an answer."""
    return [sum(c.isascii() and c.isalpha() for c in a.text) / max(1, len(a.text)) for a in answers]


class Toy:
    """One method on the toy: `rollouts` are its batches, `objective` its loss, `model` what is trained."""

    def __init__(
        self,
        method: str,
        *,
        score: Any = letters,
        skip_bad: bool = False,
        prompts: int = 4,
        batch_size: int = 4,
        new_tokens: int = 6,
        seed: int = 7,
        dtype: torch.dtype = torch.float32,
        temperature: float = 1.0,
        **table: Any,
    ) -> None:
        self.policy = policy()
        self.reference = policy().requires_grad_(False)
        rollout = RolloutTable(prompts=prompts, max_new_tokens=new_tokens, temperature=temperature)
        forward = Forward(torch.device("cpu"), dtype, temperature)
        self.model: torch.nn.Module = self.policy
        self.objective: Any
        if method == "ppo":
            ppo = PPOTable(**table)
            self.model = ActorCritic(self.policy, policy(2, ("value",)))
            self.estimator: Any = PPOEstimator(self.reference, self.model.value, forward, ppo)
            samples, epochs = 1, ppo.epochs
        else:
            grpo = GRPOTable(**{"method": method, "group": 4} | table)
            self.estimator = GRPOEstimator(self.reference if grpo.beta else None, forward, grpo)
            samples, epochs = grpo.group, grpo.epochs
        self.rollouts = Rollouts(
            self.policy,
            tokenizer(),
            PromptStream({"zh": questions(12), "en": questions(5)}, {"zh": 2.0, "en": 1.0}, seed),
            Rewards({"letters": (score, 1.0)}, skip_bad=skip_bad),
            self.estimator,
            forward,
            rollout,
            Plan(samples, epochs, batch_size, 1, 48, seed),
        )
        if method == "ppo":
            self.objective = PPOObjective(ppo, temperature, lambda: self.rollouts.gauges)
        else:
            self.objective = GRPOObjective(grpo, new_tokens, temperature, lambda: self.rollouts.gauges)


def batches(toy: Toy, count: int) -> list[Batch]:
    """The next batches of the toy."""
    return [next(toy.rollouts) for _ in range(count)]


def trainer(
    toy: Toy, folder: Path, objective: Any = None, *, kind: Any = "muon", lr: float = 3e-3, **config: Any
) -> Trainer:
    """A trainer of the toy on the CPU in fp32; `config` are fields of TrainConfig."""
    settings = {"steps": 10, "device": "cpu", "dtype": "fp32", "compile": False, "log_every": 1} | config
    return Trainer(
        toy.model,
        objective or toy.objective,
        toy.rollouts,
        TrainConfig(**settings),
        OptimConfig(kind=kind, lr=lr, schedule="constant", weight_decay=0.0),
        folder,
        metrics=Records(),  # type: ignore[arg-type]
    )
