"""What `model.inside` sees is what the model does: weights that make the layer's output, a lens that ends in logits."""

import math

import pytest
import torch

from oriole.errors import ModelError
from oriole.model.gates import gated
from oriole.model.inside import entropy, lens, look, nearest, principal
from oriole.model.lm import LM

TOKENS = torch.tensor([5, 17, 42, 5, 90, 3, 61])


def test_attention_weights_sum_to_one_and_make_the_layers_output_from_its_values(model: LM) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    inside = look(model, TOKENS)
    model(TOKENS[None])
    for block, weights, (args, out) in zip(model.blocks, inside.weights, seen[2:], strict=True):
        assert weights.shape == (4, 7, 7) and weights.triu(1).eq(0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 7))
        x, cos, sin, _, _, _, keys_seen = args
        _, _, v = block.attention.project(x, cos, sin, keys_seen)
        mixed = (weights @ v[0].repeat_interleave(4 // v.shape[1], dim=0)).transpose(0, 1)[None]
        if block.attention.gate is not None:
            mixed = gated(mixed, x, block.attention.gate)
        made = block.attention.out(mixed.flatten(2))
        torch.testing.assert_close(made, out, rtol=1e-5, atol=1e-5)


def test_the_residual_stream_is_the_embedding_and_all_that_is_added(small: LM) -> None:
    inside = look(small, TOKENS)
    assert torch.equal(inside.residual[0], small.embedding(TOKENS))
    torch.testing.assert_close(
        inside.residual[-1], inside.residual[0] + inside.attended.sum(0) + inside.transformed.sum(0)
    )
    block = small.blocks[1]
    torch.testing.assert_close(
        inside.transformed[1], block.mlp(block.mlp_norm(inside.residual[1] + inside.attended[1]))
    )  # fmt: skip


def test_the_last_lens_is_the_models_logits_and_the_first_reads_the_embedding(small: LM) -> None:
    inside = look(small, TOKENS)
    assert torch.equal(inside.logits, small.head("logits", small(TOKENS[None]).h)[0])
    assert torch.equal(lens(small, inside.residual[-1]), inside.logits)
    e = small.embedding.weight[TOKENS]
    normed = e / e.square().mean(-1, keepdim=True).add(small.config.norm_eps).sqrt() * small.norm.weight
    torch.testing.assert_close(lens(small, inside.residual[0]), normed @ small.embedding.weight.T)


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
    near, far = inside.weights
    assert near.tril(-3).eq(0).all() and near[:, 6, 4].gt(0).all() and far.tril(-3).sum() > 0
    assert torch.equal(lens(model, inside.residual[-1]), inside.logits)


def test_the_steps_of_a_latent_block_end_in_the_logits(make) -> None:  # type: ignore[no-untyped-def]
    model = make(reasoning={"steps": 3})
    inside = look(model, TOKENS)
    assert len(inside.steps) == 3 and len(inside.residual) == 3
    assert torch.equal(model.head("logits", inside.steps[-1][None])[0], inside.logits)
    assert not torch.allclose(inside.steps[0], inside.steps[1])
    torch.testing.assert_close(
        inside.residual[-1], inside.residual[0] + inside.attended.sum(0) + inside.transformed.sum(0)
    )


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
