"""Every parameter that trains belongs to exactly one group, whatever the model."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oriole.model.config import ModelConfig
from oriole.model.deepconfig import DeepConfig
from oriole.model.lm import LM
from oriole.train.groups import groups_of
from oriole.train.optim import OptimConfig, Optimizer


def lm(tie: bool = True, heads: tuple[Any, ...] = (), layers: int = 2, qk_norm: bool = True) -> LM:
    shape = {"dim": 16, "num_layers": layers, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "ffn_dim": 24}
    torch.manual_seed(0)
    return LM(ModelConfig(vocab_size=31, tie_embeddings=tie, qk_norm=qk_norm, **shape), heads=heads)


class Net(nn.Module):
    """An embedding shared with the output, a norm, a matrix with a bias, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 3)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embedding.weight


def test_of_a_net_without_muon_matrices_that_are_no_embeddings_decay() -> None:
    groups = groups_of(Net(), muon=False)
    assert groups.decayed == ("hidden.weight", "conv.weight") and groups.muon == ()
    assert groups.plain == ("embedding.weight", "norm.weight", "norm.bias", "hidden.bias", "conv.bias")


@pytest.mark.parametrize("tie", [True, False])
def test_muon_takes_what_lies_between_embedding_and_head(tie: bool) -> None:
    groups = groups_of(lm(tie, heads=("value",)), muon=True)
    blocks = [
        f"blocks.{i}.{name}.weight"
        for i in (0, 1)
        for name in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    ]
    assert set(groups.muon) == set(blocks) and groups.decayed == ()
    outside = {"embedding.weight", "scalar_heads.value.weight"} | (set() if tie else {"lm_head.weight"})
    assert outside <= set(groups.plain)


def test_what_predicts_further_tokens_is_no_head_though_its_name_ends_like_one() -> None:
    model = lm()
    model.supervise(DeepConfig(tokens_ahead=2), 0)
    inner = set(groups_of(model, muon=True).muon)
    assert {"deep.ahead.0.join.weight", "deep.ahead.0.block.mlp.down.weight"} <= inner


@settings(max_examples=40)
@given(
    tie=st.booleans(), qk_norm=st.booleans(), layers=st.integers(1, 3), muon=st.booleans(), seed=st.integers(0, 999),
    heads=st.sampled_from([(), ("value",), ("value", "reward")]),
)  # fmt: skip
def test_each_in_exactly_one_and_the_frozen_in_none(
    tie: bool, qk_norm: bool, layers: int, muon: bool, seed: int, heads: tuple[Any, ...]
) -> None:
    model = lm(tie, heads, layers, qk_norm)
    frozen = torch.rand(len(list(model.parameters())), generator=torch.Generator().manual_seed(seed)) < 0.3
    for parameter, cold in zip(model.parameters(), frozen, strict=True):
        parameter.requires_grad_(not cold)
    groups = groups_of(model, muon=muon)
    names = [*groups.muon, *groups.decayed, *groups.plain]
    assert len(names) == len(set(names))
    assert set(names) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(model.get_parameter(name).dim() == 2 for name in groups.muon)
    assert not any("norm" in name or "embedding" in name for name in (*groups.muon, *groups.decayed))


@pytest.mark.parametrize("kind", ["adamw", "muon", "normuon", "adafactor"])
@pytest.mark.parametrize("only", ["blocks.0.attention.qkv.weight", "embedding.weight", "norm.weight"])
def test_a_model_of_which_one_parameter_trains(kind: str, only: str) -> None:
    model = lm()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == only)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, OptimConfig(kind=kind, lr=0.1, warmup=0), 10)
    loss = model.head("logits", model(torch.arange(20).view(2, 10)).h).square().mean()
    loss.backward()
    optimizer.step(0, loss.detach())
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == {only}
