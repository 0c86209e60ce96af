"""A mixture of experts: the grouped products are the slow reference, on disk it is Qwen3-MoE, and its load is even."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from oriole.config import validate
from oriole.errors import ConfigError, ModelError
from oriole.model import lora
from oriole.model.config import LoraConfig, ModelConfig
from oriole.model.costs import flops_per_token, training_memory
from oriole.model.folder import load_model, read_config, save_model
from oriole.model.lm import LM, Cache
from oriole.model.moe import TILE, MoE, Routing, _segments, balance_loss, figures, imbalance_as_gradient, mixture

Make = Callable[..., LM]
SMALL = {"experts": 4, "active": 2}
KINDS: dict[str, dict[str, Any]] = {
    "loss": {"moe": SMALL},
    "shared": {"moe": SMALL | {"shared_ffn_dim": 24}},
    "bias": {"moe": SMALL | {"balance": "bias", "experts": 5, "active": 3, "ffn_dim": 32}},
}
kinds = pytest.mark.parametrize("kind", KINDS)

DOC = torch.tensor([[0] * 9 + [1] * 11 + [-1] * 4, [0] * 24])
POS = torch.tensor([[*range(9), *range(11), *range(4)], [*range(24)]])


def tokens(b: int, t: int) -> torch.Tensor:
    return torch.randint(0, 97, (b, t), generator=torch.Generator().manual_seed(3))


def logits(model: LM, *args: torch.Tensor, **kw: object) -> torch.Tensor:
    with torch.inference_mode():
        return model.head("logits", model(*args, **kw).h)


def gradients(model: LM, run: Any = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states, and every parameter's gradient of a loss that reads them and the balance."""
    model.zero_grad()
    out = (model if run is None else run)(tokens(2, 24), DOC, POS)
    (out.h[DOC >= 0].square().sum() + 100 * out.aux).backward()
    return out.h.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --- the arithmetic --------------------------------------------------------------------------------------------------


