"""The fused loss equals the slow one, and a sum is a sum."""

import pytest
import torch
import torch.nn.functional as F

from oriole.model.config import ModelConfig
from oriole.model.lm import LM
from oriole.train import objectives
from oriole.train.batch import IGNORE, Batch
from oriole.train.objectives import (
    LMObjective,
    cross_entropy,
    cross_entropy_and_hits,
    smoothed_chunk,
    token_log_probs,
)


def inputs(n: int, v: int = 37, d: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    h = torch.randn(n, d, generator=generator, dtype=torch.float64).requires_grad_()
    w = torch.randn(v, d, generator=generator, dtype=torch.float64).requires_grad_()
    return h, w, torch.randint(0, v, (n,), generator=generator)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 50])
def test_loss_and_gradients_equal_torch_in_fp64(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(objectives, "CHUNK", 16)
    h, w, y = inputs(n)
    (3.5 * cross_entropy(h, w, y)).backward()
    fused = h.grad.clone(), w.grad.clone()
    h.grad = w.grad = None
    reference = 3.5 * F.cross_entropy(h @ w.T, y, reduction="sum")
    reference.backward()
    assert float(3.5 * cross_entropy(h, w, y).detach()) == pytest.approx(float(reference.detach()), rel=1e-12)
    torch.testing.assert_close(fused[0], h.grad, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(fused[1], w.grad, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("n", [1, 16, 50])
def test_label_smoothing_is_torchs_with_its_gradients(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(objectives, "CHUNK", 16)
    h, w, y = inputs(n)
    smoothed = cross_entropy(h, w, y, chunk=smoothed_chunk(0.1))
    reference = F.cross_entropy(h @ w.T, y, reduction="sum", label_smoothing=0.1)
    assert float(smoothed.detach()) == pytest.approx(float(reference.detach()), rel=1e-12)
    ours, theirs = torch.autograd.grad(2.5 * smoothed, [h, w]), torch.autograd.grad(2.5 * reference, [h, w])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("chunk", [None, smoothed_chunk(0.1)])
def test_a_hit_is_a_target_that_no_token_beats(
    monkeypatch: pytest.MonkeyPatch, chunk: objectives.ChunkFunction | None
) -> None:
    monkeypatch.setattr(objectives, "CHUNK", 16)
    h, w, y = inputs(50)
    likeliest = (h @ w.T).argmax(-1)
    y = torch.where(torch.arange(50) % 3 == 0, likeliest, y)
    rows = torch.arange(37) * 3 % 50
    loss, hits = cross_entropy_and_hits(h, w, y, rows, chunk)
    assert torch.equal(hits, (likeliest == y)[rows]) and 5 < int(hits.sum()) < 37
    assert torch.equal(loss, cross_entropy(h, w, y, rows, chunk)) and not hits.requires_grad
    tied = torch.zeros(3, 12, dtype=torch.float64)
    assert bool(cross_entropy_and_hits(tied, w, torch.tensor([5, 0, 36]))[1].all())  # none is above it


def test_chosen_rows_equal_those_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "CHUNK", 16)
    h, w, y = inputs(50)
    rows = torch.randperm(50)[:37]
    whole = torch.autograd.grad(cross_entropy(h, w, y, rows), [h, w])
    alone = torch.autograd.grad(cross_entropy(h[rows], w, y[rows]), [h, w])
    torch.testing.assert_close(whole, alone, atol=1e-12, rtol=1e-10)
    assert set(whole[0].abs().sum(1).nonzero().flatten().tolist()) == set(rows.tolist())


@pytest.mark.parametrize("n", [1, 16, 50])
def test_token_log_probs_and_entropy_equal_torch_in_fp64(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(objectives, "CHUNK", 16)
    h, w, y = inputs(n)
    a, b = torch.linspace(-1, 2, n, dtype=torch.float64), torch.linspace(0.5, -1, n, dtype=torch.float64)
    results = []
    for fused in (True, False):
        if fused:
            log_probs, entropy = token_log_probs(h, w, y)
        else:
            every = (h @ w.T).log_softmax(-1)
            log_probs, entropy = every.gather(-1, y[:, None]).squeeze(-1), -(every.exp() * every).sum(-1)
        grads = torch.autograd.grad((a * log_probs + b * entropy.square()).sum(), [h, w])
        results.append([log_probs.detach(), entropy.detach(), *grads])
    torch.testing.assert_close(results[0], results[1], atol=1e-11, rtol=1e-9)


def test_the_entropy_alone_has_its_gradient() -> None:
    h, w, y = inputs(50)
    every = (h @ w.T).log_softmax(-1)
    wanted = torch.autograd.grad(-(every.exp() * every).sum(), [h, w])
    torch.testing.assert_close(torch.autograd.grad(token_log_probs(h, w, y)[1].sum(), [h, w]), wanted)


def test_log_probs_sum_to_the_loss() -> None:
    h, w, y = (t.float() if t.is_floating_point() else t for t in inputs(40))
    with torch.autocast("cpu", torch.bfloat16):
        total, loss = token_log_probs(h, w, y)[0].sum().detach(), cross_entropy(h, w, y).detach()
    assert float(-total) == pytest.approx(float(loss), rel=1e-5)


def test_the_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "CHUNK", 16)
    rows = []

    def spy(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, by_weight: bool) -> objectives.ChunkLoss:
        rows.append(len(x))
        return objectives.cross_entropy_chunk(x, w, y, by_weight)

    cross_entropy(*inputs(50), chunk=spy)
    assert rows == [16, 16, 16, 16]


def test_a_frozen_head_gets_no_gradient_and_the_others_keep_theirs() -> None:
    for loss in (cross_entropy, lambda *given: -token_log_probs(*given)[0].sum()):
        h, w, y = inputs(50)
        both = torch.autograd.grad(loss(h, w, y), (h, w))
        frozen = w.detach()
        (alone,) = torch.autograd.grad(loss(h, frozen, y), h)
        torch.testing.assert_close(alone, both[0], rtol=0, atol=0)
        assert frozen.grad is None and float(both[1].abs().sum()) > 0
    w = inputs(50)[1].detach()
    assert objectives.cross_entropy_chunk(w[:3], w, torch.arange(3), False).by_w.numel() == 0


def test_bf16_autocast_stays_close() -> None:
    h, w, y = (t.float() if t.is_floating_point() else t for t in inputs(40))
    exact = F.cross_entropy(h @ w.T, y, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        low = cross_entropy(h, w, y)
    assert low.dtype == torch.float32
    assert float(low.detach()) == pytest.approx(float(exact.detach()), rel=0.02)


def model_and_batch() -> tuple[LM, Batch]:
    torch.manual_seed(0)
    model = LM(
        ModelConfig(
            vocab_size=50, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=24, context=32
        )
    )
    tokens = torch.randint(0, 50, (3, 10))
    targets = torch.randint(0, 50, (3, 10))
    targets[0, 4:] = IGNORE
    targets[2] = IGNORE
    return model, Batch(tokens, targets, torch.zeros(3, 10, dtype=torch.int32), torch.arange(10).expand(3, 10))


def test_lm_objective_is_the_sum_over_trained_tokens() -> None:
    model, batch = model_and_batch()
    objective = LMObjective()
    logits = model.head("logits", model(batch.tokens, batch.doc, batch.pos).h)
    slow = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(objective(model, batch).sum, slow)
    assert int(objective.weight(batch)) == 14


def test_a_batch_without_targets_has_zero_loss_and_zero_gradient() -> None:
    model, batch = model_and_batch()
    empty = Batch(batch.tokens, torch.full_like(batch.targets, IGNORE), batch.doc, batch.pos)
    loss = LMObjective()(model, empty).sum
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or float(p.grad.abs().max()) == 0 for p in model.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_chunks_equal_eager_ones() -> None:
    model, batch = model_and_batch()
    eager, compiled = LMObjective(), LMObjective()
    compiled.compile()
    results = []
    for objective in (eager, compiled):
        model.zero_grad()
        loss = objective(model, batch).sum
        loss.backward()
        results.append((loss.detach(), model.embedding.weight.grad.clone()))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-4)
