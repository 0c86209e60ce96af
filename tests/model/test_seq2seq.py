"""The encoder-decoder against PyTorch's and against a slow reference; cached, batched and packed like alone."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oriole.errors import ConfigError, ModelError
from oriole.model.costs import seq2seq_flops_per_token
from oriole.model.rope import frequencies, rope_table
from oriole.model.seq2seq import START, Seq2Seq
from oriole.model.seq2seqconfig import SEQ2SEQ_PRESETS, Seq2SeqConfig, seq2seq_shape
from oriole.model.seq2seqlayers import distance_bucket, sinusoids

SHAPE: dict[str, Any] = {
    "vocab_size": 40, "dim": 32, "encoder_layers": 2, "decoder_layers": 2, "num_heads": 4, "ffn_dim": 48, "context": 32,
}  # fmt: skip
CLASSIC: dict[str, Any] = {
    "norm": "layer", "norm_at": "post", "positions": "sinusoid", "activation": "relu", "biases": True, "qk_norm": False,
    "norm_eps": 1e-5,
}  # fmt: skip
FORMS = {"rope": {}, "relative": {"positions": "relative", "buckets": 8, "farthest": 12}, "classic": CLASSIC}


def build(form: str = "rope", seed: int = 0, **more: Any) -> Seq2Seq:
    torch.manual_seed(seed)
    config = Seq2SeqConfig.model_validate(SHAPE | FORMS[form] | more)
    model = Seq2Seq(config).eval()
    for parameter in model.parameters():  # larger than at the start, and no bias or norm at its neutral value
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


def ids(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(16, 40, (1, n), generator=generator) for n in lengths]


def logits(model: Seq2Seq, source: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        return model.head("logits", model(target, source=source).h)


# --- parity ----------------------------------------------------------------------------------------------------------


def as_torch(model: Seq2Seq) -> nn.Transformer:
    """torch.nn.Transformer with the weights of a model of the classic form."""
    c = model.config
    theirs = nn.Transformer(
        c.dim, c.num_heads, c.encoder_layers, c.decoder_layers, c.ffn_dim, 0.0, "relu", layer_norm_eps=c.norm_eps,
        batch_first=True,
    ).eval()  # fmt: skip
    theirs.encoder.norm = theirs.decoder.norm = None  # the paper has none behind the last sum's
    names = {"attention": "self_attn", "cross": "multihead_attn", "mlp": ""}
    for mine, other in ((model.encoder, theirs.encoder.layers), (model.decoder, theirs.decoder.layers)):
        for a, b in zip(mine, other, strict=True):
            norms = ["attention_norm", *(["cross_norm"] if a.cross else []), "mlp_norm"]
            state = {
                f"norm{i}.{key}": t for i, n in enumerate(norms, 1) for key, t in getattr(a, n).state_dict().items()
            }
            for n in [m for m in names if m != "mlp" and getattr(a, m)]:
                heads = getattr(a, n)
                state[f"{names[n]}.in_proj_weight"] = torch.cat([heads.q.weight, heads.kv.weight])
                state[f"{names[n]}.in_proj_bias"] = torch.cat([heads.q.bias, heads.kv.bias])
                state |= {f"{names[n]}.out_proj.{key}": t for key, t in heads.out.state_dict().items()}
            state |= {f"linear1.{key}": t for key, t in a.mlp.up.state_dict().items()}
            state |= {f"linear2.{key}": t for key, t in a.mlp.down.state_dict().items()}
            b.load_state_dict(state)
    return theirs


def test_the_classic_form_is_torch_nn_transformer_with_the_same_weights() -> None:
    model = build("classic")
    source, target = ids(9, 7)
    theirs = as_torch(model)
    table = sinusoids(*rope_table(frequencies(32, 10_000.0), 32))
    embed = lambda x: model.embedding(x) * math.sqrt(32) + table[: x.shape[1]]  # noqa: E731
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    with torch.no_grad():
        expected = theirs(embed(source), embed(target), tgt_mask=causal)
    torch.testing.assert_close(model(target, source=source).h, expected, atol=1e-5, rtol=1e-5)


def slow(model: Seq2Seq, source: Tensor, target: Tensor) -> Tensor:
    """The modern form for one pair, written out in fp32 without `attend`, blocks, masks or fused kernels: (T, V)."""
    c, w = model.config, dict(model.named_parameters())

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[name]

    def turn(x: Tensor) -> Tensor:  # (n, hd)
        half = c.head_dim // 2
        out = torch.empty_like(x)
        for pos in range(len(x)):
            for i in range(half):
                angle = pos * c.rope_theta ** (-2 * i / c.head_dim)
                a, b = x[pos, i], x[pos, half + i]
                out[pos, i] = a * math.cos(angle) - b * math.sin(angle)
                out[pos, half + i] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def look(at: str, x: Tensor, memory: Tensor, bias: str | None, causal: bool, rotary: bool) -> Tensor:
        heads = []
        k_all, v_all = (memory @ w[f"{at}.kv.weight"].T).chunk(2, -1)
        for h in range(c.num_heads):
            span = slice(h * c.head_dim, (h + 1) * c.head_dim)
            q = rms((x @ w[f"{at}.q.weight"].T)[:, span], f"{at}.q_norm.weight")
            k = rms(k_all[:, span], f"{at}.k_norm.weight")
            if rotary:
                q, k = turn(q), turn(k)
            rows = []
            for i in range(len(x)):
                seen = i + 1 if causal else len(memory)
                scores = [float(q[i] @ k[j]) / math.sqrt(c.head_dim) for j in range(seen)]
                if bias is not None:
                    bucket = [t5_bucket(j - i, c.buckets, c.farthest, causal) for j in range(seen)]
                    scores = [s + float(w[bias][b, h]) for s, b in zip(scores, bucket, strict=True)]
                rows.append(torch.tensor(scores).softmax(0) @ v_all[:seen, span])
            heads.append(torch.stack(rows))
        return torch.cat(heads, -1) @ w[f"{at}.out.weight"].T

    def stack(name: str, x: Tensor, memory: Tensor | None) -> Tensor:
        rotary, bias = c.positions == "rope", f"{name}_bias.weight" if c.positions == "relative" else None
        for i in range(c.encoder_layers if name == "encoder" else c.decoder_layers):
            at = f"{name}.{i}"
            y = rms(x, f"{at}.attention_norm.weight")
            x = x + look(f"{at}.attention", y, y, bias, name == "decoder", rotary)
            if memory is not None:
                x = x + look(f"{at}.cross", rms(x, f"{at}.cross_norm.weight"), memory, None, False, False)
            gate, up = (rms(x, f"{at}.mlp_norm.weight") @ w[f"{at}.mlp.up.weight"].T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ w[f"{at}.mlp.down.weight"].T
        return rms(x, f"{name}_norm.weight")

    with torch.no_grad():
        memory = stack("encoder", model.embedding(source[0]), None)
        return stack("decoder", model.embedding(target[0]), memory) @ model.embedding.weight.T


def t5_bucket(distance: int, buckets: int, farthest: int, causal: bool) -> int:
    """T5's rule, as its paper describes it: half of the buckets exact, the rest logarithmic."""
    first = 0
    if not causal:
        buckets //= 2
        first = buckets if distance > 0 else 0
        distance = -abs(distance)
    near = max(0, -distance)
    exact = buckets // 2
    if near < exact:
        return first + near
    return first + min(
        buckets - 1, exact + int(math.log(near / exact) / math.log(farthest / exact) * (buckets - exact))
    )


