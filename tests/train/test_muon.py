"""Muon: orthogonal updates, fused parts as if apart, and nothing at all on a bad gradient."""

from typing import Any, get_args

import pytest
import torch
from torch import nn

from oriole.model.config import ModelConfig
from oriole.model.lm import LM
from oriole.train.muon import SECOND_MOMENT, Muon
from oriole.train.optim import OptimConfig, Optimizer
from oriole.train.orthogonal import Method, orthogonalise

ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)


def weights(rows: int, columns: int, seed: int = 0) -> nn.Parameter:
    parameter = nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    parameter.grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1))
    return parameter


@pytest.mark.parametrize("more", [{}, {"normalise": True, "cautious": True}], ids=["muon", "normuon"])
def test_parts_of_a_fused_matrix_are_updated_as_if_apart(more: dict[str, Any]) -> None:
    fused = weights(40, 16)
    apart = [nn.Parameter(p.clone()) for p in fused.detach().split([24, 8, 8])]
    together, alone = Muon([fused], {0: (24, 8, 8)}, **more), Muon(apart, {}, **more)
    for seed in range(3):
        fused.grad = weights(40, 16, seed).grad
        for part, grad in zip(apart, fused.grad.split([24, 8, 8]), strict=True):
            part.grad = grad.clone()
        together.step(0.1, 0.01, ONE, ZERO)
        alone.step(0.1, 0.01, ONE, ZERO)
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in apart]), atol=1e-2, rtol=0)
    whole = weights(40, 16)
    Muon([whole], {}, **more).step(0.1, 0.01, ONE, ZERO)
    assert not torch.allclose(whole, fused, atol=1e-2)


@pytest.mark.parametrize("method", get_args(Method))
def test_two_steps_by_hand(method: Method) -> None:
    p = weights(12, 8)
    by_hand, momentum = p.detach().clone(), torch.zeros(12, 8)
    muon = Muon([p], {}, method=method)
    for seed, divisor in ((1, 4.0), (2, 0.5)):
        grad = torch.randn(12, 8, generator=torch.Generator().manual_seed(seed))
        p.grad = grad.clone()
        muon.step(0.5, 0.2, torch.tensor(divisor), ZERO)
        momentum = 0.95 * momentum + 0.05 * grad / divisor
        ahead = 0.05 * grad / divisor + 0.95 * momentum
        update = orthogonalise(ahead[None], method)[0].float()
        by_hand = by_hand * (1 - 0.5 * 0.2) - 0.5 * 1.5**0.5 * update
        torch.testing.assert_close(muon.momentum[0], momentum)
    torch.testing.assert_close(p.detach(), by_hand, atol=0.02, rtol=0)  # ahead may be rounded to bf16 otherwise


@pytest.mark.parametrize(("rows", "columns"), [(12, 8), (8, 12), (8, 8)])
def test_normuon_is_its_slow_definition(rows: int, columns: int) -> None:
    """Neuron by neuron in fp64, given the same orthogonal updates, which plain Muon shows in its steps."""
    p, plain = weights(rows, columns), weights(rows, columns)
    muon, reference = Muon([p], {}, normalise=True), Muon([plain], {})
    neurons = max(rows, columns)
    moment = [0.0] * neurons
    for seed in range(4):
        # Neurons of very different sizes, as a gradient has them.
        grad = weights(rows, columns, seed).grad * torch.logspace(0, -3, columns)
        p.grad, plain.grad = grad.clone(), grad.clone()
        before, plain_before = p.detach().double(), plain.detach().double()
        muon.step(0.1, 0.0, ONE, ZERO)
        reference.step(0.1, 0.0, ONE, ZERO)
        update = plain_before - plain.detach().double()
        stretch = 0.1 * max(1, rows / columns) ** 0.5
        out = update.clone()
        for i in range(neurons):
            neuron = (i, slice(None)) if rows >= columns else (slice(None), i)
            square = float((update[neuron] / stretch).square().mean())
            moment[i] = SECOND_MOMENT * moment[i] + (1 - SECOND_MOMENT) * square
            out[neuron] = update[neuron] / moment[i] ** 0.5
        out *= update.norm() / out.norm()
        torch.testing.assert_close(before - p.detach().double(), out, atol=2e-5, rtol=2e-4)
        torch.testing.assert_close(muon.second_moment[0].double(), torch.tensor(moment).double(), rtol=1e-3, atol=1e-6)


