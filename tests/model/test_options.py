"""What Qwen3 and Qwen3-MoE cannot say is named in `config.options`, by which exporters refuse, and nothing else is."""

import json
from pathlib import Path
from typing import Any

import pytest

from oriole.model.config import _LETTERS, ModelConfig, ReasoningConfig
from oriole.model.folder import read_config, save_model
from oriole.model.lm import LM
from oriole.model.seq2seq import Seq2Seq
from oriole.model.seq2seqconfig import SEQ2SEQ_PRESETS
from oriole.model.seq2seqfolder import save_seq2seq

SHAPE = {
    "vocab_size": 64, "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "ffn_dim": 16,
    "context": 32,
}  # fmt: skip

EXPRESSED: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "untied": {"tie_embeddings": False},
    "windows": {"pattern": "LG", "window": 8},
    "linear": {"rope_scaling": "linear", "rope_factor": 2.0},
    "ntk": {"rope_scaling": "ntk", "rope_factor": 2.0},
    "yarn": {"rope_scaling": "yarn", "rope_factor": 2.0},
    "llama": {"qk_norm": False},
    "experts": {"pattern": "GeG", "moe": {"experts": 2, "active": 1}},
    "unused experts": {"moe": {"experts": 3, "shared_ffn_dim": 8, "balance": "bias"}},
}
NAMED: dict[str, tuple[dict[str, Any], set[str]]] = {
    **{letter: ({"pattern": f"GG{letter}"}, {"pattern"}) for letter in _LETTERS if letter != "e"},
    "a window and a gate": ({"pattern": "Lg"}, {"pattern", "window"}),
    "llama with a gate": ({"pattern": "Gg", "qk_norm": False}, {"pattern"}),
    "llama with windows": ({"pattern": "LG", "qk_norm": False}, {"pattern", "window"}),
    "llama with experts": ({"pattern": "Ge", "qk_norm": False}, {"pattern", "moe"}),
    "experts behind windows": ({"pattern": "LeG"}, {"pattern", "window", "moe"}),
    "a shared expert": ({"pattern": "Ge", "moe": {"shared_ffn_dim": 8}}, {"pattern", "moe"}),
    "balance by biases": ({"pattern": "Ge", "moe": {"balance": "bias"}}, {"pattern", "moe"}),
    "a latent block": ({"reasoning": {}}, {"reasoning"}),
    "a latent block behind windows": ({"pattern": "LG", "reasoning": {}}, {"pattern", "window", "reasoning"}),
    "a latent block behind experts": ({"pattern": "Ge", "reasoning": {}}, {"pattern", "moe", "reasoning"}),
}


def written(shape: ModelConfig, folder: Path) -> dict[str, Any]:
    """config.json of a model of that shape; what is read again is the shape."""
    save_model(LM(shape), folder, chat=False)
    again = read_config(folder)
    assert again.options == shape.options and again.layers == shape.layers and again.num_params() == shape.num_params()
    assert again.qk_norm == shape.qk_norm and again.rope_scaling == shape.rope_scaling
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("name", NAMED)
def test_what_qwen3_cannot_express_is_named_and_makes_it_an_oriole_model(name: str, tmp_path: Path) -> None:
    changes, named = NAMED[name]
    shape = ModelConfig.model_validate(SHAPE | changes)
    assert set(shape.options) == named
    config = written(shape, tmp_path)
    assert config["model_type"] == "oriole" and config["architectures"] == ["OrioleForCausalLM"]
    assert config["oriole"].keys() == named | ({"qk_norm"} if not shape.qk_norm else set())


@pytest.mark.parametrize("name", EXPRESSED)
def test_what_it_can_express_names_nothing(name: str, tmp_path: Path) -> None:
    shape = ModelConfig.model_validate(SHAPE | EXPRESSED[name])
    assert shape.options == {}
    config = written(shape, tmp_path)
    assert config["model_type"] in ("qwen3", "qwen3_moe", "llama") and "oriole" not in config


def test_every_key_of_a_shape_is_either_of_qwen3_or_an_option() -> None:
    """A new key of ModelConfig has to be looked at here."""
    expressed = {
        "vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "context", "rope_theta",
        "norm_eps", "tie_embeddings", "qk_norm", "init_std", "rope_scaling", "rope_factor", "rope_original",
    }  # fmt: skip
    named = set().union(*(keys for _, keys in NAMED.values()))
    assert set(ModelConfig.model_fields) == expressed | named
    assert (
        ReasoningConfig().model_dump().keys()
        == ModelConfig.model_validate(SHAPE | {"reasoning": {}}).options["reasoning"].keys()
    )


@pytest.mark.parametrize("preset", SEQ2SEQ_PRESETS)
def test_an_encoder_decoder_is_an_oriole_model_whatever_its_form(preset: str, tmp_path: Path) -> None:
    small = {"vocab_size": 64, "dim": 16, "num_heads": 2, "ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    save_seq2seq(Seq2Seq(SEQ2SEQ_PRESETS[preset].model_copy(update=small)), tmp_path, chat=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["oriole"]["kind"]) == ("oriole", "seq2seq")
    assert config["architectures"] == ["OrioleForConditionalGeneration"]
