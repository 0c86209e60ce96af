"""What the stages ppo and grpo share: prompts, rewards, rollouts, and how their model is looked at and saved."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from oriole.errors import ConfigError, ModelError
from oriole.infer.sample import Sampling
from oriole.model.folder import save_model
from oriole.model.lm import LM
from oriole.text.shards import Shards, View
from oriole.text.tokenizer import Tokenizer
from oriole.train.advantages import confidence
from oriole.train.device import choose_device, choose_dtype
from oriole.train.gradients import Objective
from oriole.train.lmtask import measure
from oriole.train.prepare import measured
from oriole.train.prompts import PromptStream, Question, fingerprint, read_questions, trained_parts
from oriole.train.recipe import Recipe
from oriole.train.rewards import Answer, Rewards, rewards_for
from oriole.train.rollout import STOP, Estimator, Forward, Plan, Rollouts, generate
from oriole.train.task import Task, identity, load_parent

__all__ = ["HeldOut", "parent", "reward_folder", "task"]


def parent(recipe: Recipe, init: Path | None) -> Path:
    """The folder that policy and reference start from; `ModelError` where there is none."""
    if init is None:
        raise ModelError(f"{recipe.stage} needs a chat model to start from; name its folder: init=FOLDER")
    return init


def reward_folder(recipe: Recipe) -> Path:
    """The folder of the reward model."""
    return recipe.rollout.reward_model or recipe.run / "reward" / "model"


def task(
    recipe: Recipe,
    tokenizer: Tokenizer,
    init: Path,
    policy: LM,
    model: nn.Module,
    *,
    estimator: Callable[[Forward], Estimator],
    objective: Callable[[Rollouts], Objective],
    samples: int,
    epochs: int,
) -> Task:
    """The stage whose `policy`, a part of `model` or all of it, learns from rollouts of `samples` answers a prompt."""
    table = recipe.train
    per_rollout = _steps_of_a_rollout(recipe, samples) * epochs
    device = choose_device(table.device)
    dtype, _ = choose_dtype(device, table.dtype)
    rewards = rewards_for(recipe.rollout, tokenizer, reward_folder(recipe), device, skip_bad=recipe.skip_bad)
    train = read_questions(recipe, tokenizer, policy.config, "train")
    val = read_questions(recipe, tokenizer, policy.config, "val")
    weights = {name: part.weight for name, part in trained_parts(recipe).items()}
    stream = PromptStream(train, weights, table.seed)
    forward = Forward(device, dtype, recipe.rollout.temperature)
    plan = Plan(samples, epochs, table.batch_size, table.accumulate, table.length, table.seed)
    rollouts = Rollouts(policy, tokenizer, stream, rewards, estimator(forward), forward, recipe.rollout, plan)
    texts = measured(recipe, tokenizer)
    held_out = HeldOut(recipe, tokenizer, init, val, rewards)

    def save(folder: Path) -> None:
        save_model(policy, folder, chat=True)
        tokenizer.save(folder, chat=True)

    data = {name: fingerprint(questions) for name, questions in train.items()}
    more = {
        "rollout": recipe.rollout.model_dump(mode="json"),
        recipe.stage: getattr(recipe, recipe.stage).model_dump(mode="json"),
        "parent": _digest(init),
    }
    if "model" in recipe.rollout.rewards:
        more["reward_model"] = _digest(reward_folder(recipe))
    assert table.epochs is not None, "a recipe without it is refused"
    return Task(
        lm=policy,
        model=model,
        objective=objective(rollouts),
        data=rollouts,
        steps=max(1, round(table.epochs * len(stream) / recipe.rollout.prompts)) * per_rollout,
        evaluate=lambda step: evaluate(recipe, policy, tokenizer, texts, held_out),
        save=save,
        fingerprint=identity(recipe, policy, tokenizer, data) | more,
        validation={name: s.fingerprint for name, s in texts.items()}
        | {name: fingerprint(questions) for name, questions in val.items()},
        have=", ".join(f"{name} {len(questions):,} prompts" for name, questions in train.items()),
    )


def _steps_of_a_rollout(recipe: Recipe, samples: int) -> int:
    """Optimizer steps of one pass; `ConfigError` where a rollout cannot be divided so."""
    answers, step = recipe.rollout.prompts * samples, recipe.train.batch_size * recipe.train.accumulate
    if answers % step:
        raise ConfigError(
            f"a rollout of {answers} answers (rollout.prompts = {recipe.rollout.prompts} x {samples}) is not divided "
            f"evenly into steps of {step} (train.batch_size x train.accumulate); make it a multiple"
        )
    return answers // step


def _digest(folder: Path) -> str:
    """Of a model's weights."""
    digest = xxhash.xxh3_128()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


