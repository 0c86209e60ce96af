"""TRL's RewardTrainer and Oriole: the same ids, losses, gradients and figures for the same pairs and folder."""

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from oriole.model.config import ModelConfig
from oriole.model.folder import load_reward_model, save_model, to_hf
from oriole.model.lm import LM
from oriole.text.shards import write_shards
from oriole.text.template import Message, Preference, message_dict
from oriole.text.tokenizer import train_tokenizer
from oriole.train.batch import Batch
from oriole.train.pairs import Pairs, encode_pairs, pair_batches
from oriole.train.reward import RewardObjective, at_ends, with_reward_head

TEXT = "Spring has come. Two orioles sing in the willow, and the children fly kites by the river. 两只黄鹂在枝头唱歌。"
TOK = train_tokenizer([("en", TEXT * 3)], 300)
CENTRE = 0.05


def preferences() -> list[Preference]:
    made = []
    for i in range(8):
        sides = (Message("assistant", TEXT[i : i + 9 + 3 * i]), Message("assistant", f"x{TEXT[: 5 + i]}"))
        prompt = (Message("user", f"{i} {TEXT[: i % 11]}"),)
        made.append(Preference(prompt, (sides[0],), (sides[1],), margin=i % 3 / 2))
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=TOK.vocab_size, dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=80,
        context=160, init_std=0.15,
    )  # fmt: skip
    save_model(with_reward_head(LM(shape)), tmp_path / "model", chat=True)
    TOK.save(tmp_path / "model", chat=True)
    return tmp_path / "model"


@pytest.mark.parametrize("margins", [True, False], ids=["margins", "plain"])
def test_loss_gradients_and_figures_equal_trls(folder: Path, tmp_path: Path, margins: bool) -> None:
    given = preferences()
    rows: list[dict[str, Any]] = [
        {
            side: [message_dict(m) for m in (*p.prompt, *answer)]
            for side, answer in (("chosen", p.chosen), ("rejected", p.rejected))
        }
        | ({"margin": p.margin} if margins else {})
        for p in given
    ]
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32),
        args=RewardConfig(
            output_dir=str(tmp_path / "trl"), center_rewards_coefficient=CENTRE, max_length=160, report_to="none",
            use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=8,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    collated = trainer.data_collator([trainer.train_dataset[i] for i in range(len(given))])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(collated))
    loss.backward()

    encoded = list(encode_pairs(given, TOK, row=320, context=160, cut=False, left_out=Counter()))
    theirs = [trainer.train_dataset[i][f"{side}_ids"] for i in range(8) for side in ("chosen", "rejected")]
    assert [list(ids) for ids, *_ in encoded] == theirs, "through the same last token"

    pairs = Pairs(write_shards(encoded, TOK, tmp_path / "shards"), whole=True)
    pairs.values["margin"] = np.repeat([p.margin if margins else 0.0 for p in given], 2)
    batch = Batch.joined([at_ends(one) for one, _ in pair_batches(pairs, 2, 320)])
    mine = load_reward_model(folder).train()
    found = RewardObjective(CENTRE)(mine, batch)
    (found.sum / len(given)).backward()
    assert float(found.sum.detach()) / len(given) == pytest.approx(float(loss.detach()), abs=1e-5)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert len(found.metrics) == 5
    for name, value in found.metrics.items():
        assert float(value) / len(given) == pytest.approx(logged[name], abs=1e-5), name

    reference = {name: p.grad for name, p in trainer.model.named_parameters()}
    with torch.no_grad():  # gradients under transformers' names
        for p in mine.parameters():
            p.copy_(p.grad)
    for name, grad in to_hf(mine).items():
        torch.testing.assert_close(grad, reference[name], atol=1e-5, rtol=1e-4)
