"""PEFT and Oriole read each other's adapters, and compute the same with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from oriole.model.adapter import load_adapted, load_adapter, save_adapter
from oriole.model.config import LORA_TARGETS, LoraConfig, ModelConfig
from oriole.model.folder import load_model, save_model
from oriole.model.lm import LM
from oriole.model.lora import adapters, attach

SHAPE = ModelConfig(
    vocab_size=97, dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=80, context=128
)
TOKENS = torch.randint(16, 97, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder whose every weight matters."""
    torch.manual_seed(0)
    model = LM(SHAPE)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_model(model, tmp_path / "base", chat=True)
    return tmp_path / "base"


@torch.inference_mode()
def ours(model: LM) -> torch.Tensor:
    return model.head("logits", model(TOKENS).h)


@torch.inference_mode()
def theirs(model: Any) -> torch.Tensor:
    return model.eval()(TOKENS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("targets", [LORA_TARGETS, ("q_proj", "v_proj")], ids=["all", "qv"])
def test_peft_loads_our_adapters_with_equal_logits(base: Path, tmp_path: Path, targets: Any) -> None:
    model = load_model(base)
    attach(model, LoraConfig(rank=4, alpha=12, targets=targets, dropout=0.1))
    torch.manual_seed(1)
    for adapter in adapters(model).values():
        with torch.no_grad():
            adapter.b.normal_(0, 0.1)
    save_adapter(model, tmp_path / "adapter", str(base))
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = theirs(plain)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(theirs(loaded), ours(model.eval()), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        theirs(loaded.merge_and_unload()), ours(load_adapted(tmp_path / "adapter")), rtol=0, atol=1e-4
    )
    assert (ours(model) - before).abs().max() > 0.1


@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_adapters_of_peft_with_equal_logits(base: Path, tmp_path: Path, rslora: bool) -> None:
    config = PeftConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "k_proj", "gate_proj", "o_proj"], lora_dropout=0.2,
        use_rslora=rslora, task_type="CAUSAL_LM", init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(2)
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    made.save_pretrained(tmp_path / "theirs")
    model = load_model(base)
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(ours(model), theirs(made), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours(load_adapted(tmp_path / "theirs")), theirs(made), rtol=0, atol=1e-4)
    assert (ours(model) - ours(load_model(base))).abs().max() > 0.1


def test_peft_loads_an_adapted_reward_model_with_equal_scores(base: Path, tmp_path: Path) -> None:
    model = LM(SHAPE, heads=("reward",)).eval()
    model.load_state_dict(load_model(base).state_dict(), strict=False)
    attach(model, LoraConfig(rank=2))
    torch.manual_seed(3)
    for adapter in adapters(model).values():
        with torch.no_grad():
            adapter.b.normal_(0, 0.1)
    save_adapter(model, tmp_path / "adapter", str(base))
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    with torch.inference_mode():
        scores = model.head("reward", model(TOKENS).h[:, -1])
    torch.testing.assert_close(theirs(loaded).squeeze(-1), scores, rtol=0, atol=1e-4)
