"""Every backend computes what the eager fp32 reference defines, forward and backward."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from oriole.model import attention
from oriole.model.attention import Backend, attend, document_mask, mask_for

FAST: list[Backend] = ["sdpa", "grouped"]


def qkv(b: int = 2, h: int = 4, kv: int = 2, t: int = 33, d: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(b, n, t, d, generator=generator).requires_grad_() for n in (h, kv, kv)]


def masks(t: int = 33) -> dict[str, torch.Tensor | None]:
    doc = torch.cat([torch.zeros(10), torch.ones(8), torch.full((t - 18,), -1)]).int()
    return {"causal": None, "documents": document_mask(torch.stack([doc, torch.zeros(t).int()]))}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("mask", ["causal", "documents"])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_fast_equals_eager_with_gradients(backend: Backend, mask: str, kv: int) -> None:
    results = []
    for which in ("eager", backend):
        inputs = qkv(kv=kv)
        y = attend(*inputs, masks()[mask], backend=which)
        (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
        results.append([y.detach(), *(x.grad for x in inputs)])
    for reference, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("t", "s"), [(255, 255), (256, 256), (259, 259), (257, 300)])
def test_long_rows_in_blocks_equal_eager(backend: Backend, t: int, s: int) -> None:
    """Lengths on both sides of where `grouped` cuts rows into blocks, and keys of a cache before the queries."""
    q, k, v = (x.detach().requires_grad_() for x in qkv(t=s))
    mask = document_mask((torch.arange(s) // 45)[None].expand(2, s))[:, :, s - t :]
    results = []
    for which in ("eager", backend):
        y = attend(q[:, :, s - t :], k, v, mask, backend=which)
        gradients = torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), [q, k, v])
        results.append([y.detach(), *gradients])
        if t == s:
            results[-1].append(attend(q, k, v, None, backend=which).detach())
    for reference, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("backend", ["sdpa", "grouped", "flex"])
@pytest.mark.parametrize("t", [200, 300])
def test_documents_in_the_form_of_each_backend(backend: Backend, t: int) -> None:
    doc = torch.stack([torch.arange(t) // 90, torch.where(torch.arange(t) < t - 30, 0, -1)]).int()
    results = []
    for which in ("eager", backend):
        inputs = qkv(t=t)
        if backend == "flex":  # PyTorch has its backward pass for GPUs only
            inputs = [x.detach() for x in inputs]
        y = attend(*inputs, mask_for(doc, which), backend=which)
        results.append([y.detach()])
        if backend != "flex":
            results[-1] += torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), inputs)
    for reference, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, atol=2e-5, rtol=1e-4)


def test_weights_computed_again_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    doc = (torch.arange(300) // 70)[None].expand(2, 300)
    results = []
    for kept in (1024, 100):
        monkeypatch.setattr(attention, "KEPT", kept)
        inputs = qkv(t=300)
        y = attend(*inputs, mask_for(doc, "grouped"), backend="grouped")
        saved = sum(t.numel() for t in y.grad_fn.saved_tensors)
        results.append((saved, torch.autograd.grad(y.square().sum(), inputs)))
    assert results[1][0] < results[0][0] / 2
    for first, again in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("backend", ["eager", *FAST])
def test_bf16_stays_close_to_fp32(backend: Backend) -> None:
    inputs = [x.detach() for x in qkv()]
    reference = attend(*inputs, None, backend="eager")
    low = attend(*(x.bfloat16() for x in inputs), None, backend=backend)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), reference, atol=0.03, rtol=0.03)


def test_document_mask_by_hand() -> None:
    mask = document_mask(torch.tensor([[0, 0, 1, -1]]))[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["causal", "documents"])
def test_sdpa_takes_the_flash_kernel_on_a_cpu(dtype: torch.dtype, mask: str) -> None:
    """GQA and an explicit mask must not fall to the math path, which is several times slower (DESIGN, fault 15)."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in qkv()]
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
        attend(*inputs, masks()[mask], backend="sdpa").sum().backward()
    names = {event.key for event in record.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names
    assert not any("attention_math" in name for name in names)
