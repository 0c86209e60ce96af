"""What `model.inside` sees is what the model does: weights that make a layer's output, a lens that ends in logits."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from oriole.errors import ModelError
from oriole.model.gates import gated
from oriole.model.inside import entropy, lens, look, look_across, nearest, principal
from oriole.model.lm import LM
from oriole.model.seq2seq import START, Seq2Seq
from oriole.model.seq2seqconfig import Seq2SeqConfig

TOKENS = torch.tensor([5, 17, 42, 5, 90, 3, 61])


def test_attention_weights_sum_to_one_and_make_the_layers_output_from_its_values(model: LM) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    inside = look(model, TOKENS)
    model(TOKENS[None])
    for block, weights, (args, out) in zip(model.blocks, inside.stack.weights, seen[2:], strict=True):
        assert weights.shape == (4, 7, 7) and weights.triu(1).eq(0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 7))
        x, sight, _ = args
        _, _, v = block.attention.project(x, sight)
        mixed = (weights @ v[0].repeat_interleave(4 // v.shape[1], dim=0)).transpose(0, 1)[None]
        if block.attention.gate is not None:
            mixed = gated(mixed, x, block.attention.gate)
        made = block.attention.out(mixed.flatten(2))
        torch.testing.assert_close(made, out, rtol=1e-5, atol=1e-5)


def test_the_residual_stream_is_the_embedding_and_all_that_is_added(small: LM) -> None:
    inside = look(small, TOKENS)
    assert torch.equal(inside.stack.residual[0], small.embedding(TOKENS))
    torch.testing.assert_close(
        inside.stack.residual[-1],
        inside.stack.residual[0] + inside.stack.attended.sum(0) + inside.stack.transformed.sum(0),
    )
    block = small.blocks[1]
    torch.testing.assert_close(
        inside.stack.transformed[1], block.mlp(block.mlp_norm(inside.stack.residual[1] + inside.stack.attended[1]))
    )  # fmt: skip


def test_the_last_lens_is_the_models_logits_and_the_first_reads_the_embedding(small: LM) -> None:
    inside = look(small, TOKENS)
    assert torch.equal(inside.logits, small.head("logits", small(TOKENS[None]).h)[0])
    assert torch.equal(lens(small, inside.stack.residual[-1]), inside.logits)
    e = small.embedding.weight[TOKENS]
    normed = e / e.square().mean(-1, keepdim=True).add(small.config.norm_eps).sqrt() * small.norm.weight
    torch.testing.assert_close(lens(small, inside.stack.residual[0]), normed @ small.embedding.weight.T)


def test_looking_leaves_no_hook_behind(small: LM) -> None:
    before = small(TOKENS[None]).h
    look(small, TOKENS)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in small.modules())
    with pytest.raises(ModelError, match="129 tokens exceed the model's context of 128"):
        look(small, torch.zeros(129, dtype=torch.long))
    assert not any(m._forward_pre_hooks for m in small.modules())
    assert torch.equal(small(TOKENS[None]).h, before)


def test_a_layer_with_a_window_shows_no_weight_beyond_it(make) -> None:  # type: ignore[no-untyped-def]
    model = make(pattern="LG", window=3)
    inside = look(model, TOKENS)
    near, far = inside.stack.weights
    assert near.tril(-3).eq(0).all() and near[:, 6, 4].gt(0).all() and far.tril(-3).sum() > 0
    assert torch.equal(lens(model, inside.stack.residual[-1]), inside.logits)


def test_the_steps_of_a_latent_block_end_in_the_logits(make) -> None:  # type: ignore[no-untyped-def]
    model = make(reasoning={"steps": 3})
    inside = look(model, TOKENS)
    assert len(inside.steps) == 3 and len(inside.stack.residual) == 3
    assert torch.equal(model.head("logits", inside.steps[-1][None])[0], inside.logits)
    assert not torch.allclose(inside.steps[0], inside.steps[1])
    torch.testing.assert_close(
        inside.stack.residual[-1],
        inside.stack.residual[0] + inside.stack.attended.sum(0) + inside.stack.transformed.sum(0),
    )


@torch.no_grad()
@pytest.mark.parametrize("moe", [{}, {"balance": "bias", "shared_ffn_dim": 24}])
def test_the_chosen_experts_by_their_weights_make_the_mixtures_output(make, moe: dict[str, Any]) -> None:  # type: ignore[no-untyped-def]
    model = make(num_layers=3, pattern="GGeGe", moe={"experts": 6, "active": 3, "ffn_dim": 32} | moe)
    model.backend = "eager"  # the grouped products, which match it, are compiled anew for a length, which takes seconds
    inside = look(model, TOKENS)
    assert [c.layer for c in inside.chosen] == [1, 2]
    for layer, count, experts, weights, shared in inside.chosen:
        block = model.blocks[layer]
        x = block.mlp_norm(inside.stack.residual[layer] + inside.stack.attended[layer])
        gate_up = block.mlp.gate_up.weight.view(count, -1, x.shape[1])
        down = block.mlp.down.weight.view(count, x.shape[1], -1)
        made = torch.zeros_like(x)
        for t, (ids, shares) in enumerate(zip(experts.tolist(), weights.tolist(), strict=True)):
            assert len(set(ids)) == 3 and shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)
            for expert, share in zip(ids, shares, strict=True):
                gate, up = (gate_up[expert] @ x[t]).chunk(2)
                made[t] += share * (down[expert] @ (F.silu(gate) * up))
        assert shared is bool(moe)
        if shared:
            made += block.mlp.shared(x)
        torch.testing.assert_close(made, inside.stack.transformed[layer], rtol=1e-4, atol=1e-4)
    assert torch.equal(inside.logits, model.head("logits", model(TOKENS[None]).h)[0])


FORMS = {
    "rope": {},
    "relative": {"positions": "relative", "buckets": 8, "farthest": 12},
    "classic": {
        "norm": "layer", "norm_at": "post", "positions": "sinusoid", "activation": "relu", "biases": True,
        "qk_norm": False,
    },
}  # fmt: skip


def pair(form: str) -> Seq2Seq:
    torch.manual_seed(3)
    shape = {"vocab_size": 97, "dim": 32, "encoder_layers": 2, "decoder_layers": 3, "num_heads": 4, "ffn_dim": 48}
    model = Seq2Seq(Seq2SeqConfig.model_validate(shape | {"context": 32} | FORMS[form])).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_all_three_attentions_of_an_encoder_decoder_are_what_their_layers_add(form: str) -> None:
    model, target = pair(form), torch.tensor([START, 40, 7, 12])
    given: dict[str, tuple[Any, ...]] = {}
    for name, module in model.named_modules():
        if name.endswith((".attention", ".cross")):
            module.register_forward_hook(lambda _, args, out, name=name: given.update({name: args}))
    inside = look_across(model, TOKENS, target)
    encoder, decoder = inside.encoder, inside.stack
    assert encoder is not None and inside.crossed is not None
    parts = [(f"encoder.{n}.attention", w, encoder.attended[n]) for n, w in enumerate(encoder.weights)]
    parts += [(f"decoder.{n}.attention", w, decoder.attended[n]) for n, w in enumerate(decoder.weights)]
    parts += [(f"decoder.{n}.cross", w, inside.crossed[n]) for n, w in enumerate(inside.cross)]
    assert len(parts) == 2 + 3 + 3
    for name, weights, added in parts:
        seen, asking = 4 if name[:7] + name[9:] == "decoder.attention" else 7, 7 if name[0] == "e" else 4
        assert weights.shape == (4, asking, seen)
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, asking))
        _, (_, values), *_ = given[name]
        mixed = (weights @ values[0]).transpose(0, 1).flatten(1)
        torch.testing.assert_close(model.get_submodule(name).out(mixed), added, rtol=1e-4, atol=1e-4)
    assert all(w.triu(1).eq(0).all() for w in decoder.weights)
    assert all(w.triu(1).gt(0).any() for w in encoder.weights)  # the encoder looks both ways
    assert not any(m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_the_streams_of_an_encoder_decoder_are_made_of_their_branches_and_end_in_the_logits(form: str) -> None:
    model, target = pair(form), torch.tensor([START, 40, 7, 12])
    inside = look_across(model, TOKENS, target)
    stack, crossed = inside.stack, inside.crossed
    assert crossed is not None and inside.encoder is not None
    x = stack.residual[1]
    for norm, added in zip(("attention_norm", "cross_norm", "mlp_norm"), (stack.attended, crossed, stack.transformed),
                           strict=True):  # fmt: skip
        x = x + added[1]
        x = getattr(model.decoder[1], norm)(x) if form == "classic" else x
    torch.testing.assert_close(x, stack.residual[2])
    torch.testing.assert_close(model.encoder_norm(inside.encoder.residual[-1]), model.encode(TOKENS[None])[0])
    assert torch.equal(inside.logits, model.head("logits", model(target[None], source=TOKENS[None]).h)[0])
    assert torch.equal(lens(model, stack.residual[-1]), inside.logits)


def test_entropy_by_hand() -> None:
    assert entropy(torch.zeros(2, 8)).tolist() == pytest.approx([math.log(8)] * 2)
    half = torch.log(torch.tensor([0.5, 0.25, 0.25]))
    assert entropy(half).item() == pytest.approx(1.5 * math.log(2))
    assert entropy(torch.tensor([0.0, -math.inf, -math.inf])).item() == 0.0


def test_nearest_rows_by_cosine_are_those_of_a_plain_search() -> None:
    torch.manual_seed(1)
    table = torch.randn(30, 6)
    table[7] = 3 * table[4] + 0.01
    ids, cosines = nearest(table, torch.tensor([4, 9]), 5)
    assert ids[0, 0] == 7 and cosines[0, 0] > 0.99
    plain = torch.nn.functional.cosine_similarity(table[9][None], table)
    expected = [i for i in plain.argsort(descending=True).tolist() if i != 9][:5]
    assert ids[1].tolist() == expected
    torch.testing.assert_close(cosines[1], plain[expected])
    with pytest.raises(ModelError, match="30 neighbours of a token in a vocabulary of 30"):
        nearest(table, torch.tensor([4]), 30)


def test_the_principal_axes_hold_the_most_variance() -> None:
    torch.manual_seed(2)
    flat = torch.randn(40, 2) @ torch.tensor([[5.0, 0, 0, 0], [0, 0, 2.0, 0]]) + torch.tensor([1.0, 2, 3, 4])
    coordinates, shares = principal(flat)
    assert shares.sum().item() == pytest.approx(1.0)
    apart, between = (torch.linalg.norm(x[:, None] - x, dim=-1) for x in (coordinates, flat))
    torch.testing.assert_close(apart, between)
    assert coordinates[:, 0].var() > coordinates[:, 1].var()
    torch.testing.assert_close(principal(flat[torch.arange(39, -1, -1)])[0].flip(0), coordinates, rtol=1e-4, atol=1e-4)
