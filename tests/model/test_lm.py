"""The decoder: documents are worlds of their own, and a cache changes nothing but the speed."""

import shutil
from collections.abc import Callable

import pytest
import torch

from oriole.errors import ModelError
from oriole.model.attention import Backend
from oriole.model.lm import LM, Cache

BACKENDS: list[Backend] = ["eager", "sdpa", "grouped"]


def logits(model: LM, *args: torch.Tensor, **kw: object) -> torch.Tensor:
    with torch.inference_mode():
        return model.head("logits", model(*args, **kw).h)


def tokens(b: int, t: int) -> torch.Tensor:
    return torch.randint(0, 97, (b, t), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_never_sees_another_document_or_the_future(model: LM, backend: Backend) -> None:
    model.backend = backend
    x = tokens(1, 12)
    doc = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    pos = torch.tensor([[*range(5), *range(4), *range(3)]])
    before = logits(model, x, doc, pos)
    changed = x.clone()
    changed[0, :5] = (x[0, :5] + 1) % 97
    changed[0, 8:] = (x[0, 8:] + 1) % 97
    after = logits(model, changed, doc, pos)
    assert torch.equal(before[0, 5:8], after[0, 5:8])  # the second document up to the change, bit for bit
    assert not torch.allclose(before[0, :5], after[0, :5])


def test_gradients_stay_inside_the_document(small: LM) -> None:
    x = tokens(1, 10)
    doc = torch.tensor([[0] * 5 + [1] * 5])
    embedded = small.embedding(x).detach().requires_grad_()
    small.embedding.forward = lambda _: embedded  # type: ignore[method-assign]
    small(x, doc).h[0, 5:].sum().backward()
    assert embedded.grad is not None
    assert embedded.grad[0, :5].abs().max() == 0
    assert embedded.grad[0, 5:].abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_separate(model: LM, backend: Backend) -> None:
    model.backend = backend
    a, b = tokens(1, 7), tokens(1, 5) + 1
    packed = logits(
        model, torch.cat([a, b], 1), torch.tensor([[0] * 7 + [1] * 5]), torch.tensor([[*range(7), *range(5)]])
    )
    torch.testing.assert_close(packed[:, :7], logits(model, a), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed[:, 7:], logits(model, b), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_equals_uncached_equals_batched_equals_left_padded(model: LM, backend: Backend) -> None:
    model.backend = backend
    long, short = tokens(1, 20), tokens(1, 13) + 1
    expected = logits(model, long), logits(model, short)

    # Batched prefill of unequal prompts (15 and 9 tokens), padded at the end, then one token at a time.
    cache = Cache(model.config, 2, 32)
    prompts = torch.zeros(2, 15, dtype=torch.long)
    prompts[0], prompts[1, :9] = long[0, :15], short[0, :9]
    doc = torch.zeros(2, 15, dtype=torch.int)
    doc[1, 9:] = -1
    first = logits(model, prompts, doc, cache=cache)
    assert cache.lengths == [15, 9]
    torch.testing.assert_close(first[0], expected[0][0, :15], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(first[1, :9], expected[1][0, :9], atol=1e-4, rtol=1e-4)
    for i in range(4):
        step = logits(model, torch.stack([long[0, 15 + i : 16 + i], short[0, 9 + i : 10 + i]]), cache=cache)
        torch.testing.assert_close(step[0, 0], expected[0][0, 15 + i], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(step[1, 0], expected[1][0, 9 + i], atol=1e-4, rtol=1e-4)
        assert step[0, 0].argmax() == expected[0][0, 15 + i].argmax()

    # Left padding without a cache.
    padded = torch.zeros(2, 20, dtype=torch.long)
    padded[0], padded[1, 7:] = long[0], short[0]
    doc = torch.zeros(2, 20, dtype=torch.int)
    doc[1, :7] = -1
    pos = torch.stack([torch.arange(20), torch.cat([torch.zeros(7, dtype=torch.long), torch.arange(13)])])
    left = logits(model, padded, doc, pos)
    torch.testing.assert_close(left[0], expected[0][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(left[1, 7:], expected[1][0], atol=1e-4, rtol=1e-4)
    assert left.isfinite().all()


def test_chunked_prefill_and_moved_rows(small: LM) -> None:
    x = tokens(2, 18)
    whole = logits(small, x)
    cache = Cache(small.config, 4, 24)
    view = cache.rows(2, 4)
    logits(small, x[:, :6], cache=view)
    parts = logits(small, x[:, 6:17], cache=view)
    torch.testing.assert_close(parts, whole[:, 6:17], atol=1e-4, rtol=1e-4)
    cache.lengths[2:4] = view.lengths
    cache.move(3, 0)
    last = logits(small, x[1:, 17:], cache=cache.rows(0, 1))
    torch.testing.assert_close(last[0, 0], whole[1, 17], atol=1e-4, rtol=1e-4)


def test_a_full_cache_is_an_error_not_a_wraparound(small: LM) -> None:
    cache = Cache(small.config, 1, 8)
    with pytest.raises(ModelError, match="9 tokens do not fit into a cache of 8"):
        small(tokens(1, 9), cache=cache)


def test_a_freed_row_leaves_no_trace(small: LM) -> None:
    cache = Cache(small.config, 2, 16)
    logits(small, tokens(2, 9), cache=cache)
    cache.lengths[0] = 0
    other = (tokens(1, 4) + 5) % 97
    again = logits(small, other, cache=(row := cache.rows(0, 1)))
    assert row.lengths == [4]
    torch.testing.assert_close(again, logits(small, other), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("doc", [[[-1, 0, 0]], [[0, -1, 0]]])
def test_only_padding_at_the_end_goes_into_a_cache(small: LM, doc: list[list[int]]) -> None:
    cache = Cache(small.config, 1, 8)
    with pytest.raises(ModelError, match="put it at the end"):
        small(tokens(1, 3), torch.tensor(doc), cache=cache)
    assert cache.lengths == [0]


def test_more_tokens_than_the_context_are_refused(small: LM) -> None:
    with pytest.raises(ModelError, match="129 tokens exceed the model's context of 128"):
        small(tokens(1, 129))
    with pytest.raises(ModelError, match="129 tokens exceed"):
        small(tokens(1, 129), cache=Cache(small.config, 1, 200))
    with pytest.raises(ModelError, match="2 rows of tokens for a cache of 1"):
        small(tokens(2, 3), cache=Cache(small.config, 1, 8))


@pytest.mark.parametrize("backend", ["sdpa", "grouped"])
def test_training_gradients_equal_the_eager_reference(model: LM, backend: Backend) -> None:
    """Packed documents with padding, every parameter's gradient."""
    x = tokens(2, 24)
    doc = torch.tensor([[0] * 9 + [1] * 11 + [-1] * 4, [0] * 24])
    pos = torch.tensor([[*range(9), *range(11), *range(4)], [*range(24)]])
    gradients = []
    for model.backend in ("eager", backend):
        model.zero_grad()
        h = model(x, doc, pos).h
        loss = torch.nn.functional.cross_entropy(model.head("logits", h[doc >= 0]), x[doc >= 0], reduction="sum")
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == dict(model.named_parameters()).keys()
    for name, reference in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], reference, atol=1e-4, rtol=1e-3, msg=name)


needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # torch.compile's own imports
@pytest.mark.parametrize(
    ("compiler", "layers", "pattern"),
    [
        ("aot_eager", 1, "G"),
        pytest.param("inductor", 1, "G", marks=[pytest.mark.slow, needs_compiler]),
        ("aot_eager", 2, "GctrLgsz"),
        pytest.param("inductor", 2, "GctrLgsz", marks=[pytest.mark.soak, needs_compiler]),
    ],
)
def test_a_training_step_is_one_graph(make: Callable[..., LM], compiler: str, layers: int, pattern: str) -> None:
    small = make(num_layers=layers, context=256, pattern=pattern)
    x, doc = tokens(2, 256), torch.tensor([[0] * 70 + [1] * 186, [0] * 256])  # long enough for blocks of queries
    pos = torch.tensor([[*range(70), *range(186)], [*range(256)]])
    graphs = []
    for run in (small, torch.compile(small, backend=compiler, fullgraph=True, dynamic=False)):
        small.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            h = run(x, doc, pos).h
        h.float().square().sum().backward()
        graphs.append((h.detach().float(), small.blocks[0].attention.qkv.weight.grad.clone()))
    for plain, compiled in zip(*graphs, strict=True):
        assert (plain - compiled).norm() <= 0.03 * plain.norm()


def test_recomputing_keeps_less_and_gives_the_same_gradients(small: LM) -> None:
    x, results = tokens(2, 20), []
    for recompute in (False, True):
        small.zero_grad()
        small.recompute = recompute
        kept: list[int] = []

        def note(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = small(x).h.square().sum()
        results.append(sum(kept))
        loss.backward()
        results.append(small.blocks[0].mlp.gate_up.weight.grad.clone())
    assert results[2] < results[0] / 2
    assert torch.equal(results[1], results[3])


def test_dropout_acts_while_training_only(small: LM) -> None:
    x = tokens(1, 9)
    plain = logits(small, x)
    small.set_dropout(0.5)
    assert torch.equal(logits(small, x), plain)
    small.train()
    assert not torch.allclose(logits(small, x), plain)


def test_scalar_heads_exist_only_where_asked_for(small: LM) -> None:
    h = small(tokens(2, 5)).h
    with pytest.raises(ModelError, match="no value head"):
        small.head("value", h)
    model = LM(small.config, heads=("value", "reward"))
    assert model.head("value", h).shape == (2, 5)
    assert model.head("reward", h[:, -1]).shape == (2,)


def test_rotary_tables_stay_fp32_when_the_model_is_cast(small: LM) -> None:
    cos = small.angles.cos.clone()
    small.to(torch.bfloat16)
    assert small.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(small.angles.cos, cos)


def test_output_projections_start_smaller() -> None:
    from oriole.model.config import preset

    torch.manual_seed(0)
    block = LM(preset("demo")).requires_grad_(False).blocks[0]
    assert float(block.mlp.gate_up.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(block.mlp.down.weight.std()) == pytest.approx(0.02 / 12**0.5, rel=0.02)
    assert float(block.attention.out.weight.std()) == pytest.approx(0.02 / 12**0.5, rel=0.02)
