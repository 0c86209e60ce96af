"""Adapter folders: what is written is read back; what Oriole's adapters do not have is refused by name.

That PEFT computes the same is shown in tests/peers/test_peft.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from oriole.errors import ModelError
from oriole.model.adapter import base_of, is_adapter, load_adapted, load_adapter, save_adapter
from oriole.model.config import LoraConfig
from oriole.model.folder import load_model, save_model
from oriole.model.lm import LM
from oriole.model.lora import adapters, attach, merge

TOKENS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(model: LM) -> Tensor:
    return model.head("logits", model(TOKENS).h)


@pytest.fixture
def adapted(small: LM, tmp_path: Path) -> LM:
    """A model with adapters as after training; its base is in `base`, its adapters are in `adapter`."""
    save_model(small, tmp_path / "base", chat=True)
    attach(small, LoraConfig(rank=3, alpha=7.5, targets=("q_proj", "v_proj", "down_proj"), dropout=0.1))
    torch.manual_seed(1)
    for adapter in adapters(small).values():
        with torch.no_grad():
            adapter.b.normal_(0, 0.1)
    save_adapter(small, tmp_path / "adapter", str(tmp_path / "base"))
    return small


def test_what_is_written_is_read_back(adapted: LM, tmp_path: Path) -> None:
    assert {f.name for f in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 3
    assert tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"].shape == (32, 3)
    assert is_adapter(tmp_path / "adapter") and not is_adapter(tmp_path / "base")
    base = load_model(tmp_path / "base")
    before = logits(base)
    load_adapter(base, tmp_path / "adapter")
    assert torch.equal(logits(base), logits(adapted)) and not torch.equal(logits(base), before)
    assert base.state_dict().keys() == adapted.state_dict().keys()
    save_adapter(base, tmp_path / "again", str(tmp_path / "base"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_an_adapter_folder_stands_for_its_base_with_the_adapters(adapted: LM, tmp_path: Path) -> None:
    whole = load_adapted(tmp_path / "adapter")
    merge(adapted)
    assert torch.equal(logits(whole), logits(adapted))


def test_the_base_is_found_beside_the_adapters_too(adapted: LM, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path / "adapter", "../base")
    assert base_of(tmp_path / "adapter").resolve() == (tmp_path / "base").resolve()
    save_adapter(adapted, tmp_path / "adapter", "gone")
    with pytest.raises(ModelError, match=r"adapts the model 'gone', which is not here; .* base_model_name_or_path in"):
        load_adapted(tmp_path / "adapter")


def test_a_reward_head_goes_along(small: LM, tmp_path: Path) -> None:
    model = LM(small.config, heads=("reward",)).eval()
    model.load_state_dict(small.state_dict(), strict=False)
    save_model(small, tmp_path / "base", chat=True)
    attach(model, LoraConfig(rank=2))
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    read = load_adapted(tmp_path / "adapter")
    with torch.inference_mode():
        assert torch.equal(read.head("reward", read(TOKENS).h), model.head("reward", model(TOKENS).h))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'; Oriole loads 'LORA'"),
        ({"bias": "all"}, "uses bias = 'all', which Oriole's adapters do not have"),
        ({"use_dora": True}, "uses use_dora = True"),
        ({"rank_pattern": {"q_proj": 8}}, "uses rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, r"uses modules_to_save = \['lm_head'\]"),
        ({"target_modules": "all-linear"}, "target_modules = 'all-linear' is not a list"),
        ({"target_modules": ["lm_head"]}, "target_modules|targets"),
        ({"r": 0}, "rank = 0"),
        ({"r": 4}, r"lora_A.weight .* has shape \(3, 48\), adapter_config.json says \(4, 48\)"),
        ({"target_modules": ["q_proj", "v_proj"]}, "down_proj.lora_A.weight is unexpected"),
    ],
)
def test_what_does_not_fit_is_named(adapted: LM, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        load_adapted(tmp_path / "adapter")


def test_rslora_is_another_scale(adapted: LM, tmp_path: Path) -> None:
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": True, "lora_alpha": 7.5 / 3**0.5}))
    merge(adapted)
    torch.testing.assert_close(logits(load_adapted(tmp_path / "adapter")), logits(adapted), rtol=0, atol=1e-4)


def test_a_lost_tensor_is_named(adapted: LM, tmp_path: Path) -> None:
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.lora_B\.weight is missing \(1 do not fit"):
        load_adapted(tmp_path / "adapter")


def test_a_model_without_adapters_has_none_to_write(make: Callable[..., LM], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no adapters to write to .*; train it with a \[lora\] table"):
        save_adapter(make(), tmp_path, "base")
