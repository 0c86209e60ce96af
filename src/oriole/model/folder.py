"""Model folders are Hugging Face folders: config.json, model.safetensors, generation_config.json.

The tensors carry Qwen3's names (Llama's without QK-norm), q k v and gate up apart, so that every tool which knows those
models loads ours. config.json is written in the dialects of transformers 4 and 5 at once: each reads its own spelling
of the rotary base and the dtype, and silently assumes a default where it finds only the other's.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from oriole.errors import ModelError, raise_for_os_error
from oriole.model.config import ModelConfig
from oriole.model.lm import LM

__all__ = ["load_model", "save_model"]

END_OF_TEXT, IM_END = 0, 2  # the tokenizer's reserved ids, fixed for ever


def save_model(model: LM, folder: Path, *, chat: bool, dtype: torch.dtype = torch.float32) -> None:
    """Write the model into `folder`; a `chat` model stops at <|im_end|>, another at <|endoftext|>.

    Every file appears whole or not at all. Errors: ResourceError when the disk is full or not writable.
    """
    config = _hf_config(model.config, chat, dtype)
    stop: Any = [IM_END, END_OF_TEXT] if chat else END_OF_TEXT
    generation = {"eos_token_id": stop, "pad_token_id": END_OF_TEXT, "do_sample": True, "temperature": 0.8}
    generation |= {"top_k": 50, "top_p": 0.95}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.to("cpu", dtype).contiguous() for k, v in to_hf(model).items()}
        part = folder / "model.safetensors.tmp"
        save_file(tensors, part, metadata={"format": "pt"})
        os.replace(part, folder / "model.safetensors")
        for name, content in (("config.json", config), ("generation_config.json", generation)):
            part = folder / f"{name}.tmp"
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            os.replace(part, folder / name)
    except OSError as error:
        raise_for_os_error(error, "writing the model folder", folder)
    except SafetensorError as error:  # safetensors wraps the system's error in its own
        raise_for_os_error(OSError(_errno_of(error), str(error)), "writing the model folder", folder)


def _errno_of(error: SafetensorError) -> int:
    import errno

    return errno.ENOSPC if "os error 28" in str(error) or "No space" in str(error) else errno.EIO


def load_model(folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LM:
    """The model in a Hugging Face folder of ours, of a Qwen3 or of a Llama.

    Errors: ModelError that names the file, option or tensor that does not fit.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = LM(config)
    tensors = _read_tensors(folder)
    state = from_hf(tensors, config, folder)
    model = model.to_empty(device="cpu")
    model.load_state_dict(state)
    model.reset_rope()
    return model.to(device=device, dtype=dtype).eval()


# --- config.json -----------------------------------------------------------------------------------------------------


def _hf_config(config: ModelConfig, chat: bool, dtype: torch.dtype) -> dict[str, Any]:
    qwen = config.qk_norm
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["Qwen3ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen3" if qwen else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": config.init_std,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": IM_END if chat else END_OF_TEXT,
        "pad_token_id": END_OF_TEXT,
        "dtype": name,
        "torch_dtype": name,
    } | ({"use_sliding_window": False, "sliding_window": None} if qwen else {})