@pytest.mark.parametrize("form", ["rope", "relative"])
def test_the_modern_form_is_the_slow_reference(form: str) -> None:
    model = build(form)
    source, target = ids(14, 11)
    torch.testing.assert_close(logits(model, source, target)[0], slow(model, source, target), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_distances_fall_into_the_buckets_of_t5(causal: bool) -> None:
    distance = torch.arange(-300, 301)
    made = distance_bucket(distance, 32, 128, causal=causal).tolist()
    assert made == [t5_bucket(d, 32, 128, causal) for d in distance.tolist()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["sdpa", "grouped"])
def test_every_backend_gives_what_eager_gives(form: str, backend: Any) -> None:
    model = build(form)
    source, target = ids(12, 9)
    model.backend = "eager"
    expected = logits(model, source, target)
    model.backend = backend
    torch.testing.assert_close(logits(model, source, target), expected, atol=1e-5, rtol=1e-5)


def test_the_encoder_sees_both_directions_and_the_decoder_only_the_past() -> None:
    model = build()
    source, target = ids(8, 6)
    other = source.clone()
    other[0, -1] = 20 if source[0, -1] != 20 else 21
    assert (model.encode(source)[0, 0] - model.encode(other)[0, 0]).abs().max() > 1e-3
    later = target.clone()
    later[0, -1] = 20 if target[0, -1] != 20 else 21
    torch.testing.assert_close(logits(model, source, target)[:, :-1], logits(model, source, later)[:, :-1])


# --- what the seeds got wrong ----------------------------------------------------------------------------------------


def test_sine_and_cosine_of_a_pair_have_one_frequency_and_moving_is_a_rotation() -> None:
    table = sinusoids(*rope_table(frequencies(16, 10_000.0), 50))
    sine, cosine = table[:, 0::2], table[:, 1::2]
    torch.testing.assert_close(sine**2 + cosine**2, torch.ones_like(sine))
    frequency = 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(table[1, 0::2], frequency.sin())
    turned = sine[:-7] * (7 * frequency).cos() + cosine[:-7] * (7 * frequency).sin()
    torch.testing.assert_close(sine[7:], turned, atol=1e-5, rtol=1e-5)


def test_each_branch_has_a_norm_of_its_own() -> None:
    model = build("classic")
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len({id(m.weight) for m in norms}) == len(norms) == 2 * 2 + 2 * 3


def test_positions_are_no_weights_and_stay_exact_when_the_model_is_cast() -> None:
    model = build("classic").to(torch.bfloat16)
    assert not any("angles" in name for name in model.state_dict()) and model.angles.cos.dtype == torch.float32


# --- cached, batched, packed, padded ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_cached_equals_uncached_and_batched_equals_single(form: str) -> None:
    model = build(form)
    sources, targets = ids(5, 11, 8), ids(6, 6, 6, seed=1)
    lengths = torch.tensor([s.shape[1] for s in sources])
    padded = torch.cat([F.pad(s, (0, 11 - s.shape[1]), value=33) for s in sources])
    cache = model.new_cache(3, 16)
    with torch.no_grad():
        steps = [model.prefill(padded, lengths, cache).h[:, -1]]
        steps += [model(torch.cat([t[:, i : i + 1] for t in targets]), cache=cache).h[:, -1] for i in range(6)]
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        whole = torch.cat([torch.full((1, 1), START), target], 1)
        with torch.no_grad():
            expected = model(whole, source=source).h[0]
        torch.testing.assert_close(torch.stack([s[row] for s in steps]), expected, atol=2e-5, rtol=2e-5)


def test_rows_of_different_length_go_on_together_and_move() -> None:
    model = build("relative")
    sources, targets = ids(4, 7), ids(5, 5, seed=2)
    with torch.no_grad():
        cache = model.new_cache(2, 12)
        for row in (0, 1):
            view = cache.rows(row, row + 1)
            model.prefill(sources[row], torch.tensor([sources[row].shape[1]]), view)
            cache.keep(row, view)
        first = cache.rows(0, 1)
        model(targets[0][:, :2], cache=first)
        cache.keep(0, first)
        both = model(torch.stack([targets[0][0, 2:3], targets[1][0, :1]]), cache=cache).h
        cache.move(1, 0)
        moved = cache.rows(0, 1)
        after = model(targets[1][:, 1:2], cache=moved).h
        for got, source, target, n in ((both[0], sources[0], targets[0], 3), (both[1], sources[1], targets[1], 1),
                                       (after[0], sources[1], targets[1], 2)):  # fmt: skip
            whole = torch.cat([torch.full((1, 1), START), target[:, :n]], 1)
            torch.testing.assert_close(got, model(whole, source=source).h[0, -1:], atol=2e-5, rtol=2e-5)


def packed(model: Seq2Seq, sources: list[Tensor], targets: list[Tensor], room: tuple[int, int]) -> Tensor:
    """States of the targets' tokens in one row with all pairs, padded at the end."""

    def row(parts: list[Tensor], length: int) -> tuple[Tensor, Tensor, Tensor]:
        tokens, doc = torch.full((1, length), 17), torch.full((1, length), -1)
        pos, at = torch.zeros(1, length, dtype=torch.int64), 0
        for number, part in enumerate(parts):
            n = part.shape[1]
            tokens[:, at : at + n], doc[:, at : at + n], pos[:, at : at + n] = part, number, torch.arange(n)
            at += n
        return tokens, doc, pos

    (source, source_doc, source_pos), (target, doc, pos) = row(sources, room[0]), row(targets, room[1])
    out: Tensor = model(target, doc, pos, source=source, source_doc=source_doc, source_pos=source_pos).h
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["eager", "sdpa", "grouped"])
@pytest.mark.parametrize("room", [(24, 16), (18, 15)])  # with padding, and with none
def test_pairs_packed_in_a_row_do_not_see_each_other(form: str, backend: Any, room: tuple[int, int]) -> None:
    model = build(form)
    model.backend = backend
    sources, targets = ids(7, 3, 8), ids(4, 6, 5, seed=3)
    with torch.no_grad():
        together = packed(model, sources, targets, room)
        apart = torch.cat([model(t, source=s).h for s, t in zip(sources, targets, strict=True)], 1)
    torch.testing.assert_close(together[:, :15], apart, atol=2e-5, rtol=2e-5)
    assert together.isfinite().all()


