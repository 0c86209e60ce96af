"""GRPO's and RLOO's losses and gradients are TRL's, on the same ids; ours packed, TRL's padded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from oriole.model.config import ModelConfig
from oriole.model.folder import load_model, save_model, to_hf
from oriole.model.lm import LM
from oriole.text.template import Message, Prompt
from oriole.text.tokenizer import train_tokenizer
from oriole.train.grpo import GRPOEstimator, GRPOObjective
from oriole.train.prompts import Question
from oriole.train.rollout import LEFT_OUT, Forward, Rollout, Written, pack
from oriole.train.tables import GRPOTable

SHAPE = ModelConfig(
    vocab_size=300, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, context=128
)
GROUP, PROMPTS, NEW, TEMPERATURE = 4, 3, 12, 0.8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The policy that answered, the reference, and the policy as it is now: three models of one tokenizer."""
    made = []
    tok = train_tokenizer([("en", "two orioles sing in the willow " * 9)], 280)
    torch.manual_seed(0)
    lm = LM(SHAPE)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    for name in ("old", "reference", "now"):
        folder = tmp_path_factory.mktemp(name)
        save_model(lm, folder, chat=True)
        tok.save(folder, chat=True)
        made.append(folder)
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
    return made


def answered() -> tuple[Rollout, Tensor]:
    """Answers of unlike length to prompts of unlike length, and their rewards."""
    rng = np.random.default_rng(5)

    def ids(least: int, most: int) -> list[int]:
        return rng.integers(16, 300, int(rng.integers(least, most))).tolist()

    questions = [Question(Prompt((Message("user", str(i)),)), ids(3, 12)) for i in range(PROMPTS)]
    questions = [question for question in questions for _ in range(GROUP)]
    written = [Written(ids(1, NEW + 1), bool(i % 3)) for i in range(len(questions))]
    rewards = torch.tensor(rng.normal(size=len(written)))
    return Rollout([("", 0)] * len(questions), questions, written), rewards


def padded(rollout: Rollout) -> dict[str, Tensor]:
    """The answers as TRL has them: prompts padded on the left, answers on the right."""
    widest = max(len(q.ids) for q in rollout.questions)
    prompts = [[0] * (widest - len(q.ids)) + q.ids for q in rollout.questions]
    count, width = rollout.shape
    answers = torch.zeros(count, width, dtype=torch.int64)
    for row, one in enumerate(rollout.written):
        answers[row, : len(one.ids)] = torch.tensor(one.ids)
    return {
        "prompt_ids": torch.tensor(prompts),
        "prompt_mask": torch.tensor([[0] * (widest - len(q.ids)) + [1] * len(q.ids) for q in rollout.questions]),
        "completion_ids": answers,
        "completion_mask": rollout.mask.long(),
    }


def ours(folders: list[Path], table: GRPOTable) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Rollout]:
    """Loss, gradients by Hugging Face's names, and the columns of the rollout."""
    rollout, rewards = answered()
    forward = Forward(torch.device("cpu"), torch.float32, TEMPERATURE)
    members = range(len(rollout.written))
    packed = [pack(rollout, members, 64)]
    old, reference, now = (load_model(folder) for folder in folders)
    log_probs = forward.log_probs(old, packed, rollout.shape)
    columns: dict[str, Tensor] = {"old_log_probs": log_probs}
    rollout = Rollout(rollout.places, rollout.questions, rollout.written, columns)
    estimator = GRPOEstimator(reference if table.beta else None, forward, table)
    columns |= estimator.columns(rollout, rewards, packed)[0]
    (batch, place), objective = packed[0], GRPOObjective(table, NEW, TEMPERATURE, dict)
    extra = {n: torch.where(place >= 0, c.flatten()[place.clamp(min=0)], 0.0) for n, c in columns.items()}
    assert not extra.pop(LEFT_OUT).any()
    object.__setattr__(batch, "extra", extra)
    loss = objective(now, batch).sum / objective.weight(batch)
    loss.backward()
    with torch.no_grad():  # the gradients in place of the weights, to be cut and named as those are
        for parameter in now.parameters():
            parameter.copy_(parameter.grad)
        tensors = {name: tensor.clone() for name, tensor in to_hf(now).items()}
    return loss.detach(), tensors, columns, rollout


def trainer(kind: Any, config: Any, folder: Path, tmp_path: Path, **more: Any) -> Any:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    args = config(
        output_dir=str(tmp_path), per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP, use_cpu=True,
        max_completion_length=NEW, temperature=TEMPERATURE, report_to=[], bf16=False, **more,
    )  # fmt: skip
    return kind(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 16}),
        processing_class=tokenizer,
    )


def compare(theirs: Any, inputs: dict[str, Tensor], loss: Tensor, grads: dict[str, Tensor]) -> None:
    theirs.current_gradient_accumulation_steps = 1
    theirs.model.train()
    made = theirs._compute_loss(theirs.model, inputs)
    made.backward()
    assert float(loss) == pytest.approx(float(made.detach()), abs=1e-5, rel=1e-5)
    for name, parameter in theirs.model.named_parameters():
        if name in grads:
            torch.testing.assert_close(grads[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(
    "table",
    [
        {"loss": "dapo", "clip_high": 0.28},
        {"loss": "grpo", "beta": 0.1},
        {"loss": "dr_grpo", "scale_rewards": "none"},
        {"loss": "dapo", "scale_rewards": "batch", "beta": 0.05},
    ],
    ids=str,
)
def test_grpo(folders: list[Path], tmp_path: Path, table: dict[str, Any]) -> None:
    loss, grads, columns, rollout = ours(folders, GRPOTable(group=GROUP, clip=0.02, **table))
    theirs = trainer(
        GRPOTrainer, GRPOConfig, folders[2], tmp_path, loss_type=table["loss"], beta=table.get("beta", 0.0),
        epsilon=0.02, epsilon_high=table.get("clip_high", 0.02), scale_rewards=table.get("scale_rewards", "group"),
    )  # fmt: skip
    inputs = padded(rollout) | {
        "advantages": columns["advantages"][:, 0],
        "old_per_token_logps": columns["old_log_probs"],
        "num_items_in_batch": rollout.mask.sum(),
    }
    if "beta" in table:
        inputs["ref_per_token_logps"] = columns["ref_log_probs"]
    compare(theirs, inputs, loss, grads)


def test_rloo(folders: list[Path], tmp_path: Path) -> None:
    loss, grads, columns, rollout = ours(folders, GRPOTable(method="rloo", group=GROUP, clip=0.02, beta=0.1))
    theirs = trainer(RLOOTrainer, RLOOConfig, folders[2], tmp_path, beta=0.1, epsilon=0.02, epsilon_high=0.02)
    old = torch.where(rollout.mask, columns["old_log_probs"], 0.0).sum(1)
    compare(theirs, padded(rollout) | {"advantages": columns["advantages"][:, 0], "old_logps": old}, loss, grads)
