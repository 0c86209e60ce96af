"""Gates, temperatures, residual scales: what their papers say, one parameter each, and nothing else is touched.

That fast backends, cache, packing and padding agree with them on is tested in test_lm.py, whose model has them too.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oriole.errors import ModelError
from oriole.model import gates
from oriole.model.attention import document_mask
from oriole.model.config import LoraConfig, ModelConfig
from oriole.model.costs import flops_per_token, training_memory
from oriole.model.folder import load_model, read_config, save_model, to_hf
from oriole.model.layers import Block
from oriole.model.lm import LM, Cache
from oriole.model.lora import attach, merge
from oriole.model.rope import rotate
from oriole.train.groups import groups_of
from oriole.train.optim import OptimConfig, Optimizer

LETTERS = "gctsrz"
MIXED = "GctrLgsz"
TOKENS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(3))
DOC = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [-1] * 3])
POS = torch.tensor([[*range(5), *range(7)], [*range(9), *range(3)]])


def shape(pattern: str = "G", **changes: Any) -> ModelConfig:
    table = {"vocab_size": 97, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    return ModelConfig.model_validate(table | {"ffn_dim": 48, "context": 64, "pattern": pattern} | changes)


def fresh(pattern: str = "G", **changes: Any) -> LM:
    torch.manual_seed(0)
    return LM(shape(pattern, **changes)).eval()


def added(model: LM) -> dict[str, torch.nn.Parameter]:
    """The parameters that the plain model does not have."""
    plain = dict(LM(shape()).named_parameters())
    return {name: p for name, p in model.named_parameters() if name not in plain}


def logits(model: LM, *args: Tensor, **more: Any) -> Tensor:
    with torch.inference_mode():
        return model.head("logits", model(*args, **more).h)


# --- what they compute -----------------------------------------------------------------------------------------------


def by_the_papers(model: LM) -> Tensor:
    """Hidden states (T, D) of the first row of TOKENS, query by query and head by head, in fp64; the pattern is MIXED,
    the window 4."""
    c, h = model.config, model.embedding.weight[TOKENS[0]]
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        letters, window, a = ("ctr", "gsz")[i], (12, 4)[i], block.attention
        x = block.attention_norm(h)
        rows = a.qkv(x).view(12, -1, c.head_dim)
        q, k, v = rows.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        turn = (model.angles.cos.double()[POS[0]][:, None], model.angles.sin.double()[POS[0]][:, None])
        # The rotation works in fp32 by itself: that is the precision of this whole reference.
        q, k = (rotate(n(y)[None], *(t[None] for t in turn))[0] for n, y in ((a.q_norm, q), (a.k_norm, k)))
        y = torch.zeros(12, c.num_heads, c.head_dim, dtype=h.dtype)
        for t in range(12):
            first = max(0 if t < 5 else 5, t - window + 1)
            for head in range(c.num_heads):
                scores = k[first : t + 1, head // 2] @ q[t, head] / math.sqrt(c.head_dim)
                if "t" in letters:
                    scores = scores * 4 ** math.tanh(float(a.temperature[head] @ x[t]))  # type: ignore[index]
                if "s" in letters:
                    scores = scores * float(a.temperature[head]) * math.log(t - first + 1)  # type: ignore[index]
                y[t, head] = scores.softmax(0) @ v[first : t + 1, head // 2]
                if "g" in letters:
                    y[t, head] *= torch.sigmoid(a.gate[head] @ x[t])  # type: ignore[index]
                if "c" in letters:
                    y[t, head] *= torch.sigmoid(a.gate.view(4, 8, 32)[head] @ x[t])  # type: ignore[union-attr]
        one, other = block.attention_scale, block.mlp_scale
        assert one is not None and other is not None
        h = h + one * a.out(y.flatten(1))
        h = h + other * block.mlp(block.mlp_norm(h))
    return model.norm(h)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "grouped"])
@torch.no_grad()
def test_a_forward_pass_is_that_of_the_formulas(backend: Any) -> None:
    model = fresh(MIXED, window=4)
    model.backend = backend
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    h = model(TOKENS, DOC, POS).h
    expected = by_the_papers(model.double())
    torch.testing.assert_close(h[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_keys_are_counted_in_the_document_and_in_the_window() -> None:
    doc = torch.tensor([[0, 0, 0, 1, 1, -1, -1], [-1, -1, 0, 0, 0, 0, 2]])
    assert gates.keys_seen(doc).tolist() == [[1, 2, 3, 1, 2, 1, 2], [1, 2, 1, 2, 3, 4, 1]]
    assert torch.equal(gates.keys_seen(doc), document_mask(doc).sum(-1)[:, 0])
    s = torch.tensor([0.5, 2.0])
    factor = gates.length_temperature(gates.keys_seen(doc), s, 3)
    assert factor.shape == (2, 7, 2, 1)
    assert factor[1, 5].flatten().tolist() == pytest.approx([0.5 * math.log(3), 2 * math.log(3)])
    assert factor[0, 1].flatten().tolist() == pytest.approx([0.5 * math.log(2), 2 * math.log(2)])


def test_where_positions_start_changes_no_temperature() -> None:
    """RoPE knows differences only, and neither does the number of keys depend on where they are counted from."""
    model = fresh("Gs")
    for name, parameter in added(model).items():
        assert "temperature" in name
        parameter.data.mul_(3.0)
    torch.testing.assert_close(logits(model, TOKENS, DOC, POS + 20), logits(model, TOKENS, DOC, POS))
    torch.testing.assert_close(logits(model, TOKENS, None, POS[:1] * 0), logits(model, TOKENS, DOC * 0, POS[:1] * 0))


def test_a_temperature_from_the_query_stays_within_its_bounds() -> None:
    x = torch.randn(1, 50, 32) * 1e4
    factor = gates.query_temperature(x, torch.randn(4, 32))
    assert factor.min() >= 1 / 4 - 1e-6 and factor.max() <= 4 + 1e-5
    assert torch.equal(gates.query_temperature(x, torch.zeros(4, 32)), torch.ones(1, 50, 4, 1))


# --- where they begin ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", LETTERS)
def test_an_option_draws_no_random_numbers_and_leaves_all_other_weights_as_they_are(letter: str) -> None:
    plain = fresh()
    state = torch.get_rng_state()
    model = fresh(f"G{letter}")
    assert torch.equal(torch.get_rng_state(), state)
    new = added(model)
    assert new
    for name, parameter in model.named_parameters():
        assert name in new or torch.equal(parameter, plain.get_parameter(name))


def test_what_an_untrained_option_does() -> None:
    plain = fresh()
    expected, stream = logits(plain, TOKENS), plain.embedding(TOKENS)
    assert torch.equal(logits(fresh("Gt"), TOKENS), expected)  # a factor of 1
    assert torch.equal(fresh("Gz")(TOKENS).h, plain.norm(stream))  # no block adds anything
    x = torch.randint(0, 97, (1, 64))
    scaled = [model(x).h[0, -1] for model in (fresh("Gs", num_layers=1), fresh(num_layers=1))]
    torch.testing.assert_close(*scaled)  # 64 keys of a context of 64: s log n = 1
    windowed = [model(x[:, :8]).h[0, -1] for model in (fresh("Ls", num_layers=1, window=8), fresh(num_layers=1))]
    torch.testing.assert_close(*windowed)  # 8 keys of a window of 8
    half, whole = fresh("Gg", num_layers=1), fresh(num_layers=1)
    for model in (half, whole):
        torch.nn.init.zeros_(model.blocks[0].mlp.down.weight)  # type: ignore[union-attr,arg-type]
    whole.blocks[0].attention.out.weight.data /= 2  # type: ignore[union-attr]
    torch.testing.assert_close(half(TOKENS).h, whole(TOKENS).h)
    tenth = fresh("Gr", num_layers=1).blocks[0]
    assert torch.equal(tenth.attention_scale, torch.full((32,), 0.1))  # type: ignore[arg-type]


@pytest.mark.parametrize("letter", LETTERS)
def test_every_parameter_has_a_gradient_from_the_first_step_on(letter: str) -> None:
    model = fresh(f"G{letter}").train()
    model.head("logits", model(TOKENS, DOC, POS).h).square().sum().backward()
    new = added(model)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in new.values())
    assert all(p.grad is not None for p in model.parameters())
    # Every optimizer takes them, and an update of ReZero's untouched branches (gradients of zero) is finite.
    for muon in (False, True):
        groups = groups_of(model, muon=muon)
        assert {n for n, p in new.items() if p.dim() == 2} <= {*groups.muon, *groups.decayed}
        assert {n for n, p in new.items() if p.dim() == 1} <= {*groups.plain}
    before = {name: p.detach().clone() for name, p in new.items()}
    optimizer = Optimizer(model, OptimConfig(kind="normuon", warmup=0), 10)
    _, skipped = optimizer.step(0, torch.zeros(()))
    assert not skipped and all(p.isfinite().all() for p in model.parameters())
    assert all(not torch.equal(p, before[name]) for name, p in new.items())


# --- what they cost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["G", "Gg", "Gc", "Gt", "Gs", "Gr", "Gz", MIXED, "GGcz"])
def test_parameters_and_flops_are_those_of_the_tensors(pattern: str) -> None:
    model = fresh(pattern, num_layers=3)
    count = sum(p.numel() for p in model.parameters())
    assert model.config.num_params() == count
    more = count - shape(num_layers=3).num_params()
    assert flops_per_token(model.config, 64) - flops_per_token(shape(num_layers=3), 64) == 6 * more
    attach(model, lora := LoraConfig(rank=2))
    assert lora.num_params(model.config) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("letter", LETTERS)
def test_what_autograd_keeps_of_an_option_is_in_the_estimate(letter: str) -> None:
    """Measured on a block without dropout, in fp32; to a tenth, since small things are left out."""

    def kept(pattern: str) -> int:
        model = fresh(pattern, num_layers=1, dim=64, head_dim=24)
        owned = {p.data_ptr() for p in model.parameters()}
        found: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in owned:
                found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            h = model(torch.zeros(4, 64, dtype=torch.long)).h  # holds all that was kept, so that no address comes twice
        assert h.requires_grad
        return sum(found.values())

    def estimated(pattern: str) -> int:
        table = training_memory(shape(pattern, num_layers=1, dim=64, head_dim=24), 4, 64, 4)
        return table["activations"]

    measured = kept(f"G{letter}") - kept("G")
    assert estimated(f"G{letter}") - estimated("G") == pytest.approx(measured, rel=0.15)


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_a_model_with_options_is_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    model = fresh(MIXED)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    save_model(model, tmp_path / "a", chat=False)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["model_type"] == "oriole" and config["oriole"] == {"pattern": MIXED, "window": 512}
    assert read_config(tmp_path / "a") == model.config
    loaded = load_model(tmp_path / "a")
    assert torch.equal(logits(loaded, TOKENS), logits(model, TOKENS))
    save_model(loaded, tmp_path / "b", chat=False)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    names = set(to_hf(model)) - set(to_hf(fresh()))
    assert names == {f"model.{name.replace('blocks', 'layers')}" for name in added(model)}

    from transformers import AutoConfig

    with pytest.raises(ValueError, match="oriole"):
        AutoConfig.from_pretrained(tmp_path / "a")


def test_weights_of_another_pattern_are_refused_by_the_name_of_the_tensor(tmp_path: Path) -> None:
    save_model(fresh("Gg"), tmp_path, chat=False)
    config = json.loads((tmp_path / "config.json").read_text())
    for pattern, message in (("Gz", "attention_scale is missing"), ("Gc", "gate.*shape"), ("G", "unexpected.*gate")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"oriole": {"pattern": pattern}}))
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path)


def test_lora_leaves_what_an_option_adds_as_it_is() -> None:
    model = fresh(MIXED)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = logits(model, TOKENS)
    attach(model, LoraConfig(rank=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".adapters." in name for name in trained)
    assert torch.equal(logits(model, TOKENS), expected)
    merge(model)
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in before.items()}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_takes_whole_heads_of_a_row_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    y = gates.drop_heads(torch.ones(200, 50, 3, 4), 0.2)
    per_head = y.flatten(2)
    assert torch.equal(per_head.min(-1).values, per_head.max(-1).values)
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert float(y.mean()) == pytest.approx(1.0, abs=0.02)
    assert (per_head.amax(-1).var(1) > 0).all() and (per_head.amax(-1).var(0) > 0).all()  # each head by itself


def test_heads_are_dropped_while_training_only() -> None:
    model = fresh()
    plain = logits(model, TOKENS)
    model.set_dropout(0.0, heads=0.5)
    assert torch.equal(logits(model, TOKENS), plain)
    model.train()
    assert not torch.allclose(logits(model, TOKENS), plain)
    model.set_dropout(0.0)
    assert torch.equal(logits(model, TOKENS), plain)


def test_dropout_grows_linearly_with_depth_where_it_is_asked_to() -> None:
    model = fresh(num_layers=4)

    def probabilities() -> list[tuple[float, float]]:
        return [(b.dropout, b.attention.head_dropout) for b in model.blocks if isinstance(b, Block)]

    model.set_dropout(0.2, heads=0.4, depth="linear")
    assert [p for pair in probabilities() for p in pair] == pytest.approx([0.05, 0.1, 0.1, 0.2, 0.15, 0.3, 0.2, 0.4])
    model.set_dropout(0.2, heads=0.4)
    assert probabilities() == [(0.2, 0.4)] * 4


def test_a_cached_row_counts_the_keys_of_its_own() -> None:
    """Two rows of different lengths, token by token, against each alone."""
    model = fresh("Gs")
    for parameter in added(model).values():
        parameter.data.mul_(4.0)
    long, short = TOKENS[:1], TOKENS[1:, :7]
    cache = Cache(model.config, 2, 16)
    first = torch.cat([long[:, :8], torch.cat([short[:, :3], torch.zeros(1, 5, dtype=torch.long)], 1)])
    logits(model, first, torch.tensor([[0] * 8, [0] * 3 + [-1] * 5]), cache=cache)
    for i in range(4):
        step = logits(model, torch.stack([long[0, 8 + i : 9 + i], short[0, 3 + i : 4 + i]]), cache=cache)
        torch.testing.assert_close(step[0, 0], logits(model, long)[0, 8 + i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(step[1, 0], logits(model, short)[0, 3 + i], atol=1e-5, rtol=1e-5)
