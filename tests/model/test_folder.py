"""What is saved is what Hugging Face loads, and the other way round; what does not fit is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from oriole.errors import ModelError, ResourceError
from oriole.model.folder import load_model, read_config, save_model
from oriole.model.lm import LM


def ours(model: LM, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.head("logits", model(x).h)


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_equal_transformers_on_the_saved_folder(make: Any, tmp_path: Path, qk_norm: bool, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = make(qk_norm=qk_norm, tie_embeddings=tied, rope_theta=5_000.0, head_dim=20)
    save_model(model, tmp_path, chat=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    x = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        reference = theirs(x).logits
    assert (ours(model, x) - reference).abs().max() <= 1e-4
    assert (ours(load_model(tmp_path), x) - reference).abs().max() <= 1e-4


def test_a_folder_saved_by_transformers_loads(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=97,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=128,
            tie_word_embeddings=False,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    x = torch.randint(0, 97, (2, 40))
    with torch.inference_mode():
        assert (ours(load_model(tmp_path), x) - theirs(x).logits).abs().max() <= 1e-4


def test_save_load_save_is_the_identity(small: LM, tmp_path: Path) -> None:
    save_model(small, tmp_path / "a", chat=False)
    save_model(load_model(tmp_path / "a"), tmp_path / "b", chat=False)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_both_dialects_and_the_stop_ids_are_on_disk(small: LM, tmp_path: Path) -> None:
    save_model(small, tmp_path, chat=True, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000.0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    save_model(small, tmp_path, chat=False)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "rope_type=llama3"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type=dynamic"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type says .'default', 'linear'. in two places"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type=yarn without a factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": 16}}, "yarn with beta_fast=16"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "attention_factor": 1.0}}, "attention_factor=1.0"),
        ({"oriole_rope": {"type": "ntk", "factor": 2, "rope_theta": 100_000.0}}, "remove oriole_rope if"),
        ({"oriole_rope": {"factor": 2}}, "oriole_rope = .* is not what Oriole writes"),
        ({"rope_theta": 3.0}, "rope_theta says .3.0, 100000.0. in two places"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*but use_sliding_window is off"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types=.*chunked_attention"),
        ({"layer_types": ["full_attention"]}, "for 2 layers"),
        ({"model_type": "llama", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "oriole", "oriole": {"mtp": 2}}, "mtp"),
        ({"oriole_schema": 2}, "schema 2, this Oriole reads 1"),
        ({"hidden_size": None}, "hidden_size = None is not an integer"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"intermediate_size": 81}, r"shape \(48, 80\), config.json says \(48, 81\)"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.* is missing"),
        ({"num_hidden_layers": 1}, "unexpected tensor model.layers.1"),
        ({"num_key_value_heads": 3}, "no possible model"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(small: LM, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_model(small, tmp_path, chat=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_broken_files_are_one_sentence(small: LM, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        load_model(tmp_path / "nothing")
    save_model(small, tmp_path, chat=False)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="truncated or broken"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(ModelError, match="safetensors only"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_absent_keys_mean_what_transformers_means(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig

    shape = {"vocab_size": 9, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1}
    data = shape | {"model_type": kind, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(data))
    theirs, mine = AutoConfig.from_pretrained(tmp_path), read_config(tmp_path)
    assert mine.num_kv_heads == theirs.num_key_value_heads
    assert mine.head_dim == (theirs.head_dim or 64 // 32)
    assert mine.context == theirs.max_position_embeddings
    assert mine.rope_theta == theirs.rope_parameters["rope_theta"]
    assert mine.norm_eps == theirs.rms_norm_eps
    assert mine.tie_embeddings == theirs.tie_word_embeddings
    assert mine.init_std == theirs.initializer_range


def test_weights_are_read_in_the_wanted_precision(small: LM, tmp_path: Path) -> None:
    save_model(small, tmp_path, chat=False)
    low = load_model(tmp_path, "cpu", torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert torch.equal(low.angles.cos, small.angles.cos)
    assert all(p.requires_grad for p in low.parameters())
    x = torch.randint(0, 97, (1, 30))
    assert (ours(low, x).float() - ours(small, x)).abs().mean() < 0.05 * ours(small, x).abs().mean()


def test_a_tied_head_that_was_written_all_the_same_is_ignored(small: LM, tmp_path: Path) -> None:
    save_model(small, tmp_path, chat=False)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    x = torch.randint(0, 97, (1, 9))
    assert torch.equal(ours(load_model(tmp_path), x), ours(small, x))


def test_integer_weights_are_refused_by_name(small: LM, tmp_path: Path) -> None:
    save_model(small, tmp_path, chat=False)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(48, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"tensor model.norm.weight .* is torch.int8"):
        load_model(tmp_path)


def test_a_save_that_fails_leaves_the_old_files_whole(
    small: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(small, tmp_path, chat=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("oriole.model.files.save_file", full)
    with pytest.raises(ResourceError, match="disk is full"):
        save_model(small, tmp_path, chat=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_index_may_not_leave_its_folder(small: LM, tmp_path: Path) -> None:
    save_model(small, tmp_path, chat=False)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ModelError, match="outside its folder"):
        load_model(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ModelError, match=r"gone.safetensors is missing"):
        load_model(tmp_path)
    index.write_text("[]")
    with pytest.raises(ModelError, match="not an object"):
        load_model(tmp_path)


def test_sharded_weights_load(small: LM, tmp_path: Path) -> None:
    save_model(small, tmp_path, chat=False)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, tmp_path / file)
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    x = torch.randint(0, 97, (1, 9))
    assert torch.equal(ours(load_model(tmp_path), x), ours(small, x))