# --- looking ---------------------------------------------------------------------------------------------------------


def evaluate(
    recipe: Recipe, policy: LM, tokenizer: Tokenizer, texts: Mapping[str, Shards | View], held_out: "HeldOut"
) -> dict[str, Any]:
    """Bits per byte of the parts that are only measured, and the rewards of held-out prompts."""
    looked = measure(recipe, policy, tokenizer, texts, chat=True)
    if not texts:
        looked.pop("bpb")
    return looked | held_out.figures(policy)


class HeldOut:
    """Held-out prompts, answered greedily, and the parent's answers to them."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer,
        parent: Path,
        questions: Mapping[str, Sequence[Question]],
        rewards: Rewards,
    ) -> None:
        self.tokenizer, self.parent, self.rewards, self.table = tokenizer, parent, rewards, recipe.rollout
        # Of every part the same share.
        every, most = sum(map(len, questions.values())), recipe.rollout.eval_prompts
        share = min(1.0, most / every)
        self.questions = [q for part in questions.values() for q in part[: max(1, round(share * len(part)))]]
        self._parents: torch.Tensor | None = None

    def figures(self, policy: LM) -> dict[str, Any]:
        """{"reward", "rewards": {name: mean}, "completion_length", "clipped_ratio", "reward_gain": mean difference to
        the parent's, "reward_gain_interval": [low, high] of 95 %}."""
        if self._parents is None:
            device = policy.embedding.weight.device
            self._parents, _, _ = self._judged(load_parent(self.parent).to(device))
        rewards, by_name, written = self._judged(policy)
        both = rewards.isfinite() & self._parents.isfinite()
        out: dict[str, Any] = {
            "reward": round(float(rewards[rewards.isfinite()].mean()), 4),
            "rewards": {n: round(float(c[c.isfinite()].mean()), 4) for n, c in by_name.items()},
            "completion_length": round(sum(n for n, _ in written) / len(written), 2),
            "clipped_ratio": round(sum(not ended for _, ended in written) / len(written), 4),
        }
        if int(both.sum()) > 1:
            gain, low, high = confidence((rewards - self._parents)[both])
            out |= {"reward_gain": round(gain, 4), "reward_gain_interval": [round(low, 4), round(high, 4)]}
        return out

    def _judged(self, model: LM) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[tuple[int, bool]]]:
        """Rewards (N,), scores by name, and each answer's length in tokens and whether it ended."""
        sampling = Sampling(max_new_tokens=self.table.max_new_tokens, temperature=0.0, stop_ids=STOP)
        written = generate(
            model,
            [q.ids for q in self.questions],
            [sampling] * len(self.questions),
            max_batch=self.table.max_batch,
            vocab_size=self.tokenizer.vocab_size,
        )
        texts = (self.tokenizer.decode([i for i in one.ids if i not in STOP]) for one in written)
        answers = [Answer(q.prompt, t, w.ended) for q, t, w in zip(self.questions, texts, written, strict=True)]
        rewards, by_name = self.rewards(answers)
        return rewards, by_name, [(len(one.ids), one.ended) for one in written]
