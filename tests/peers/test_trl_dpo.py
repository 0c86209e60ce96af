"""Our preference losses, their gradients and metrics are TRL's, on the same ids; ours packed, TRL's padded."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from oriole.model.config import ModelConfig
from oriole.model.folder import load_model, save_model, to_hf
from oriole.model.lm import LM
from oriole.text.records import preference
from oriole.text.tokenizer import Tokenizer, train_tokenizer
from oriole.train.batch import IGNORE, Batch, Rows
from oriole.train.dpo import DPOObjective, Sides, pair_loss, rewards
from oriole.train.pairs import encode_pairs
from oriole.train.tables import DPOTable

SHAPE = ModelConfig(
    vocab_size=300, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, context=128
)
BETA, SMOOTHING = 0.3, 0.2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Policy and reference, two models of one tokenizer."""
    made = []
    tok = train_tokenizer([("en", "two orioles sing in the willow " * 9)], 280)
    for seed in range(2):
        folder = tmp_path_factory.mktemp(f"model{seed}")
        torch.manual_seed(seed)
        lm = LM(SHAPE)
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
        save_model(lm, folder, chat=True)
        tok.save(folder, chat=True)
        made.append(folder)
    return made[0], made[1]


def pairs(count: int) -> list[dict[str, list[int]]]:
    """Pairs of ids as TRL's collator takes them; every answer is trained on from its first token to its last."""
    rng = np.random.default_rng(5)

    def ids(least: int, most: int) -> list[int]:
        return rng.integers(16, 300, int(rng.integers(least, most))).tolist()

    return [{"prompt_ids": ids(2, 9), "chosen_ids": ids(2, 25), "rejected_ids": ids(2, 25)} for _ in range(count)]


def side(pair: dict[str, list[int]], which: str) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array(pair["prompt_ids"] + pair[which])
    mask = np.array([0] * len(pair["prompt_ids"]) + [1] * len(pair[which]))
    return ids, mask


def packed(given: list[dict[str, list[int]]], reference: LM, row: int = 96) -> Batch:
    """The pairs in rows of 96, as many as fit, with the reference's log-probs."""
    layout: list[list[dict[str, list[int]]]] = [[]]
    used = 0
    for pair in given:
        takes = 2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) - 2
        if used + takes > row:
            layout.append([])
            used = 0
        layout[-1].append(pair)
        used += takes
    rows = Rows(len(layout), row)
    known = np.zeros((len(layout), row))
    for number, held in enumerate(layout):
        for pair in held:
            for which in ("chosen_ids", "rejected_ids"):
                ids, mask = side(pair, which)
                span = rows.add(number, ids[:-1], np.where(mask[1:], ids[1:], IGNORE))
                with torch.no_grad():
                    logits = reference.head("logits", reference(torch.as_tensor(ids)[None]).h)[0]
                every = logits.log_softmax(-1)[:-1].gather(-1, torch.as_tensor(ids)[1:, None]).squeeze(-1)
                known[number, span.stop - 1] = float(every[torch.as_tensor(mask[1:]) > 0].sum())
    return rows.batch({"reference": known})


class Ready(DPOTrainer):  # type: ignore[misc]
    """A trainer whose data is ids already."""

    def _prepare_dataset(self, dataset: Dataset, *rest: Any) -> Dataset:
        return dataset


def trainer(folders: tuple[Path, Path], tmp_path: Path, **more: Any) -> Ready:
    policy, reference = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders)
    args = DPOConfig(
        output_dir=str(tmp_path), beta=BETA, label_smoothing=SMOOTHING, bf16=False, use_cpu=True, report_to="none",
        gradient_checkpointing=False, per_device_train_batch_size=8, **more,
    )  # fmt: skip
    tok = PreTrainedTokenizerFast.from_pretrained(folders[0])
    return Ready(policy, reference, args=args, train_dataset=Dataset.from_list(pairs(8)), processing_class=tok)


def theirs(
    folders: tuple[Path, Path], tmp_path: Path, given: list[Any], **more: Any
) -> tuple[float, LM, dict[str, Any]]:
    """Loss, gradients (as the weights of a model of ours) and metrics."""
    made = trainer(folders, tmp_path, **more)
    loss = made._compute_loss(made.model.train(), made.data_collator(given), return_outputs=False)
    loss.backward()
    gradients = LM(SHAPE)
    views = to_hf(gradients)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            views[name].copy_(parameter.grad)
    return float(loss.detach()), gradients, {k: v[-1] for k, v in made._metrics["train"].items()}


