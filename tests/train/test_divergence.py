"""Distillation's loss and gradients equal slow ones in fp64, in chunks, whichever way the teacher is known."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oriole.train import divergence
from oriole.train.divergence import PLAIN, Cached, Live, Mixed, distillation

N, V, D = 50, 37, 12
GENERATOR = torch.Generator()


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Live]:
    """h, weight, targets, rows and a teacher of another width, in fp64."""
    GENERATOR.manual_seed(0)
    h, w, states, head = (
        torch.randn(*shape, generator=GENERATOR, dtype=torch.float64) for shape in ((N, D), (V, D), (N, 7), (V, 7))
    )
    targets = torch.randint(0, V, (N,), generator=GENERATOR)
    rows = torch.randperm(N, generator=GENERATOR)[:41].sort().values
    return h.requires_grad_(), w.requires_grad_(), targets, rows, Live(states, head)


def reference(h: Tensor, w: Tensor, y: Tensor, rows: Tensor, log_p: Tensor, mixed: Mixed) -> Tensor:
    """The definition, with whole logits and autograd; log_p (N, V) at the temperature."""
    z, tau = (h @ w.T)[rows], mixed.temperature
    log_q, log_p = (z / tau).log_softmax(-1), log_p[rows]
    if mixed.reverse:
        kl = (log_q.exp() * (log_q - log_p)).sum()
    else:
        kl = (log_p.exp() * (log_p - log_q)).sum()
    lm = F.cross_entropy(z, y[rows], reduction="sum")
    return (1 - mixed.lm_weight) * tau**2 * kl + mixed.lm_weight * lm


def coarse_reference(h: Tensor, w: Tensor, y: Tensor, rows: Tensor, cached: Cached, mixed: Mixed) -> Tensor:
    """The same with all tokens outside of the top k as one outcome, by summing probabilities."""
    z, tau = (h @ w.T)[rows], mixed.temperature
    q = (z / tau).softmax(-1)
    at_top = q.gather(-1, cached.top[rows])
    q = torch.cat([at_top, 1 - at_top.sum(-1, keepdim=True)], -1)
    p = cached.log_probs[rows].exp()
    a, b = (q, p) if mixed.reverse else (p, q)
    lm = F.cross_entropy(z, y[rows], reduction="sum")
    return (1 - mixed.lm_weight) * tau**2 * (a * (a / b).log()).sum() + mixed.lm_weight * lm


def cached(teacher: Live, k: int, tau: float) -> Cached:
    log_p = (teacher.h @ teacher.weight.T / tau).log_softmax(-1)
    log_probs, top = log_p.topk(k, -1)
    rest = log_p.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    return Cached(top, torch.cat([log_probs, rest], -1))


MIXTURES = [
    Mixed(reverse, tau, m) for reverse in (False, True) for tau, m in ((1.0, 0.0), (2.5, 0.0), (0.7, 0.3), (1.0, 1.0))
]


@pytest.mark.parametrize("mixed", MIXTURES, ids=str)
@pytest.mark.parametrize("k", [0, 1, 5, 36])
def test_loss_and_gradients_equal_the_definition_in_fp64(monkeypatch: pytest.MonkeyPatch, mixed: Mixed, k: int) -> None:
    monkeypatch.setattr(divergence, "CHUNK", 16)
    h, w, y, rows, live = inputs()
    teacher = cached(live, k, mixed.temperature) if k else live
    loss, kl, lm = distillation(h, w, y, rows, teacher, mixed, PLAIN)
    ours = torch.autograd.grad(1.5 * loss, (h, w))
    if isinstance(teacher, Cached):
        slow = coarse_reference(h, w, y, rows, teacher, mixed)
    else:
        slow = reference(h, w, y, rows, (live.h @ live.weight.T / mixed.temperature).log_softmax(-1), mixed)
    theirs = torch.autograd.grad(1.5 * slow, (h, w))
    assert float(loss.detach()) == pytest.approx(float(slow.detach()), rel=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert float((1 - mixed.lm_weight) * mixed.temperature**2 * kl + mixed.lm_weight * lm) == pytest.approx(
        float(loss.detach())
    )
    assert not kl.requires_grad and not lm.requires_grad


@pytest.mark.parametrize("reverse", [False, True])
def test_all_but_one_token_are_the_whole_divergence_and_fewer_never_more(reverse: bool) -> None:
    h, w, y, rows, live = inputs()
    mixed = Mixed(reverse, 1.3, 0.0)
    whole = float(distillation(h, w, y, rows, live, mixed, PLAIN)[0].detach())
    parts = [float(distillation(h, w, y, rows, cached(live, k, 1.3), mixed, PLAIN)[0].detach()) for k in (1, 4, 12, 36)]
    assert parts == sorted(parts) and parts[0] < 0.9 * whole
    assert parts[-1] == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(reverse: bool) -> None:
    h, w, y, rows, _ = inputs()
    own = Live(h.detach(), w.detach())
    for teacher in (own, cached(own, 6, 2.0)):
        loss, _, lm = distillation(h, w, y, rows, teacher, Mixed(reverse, 2.0, 0.0), PLAIN)
        assert abs(float(loss.detach())) < 1e-9 and float(lm) > 1
        for grad in torch.autograd.grad(loss, (h, w)):
            assert float(grad.abs().max()) < 1e-9


def test_log_probs_that_were_rounded_are_a_distribution_again() -> None:
    h, w, y, rows, live = inputs()
    exact = cached(live, 8, 1.0)
    rounded = Cached(exact.top, exact.log_probs.half())
    losses = [
        float(distillation(h, w, y, rows, t, Mixed(False, 1.0, 0.0), PLAIN)[0].detach()) for t in (exact, rounded)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    p = rounded.log_probs.double().log_softmax(-1)
    renormalised = coarse_reference(h, w, y, rows, Cached(exact.top, p), Mixed(False, 1.0, 0.0))
    assert losses[1] == pytest.approx(float(renormalised.detach()), rel=1e-9)


class Largest(TorchDispatchMode):
    """Notes the most numbers in a tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("k", [0, 5])
def test_the_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    monkeypatch.setattr(divergence, "CHUNK", 8)
    h, w, y, rows, live = inputs()
    with Largest() as largest:
        loss = distillation(h, w, y, rows, cached_outside(live, k), Mixed(True, 2.0, 0.5), PLAIN)[0]
        loss.backward()
    assert largest.numbers == max(8 * V, N * D) < len(rows) * V


def cached_outside(live: Live, k: int) -> Live | Cached:
    """The teacher, its logits made where nobody counts them."""
    mode = torch.utils._python_dispatch._disable_current_modes
    with mode():
        return cached(live, k, 2.0) if k else live


def test_a_frozen_head_gets_no_gradient() -> None:
    h, w, y, rows, live = inputs()
    both = torch.autograd.grad(distillation(h, w, y, rows, live, Mixed(False, 1.0, 0.5), PLAIN)[0], (h, w))
    (alone,) = torch.autograd.grad(distillation(h, w.detach(), y, rows, live, Mixed(False, 1.0, 0.5), PLAIN)[0], h)
    assert torch.equal(alone, both[0])


def test_bf16_autocast_stays_close() -> None:
    h, w, y, rows, live = (t.float() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs())
    teacher = Live(live.h.float(), live.weight.float())
    given = (h.detach(), w.detach(), y, rows, teacher, Mixed(False, 1.0, 0.5), PLAIN)
    exact = distillation(*given)[0]
    with torch.autocast("cpu", torch.bfloat16):
        low = distillation(*given)[0]
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(float(exact), rel=0.02)