def test_normuon_makes_the_neurons_alike_and_keeps_the_norm() -> None:
    """A gradient that leaves half of the neurons nearly alone."""
    spread = {}
    for normalise in (False, True):
        p = weights(64, 16)
        muon = Muon([p], {}, normalise=normalise)
        for seed in range(20):
            before = p.detach().clone()
            p.grad = weights(64, 16, seed).grad * torch.cat([torch.ones(32), torch.full((32,), 1e-3)])[:, None]
            muon.step(0.1, 0.0, ONE, ZERO)
        moved = p.detach() - before
        sizes = moved.norm(dim=1)
        spread[normalise] = float(sizes.max() / sizes.min()), float(moved.norm())
    assert spread[False][0] > 50 and spread[True][0] < 10
    assert spread[True][1] == pytest.approx(spread[False][1], rel=0.02)


def test_cautious_decay_leaves_weights_that_the_update_lets_grow() -> None:
    careful, plain, none = weights(8, 12), weights(8, 12), weights(8, 12)
    before = plain.detach().clone()
    Muon([careful], {}, cautious=True).step(0.5, 0.2, ONE, ZERO)
    Muon([plain], {}).step(0.5, 0.2, ONE, ZERO)
    Muon([none], {}).step(0.5, 0.0, ONE, ZERO)
    shrinks = (before - none.detach()) * before > 0
    assert 0.2 < float(shrinks.float().mean()) < 0.8
    expected = torch.where(shrinks, plain.detach(), none.detach())
    torch.testing.assert_close(careful.detach(), expected)


@pytest.mark.parametrize("more", [{}, {"normalise": True, "cautious": True}], ids=["muon", "normuon"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_gradient_changes_nothing(more: dict[str, Any], value: float) -> None:
    p = weights(8, 12)
    muon = Muon([p], {}, **more)
    muon.step(0.5, 0.2, ONE, ZERO)
    before = [t.clone() for t in (p.detach(), *(t for _, _, t in muon.tensors()))]
    p.grad = weights(8, 12, 5).grad
    p.grad[3, 3] = value
    muon.step(0.5, 0.2, torch.tensor(torch.nan), ONE)
    after = (p.detach(), *(t for _, _, t in muon.tensors()))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def small() -> LM:
    torch.manual_seed(0)
    shape = {"dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "ffn_dim": 24}
    return LM(ModelConfig(vocab_size=31, context=32, **shape))


def backward(model: LM) -> torch.Tensor:
    loss = model.head("logits", model(torch.arange(20).view(2, 10)).h).square().mean()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("kind", ["muon", "normuon"])
def test_every_parameter_is_moved_by_exactly_one_of_the_two(kind: str) -> None:
    model = small()
    optimizer = Optimizer(model, OptimConfig(kind=kind, lr=1e-2, warmup=0), 10)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step(0, backward(model))
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    kinds: dict[str, set[str]] = {}
    for key in optimizer.tensors():
        name, _, kept = key.rpartition(".")
        kinds.setdefault(name, set()).add(kept)
    inner = {n for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("blocks.")}
    wanted = {"momentum"} if kind == "muon" else {"momentum", "second_moment"}
    assert {n for n, k in kinds.items() if k == wanted} == inner
    assert {n for n, k in kinds.items() if "exp_avg" in k} == {n for n, _ in model.named_parameters()} - inner


@pytest.mark.parametrize("kind", ["muon", "normuon", "adafactor"])
def test_a_resumed_optimizer_goes_on_the_same(kind: str) -> None:
    straight, resumed = small(), small()
    config = OptimConfig(kind=kind, lr=1e-2, cautious=True)
    a, b = Optimizer(straight, config, 10), Optimizer(resumed, config, 10)
    for step in range(3):
        a.step(step, backward(straight))
    resumed.load_state_dict(straight.state_dict())
    b.load({k: v.clone() for k, v in a.tensors().items()})
    for step in range(3, 6):
        a.step(step, backward(straight))
        b.step(step, backward(resumed))
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))
    left = b.tensors()
    assert left.keys() == a.tensors().keys()
    assert all(torch.equal(left[k], v) for k, v in a.tensors().items())
