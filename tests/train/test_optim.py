"""AdamW against torch's plain one, and updates that must not happen."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from oriole.errors import CheckpointError
from oriole.train.optim import FIRST_LOSS_SCALE, OptimConfig, Optimizer
from oriole.train.schedules import lr_at


def config(**changes: object) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 0.5, "warmup": 0.1, "min_lr": 0.2, "schedule": "cosine"} | changes)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 11, bias=False)
        self.tied.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.hidden(self.norm(self.embedding(x))))


def loss_of(net: nn.Module, seed: int, factor: float = 1.0) -> torch.Tensor:
    x = torch.randint(0, 11, (5,), generator=torch.Generator().manual_seed(seed))
    return net(x).square().sum() * factor


# --- updates ---------------------------------------------------------------------------------------------------------


def decay_groups(net: Net) -> list[dict[str, Any]]:
    """The one matrix that is no embedding, decayed by 0.1, and the others."""
    others = [p for p in net.parameters() if p is not net.hidden.weight]
    return [{"params": [net.hidden.weight], "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


@pytest.mark.parametrize("clip", [0.5, 1e9], ids=["clipped", "unclipped"])
def test_equals_plain_adamw_with_torchs_clipping(clip: float) -> None:
    c = config(clip=clip, weight_decay=0.1, lr=0.01)
    ours, theirs = Net(), Net()
    optimizer = Optimizer(ours, c, 20)
    plain = torch.optim.AdamW(decay_groups(theirs), lr=0.01, betas=c.betas, eps=c.eps, fused=False, foreach=False)
    for step in range(20):
        loss = loss_of(ours, step)
        loss.backward()
        norm, _ = optimizer.step(step, loss)

        loss_of(theirs, step).backward()
        wanted = nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        for group in plain.param_groups:
            group["lr"] = lr_at(step, 20, c)
        plain.step()
        plain.zero_grad()
        assert float(norm) == pytest.approx(float(wanted), rel=1e-4)
        assert (clip > 1e8) or float(norm) > clip  # the case is what its name says
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_adafactor_is_torchs_with_our_schedule_groups_and_clip() -> None:
    c = config(kind="adafactor", clip=0.5, weight_decay=0.1, lr=0.01)
    ours, theirs = Net(), Net()
    optimizer = Optimizer(ours, c, 20)
    plain = torch.optim.Adafactor(decay_groups(theirs), lr=0.01)
    for step in range(20):
        loss = loss_of(ours, step)
        loss.backward()
        optimizer.step(step, loss)
        loss_of(theirs, step).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in plain.param_groups:
            group["lr"] = lr_at(step, 20, c)
        plain.step()
        plain.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["fused", "elsewhere", "adafactor"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_nothing(bad: float, case: str) -> None:
    net = Net()
    optimizer = Optimizer(net, config(kind="adafactor" if case == "adafactor" else "adamw"), 10)
    optimizer._fused_skips = case == "fused"
    loss = loss_of(net, 0)
    loss.backward()
    optimizer.step(0, loss)
    weights = {name: p.clone() for name, p in net.state_dict().items()}
    state = {name: t.clone() for name, t in optimizer.tensors().items()}

    loss = loss_of(net, 1)
    loss.backward()
    net.hidden.bias.grad[0] = bad
    _, skipped = optimizer.step(1, loss)

    assert skipped == 1 and optimizer.skipped == 1 and optimizer.skipped_in_a_row == 1
    assert all(torch.equal(weights[name], p) for name, p in net.state_dict().items())
    now = optimizer.tensors()
    assert all(torch.equal(t, now[name]) for name, t in state.items() if not name.startswith("oriole."))
    assert float(now["hidden.weight.step"]) == 1

    loss = loss_of(net, 2)
    loss.backward()
    optimizer.step(2, loss)
    assert optimizer.skipped == 1 and optimizer.skipped_in_a_row == 0
    assert not torch.equal(weights["hidden.weight"], net.hidden.weight)


def test_a_non_finite_loss_with_finite_gradients_is_skipped_too() -> None:
    net = Net()
    optimizer = Optimizer(net, config(), 10)
    loss_of(net, 0).backward()
    before = net.hidden.weight.clone()
    optimizer.step(0, torch.tensor(math.nan))
    assert optimizer.skipped == 1
    assert torch.equal(before, net.hidden.weight)


def test_loss_scale_leaves_the_update_as_it_was_and_halves_on_overflow() -> None:
    scaled, plain = Net(), Net()
    with_scale, without = Optimizer(scaled, config(), 10, loss_scale=True), Optimizer(plain, config(), 10)
    loss = loss_of(scaled, 0)
    (loss * with_scale.scale).backward()
    norm, _ = with_scale.step(0, loss)
    loss = loss_of(plain, 0)
    loss.backward()
    assert float(norm) == pytest.approx(float(without.step(0, loss)[0]), rel=1e-5)
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    loss = loss_of(scaled, 1)
    (loss * math.inf).backward()
    with_scale.step(1, loss)
    assert float(with_scale.scale) == FIRST_LOSS_SCALE / 2


# --- state -----------------------------------------------------------------------------------------------------------


def test_a_loaded_optimizer_goes_on_bit_for_bit() -> None:
    net = Net()
    optimizer = Optimizer(net, config(), 10, loss_scale=True)
    for step in range(3):
        loss = loss_of(net, step)
        loss.backward()
        optimizer.step(step, loss)
    other = Net()
    other.load_state_dict(net.state_dict())
    second = Optimizer(other, config(), 10, loss_scale=True)
    second.load({name: t.clone() for name, t in optimizer.tensors().items()})
    for n, o in ((net, optimizer), (other, second)):
        loss = loss_of(n, 3)
        (loss * o.scale).backward()
        o.step(3, loss)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_state_of_another_model_is_refused_by_name() -> None:
    net = Net()
    optimizer = Optimizer(net, config(), 10)
    loss = loss_of(net, 0)
    loss.backward()
    optimizer.step(0, loss)
    tensors = optimizer.tensors()
    with pytest.raises(CheckpointError, match=r"hidden\.weight\.exp_avg has shape \(2, 2\)"):
        Optimizer(Net(), config(), 10).load(tensors | {"hidden.weight.exp_avg": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"lacks hidden\.weight\.exp_avg_sq"):
        Optimizer(Net(), config(), 10).load({k: t for k, t in tensors.items() if k != "hidden.weight.exp_avg_sq"})
    with pytest.raises(CheckpointError, match=r"has (embedding|hidden|norm)\..*exp_avg"):
        Optimizer(Net(), config(kind="muon"), 10).load(tensors | {"hidden.weight.momentum": torch.zeros(6, 6)})
    with pytest.raises(CheckpointError, match=r"lacks hidden\.weight\.row_var"):
        Optimizer(Net(), config(kind="adafactor"), 10).load(tensors)
    with pytest.raises(CheckpointError, match=r"has ghost\.step"):
        Optimizer(Net(), config(), 10).load(tensors | {"ghost.step": torch.zeros(())})
