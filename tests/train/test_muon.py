"""Muon: orthogonal updates, fused parts as if apart, and nothing at all on a bad gradient."""

import pytest
import torch
from torch import nn

from oriole.model.config import ModelConfig
from oriole.model.lm import LM
from oriole.train.muon import Muon, orthogonalise
from oriole.train.optim import OptimConfig, Optimizer

ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)


@pytest.mark.parametrize(("n", "m"), [(16, 64), (64, 64), (5, 7)])
def test_singular_values_come_near_one_and_directions_stay(n: int, m: int) -> None:
    x = torch.randn(3, n, m, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalise(x)
    along = torch.einsum("kni,knm,kim->ki", u, y, v)  # u_i^T y v_i
    clear = s > 0.1 * s.amax(1, keepdim=True)  # tiny singular values need more steps than five
    assert 0.6 < float(along[clear].min()) and float(along[clear].max()) < 1.3


@pytest.mark.parametrize(("n", "m"), [(48, 144), (64, 64)])
@pytest.mark.parametrize("decades", [2, 4])
def test_small_singular_values_do_not_become_noise(n: int, m: int, decades: int) -> None:
    """Gradients are like this: a few large singular values, many small ones. In bf16 it takes care not to mix them."""
    generator = torch.Generator().manual_seed(decades)
    u = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(m, n, generator=generator)).Q
    y = orthogonalise((u * torch.logspace(0, -decades, n) @ v.T)[None])[0]
    along = torch.einsum("ni,nm,mi->i", u, y, v)
    across = y - u * along @ v.T
    assert float(across.norm() / y.norm()) < 0.15  # 0.4 to 0.7 where noise has taken over
    assert float(torch.linalg.svdvals(y)[0]) < 1.3


def weights(rows: int, columns: int, seed: int = 0) -> nn.Parameter:
    parameter = nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    parameter.grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1))
    return parameter


def test_parts_of_a_fused_matrix_are_updated_as_if_apart() -> None:
    fused = weights(40, 16)
    apart = [nn.Parameter(p.clone()) for p in fused.detach().split([24, 8, 8])]
    for part, grad in zip(apart, fused.grad.split([24, 8, 8]), strict=True):
        part.grad = grad.clone()
    Muon([fused], {0: (24, 8, 8)}).step(0.1, 0.01, ONE, ZERO)
    Muon(apart, {}).step(0.1, 0.01, ONE, ZERO)
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in apart]), atol=1e-2, rtol=0)
    whole = weights(40, 16)
    Muon([whole], {}).step(0.1, 0.01, ONE, ZERO)
    assert not torch.allclose(whole, fused, atol=1e-2)


def test_a_step_by_hand() -> None:
    p = weights(8, 12)
    before, grad = p.detach().clone(), p.grad.clone()
    Muon([p], {}).step(0.5, 0.2, torch.tensor(4.0), ZERO)
    momentum = 0.05 * grad / 4
    nesterov = 0.05 * grad / 4 + 0.95 * momentum
    torch.testing.assert_close(p.detach(), before * (1 - 0.5 * 0.2) - 0.5 * orthogonalise(nesterov[None])[0])


def test_a_bad_gradient_changes_nothing() -> None:
    p = weights(8, 12)
    muon = Muon([p], {})
    before = p.detach().clone()
    p.grad[3, 3] = torch.nan
    muon.step(0.5, 0.2, ONE, ONE)
    assert torch.equal(p, before) and float(muon.momentum[0].abs().max()) == 0


def small() -> LM:
    torch.manual_seed(0)
    shape = {"dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "ffn_dim": 24}
    return LM(ModelConfig(vocab_size=31, context=32, **shape))


def backward(model: LM) -> torch.Tensor:
    loss = model.head("logits", model(torch.arange(20).view(2, 10)).h).square().mean()
    loss.backward()
    return loss.detach()


def test_every_parameter_is_moved_by_exactly_one_of_the_two() -> None:
    model = small()
    optimizer = Optimizer(model, OptimConfig(kind="muon", lr=1e-2, warmup=0), 10)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step(0, backward(model))
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    kinds: dict[str, set[str]] = {}
    for key in optimizer.tensors():
        name, _, kind = key.rpartition(".")
        kinds.setdefault(name, set()).add(kind)
    inner = {n for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("blocks.")}
    assert {n for n, k in kinds.items() if k == {"momentum"}} == inner
    assert {n for n, k in kinds.items() if "exp_avg" in k} == {n for n, _ in model.named_parameters()} - inner


def test_a_resumed_optimizer_goes_on_the_same() -> None:
    straight, resumed = small(), small()
    a = Optimizer(straight, OptimConfig(kind="muon", lr=1e-2), 10)
    b = Optimizer(resumed, OptimConfig(kind="muon", lr=1e-2), 10)
    for step in range(3):
        a.step(step, backward(straight))
    resumed.load_state_dict(straight.state_dict())
    b.load({k: v.clone() for k, v in a.tensors().items()})
    for step in range(3, 6):
        a.step(step, backward(straight))
        b.step(step, backward(resumed))
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))
