"""A layer with a window sees the last W tokens and nothing else, at a cost that is linear in the length."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from oriole.config import validate
from oriole.infer.engine import Engine
from oriole.infer.sample import Sampling
from oriole.model import attention
from oriole.model.attention import Backend, Band, attend, document_mask, mask_for
from oriole.model.blockmask import block_mask
from oriole.model.config import ModelConfig, preset, query_block
from oriole.model.costs import kv_cache_bytes, training_memory
from oriole.model.lm import LM, Cache

BACKENDS: list[Backend] = ["eager", "sdpa", "grouped"]
FAST: list[Backend] = ["sdpa", "grouped"]


def logits(model: LM, *args: torch.Tensor, **kw: object) -> torch.Tensor:
    with torch.inference_mode():
        return model.head("logits", model(*args, **kw).h)


def tokens(b: int, t: int) -> torch.Tensor:
    return torch.randint(0, 97, (b, t), generator=torch.Generator().manual_seed(3))


def qkv(t: int, s: int, b: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((4, t), (2, s), (2, s))
    return [torch.randn(b, n, length, 16, generator=generator).requires_grad_() for n, length in sizes]


def documents(t: int) -> torch.Tensor:
    return torch.stack([torch.arange(t) // 90, torch.where(torch.arange(t) < t - 30, 0, -1)]).int()


# --- attention -------------------------------------------------------------------------------------------------------


def test_window_and_documents_by_hand() -> None:
    mask = document_mask(torch.tensor([[0, 0, 0, 1, -1]]), window=2)[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize(
    ("t", "s", "window"), [(40, 40, 1), (200, 200, 33), (255, 255, 200), (300, 300, 64), (700, 700, 40), (270, 333, 70)]
)
def test_fast_equals_eager_with_gradients(backend: Backend, packed: bool, t: int, s: int, window: int) -> None:
    """Lengths on both sides of where rows are cut into blocks, windows narrower and wider than a block, a last block
    that is not full, and keys before the queries as a cache has them."""
    doc = documents(s) if packed or t != s else None
    results = []
    for which in ("eager", backend):
        inputs = qkv(t, s)
        mask = Band(window) if doc is None else mask_for(doc, which, window, t)
        y = attend(*inputs, mask, backend=which)
        gradients = torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), inputs)
        results.append([y.detach(), *gradients])
    for reference, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, atol=2e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("window", [None, 50, 150])
def test_flex_equals_eager(window: int | None) -> None:
    doc = documents(330)
    q, k, v = (x.detach() for x in qkv(330, 330))
    reference, fast = (attend(q, k, v, mask_for(doc, which, window), backend=which) for which in ("eager", "flex"))
    torch.testing.assert_close(fast, reference, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 1, 2, 128, 129, 130, 200])
def test_blocks_of_flex_are_those_that_the_square_would_give(window: int | None) -> None:
    t = 700
    doc = torch.stack([torch.arange(t) // 256, torch.where(torch.arange(t) < 600, torch.arange(t) // 300, -1)])
    made = block_mask(doc, window)
    square = torch.zeros(2, 768, 768, dtype=torch.int)
    square[:, :t, :t] = document_mask(doc, window)[:, 0].int()
    counts = square.view(2, 6, 128, 6, 128).sum((2, 4))
    assert torch.equal(made.full_kv_num_blocks[:, 0], (counts == 128 * 128).sum(-1).int())
    assert torch.equal(made.kv_num_blocks[:, 0], ((counts > 0) & (counts < 128 * 128)).sum(-1).int())
    assert torch.equal(made.to_dense()[:, 0] > 0, counts > 0)
    # What the keys' side says is what torch derives from the queries' side.
    names = [
        f"{full}{side}_{what}" for full in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices")
    ]
    derived = BlockMask.from_kv_blocks(*(getattr(made, name) for name in names if "kv" in name), BLOCK_SIZE=128)
    for name in names:
        mine, its = getattr(made, name), getattr(derived, name)
        if name.endswith("indices"):  # beyond the number of a row's blocks they mean nothing
            number = getattr(made, name.replace("indices", "num_blocks"))
            used = torch.arange(6) < number[..., None]
            mine, its = mine * used, its * used
        assert torch.equal(mine, its), name


def largest(run: object) -> int:
    """Elements of the largest tensor that an operator gives while `run` does its work."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Note(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.most = max(self.most, tensor.numel())
            return out

    with Note() as note:
        run()  # type: ignore[operator]
    return note.most


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_no_tensor_of_a_local_layer_grows_with_the_square(backend: Backend, packed: bool) -> None:
    """Forward and backward, beyond the length up to which the weights are kept."""

    def step(t: int) -> None:
        doc = (torch.arange(t) // 100)[None]
        q, k, v = qkv(t, t, b=1)
        mask = mask_for(doc, backend, 16) if packed else Band(16)
        attend(q, k, v, mask, backend=backend).sum().backward()

    assert largest(lambda: step(4800)) <= 2.05 * largest(lambda: step(2400))


def test_operations_of_a_local_layer_are_linear_in_the_length() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for t in (2048, 8192):
        with FlopCounterMode(display=False) as counter:
            attend(*qkv(t, t, b=1), Band(256), backend="grouped").sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] <= 4.25 * counts[0]
    # Two products in the forward pass, one again and four more in the backward pass; blocks of 256 queries.
    assert counts[1] <= 2 * 7 * 8192 * (256 + 255) * 4 * 16