@kinds
def test_grouped_products_equal_every_expert_on_every_token(make: Make, kind: str) -> None:
    model = make(pattern="GeG", **KINDS[kind])
    model.backend = "eager"
    expected, by_eager = gradients(model)
    model.backend = "grouped"
    h, by_grouped = gradients(model)
    torch.testing.assert_close(h, expected, atol=1e-5, rtol=1e-5)
    assert by_eager.keys() == by_grouped.keys() == dict(model.named_parameters()).keys()
    for name, reference in by_eager.items():
        assert reference.abs().max() > 0, name
        torch.testing.assert_close(by_grouped[name], reference, atol=1e-5 * float(reference.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("n", [1, 40, 70])
def test_segments_are_whole_tiles_that_hold_every_pair_once(n: int) -> None:
    """Of experts that have no token as well: GPU kernels take no segment that is empty or begins within a tile."""
    choice = torch.tensor([[4, 1]] * n)
    place, ends, rows = _segments(choice, 6)
    sizes = ends.diff(prepend=torch.zeros(1, dtype=ends.dtype))
    assert bool((sizes % TILE == 0).all()) and int(sizes.min()) == TILE and int(ends[-1]) <= rows
    assert len(set(place.tolist())) == 2 * n
    expert = torch.searchsorted(ends, place.to(ends.dtype), right=True)
    assert torch.equal(expert, choice.flatten())
    with torch.no_grad():  # few pairs lie close together
        _, ends, rows = _segments(choice, 6)
    assert (int(ends[-1]) == rows == 2 * n) or 2 * n >= 6 * TILE


@pytest.mark.parametrize("n", [1, 7, 300])
def test_an_expert_without_tokens_has_a_gradient_of_zeros(n: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, gate_up, down = (torch.randn(*s, generator=g) for s in ((n, 16), (6, 16, 16), (6, 16, 8)))
    choice = torch.stack([torch.tensor([5, 1, 3, 0])[torch.randperm(4, generator=g)[:2]] for _ in range(n)])
    weights = torch.rand(n, 2, generator=g)
    results = []
    for eager in (True, False):
        given = [t.clone().requires_grad_() for t in (x, gate_up, down, weights)]
        y = mixture(given[0], given[1], given[2], choice, given[3], eager=eager)
        y.square().sum().backward()
        with torch.no_grad():
            few = mixture(*given[:3], choice, given[3], eager=eager)
        results.append([y.detach(), few, *(t.grad for t in given)])
    for reference, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, atol=1e-5 * float(reference.abs().max()), rtol=1e-5)
    for unused in (2, 4):
        assert results[1][3][unused].abs().max() == results[1][4][unused].abs().max() == 0


def test_the_choice_is_the_likeliest_and_its_weights_sum_to_one(make: Make) -> None:
    mlp = make(pattern="Ge", **KINDS["bias"]).blocks[0].mlp
    x = torch.randn(30, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mlp.bias.zero_()
        probs, choice, weights = mlp.route(x)
        expected = torch.softmax(x.double() @ mlp.router.weight.double().T, -1).topk(3)
        assert torch.equal(choice, expected.indices)
        torch.testing.assert_close(weights, (expected.values / expected.values.sum(-1, keepdim=True)).float())
        mlp.bias[4] = 10.0  # changes the choice, and of the weights nothing but whose they are
        _, moved, weights = mlp.route(x)
    assert (moved[:, 0] == 4).all()
    torch.testing.assert_close(weights, probs.gather(1, moved) / probs.gather(1, moved).sum(-1, keepdim=True))


@pytest.mark.parametrize("kind", ["shared", "bias"])
def test_cached_equals_uncached_equals_batched_equals_left_padded(make: Make, kind: str) -> None:
    model = make(pattern="Ge", **KINDS[kind])
    long, short = tokens(1, 12), tokens(1, 8) + 1
    expected = logits(model, long)[0], logits(model, short)[0]
    cache = Cache(model.config, 2, 16)
    prompts, doc = torch.zeros(2, 10, dtype=torch.long), torch.zeros(2, 10, dtype=torch.int)
    prompts[0], prompts[1, :6], doc[1, 6:] = long[0, :10], short[0, :6], -1
    first = logits(model, prompts, doc, cache=cache)
    torch.testing.assert_close(first[0], expected[0][:10], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(first[1, :6], expected[1][:6], atol=1e-4, rtol=1e-4)
    for i in range(2):
        step = logits(model, torch.stack([long[0, 10 + i : 11 + i], short[0, 6 + i : 7 + i]]), cache=cache)[:, 0]
        torch.testing.assert_close(step, torch.stack([expected[0][10 + i], expected[1][6 + i]]), atol=1e-4, rtol=1e-4)
    padded, doc = torch.zeros(1, 12, dtype=torch.long), torch.zeros(1, 12, dtype=torch.int)
    padded[0, 4:], doc[0, :4] = short[0], -1
    pos = torch.tensor([[0] * 4 + [*range(8)]])
    torch.testing.assert_close(logits(model, padded, doc, pos)[0, 4:], expected[1], atol=1e-4, rtol=1e-4)


def test_documents_packed_in_a_row_do_not_see_each_other(make: Make) -> None:
    model = make(pattern="Ge", **KINDS["loss"])
    x = tokens(2, 24)
    before = logits(model, x, DOC, POS)
    x[0, :9] = (x[0, :9] + 1) % 97
    after = logits(model, x, DOC, POS)
    torch.testing.assert_close(after[0, 9:20], before[0, 9:20], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after[0, :9], before[0, :9])


@pytest.mark.parametrize("kind", ["loss", "bias"])
def test_recomputed_activations_give_the_same_gradients(make: Make, kind: str) -> None:
    model = make(pattern="Ge", **KINDS[kind])
    plain = gradients(model)[1]
    model.recompute = True
    again = gradients(model)[1]
    assert plain.keys() == again.keys()
    assert all(torch.equal(again[name], plain[name]) for name in plain)  # the balance too: counted once


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # torch.compile's own imports
def test_a_training_step_is_one_graph_however_tokens_are_spread(make: Make) -> None:
    model = make(pattern="Ge", num_layers=1, **KINDS["loss"])
    torch.compiler.reset()  # what other tests have compiled would make the first call a recompilation
    run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    spreads = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            plain, compiled = gradients(model), gradients(model, run)
            torch.testing.assert_close(compiled[0], plain[0], atol=1e-5, rtol=1e-5)
            for name, reference in plain[1].items():
                torch.testing.assert_close(compiled[1][name], reference, atol=1e-4, rtol=1e-3, msg=name)
            spreads.append(run(tokens(2, 24), DOC, POS).metrics["expert_load"])
            with torch.no_grad():
                model.blocks[0].mlp.router.weight.mul_(-3)
    assert spreads[0] != spreads[1]


def test_bf16_arithmetic_stays_near(make: Make) -> None:
    model = make(pattern="Ge", **KINDS["shared"])
    exact = gradients(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        h = model(tokens(2, 24), DOC, POS).h
    # A token whose third expert is as likely as its second may go elsewhere; the others must not.
    error = (h.float() - exact[0]).norm(dim=-1) / exact[0].norm(dim=-1)
    assert float(error.median()) < 0.03


# --- balance and figures ---------------------------------------------------------------------------------------------


def test_the_balance_is_transformers_loss_of_each_layer(make: Make) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    model = make(pattern="Ge", moe=SMALL | {"balance_weight": 0.5})
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.mlp_norm.register_forward_hook(lambda _, __, y: seen.append(y))
    aux = model(tokens(2, 24), DOC, POS).aux
    scores = [y.flatten(0, 1) @ block.mlp.router.weight.T for y, block in zip(seen, model.blocks, strict=True)]
    theirs = [load_balancing_loss_func((s,), 4, 2, attention_mask=(DOC >= 0).long()) for s in scores]
    torch.testing.assert_close(aux, 0.5 * torch.stack(theirs).mean())
    assert float(balance_loss(torch.full((4,), 0.5), torch.full((4,), 0.25))) == 2.0  # k where all is even


def test_padding_counts_neither_in_the_balance_nor_in_the_figures(make: Make) -> None:
    model = make(pattern="Ge", **KINDS["loss"])
    x = tokens(1, 12)
    alone = model(x)
    padded = torch.cat([x, torch.full((1, 20), 5)], 1)
    doc, pos = torch.tensor([[0] * 12 + [-1] * 20]), torch.tensor([[*range(12), *range(20)]])
    with_padding = model(padded, doc, pos)
    torch.testing.assert_close(with_padding.aux, alone.aux)
    for name, value in alone.metrics.items():
        torch.testing.assert_close(with_padding.metrics[name], value, msg=name)


def test_figures_of_a_router_that_sends_all_to_two_of_five(make: Make) -> None:
    model = make(pattern="Ge", num_layers=1, moe=SMALL | {"experts": 5})
    with torch.no_grad():
        model.blocks[0].mlp.router.weight.zero_()
    metrics = model(tokens(2, 24)).metrics
    assert {name: round(float(value), 4) for name, value in metrics.items()} == {
        "expert_load": 2.5, "dead_experts": 0.6, "router_entropy": 1.6094,
    }  # fmt: skip


def test_the_imbalance_is_a_gradient_and_no_loss() -> None:
    bias, excess = torch.tensor([3.0, -1.0], requires_grad=True), torch.tensor([0.25, -0.25])
    value = imbalance_as_gradient(bias, excess)
    value.backward()
    assert value.item() == 0 and bias.grad is not None and torch.equal(bias.grad, excess)


def test_an_expert_below_a_tenth_of_the_mean_is_dead_and_the_busiest_of_all_layers_counts() -> None:
    even, uneven = torch.full((4,), 0.25), torch.tensor([0.5, 0.452, 0.024, 0.024])
    layers = [Routing(torch.zeros(()), load, torch.tensor(1.0)) for load in (even, uneven, even)]
    found = {name: float(value) for name, value in figures(layers).items()}
    assert found == pytest.approx({"expert_load": 2.0, "dead_experts": 2 / 12, "router_entropy": 1.0})


# --- the shape -------------------------------------------------------------------------------------------------------


@kinds
def test_num_params_are_those_of_the_tensors_and_the_active_ones_those_of_a_token(make: Make, kind: str) -> None:
    model = make(pattern="GGe", num_layers=3, **KINDS[kind])
    c = model.config
    assert c.num_params() == sum(p.numel() for p in model.parameters())
    idle = (c.moe.experts - c.moe.active) * 3 * c.dim * c.expert_dim
    assert c.num_params(active=True) == c.num_params() - idle
    assert flops_per_token(c, 64) == 6 * c.num_params(active=True) + 6 * 3 * 64 * 64
    parts = training_memory(c, 2, 64)
    assert parts["weights"] == 4 * c.num_params()


def test_experts_are_as_wide_as_a_dense_layer_together() -> None:
    table = {"preset": "demo", "pattern": "Ge", "moe": SMALL}
    config = validate(ModelConfig, table, "here")
    router = config.num_layers * 4 * config.dim
    assert config.num_params(active=True) == validate(ModelConfig, {"preset": "demo"}, "here").num_params() + router


def test_without_experts_in_the_pattern_the_model_is_the_plain_one(make: Make) -> None:
    plain, other = make(), make(moe=SMALL | {"balance": "bias", "shared_ffn_dim": 8})
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    out, same = plain(tokens(2, 9)), other(tokens(2, 9))
    assert torch.equal(out.h, same.h)
    assert (float(out.aux), out.metrics, other.config.options, other.sign_steps()) == (0.0, {}, {}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe": {"active": 3, "experts": 2}}, "active=3 of experts=2"),
        ({"moe": {"active": 3}, "ffn_dim": 704}, "ffn_dim=704 / 3, is 234, .* multiple of 8"),
        ({"moe": {"ffn_dim": 12}}, "moe.ffn_dim=12, is 12, .* multiple of 8"),
        ({"dim": 252}, "dim is 252"),
    ],
)
def test_impossible_experts_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ModelConfig, {"preset": "demo", "pattern": "Ge"} | change, "here")


# --- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["Ge", "GeG"])
def test_the_folder_is_a_qwen3_moe(make: Make, tmp_path: Path, pattern: str) -> None:
    from transformers import AutoModelForCausalLM

    model = make(pattern=pattern, num_layers=3, **KINDS["loss"])
    save_model(model, tmp_path, chat=False)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["router_aux_loss_coef"]) == ("qwen3_moe", 0.1)
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in load_file(tmp_path / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Qwen3MoeForCausalLM"
    x = tokens(2, 40)
    with torch.inference_mode():
        assert (logits(model, x) - theirs(x).logits).abs().max() <= 1e-4
    again = load_model(tmp_path)
    assert torch.equal(logits(again, x), logits(model, x))
    assert again.config.layers == model.config.layers


@pytest.mark.parametrize(
    ("where", "where_experts"),
    [({"decoder_sparse_step": 2}, [0, 1, 0]), ({"mlp_only_layers": [1]}, [1, 0, 1]), ({}, [1, 1, 1])],
)
def test_a_folder_saved_by_transformers_loads(tmp_path: Path, where: dict[str, Any], where_experts: list[int]) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "num_experts": 6,
        "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True, "tie_word_embeddings": False,
    }  # fmt: skip
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **where)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # their routers start at zero, where every choice is a tie
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    x = tokens(2, 40)
    with torch.inference_mode():
        assert (logits(model, x) - theirs(x).logits).abs().max() <= 1e-4
    assert [isinstance(block.mlp, MoE) for block in model.blocks] == where_experts


@pytest.mark.parametrize("kind", ["shared", "bias"])
def test_what_qwen3_moe_lacks_is_an_oriole_model_by_name(make: Make, tmp_path: Path, kind: str) -> None:
    model = make(pattern="Ge", **KINDS[kind])
    save_model(model, tmp_path, chat=False)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("oriole", ["OrioleForCausalLM"])
    assert config["oriole"] == {"pattern": "Ge", "moe": model.config.moe.model_dump()}
    again = load_model(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in model.named_parameters())
    own = {"shared": "mlp.shared.down.weight", "bias": "mlp.bias"}[kind]
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.1.{own}"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"tensor model.layers.1.{own} is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "more", [{"pattern": "Le", "window": 8}, {"pattern": "Gge"}, {"qk_norm": False}, {"reasoning": {}}]
)
def test_experts_beside_other_options_come_back_from_disk(make: Make, tmp_path: Path, more: dict[str, Any]) -> None:
    model = make(**{"pattern": "Ge", "moe": SMALL, **more})
    save_model(model, tmp_path, chat=False)
    assert load_model(tmp_path).config == model.config


def test_weights_that_do_not_sum_to_one_are_refused(make: Make, tmp_path: Path) -> None:
    save_model(make(pattern="Ge", **KINDS["loss"]), tmp_path, chat=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_topk_prob": False}))
    with pytest.raises(ModelError, match="norm_topk_prob=false"):
        read_config(tmp_path)


# --- adapters --------------------------------------------------------------------------------------------------------


def test_adapters_go_on_attention_alone(make: Make) -> None:
    model = make(pattern="Ge", **KINDS["bias"])
    with pytest.raises(ModelError, match="down_proj, gate_proj, up_proj, which are experts in this model"):
        lora.attach(model, LoraConfig())
    config = LoraConfig(rank=2, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    before = logits(model, tokens(1, 9))
    lora.attach(model, config)
    assert torch.equal(logits(model, tokens(1, 9)), before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == config.num_params(model.config)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter))
    adapted = logits(model, tokens(1, 9))
    assert not torch.allclose(adapted, before)
    lora.merge(model)
    torch.testing.assert_close(logits(model, tokens(1, 9)), adapted, atol=1e-4, rtol=1e-4)
    assert all(p.requires_grad for p in model.parameters())