def read_config(folder: Path) -> ModelConfig:
    """The shape of the model in `folder`; ModelError when it is no Qwen3 or Llama, or has an option we lack."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{folder} is no model folder: it has no config.json") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); copy the folder again") from error
    kind = raw.get("model_type")
    if kind not in ("qwen3", "llama"):
        raise ModelError(f"{path}: model_type is '{kind}'; Oriole loads 'qwen3' and 'llama'")
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    unsupported = {
        "attention_bias": raw.get("attention_bias"),
        "mlp_bias": raw.get("mlp_bias"),
        f"rope_type={rope_type}": rope_type != "default",
        "use_sliding_window": raw.get("use_sliding_window"),
        f"hidden_act={raw.get('hidden_act')}": raw.get("hidden_act", "silu") != "silu",
        "quantization_config": raw.get("quantization_config"),
    }
    for option, present in unsupported.items():
        if present:
            raise ModelError(f"{path} uses {option}, which Oriole's model does not have")
    try:
        heads = raw["num_attention_heads"]
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            dim=raw["hidden_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            ffn_dim=raw["intermediate_size"],
            context=raw.get("max_position_embeddings", 2048),
            rope_theta=rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0,
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_embeddings=raw.get("tie_word_embeddings", False),
            qk_norm=kind == "qwen3",
            init_std=raw.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ModelError(f"{path} lacks {error}; it is no complete model config") from error
    except ValueError as error:
        raise ModelError(f"{path} describes no possible model: {error}") from error


# --- tensors ---------------------------------------------------------------------------------------------------------


def to_hf(model: LM) -> dict[str, Tensor]:
    """The model's weights under Hugging Face's names, fused matrices split."""
    config = model.config
    state = {k: v.detach() for k, v in model.state_dict().items()}
    out = {"model.embed_tokens.weight": state["embedding.weight"], "model.norm.weight": state["norm.weight"]}
    if not config.tie_embeddings:
        out["lm_head.weight"] = state["lm_head.weight"]
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        for source, targets, sizes in _FUSED:
            split = state[f"{ours}.{source}.weight"].split([q, kv, kv] if sizes == "qkv" else [config.ffn_dim] * 2)
            out |= {f"{theirs}.{t}.weight": part for t, part in zip(targets, split, strict=True)}
        out |= {f"{theirs}.{t}.weight": state[f"{ours}.{s}.weight"] for s, t in _plain(config)}
    return out


def from_hf(tensors: dict[str, Tensor], config: ModelConfig, where: Path) -> dict[str, Tensor]:
    """Our state dict from Hugging Face tensors; ModelError for a missing, unexpected or misshapen one."""
    with torch.device("meta"):
        expected = to_hf(LM(config))
    given = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        given.pop("lm_head.weight", None)  # some writers store the shared matrix twice
    if missing := sorted(expected.keys() - given.keys()):
        raise ModelError(f"{where}: tensor {missing[0]} is missing ({len(missing)} in all); copy the folder again")
    if extra := sorted(given.keys() - expected.keys()):
        raise ModelError(f"{where}: unexpected tensor {extra[0]} ({len(extra)} in all); config.json names another model")
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(
                f"{where}: tensor {name} has shape {tuple(tensor.shape)}, config.json says "
                f"{tuple(expected[name].shape)}; weights and config belong to different models"
            )
    state = {"embedding.weight": given["model.embed_tokens.weight"], "norm.weight": given["model.norm.weight"]}
    if not config.tie_embeddings:
        state["lm_head.weight"] = given["lm_head.weight"]
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        for source, targets, _ in _FUSED:
            state[f"{ours}.{source}.weight"] = torch.cat([given[f"{theirs}.{t}.weight"] for t in targets])
        state |= {f"{ours}.{s}.weight": given[f"{theirs}.{t}.weight"] for s, t in _plain(config)}
    return state


_FUSED = (
    ("attention.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "qkv"),
    ("mlp.gate_up", ("mlp.gate_proj", "mlp.up_proj"), "gate_up"),
)
"""Ours (one matrix in memory), theirs (several on disk)."""


def _plain(config: ModelConfig) -> list[tuple[str, str]]:
    """(ours, theirs) of a block's tensors that are the same in memory and on disk."""
    names = [
        ("attention_norm", "input_layernorm"),
        ("mlp_norm", "post_attention_layernorm"),
        ("attention.out", "self_attn.o_proj"),
        ("mlp.down", "mlp.down_proj"),
    ]
    if config.qk_norm:
        names += [("attention.q_norm", "self_attn.q_norm"), ("attention.k_norm", "self_attn.k_norm")]
    return names


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards its index names."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists() and not (folder / names[0]).exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is broken ({error}); copy the folder again") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / Path(name).name  # an index may not point outside its folder
        if not path.exists():
            raise ModelError(f"{folder} has no {path.name}; Oriole reads weights from safetensors only")
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is truncated or broken ({error}); copy it again") from error
    return tensors