def test_long_rows_that_see_everything_have_no_square_either(monkeypatch: pytest.MonkeyPatch) -> None:
    doc = documents(400)
    inputs = qkv(400, 400)
    reference = attend(*inputs, mask_for(doc, "grouped"), backend="grouped")
    gradients = torch.autograd.grad(reference.square().sum(), inputs)
    monkeypatch.setattr(attention, "LONG", 300)
    for backend in FAST:
        mask = mask_for(doc, backend)
        assert isinstance(mask, torch.Tensor)
        assert mask.shape == doc.shape
        y = attend(*inputs, mask, backend=backend)
        torch.testing.assert_close(y, reference, atol=1e-5, rtol=1e-4)
        for again, first in zip(torch.autograd.grad(y.square().sum(), inputs), gradients, strict=True):
            torch.testing.assert_close(again, first, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 16, 64, 512, 4096])
def test_a_block_is_bounded_by_the_window_and_by_memory(window: int | None) -> None:
    assert query_block(255, window) == 255
    assert query_block(256, window) == 64
    most = {None: 1024, 16: 256, 64: 256, 512: 256, 4096: 1024}[window]
    assert query_block(100_000, window) == most


# --- what a model sees -----------------------------------------------------------------------------------------------


def reached(model: LM, length: int, needle: int) -> list[int]:
    """Places whose logits change when the token at `needle` does."""
    x = tokens(1, length)
    changed = x.clone()
    changed[0, needle] = (x[0, needle] + 1) % 97
    differs = (logits(model, x) != logits(model, changed)).any(-1)[0]
    return differs.nonzero().flatten().tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_needle_is_seen_within_the_window_and_not_beyond(make, backend: Backend) -> None:  # type: ignore[no-untyped-def]
    """One layer: exactly the window. Several: information travels W - 1 tokens a layer. A global layer sees all."""
    for pattern, layers, farthest in (("L", 1, 7), ("L", 3, 21), ("LLLG", 4, 119), ("GL", 1, 119)):
        model = make(pattern=pattern, window=8, num_layers=layers)
        model.backend = backend
        assert reached(model, 120, 0) == list(range(farthest + 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_stays_inside_its_document_and_long_rows_equal_short_ones(make, backend: Backend) -> None:  # type: ignore[no-untyped-def]
    model = make(pattern="LG", window=20, context=400)
    model.backend = backend
    a, b = tokens(1, 260), (tokens(1, 37) + 1) % 97
    doc = torch.tensor([[0] * 260 + [1] * 37 + [-1] * 5])
    pos = torch.tensor([[*range(260), *range(37), *range(5)]])
    packed = logits(model, torch.cat([a, b, tokens(1, 5)], 1), doc, pos)
    torch.testing.assert_close(packed[:, :260], logits(model, a), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed[:, 260:297], logits(model, b), atol=1e-4, rtol=1e-4)
    assert packed.isfinite().all()


def test_a_window_as_long_as_the_row_is_the_plain_model_bit_for_bit(make) -> None:  # type: ignore[no-untyped-def]
    x, doc = tokens(2, 60), torch.tensor([[0] * 40 + [1] * 20, [0] * 60])
    plain, local = make(), make(pattern="LG", window=60)
    assert torch.equal(logits(plain, x, doc), logits(local, x, doc))
    assert torch.equal(logits(plain, x), logits(local, x))
    assert not torch.equal(logits(plain, x), logits(make(pattern="LG", window=59), x))


def test_training_gradients_equal_the_eager_reference(make) -> None:  # type: ignore[no-untyped-def]
    model = make(pattern="LG", window=24, context=512)
    x, doc = tokens(2, 300), documents(300)
    gradients = []
    for model.backend in ("eager", "sdpa", "grouped"):
        model.zero_grad()
        h = model(x, doc).h
        torch.nn.functional.cross_entropy(model.head("logits", h[doc >= 0]), x[doc >= 0]).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for fast in gradients[1:]:
        for name, reference in gradients[0].items():
            torch.testing.assert_close(fast[name], reference, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # torch.compile's own imports
def test_a_training_step_is_one_graph(make) -> None:  # type: ignore[no-untyped-def]
    small = make(pattern="L", num_layers=1, window=24, context=256)
    x, doc = tokens(2, 256), documents(256)
    graphs = []
    for run in (small, torch.compile(small, backend="aot_eager", fullgraph=True, dynamic=False)):
        small.zero_grad()
        h = run(x, doc).h
        h.square().sum().backward()
        graphs.append((h.detach(), small.blocks[0].attention.qkv.weight.grad.clone()))
    for plain, compiled in zip(*graphs, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-3)


def test_recomputing_gives_the_same_gradients(make) -> None:  # type: ignore[no-untyped-def]
    model, results = make(pattern="LG", window=10), []
    for model.recompute in (False, True):
        model.zero_grad()
        model(tokens(2, 40)).h.square().sum().backward()
        results.append(model.blocks[0].attention.qkv.weight.grad.clone())
    assert torch.equal(*results)


# --- the rolling cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["L", "LG"])
@pytest.mark.parametrize("window", [1, 2, 7, 16])
def test_cached_equals_uncached_in_any_chunks(make, pattern: str, window: int, backend: Backend) -> None:  # type: ignore[no-untyped-def]
    """Rows of different lengths with padding behind them; chunks shorter and longer than the window; single tokens."""
    model = make(pattern=pattern, window=window)
    model.backend = backend
    lengths, x = [50, 41, 9], tokens(3, 50)
    expected = [logits(model, x[row : row + 1, :n])[0] for row, n in enumerate(lengths)]
    for chunks in ([50], [3, 20, 27], [1, 1, 5, 5, 1, 30, 7], [2] * 25, [1] * 50):
        cache = Cache(model.config, 3, 64)
        start = 0
        for size in chunks:
            places = torch.arange(start, start + size)
            doc = torch.where(places < torch.tensor(lengths)[:, None], 0, -1)
            out = logits(model, x[:, start : start + size], doc, cache=cache)
            for row, n in enumerate(lengths):
                real = max(0, min(size, n - start))
                torch.testing.assert_close(out[row, :real], expected[row][start : start + real], atol=1e-4, rtol=1e-4)
            # A row that has ended stays where it is, whatever is padded behind it.
            start += size
        assert cache.lengths == lengths


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_short_row_goes_on_beside_one_that_has_left_its_window(make, backend: Backend) -> None:  # type: ignore[no-untyped-def]
    """What stands before the first token of the short row is nothing, whatever the columns held before."""
    model = make(pattern="L", window=8)
    model.backend = backend
    x, held = tokens(2, 40), [30, 3]
    cache = Cache(model.config, 2, 64)
    logits(model, tokens(2, 20).flip(1), cache=cache)
    cache.lengths = [0, 0]
    logits(model, x[:, :30], torch.where(torch.arange(30) < torch.tensor(held)[:, None], 0, -1), cache=cache)
    new = torch.stack([x[0, 30:36], x[1, 3:9]])
    out = logits(model, new, cache=cache)
    for row, n in enumerate(held):
        torch.testing.assert_close(out[row], logits(model, x[row : row + 1, : n + 6])[0, n:], atol=1e-4, rtol=1e-4)


def test_rows_move_and_are_freed_beyond_the_window(make) -> None:  # type: ignore[no-untyped-def]
    model = make(pattern="LG", window=8)
    x = tokens(2, 40)
    whole = logits(model, x)
    cache = Cache(model.config, 3, 64)
    view = cache.rows(1, 3)
    logits(model, x[:, :30], cache=view)
    cache.lengths[1:3] = view.lengths
    cache.move(2, 0)
    moved = logits(model, x[1:, 30:31], cache=(row := cache.rows(0, 1)))
    torch.testing.assert_close(moved[0, 0], whole[1, 30], atol=1e-4, rtol=1e-4)
    assert row.lengths == [31]
    cache.lengths[1] = 0
    fresh = (tokens(1, 5) + 7) % 97
    torch.testing.assert_close(logits(model, fresh, cache=cache.rows(1, 2)), logits(model, fresh), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pattern", ["G", "L", "LLLG"])
@pytest.mark.parametrize("length", [5, 12, 100])
def test_the_cache_has_the_bytes_that_the_config_states(pattern: str, length: int) -> None:
    config = validate(ModelConfig, {"preset": "demo", "pattern": pattern, "window": 12}, "here")
    cache = Cache(config, 3, length, dtype=torch.bfloat16)
    assert kv_cache_bytes(config, 3, length) == sum(t.numel() * 2 for t in (*cache.keys, *cache.values))
    if pattern == "L":
        assert kv_cache_bytes(config, 3, 100) == kv_cache_bytes(config, 3, 12) == kv_cache_bytes(config, 3, 10_000)


def test_decoding_with_windows_alone_needs_no_more_memory_than_the_window(make) -> None:  # type: ignore[no-untyped-def]
    """A cache of the window's size goes on to the end of the context; nothing that decoding makes is longer."""
    model = make(pattern="L", window=16)
    x = tokens(1, 128)
    expected = logits(model, x)
    cache = Cache(model.config, 1, 16)
    logits(model, x[:, :20], cache=cache)
    model.angles.cos, model.angles.sin = model.angles.cos[:128], model.angles.sin[:128]
    for place in range(20, 128):
        step = logits(model, x[:, place : place + 1], cache=cache)
        torch.testing.assert_close(step[0, 0], expected[0, place], atol=1e-4, rtol=1e-4)
    assert [k.shape[2] for k in cache.keys] == [16, 16]
    early, late = Cache(model.config, 1, 16), Cache(model.config, 1, 16)
    early.lengths, late.lengths = [16], [120]
    sizes = [largest(lambda c=c: logits(model, x[:, :1], cache=c)) for c in (early, late)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("pattern", ["L", "LLLG"])
def test_the_engine_gives_the_ids_of_the_model_without_cache(make, pattern: str) -> None:  # type: ignore[no-untyped-def]
    """Prompts shorter and longer than the window join and leave while the cache grows from both sides."""
    model = make(pattern=pattern, window=10, num_layers=4)
    prompts = [tokens(1, n)[0].tolist() for n in (3, 60, 10, 25, 11)]
    sampling = Sampling(max_new_tokens=30, temperature=0.0, stop_ids=())
    engine = Engine(model, max_batch=3)
    short = Sampling(max_new_tokens=2, temperature=0.0, stop_ids=())
    assert len(engine.run([(prompts[0], short)])[0]) == 2  # a small cache first
    answers = engine.run([(prompt, sampling) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for _ in range(30):
            ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
        assert answer == ids[len(prompt) :]


def test_the_engine_reads_a_long_prompt_in_pieces(make, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from oriole.infer import engine

    model = make(pattern="LG", window=10)
    requests = [(tokens(1, n)[0].tolist(), Sampling(max_new_tokens=9, temperature=0.0, stop_ids=())) for n in (61, 9)]
    whole = Engine(model, max_batch=2).run(requests)
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 20)
    assert Engine(model, max_batch=2).run(requests) == whole
    hook.remove()
    assert seen[:4] == [20, 20, 20, 1]
    assert max(seen) == 20


def test_a_cache_shorter_than_the_window_is_an_error_when_full(make) -> None:  # type: ignore[no-untyped-def]
    from oriole.errors import ModelError

    model = make(pattern="L", window=16)
    with pytest.raises(ModelError, match="9 tokens do not fit into a cache of 8"):
        model(tokens(1, 9), cache=Cache(model.config, 1, 8))
    with pytest.raises(ModelError, match="129 tokens exceed the model's context of 128"):
        model(tokens(1, 129), cache=Cache(model.config, 1, 200))


def test_only_a_cache_whose_layers_all_roll_holds_more_than_it_was_made_for(make) -> None:  # type: ignore[no-untyped-def]
    capacity = {p: Cache(make(pattern=p, window=8).config, 1, 20).capacity for p in ("G", "L", "LG")}
    assert (
        capacity == {"G": 20, "L": 128, "LG": 20} and Cache(make(pattern="L", window=24).config, 1, 20).capacity == 20
    )


def test_training_memory_counts_the_keys_that_a_window_leaves() -> None:
    plain = preset("demo")
    local = validate(ModelConfig, {"preset": "demo", "pattern": "L", "window": 64}, "here")
    sizes = [training_memory(c, 4, 512, whole_scores=True)["activations"] for c in (plain, local)]
    kept = [sum(n * m for n, m in blocks(512, w)) for w in (None, 64)]
    saved = 4 * plain.num_heads * 2 * plain.num_layers * (kept[0] - kept[1])
    assert math.isclose(sizes[0] - sizes[1], saved, rel_tol=0.12)


def blocks(t: int, window: int | None) -> list[tuple[int, int]]:
    """Queries and keys of each block of `grouped`."""
    out = []
    seen = attention._Seen(t, t, True, window)
    for start, end in seen.blocks():
        met = seen.met(start, end)
        out.append((end - start, met.stop - met.start))
    return out
