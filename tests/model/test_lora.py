"""Adapters: nothing at first, then what the formula says; the merged model is the same one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oriole.errors import ModelError
from oriole.model.config import LORA_TARGETS, LoraConfig
from oriole.model.folder import to_hf
from oriole.model.lm import LM
from oriole.model.lora import LoraLinear, adapters, attach, disabled, is_adapted, merge

TOKENS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))


def logits(model: LM) -> Tensor:
    return model.head("logits", model(TOKENS).h)


def shake(model: LM) -> None:
    """Adapters as after training."""
    torch.manual_seed(3)
    for adapter in adapters(model).values():
        with torch.no_grad():
            adapter.b.normal_(0, 0.1)


def test_an_adapted_model_begins_as_its_base_to_the_bit(small: LM) -> None:
    before = logits(small)
    attach(small, LoraConfig(rank=4))
    assert torch.equal(logits(small), before)


def test_every_linear_layer_has_one_adapter_for_each_of_its_parts(small: LM) -> None:
    attach(small, config := LoraConfig(rank=3))
    assert {name.rpartition(".")[2] for name in adapters(small)} == set(LORA_TARGETS)
    base = to_hf(small)
    for name, adapter in adapters(small).items():
        rows, columns = base[f"{name}.weight"].shape
        assert adapter.a.shape == (3, columns) and adapter.b.shape == (rows, 3)
        assert 0 < adapter.a.abs().max() <= columns**-0.5
    trained = {name: p.numel() for name, p in small.named_parameters() if p.requires_grad}
    assert all(".adapters." in name for name in trained)
    assert sum(trained.values()) == config.num_params(small.config)


@pytest.mark.parametrize("targets", [LORA_TARGETS, ("q_proj", "v_proj"), ("k_proj", "up_proj", "down_proj")])
def test_the_forward_pass_is_that_of_the_formula_and_of_the_merged_model(
    make: Callable[..., LM], targets: tuple[str, ...]
) -> None:
    model = make()
    attach(model, LoraConfig(rank=4, alpha=12, targets=targets))  # type: ignore[arg-type]
    shake(model)
    adapted = logits(model)
    plain = make()
    with torch.no_grad():
        weights = to_hf(plain)
        for name, adapter in adapters(model).items():
            assert name.rpartition(".")[2] in targets
            weights[f"{name}.weight"] += 12 / 4 * adapter.b @ adapter.a
    torch.testing.assert_close(adapted, logits(plain), rtol=0, atol=1e-5)
    assert (adapted - logits(make())).abs().max() > 0.1

    merge(model)
    assert not is_adapted(model) and not any(isinstance(m, LoraLinear) for m in model.modules())
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-5)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_are_those_of_the_merged_matrix(small: LM) -> None:
    attach(small, LoraConfig(rank=4, alpha=8))
    shake(small)
    layer = small.blocks[0].attention.qkv
    assert isinstance(layer, LoraLinear)
    x = torch.randn(7, layer.in_features)
    upstream = torch.randn(7, layer.out_features)
    (layer(x) * upstream).sum().backward()
    by_matrix = (upstream.T @ x)[-32:] * 2.0  # v's two heads of 16 are the last rows; alpha / r = 2
    v = adapters(small)["model.layers.0.self_attn.v_proj"]
    torch.testing.assert_close(v.b.grad, by_matrix @ v.a.T)
    torch.testing.assert_close(v.a.grad, v.b.T @ by_matrix)
    assert layer.weight.grad is None


def test_dropout_acts_on_the_adapters_alone_and_only_while_training(small: LM) -> None:
    base = logits(small)
    attach(small, LoraConfig(rank=4, dropout=0.5))
    assert not any(module.training for module in small.modules())
    small.train()
    assert torch.equal(logits(small), base)  # B is zero: whatever is dropped changes nothing
    shake(small)
    torch.manual_seed(0)
    one, other = logits(small), logits(small)
    assert not torch.equal(one, other)
    small.eval()
    assert torch.equal(logits(small), logits(small))


def test_disabled_adapters_leave_the_base(small: LM) -> None:
    base = logits(small)
    attach(small, LoraConfig())
    shake(small)
    with disabled(small):
        assert torch.equal(logits(small), base)
    assert not torch.equal(logits(small), base)


def test_a_new_head_trains_with_the_adapters() -> None:
    from oriole.model.config import ModelConfig

    shape = ModelConfig(vocab_size=9, dim=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, ffn_dim=8)
    model = LM(shape, heads=("reward",))
    attach(model, LoraConfig(rank=2))
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"blocks", "scalar_heads"}


def test_the_same_seed_gives_the_same_adapters_and_leaves_other_random_numbers_alone(make: Callable[..., LM]) -> None:
    one, same, other = make(), make(), make()
    state = torch.get_rng_state()
    for model, seed in ((one, 1), (same, 1), (other, 2)):
        attach(model, LoraConfig(), seed)
    assert torch.equal(torch.get_rng_state(), state)
    first = [next(iter(adapters(m).values())).a for m in (one, same, other)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_adapters_are_put_on_once(small: LM) -> None:
    attach(small, LoraConfig())
    with pytest.raises(ModelError, match="has LoRA adapters already; merge them"):
        attach(small, LoraConfig())


def test_bf16_adds_the_same_in_its_own_width(small: LM) -> None:
    attach(small, LoraConfig(rank=4))
    shake(small)
    exact = logits(small)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits(small)
    assert rounded.dtype == torch.bfloat16
    assert F.cosine_similarity(rounded.float().flatten(), exact.flatten(), dim=0) > 0.999
