"""Model folders: a plain Hugging Face folder of Qwen3, Qwen3-MoE or Llama form, written and read.

`config.json` is written so that transformers 4.57 and 5 read the same model: the older one knows `rope_theta` and
`torch_dtype`, the newer one `rope_parameters` and `dtype`. Only safetensors and JSON are touched, never pickle. A model
with a reward head is a `Qwen3ForSequenceClassification` of one label: it gives a whole conversation a number.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from oriole.config import validate
from oriole.errors import ConfigError, ModelError
from oriole.model.config import ModelConfig
from oriole.model.files import copy_tensor, opened, read_json, write_folder
from oriole.model.folderkeys import (
    experts_from_hf,
    experts_to_hf,
    rope_from_hf,
    rope_to_hf,
    windows_from_hf,
    windows_to_hf,
)
from oriole.model.layers import Block, SwiGLU
from oriole.model.lm import LM
from oriole.model.moe import MoE

__all__ = [
    "SCHEMA", "load_model", "load_reward_model", "load_weights", "read_config", "read_hf_config", "save_model", "to_hf",
]  # fmt: skip

SCHEMA = 1
"""Version of what Oriole writes into a model folder; a higher one is refused."""

END_OF_TEXT, END_OF_TURN = 0, 2
"""Reserved ids (see `text.tokenizer`): where a pretrained model stops, and a chat model too."""

CLASSIFIER = "ForSequenceClassification"
"""How transformers calls a model with a score instead of a head for logits."""

_STANDARD = re.compile(
    r"(attention_norm|mlp_norm|attention\.(qkv|out|q_norm|k_norm)|mlp\.(gate_up|down|router))\.weight"
)
"""Parameters of a block that Qwen3 or Qwen3-MoE has."""

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

M = TypeVar("M", bound=nn.Module)


# --- writing ---------------------------------------------------------------------------------------------------------


def save_model(model: LM, folder: str | Path, *, chat: bool, dtype: torch.dtype = torch.float32) -> None:
    """Write `model.safetensors`, `generation_config.json` and `config.json` into `folder`, each in one atomic step.

    `chat` models stop at the end of a turn or of the text, others at the end of the text only. `dtype` is that of the
    tensors on disk. Other files in the folder (the tokenizer's) stay. A value head is run state and is not written.
    With a reward head the model is a reward model: the head is `score.weight`, nothing of it generates, and
    transformers takes the number at the last token that is not `pad_token_id`.
    `ResourceError` when the disk is full or the folder not writable.
    """
    rewards = "reward" in model.scalar_heads
    stop = [END_OF_TURN, END_OF_TEXT] if chat else END_OF_TEXT
    generation: dict[str, Any] = {"eos_token_id": stop, "pad_token_id": END_OF_TEXT}
    if chat:
        generation |= {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
    config = _hf_config(model.config, dtype, rewards=rewards)
    objects = {} if rewards else {GENERATION: generation}
    objects[CONFIG] = config | {"eos_token_id": stop, "pad_token_id": END_OF_TEXT}
    write_folder(Path(folder), WEIGHTS, to_hf(model), dtype, objects)


def to_hf(model: LM) -> dict[str, Tensor]:
    """The model's parameters under their Hugging Face names; fused matrices appear as views of their parts.

    A tied head is left out, as is a value head. A reward model has `score.weight`, and no head for logits. What an
    option adds to a block keeps its own name, below `model.layers.N`, and so do the parameters of a latent block, below
    `model.reasoning`.
    """
    c = model.config
    out: dict[str, Tensor] = {"model.embed_tokens.weight": model.embedding.weight}
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        at = f"model.layers.{i}."
        q, k, v = torch.split(block.attention.qkv.weight, [c.query_dim, c.kv_dim, c.kv_dim])
        out[at + "input_layernorm.weight"] = block.attention_norm.weight
        out[at + "self_attn.q_proj.weight"] = q
        out[at + "self_attn.k_proj.weight"] = k
        out[at + "self_attn.v_proj.weight"] = v
        out[at + "self_attn.o_proj.weight"] = block.attention.out.weight
        if c.qk_norm:
            out[at + "self_attn.q_norm.weight"] = block.attention.q_norm.get_parameter("weight")
            out[at + "self_attn.k_norm.weight"] = block.attention.k_norm.get_parameter("weight")
        out[at + "post_attention_layernorm.weight"] = block.mlp_norm.weight
        out |= {at + name: tensor for name, tensor in _mlp(block.mlp).items()}
        out |= {at + name: p for name, p in block.named_parameters() if _STANDARD.fullmatch(name) is None}
    if model.reasoning is not None:
        out |= {"model.reasoning." + name: parameter for name, parameter in model.reasoning.named_parameters()}
    out["model.norm.weight"] = model.norm.weight
    if "reward" in model.scalar_heads:
        out["score.weight"] = model.scalar_heads["reward"].get_parameter("weight")
    elif model.lm_head is not None:
        out["lm_head.weight"] = model.lm_head.weight
    return out


def _mlp(mlp: SwiGLU | MoE) -> dict[str, Tensor]:
    """The parameters of an MLP, or of each expert and their router."""
    count = mlp.experts if isinstance(mlp, MoE) else 1
    out = {"mlp.gate.weight": mlp.router.weight} if isinstance(mlp, MoE) else {}
    parts = zip(mlp.gate_up.weight.chunk(count), mlp.down.weight.chunk(count), strict=True)
    for i, (gate_up, down) in enumerate(parts):
        at = f"mlp.experts.{i}." if isinstance(mlp, MoE) else "mlp."
        gate, up = gate_up.chunk(2)
        out |= {at + "gate_proj.weight": gate, at + "up_proj.weight": up, at + "down_proj.weight": down}
    return out


def _hf_config(c: ModelConfig, dtype: torch.dtype, *, rewards: bool) -> dict[str, Any]:
    """The config in both dialects. Without `qk_norm` the model is a Llama, and says so."""
    kind, name = ("qwen3", "Qwen3") if c.qk_norm else ("llama", "Llama")
    extra: dict[str, Any] = {}
    if any(layer.experts for layer in c.layers):
        kind, name, extra = "qwen3_moe", "Qwen3Moe", experts_to_hf(c)
    if c.options:
        kind, name = "oriole", "Oriole"
        extra = {"oriole": c.options | ({} if c.qk_norm else {"qk_norm": False})}
    # transformers counts the names; vLLM reads the number.
    labels = {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}} if rewards else {}
    width = str(dtype).removeprefix("torch.")
    return {
        "architectures": [f"{name}{CLASSIFIER if rewards else 'ForCausalLM'}"],
        **labels,
        "model_type": kind,
        **extra,
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "max_position_embeddings": c.context,
        **rope_to_hf(c),
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **(windows_to_hf(c) if c.qk_norm else {"mlp_bias": False}),
        "initializer_range": c.init_std,
        "use_cache": True,
        "bos_token_id": None,
        "dtype": width,
        "torch_dtype": width,
        "oriole_schema": SCHEMA,
    }


# --- reading ---------------------------------------------------------------------------------------------------------


def load_model(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LM:
    """The language model in `folder`: Oriole's own, or any Hugging Face folder of a Qwen3, a Qwen3-MoE or a Llama.

    One safetensors file or several with an index. The model is in evaluation mode. `ModelError` names the option, file
    or tensor that does not fit and says what to do, and where the folder holds a reward model.
    """
    folder = Path(folder)
    config = read_config(folder)
    if _architecture(folder).endswith(CLASSIFIER):
        raise ModelError(
            f"{folder} holds a reward model: it scores answers and cannot write any; "
            "give the folder of a language model"
        )
    return load_weights(lambda: LM(config), to_hf, folder, device, dtype)


def load_reward_model(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LM:
    """The reward model in `folder`, one label on a Qwen3 or Llama: `head("reward", h)` at a conversation's last token.

    In evaluation mode. `ModelError` as of `load_model`, and where the folder holds a language model.
    """
    folder = Path(folder)
    config = read_config(folder)
    name = _architecture(folder)
    if not name.endswith(CLASSIFIER):
        raise ModelError(
            f"{folder} holds a language model ({name}): it writes answers and cannot score them; give the folder of a "
            "reward model (oriole train RECIPE/reward makes one)"
        )
    data = read_json(folder / CONFIG, "")
    labels = data.get("id2label") or {}
    count = data.get("num_labels", len(labels) or 2)  # transformers' default is 2
    if count != 1:
        raise ModelError(f"{folder} sorts texts into {count} classes; a reward model has one label (num_labels 1)")
    # It has no head for logits; whether its parent's was tied means nothing any more.
    config = config.model_copy(update={"tie_embeddings": True})
    return load_weights(lambda: LM(config, heads=("reward",)), to_hf, folder, device, dtype)


def _architecture(folder: Path) -> str:
    """transformers' class for the folder, as its config says it; a causal LM where it does not."""
    names = read_json(folder / CONFIG, "").get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "a causal LM"


def load_weights(
    build: Callable[[], M],
    names: Callable[[M], Mapping[str, Tensor]],
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype,
) -> M:
    """The model that `build` makes, with the folder's weights, in evaluation mode; `names`: its parameters by their
    names on disk. `ModelError` names the tensor that does not fit."""
    with torch.device("meta"):  # shapes only: no time is spent on weights that are overwritten at once
        model = build()
    # The weights of a model are trainable; only the copying below must not be recorded.
    model = model.to(dtype).to_empty(device=device)
    wanted = names(model)
    missing = set(wanted)
    unexpected: list[str] = []
    for path in _weight_files(folder):
        with opened(path) as file:
            for name in file.keys():
                if name not in wanted:
                    if not _follows(name):
                        unexpected.append(name)
                    continue
                copy_tensor(wanted[name], file.get_tensor(name), f"tensor {name} in {path}", CONFIG)
                missing.discard(name)
    if missing:
        raise ModelError(
            f"{folder}: tensor {min(missing)} is missing ({len(missing)} in all); "
            f"{CONFIG} and weights belong to different models, or a file is not complete: copy the folder again"
        )
    if unexpected:
        raise ModelError(
            f"{folder}: unexpected tensor {min(unexpected)} ({len(unexpected)} in all); "
            f"{CONFIG} describes another model: take both from the same folder"
        )
    return model.eval()


def read_config(folder: str | Path) -> ModelConfig:
    """The shape of the model in `folder`, from its `config.json` alone; `ModelError` names what cannot be used."""
    data, path = read_hf_config(Path(folder)), Path(folder) / CONFIG
    _refuse_options(data, path)
    try:
        return validate(ModelConfig, _from_hf(data, path), str(path))
    except ConfigError as error:
        raise ModelError(f"{error}: this is no possible model; the file is broken") from error


def read_hf_config(folder: Path) -> dict[str, Any]:
    """What is in the folder's config.json; `ModelError` where there is none, or a newer Oriole's."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise ModelError(f"no model folder at {folder}; train one, or give the path of a folder with a {CONFIG}")
    data = read_json(path, "is this a model folder?")
    schema = data.get("oriole_schema", SCHEMA)
    if schema != SCHEMA:
        raise ModelError(f"{path} has schema {schema!r}, this Oriole reads {SCHEMA}; install the Oriole that wrote it")
    return data


def _from_hf(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Our names and values, with transformers' defaults where a key is absent."""
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for key in required:
        if type(data.get(key)) is not int:
            problem = f"{key} = {data[key]!r} is not an integer" if key in data else f"{key} is missing"
            raise ModelError(f"{path}: {problem}; the file is broken, or of no Qwen3 or Llama")
    options = data["oriole"] if data["model_type"] == "oriole" else {}
    qwen = data["model_type"] in ("qwen3", "qwen3_moe") or options.get("qk_norm", data["model_type"] == "oriole")
    heads = data["num_attention_heads"]
    # A null means "as usual" in these files, like an absent key.
    shape = {
        "vocab_size": data["vocab_size"],
        "dim": data["hidden_size"],
        "ffn_dim": data["intermediate_size"],
        "num_layers": data["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": _or(data.get("num_key_value_heads"), 32 if qwen else heads),
        "head_dim": _or(data.get("head_dim"), 128 if qwen else data["hidden_size"] // max(1, heads)),
        "context": _or(data.get("max_position_embeddings"), 32_768 if qwen else 2_048),
        "norm_eps": _or(data.get("rms_norm_eps"), 1e-6),
        "tie_embeddings": _or(data.get("tie_word_embeddings"), False),
        "qk_norm": qwen,
        "init_std": _or(data.get("initializer_range"), 0.02),
    }
    shape |= rope_from_hf(data, shape["context"], path)
    if data["model_type"] == "qwen3":
        shape |= windows_from_hf(data, path)
    if data["model_type"] == "qwen3_moe":
        shape |= experts_from_hf(data, path)
    return shape | options


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _refuse_options(data: dict[str, Any], path: Path) -> None:
    """`ModelError` for an option that would make Oriole compute something else than the model's author."""
    kind = data.get("model_type")
    if kind == "oriole":
        options = data.get("oriole")
        if isinstance(options, dict) and options.get("kind") == "seq2seq":
            raise ModelError(
                f"{path.parent} holds an encoder-decoder, and here a decoder-only model is needed; oriole chat, "
                "generate and eval can use it, and stage seq2seq goes on training it"
            )
        unknown = sorted(set(options) - set(ModelConfig.model_fields)) if isinstance(options, dict) else ["unnamed"]
        if unknown:
            raise ModelError(
                f"{path} uses options this Oriole does not know ({', '.join(unknown)}); "
                "install the Oriole that wrote it"
            )
    elif kind not in ("qwen3", "qwen3_moe", "llama"):
        raise ModelError(f"{path}: model_type is {kind!r}; Oriole loads 'qwen3', 'qwen3_moe' and 'llama'")
    # transformers' Llama and Qwen3-MoE have no windows layer by layer, whatever a folder says.
    layers = set(data.get("layer_types") or ()) - {"full_attention"} if kind in ("llama", "qwen3_moe") else set()
    problems = {
        "attention_bias": data.get("attention_bias"),
        "mlp_bias": data.get("mlp_bias"),
        "use_sliding_window": kind == "llama" and data.get("use_sliding_window"),
        f"layer_types={sorted(map(str, layers))}": layers,
        f"hidden_act={data.get('hidden_act')}": _or(data.get("hidden_act"), "silu") != "silu",
        "quantization_config": data.get("quantization_config"),
    }
    for option, present in problems.items():
        if present:
            raise ModelError(f"{path} uses {option}, which Oriole's model does not have; choose a model without it")


def _weight_files(folder: Path) -> list[Path]:
    """The one file, or the shards that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ModelError(
            f"{folder} has no {WEIGHTS}; Oriole reads weights from safetensors only, so convert others first"
        )
    table = read_json(folder / INDEX, "").get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise ModelError(f"{folder / INDEX} has no weight_map; copy or download the folder again")
    names = sorted(set(table.values()))
    if any(Path(name).name != name for name in names):
        raise ModelError(f"{folder / INDEX} points outside its folder; do not trust this model")
    return [folder / name for name in names]


def _follows(name: str) -> bool:
    """Whether a tensor that the model lacks follows from the others; some tools write a tied head all the same, or the
    rotary frequencies."""
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")
