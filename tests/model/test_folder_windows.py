"""Windows and stretched positions on disk: transformers reads what Oriole means, and the other way round."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from oriole.model.config import ModelConfig
from oriole.model.folder import load_model, load_reward_model, read_config, save_model
from oriole.model.lm import LM


def ours(model: LM, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.head("logits", model(x).h)


def ids(t: int) -> torch.Tensor:
    return torch.randint(0, 97, (2, t), generator=torch.Generator().manual_seed(0))


CHANGES: dict[str, dict[str, Any]] = {
    "all local": {"pattern": "L", "window": 9},
    "mixed": {"pattern": "LLG", "window": 9, "num_layers": 4},
    "global first": {"pattern": "GL", "window": 9},
    "linear": {"rope_scaling": "linear", "rope_factor": 4.0},
    "ntk": {"rope_scaling": "ntk", "rope_factor": 4.0},
    "yarn": {"rope_scaling": "yarn", "rope_factor": 2.5},
    "both": {"pattern": "LG", "window": 9, "rope_scaling": "yarn", "rope_factor": 4.0},
    "llama": {"qk_norm": False, "rope_scaling": "yarn", "rope_factor": 4.0},
}


@pytest.mark.parametrize("name", CHANGES)
def test_transformers_gives_the_same_logits_beyond_the_window(make: Any, tmp_path: Path, name: str) -> None:
    model = make(**CHANGES[name], rope_theta=500.0)
    save_model(model, tmp_path, chat=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == ("LlamaForCausalLM" if name == "llama" else "Qwen3ForCausalLM")
    x = ids(100)
    with torch.inference_mode():
        reference = theirs(x).logits
    assert (ours(model, x) - reference).abs().max() <= 1e-4
    again = load_model(tmp_path)
    assert again.config == model.config
    assert torch.equal(ours(again, x), ours(model, x))


@pytest.mark.parametrize("dialect", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("scaling", ["linear", "yarn"])
def test_either_dialect_alone_is_enough(make: Any, tmp_path: Path, scaling: str, dialect: str) -> None:
    model = make(rope_scaling=scaling, rope_factor=4.0)
    save_model(model, tmp_path, chat=True)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    del data[dialect]
    path.write_text(json.dumps(data))
    assert read_config(tmp_path) == model.config


def saved(folder: Path, **changes: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    }  # fmt: skip
    theirs = Qwen3ForCausalLM(Qwen3Config(**shape | changes)).eval()
    for parameter in theirs.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"] * 2}, "LG"),
        ({"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]}, "LGG"),
        ({"max_window_layers": 1}, "GLLL"),
        ({"max_window_layers": 28}, "G"),
    ],
)
def test_a_foreign_qwen3_with_windows_loads(tmp_path: Path, changes: dict[str, Any], pattern: str) -> None:
    theirs = saved(tmp_path, use_sliding_window=True, sliding_window=7, **changes)
    model, x = load_model(tmp_path), ids(60)
    assert model.config.pattern == pattern
    with torch.inference_mode():
        assert (ours(model, x) - theirs(x).logits).abs().max() <= 1e-4


@pytest.mark.parametrize(("longest", "context"), [(128, 128), (40, 128), (200, 200)])
def test_a_foreign_yarn_loads_with_its_own_context(tmp_path: Path, longest: int, context: int) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 300.0, "original_max_position_embeddings": 32}
    theirs = saved(tmp_path, max_position_embeddings=longest, rope_parameters=rope)
    model, x = load_model(tmp_path), ids(100)
    assert (model.config.context, model.config.trained_context) == (context, 32)
    with torch.inference_mode():
        assert (ours(model, x) - theirs(x).logits).abs().max() <= 1e-4
    save_model(model, tmp_path / "again", chat=False)
    assert read_config(tmp_path / "again") == model.config


def test_what_a_llama_lacks_makes_the_folder_an_oriole(make: Any, tmp_path: Path) -> None:
    model = make(qk_norm=False, pattern="LG", window=9)
    save_model(model, tmp_path, chat=True)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["model_type"] == "oriole"
    assert data["oriole"] == {"pattern": "LG", "window": 9, "qk_norm": False}
    assert load_model(tmp_path).config == model.config


def test_options_keep_their_window(small: LM) -> None:
    assert small.config.model_copy(update={"pattern": "LgG", "window": 9}).options == {"pattern": "LgG", "window": 9}


def test_a_reward_model_keeps_its_windows(tmp_path: Path) -> None:
    shape = {"vocab_size": 97, "dim": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    config = ModelConfig.model_validate(shape | {"ffn_dim": 80, "pattern": "LG", "window": 9})
    save_model(LM(config, heads=("reward",)), tmp_path, chat=False)
    assert load_reward_model(tmp_path).config == config


def test_the_plain_model_is_written_as_before(small: LM, tmp_path: Path) -> None:
    save_model(small, tmp_path, chat=False)
    data = json.loads((tmp_path / "config.json").read_text())
    assert {key for key in data if "rope" in key or "window" in key or key == "layer_types"} == {
        "rope_theta", "rope_parameters", "use_sliding_window",
    }  # fmt: skip
