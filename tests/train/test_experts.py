"""Training a mixture of experts: who moves its parameters, what keeps its load even, what a record says of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import SHAPE, Records, digest, trainer

from oriole.model.lm import LM
from oriole.train.batch import Batch
from oriole.train.groups import groups_of
from oriole.train.objectives import LMObjective
from oriole.train.optim import OptimConfig, Optimizer


def lm(balance: str = "loss", **moe: Any) -> LM:
    torch.manual_seed(1)
    table = {"experts": 4, "active": 2, "ffn_dim": 24, "balance": balance} | moe
    return LM(SHAPE.model_validate(SHAPE.model_dump() | {"pattern": "GGe", "moe": table}))


def batch(seed: int, rows: int = 2) -> Batch:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SHAPE.vocab_size, (rows, 17), generator=g)
    pos = torch.arange(16).expand(rows, 16)
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros_like(pos, dtype=torch.int32), pos)


# --- groups ----------------------------------------------------------------------------------------------------------


def test_experts_are_muons_their_router_is_not_and_the_bias_is_nobodys() -> None:
    model = lm("bias", shared_ffn_dim=16)
    groups = groups_of(model, muon=True, signed=model.sign_steps())
    own = {"gate_up", "down", "shared.gate_up", "shared.down"}
    assert {f"blocks.1.mlp.{name}.weight" for name in own} <= set(groups.muon)
    assert "blocks.1.mlp.router.weight" in groups.plain
    assert groups.signed == ("blocks.1.mlp.bias",)
    decayed = groups_of(model, muon=False, signed=model.sign_steps()).decayed
    assert "blocks.1.mlp.router.weight" in decayed and "blocks.1.mlp.bias" not in decayed
    for name, rows in model.fused_rows().items():
        assert sum(rows) == len(model.get_parameter(name)), name


def test_every_expert_is_made_orthogonal_by_itself() -> None:
    model = lm()
    down = model.blocks[1].mlp.down.weight
    before = down.detach().clone()
    optimizer = Optimizer(model, OptimConfig(kind="muon", muon_lr=0.5, weight_decay=0.0, warmup=0), 10)
    down.grad = torch.randn(down.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step(0, torch.zeros(()))
    moved = (before - down.detach()).view(4, 32, 24) / (0.5 * (32 / 24) ** 0.5)
    values = torch.linalg.svdvals(moved)
    # Had all four been one matrix, their values would be about a half: together the blocks of a column have length 1.
    assert 0.8 < float(values.min()) and float(values.max()) < 1.2


# --- balance by bias -------------------------------------------------------------------------------------------------


def loads(model: LM, batches: list[Batch]) -> torch.Tensor:
    """Tokens of each expert in all batches (E,)."""
    counts, mlp = torch.zeros(4), model.blocks[1].mlp

    def count(module: torch.nn.Module, given: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        counts.add_(mlp.route(y.flatten(0, 1))[1].flatten().bincount(minlength=4))

    handle = model.blocks[1].mlp_norm.register_forward_hook(count)
    with torch.no_grad():
        for one in batches:
            model(one.tokens, one.doc, one.pos)
    handle.remove()
    return counts


def step(model: LM, optimizer: Optimizer, batches: list[Batch]) -> torch.Tensor:
    objective = LMObjective()
    total = torch.zeros(())
    for one in batches:
        loss = objective(model, one).sum
        loss.backward()
        total = total + loss.detach()
    return optimizer.step(0, total)[0]


def test_a_bias_moves_once_a_step_against_the_load_of_all_micro_batches() -> None:
    model, batches = lm("bias", balance_weight=0.01), [batch(seed) for seed in range(3)]
    counts = loads(model, batches)
    optimizer = Optimizer(model, OptimConfig(), 10)
    step(model, optimizer, batches)
    bias = model.blocks[1].mlp.bias
    assert bias is not None and bias.grad is None
    assert torch.equal(bias.detach(), -0.01 * (counts - counts.mean()).sign())
    assert bias.min() < 0 < bias.max()


def test_a_skipped_step_leaves_the_bias_and_its_gradient_is_not_in_the_norm() -> None:
    model = lm("bias")
    optimizer = Optimizer(model, OptimConfig(), 10)
    LMObjective()(model, batch(0)).sum.backward()
    optimizer.step(0, torch.tensor(float("nan")))
    assert model.blocks[1].mlp.bias.abs().max() == 0
    norms = []
    for balance in ("bias", "loss"):
        other = lm(balance, balance_weight=0.0)
        norms.append(float(step(other, Optimizer(other, OptimConfig(), 10), [batch(0)])))
    assert norms[0] == norms[1]


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_a_run_that_was_broken_off_ends_like_the_unbroken_one_and_records_the_routing(
    tmp_path: Path, balance: str
) -> None:
    whole = trainer(tmp_path / "whole", lm=lm(balance), steps=8, accumulate=2, checkpoint_every=4)
    whole.fit()
    path = tmp_path / "whole" / "checkpoints" / "step-4"
    again = trainer(tmp_path / "again", lm=lm(balance), steps=8, accumulate=2, resume=str(path))
    again.fit()
    assert digest(whole.model) == digest(again.model)
    if balance == "bias":
        assert whole.model.get_parameter("blocks.1.mlp.bias").abs().max() > 0
    assert isinstance(whole.metrics, Records)
    for record in whole.metrics.of("step"):
        assert 1 <= record["expert_load"] <= 2 and 0 <= record["dead_experts"] < 1
        assert 0 < record["router_entropy"] <= 1.3863


@pytest.mark.parametrize(("balance", "weight", "trained"), [("loss", 1.0, "router.weight"), ("bias", 0.003, "bias")])
def test_a_load_that_is_all_on_one_side_becomes_even(balance: str, weight: float, trained: str) -> None:
    """Within a fifth of the mean, over many tokens."""
    model = lm(balance, balance_weight=weight)
    with torch.no_grad():  # what all tokens have in common speaks for the first expert
        model.embedding.weight.add_(0.02)
        model.blocks[1].mlp.router.weight.mul_(10)[0].add_(0.05)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("norm") or name.endswith(trained))
    many = [batch(seed, rows=8) for seed in range(8)]
    before = loads(model, many)
    assert before.max() > 1.9 * before.mean()
    optimizer = Optimizer(model, OptimConfig(lr=3e-3, warmup=0), 1000)
    for i in range(80):
        step(model, optimizer, [many[i % 8]])
    after = loads(model, many)
    assert after.max() <= 1.2 * after.mean()