def ours(folders: tuple[Path, Path], given: list[Any], table: DPOTable) -> tuple[float, LM, dict[str, float]]:
    lm, objective = load_model(folders[0]), DPOObjective(table)
    batch = packed(given, load_model(folders[1]))
    count = int(objective.weight(batch))
    assert count == len(given)
    loss = objective(lm, batch)
    (loss.sum / count).backward()
    return float(loss.sum.detach()) / count, lm, {name: float(v) / count for name, v in loss.metrics.items()}


def compare(folders: tuple[Path, Path], tmp_path: Path, table: DPOTable, given: list[Any], **more: Any) -> None:
    their_loss, gradients, theirs_by_name = theirs(folders, tmp_path, given, **more)
    loss, lm, by_name = ours(folders, given, table)
    assert loss == pytest.approx(their_loss, rel=1e-5)
    scale = max(float(p.detach().abs().max()) for p in gradients.parameters())
    for (name, mine), other in zip(lm.named_parameters(), gradients.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.detach(), atol=1e-5 * scale, rtol=1e-4, msg=name)
    exact = [f"{a}/{b}" for a in ("rewards", "logps") for b in ("chosen", "rejected")]
    for name in (*exact, "rewards/margins", "rewards/accuracies"):
        assert by_name[name] == pytest.approx(theirs_by_name[name], rel=1e-4, abs=1e-5), name
    if len(given) == 1:  # TRL's mean over tokens is our mean over pairs there
        for name in ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"):
            assert by_name[name] == pytest.approx(theirs_by_name[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust"])
@pytest.mark.parametrize("count", [1, 8])
def test_loss_gradient_and_metrics_equal_trls(
    folders: tuple[Path, Path], tmp_path: Path, loss: Any, count: int
) -> None:
    table = DPOTable(loss=loss, beta=BETA, label_smoothing=SMOOTHING if loss == "robust" else 0.0)
    compare(folders, tmp_path, table, pairs(count), loss_type=[loss])


def test_the_sft_term_equals_trls(folders: tuple[Path, Path], tmp_path: Path) -> None:
    table = DPOTable(loss="sigmoid", beta=BETA, sft=0.4)
    compare(folders, tmp_path, table, pairs(1), loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.4])


def random_sides() -> Sides:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 30, (16, 2), generator=generator).double()
    log_probs = -(0.05 + 4 * torch.rand(16, 2, generator=generator, dtype=torch.float64)) * lengths
    return Sides(log_probs, lengths, torch.zeros(16, 2, dtype=torch.float64))


def test_simpo_equals_trls() -> None:
    sides = random_sides()
    per_token = (sides.log_probs / sides.lengths).unbind(-1)
    settings = SimpleNamespace(
        beta=2.0, simpo_gamma=0.7, alpha=0.0, label_smoothing=0.0, loss_type="simpo",
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    loss, chosen, rejected = CPOTrainer.cpo_loss(settings, *per_token)
    table = DPOTable(loss="simpo", beta=2.0, gamma=0.7)
    torch.testing.assert_close(pair_loss(table, sides), loss, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(rewards(table, sides), torch.stack([chosen, rejected], -1))


def test_orpo_equals_trls() -> None:
    sides = random_sides()
    per_token = (sides.log_probs / sides.lengths).unbind(-1)
    settings = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    ratio, *_ = ORPOTrainer.odds_ratio_loss(settings, *per_token)
    # TRL's likelihood term is of the whole batch's tokens, prompts among them; ours is the better answer's, as in SFT.
    table = DPOTable(loss="orpo", beta=0.3)
    torch.testing.assert_close(pair_loss(table, sides), -per_token[0] - ratio.double(), atol=1e-6, rtol=1e-5)


def test_trl_reads_the_same_ids_from_our_template(folders: tuple[Path, Path], tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "two orioles?"}, {"role": "assistant", "content": "sing"},
              {"role": "user", "content": "in the willow?"}]  # fmt: skip
    record = {"prompt": prompt, "chosen": "they sing", "rejected": "no"}
    args = DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    messages = {key: [{"role": "assistant", "content": record[key]}] for key in ("chosen", "rejected")}
    made = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folders[0]), None, args=args,
        train_dataset=Dataset.from_list([record | messages]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folders[0]),
    )  # fmt: skip
    theirs = made.train_dataset[0]
    read = [preference(record)]
    rows = encode_pairs(read, Tokenizer.load(folders[0]), row=256, context=128, cut=False, left_out=Counter())
    for (ids, mask, _), key in zip(rows, ("chosen_ids", "rejected_ids"), strict=True):
        start = mask.index(1)
        assert ids[:start] == theirs["prompt_ids"] and ids[start:] == theirs[key]
        # TRL also trains the line break behind the end mark, which stands there whatever the answer was.
        assert mask[start:] == [1] * (len(ids) - start - 1) + [0]