def test_long_rows_whose_attention_is_cut_into_blocks_are_the_same() -> None:
    model = build(context=512)
    sources, targets = ids(170, 150), ids(140, 160, seed=3)
    with torch.no_grad():
        together = packed(model, sources, targets, (400, 300))
        model.backend = "eager"
        torch.testing.assert_close(together, packed(model, sources, targets, (400, 300)), atol=5e-5, rtol=5e-5)


def test_gradients_in_blocks_are_those_of_eager() -> None:
    grads = {}
    for backend in ("eager", "grouped"):
        model = build(context=512)
        model.backend = backend  # type: ignore[assignment]
        packed(model, ids(170, 150), ids(140, 160, seed=3), (320, 300)).square().sum().backward()
        grads[backend] = {n: p.grad for n, p in model.named_parameters()}
    for name, grad in grads["eager"].items():
        torch.testing.assert_close(
            grads["grouped"][name], grad, atol=1e-2, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_every_parameter_and_recomputing_gives_the_same_and_keeps_less(form: str) -> None:
    grads, kept = [], [0, 0]
    for recompute in (False, True):

        def note(tensor: torch.Tensor, at: int = int(recompute)) -> torch.Tensor:
            kept[at] += tensor.numel()
            return tensor

        model = build(form).train()
        model.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = packed(model, ids(7, 3), ids(4, 6, seed=3), (12, 10))
        model.head("logits", out[:, :10]).logsumexp(-1).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert kept[1] < kept[0] / 2
    for name, grad in grads[0].items():
        assert grad is not None and grad.abs().max() > 0, name
        torch.testing.assert_close(grads[1][name], grad)


def test_dropout_acts_on_embeddings_and_branches_in_training_only() -> None:
    model = build("classic")
    source, target = ids(6, 5)
    plain = model(target, source=source).h
    model.set_dropout(0.3)
    torch.testing.assert_close(model(target, source=source).h, plain)
    model.train()
    assert (model(target, source=source).h - plain).abs().max() > 0.1
    assert (model.encode(source) != model.encode(source)).any()
    model.dropout = 0.0  # the branches alone
    assert (model.encode(source) != model.encode(source)).any()
    model.set_dropout(0.0)
    model.dropout = 0.3  # the embeddings alone
    assert (model.encode(source) != model.encode(source)).any()


@pytest.mark.parametrize("form", FORMS)
def test_padding_of_sources_is_not_seen_where_each_row_is_one_pair(form: str) -> None:
    model = build(form)
    (source, target, other) = ids(5, 4, 9)
    padded = torch.cat([F.pad(source, (0, 4), value=33), other])
    doc = torch.tensor([[0] * 5 + [-1] * 4, [0] * 9])
    both = model(torch.cat([target, target]), source=padded, source_doc=doc).h
    torch.testing.assert_close(both[0], model(target, source=source).h[0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(both[1], model(target, source=other).h[0], atol=2e-5, rtol=2e-5)


def test_weights_begin_as_each_form_has_them() -> None:
    torch.manual_seed(0)
    shape = SHAPE | {"dim": 128, "ffn_dim": 256, "vocab_size": 400}
    classic, modern = (Seq2Seq(Seq2SeqConfig.model_validate(shape | more)) for more in (CLASSIC, {}))
    layer = classic.decoder[0]
    assert float(classic.embedding.weight.detach().std()) == pytest.approx(128**-0.5, rel=0.02)
    for weight, fan in ((layer.attention.q.weight, 256), (layer.cross.kv.weight, 256), (layer.mlp.up.weight, 384)):
        bound = (6 / fan) ** 0.5  # Glorot & Bengio 2010; keys and values are two matrices
        assert 0.98 * bound < float(weight.detach().abs().max()) <= bound
    assert not layer.mlp.up.bias.any() and bool((layer.mlp_norm.weight == 1).all())
    layer = modern.decoder[0]
    small = 0.02 / (2 * 2 + 3 * 2) ** 0.5  # so many branches write into the residual streams
    for weight, std in (
        (layer.attention.q.weight, 0.02),
        (layer.cross.out.weight, small),
        (layer.mlp.down.weight, small),
    ):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.03)


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("more", [{}, {"biases": True, "activation": "relu"}, {"norm_at": "pre", "norm": "layer"}])
def test_num_params_counts_the_tensors(form: str, more: dict[str, Any]) -> None:
    model = Seq2Seq(Seq2SeqConfig.model_validate(SHAPE | FORMS[form] | more))
    assert model.config.num_params() == sum(p.numel() for p in model.parameters())
    fused = model.fused_rows()
    assert all(sum(rows) == len(model.get_parameter(name)) for name, rows in fused.items()) and fused


def test_flops_are_six_a_weight_and_position_plus_attention() -> None:
    config = Seq2SeqConfig.model_validate(SHAPE)
    weights = config.num_params()  # with targets as long as sources every weight meets one position
    attention = 12 * 32 * (2 * (10 / 2 + 10) + 2 * 10)
    assert seq2seq_flops_per_token(config, 10, 10) == pytest.approx(6 * weights + attention)
    assert seq2seq_flops_per_token(config, 10, 20) > seq2seq_flops_per_token(config, 10, 10)


def _wrong(**more: Any) -> Callable[[], object]:
    return lambda: seq2seq_shape(SHAPE | more)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: seq2seq_shape("clasic"), "no encoder-decoder preset 'clasic'; did you mean 'classic'?"),
        (_wrong(num_heads=5), "dim=32 is not a multiple of num_heads=5"),
        (_wrong(num_heads=32), "must be even, because RoPE rotates pairs"),
        (_wrong(dim=33, num_heads=3, positions="sinusoid"), "each frequency has a sine and a cosine"),
        (_wrong(buckets=32, farthest=16), "less than twice farthest=16"),
        (_wrong(layers=3), "unknown key 'layers'"),
    ],
)
def test_a_shape_that_cannot_be_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        make()


def test_a_preset_may_be_changed_key_by_key() -> None:
    assert seq2seq_shape({"preset": "tfchat", "context": 64}) == SEQ2SEQ_PRESETS["tfchat"].model_copy(
        update={"context": 64}
    )


def test_what_does_not_fit_is_refused() -> None:
    model = build()
    (source, target) = ids(33, 3)
    with pytest.raises(ModelError, match="33 tokens exceed the model's context of 32"):
        model.encode(source)
    with pytest.raises(ModelError, match="needs a source"):
        model(target)
    with pytest.raises(ModelError, match="33 tokens do not fit into a cache of 16"):
        model.prefill(source, torch.tensor([33]), model.new_cache(1, 16))
    with pytest.raises(ModelError, match="no reward head"):
        model.head("reward", torch.zeros(1, 32))
