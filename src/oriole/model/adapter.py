"""Adapter folders: LoRA's matrices alone, as PEFT writes and loads them.

    adapter_config.json         peft_type LORA, r, lora_alpha, target_modules, the model that was adapted
    adapter_model.safetensors   base_model.model.<Hugging Face module>.lora_A.weight (r, in) and .lora_B.weight (out, r)

A reward model's head goes along, as PEFT's "modules_to_save".
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oriole.config import validate
from oriole.errors import ConfigError, ModelError
from oriole.model.config import LoraConfig
from oriole.model.files import copy_tensor, opened, read_json, write_folder
from oriole.model.folder import load_model
from oriole.model.lm import LM
from oriole.model.lora import LoraLinear, adapters, attach, merge

__all__ = ["base_of", "is_adapter", "load_adapted", "load_adapter", "save_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SCORE = PREFIX + "score.weight"


def is_adapter(folder: str | Path) -> bool:
    """Whether this is an adapter folder and no whole model."""
    return (Path(folder) / CONFIG).is_file() and not (Path(folder) / "config.json").is_file()


def save_adapter(model: LM, folder: str | Path, base: str) -> None:
    """Write the adapters of `model` into `folder`; `base` is the model folder that they belong to.

    `ModelError` when the model has none; `ResourceError` when the disk is full or the folder not writable.
    """
    folder = Path(folder)
    layer = next((module for module in model.modules() if isinstance(module, LoraLinear)), None)
    if layer is None:
        raise ModelError(f"the model has no adapters to write to {folder}; train it with a [lora] table")
    made = adapters(model)
    rank = next(iter(made.values())).a.shape[0]
    tensors = _tensors(model)
    reward = "reward" in model.scalar_heads
    if reward:
        tensors[SCORE] = model.scalar_heads["reward"].get_parameter("weight")
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if reward else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _plain_number(layer.scale * rank),
        "lora_dropout": layer.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in made}),
        "modules_to_save": ["score"] if reward else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    write_folder(folder, WEIGHTS, tensors, torch.float32, {CONFIG: config})


def load_adapter(model: LM, folder: str | Path) -> None:
    """Give `model` the adapters in `folder`, Oriole's or PEFT's own, and their reward head; all else is frozen.

    `ModelError` names the option or tensor that does not fit.
    """
    folder = Path(folder)
    data = read_json(folder / CONFIG, "is this an adapter folder?")
    attach(model, _settings(data, folder / CONFIG))
    wanted = _tensors(model)
    if data.get("modules_to_save"):
        if "reward" not in model.scalar_heads:
            model.scalar_heads["reward"] = nn.Linear(
                model.config.dim, 1, bias=False, device=model.embedding.weight.device
            )
        wanted[SCORE] = model.scalar_heads["reward"].get_parameter("weight")
    with opened(folder / WEIGHTS) as file:
        found = set(file.keys())
        if found != wanted.keys():
            odd = sorted(found ^ wanted.keys())
            what = "unexpected" if odd[0] in found else "missing"
            raise ModelError(
                f"{folder / WEIGHTS}: tensor {odd[0]} is {what} ({len(odd)} do not fit in all); the adapters belong to "
                "a model of another shape, or to layers that Oriole does not adapt"
            )
        for name, tensor in wanted.items():
            copy_tensor(tensor, file.get_tensor(name), f"tensor {name} in {folder / WEIGHTS}", CONFIG)


def base_of(folder: str | Path) -> Path:
    """The model folder that an adapter folder belongs to, as it says itself; `ModelError` when that is not here."""
    folder = Path(folder)
    name = read_json(folder / CONFIG, "is this an adapter folder?").get("base_model_name_or_path")
    for base in (Path(str(name)), folder / str(name)):
        if name and (base / "config.json").is_file():
            return base
    raise ModelError(
        f"{folder} adapts the model {name!r}, which is not here; copy that folder here or correct "
        f"base_model_name_or_path in {folder / CONFIG}"
    )


def load_adapted(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LM:
    """The model that an adapter folder stands for: its base with the adapters merged into it."""
    model = load_model(base_of(folder), device, dtype)
    load_adapter(model, folder)
    merge(model)
    return model.eval()


def _tensors(model: LM) -> dict[str, Tensor]:
    """The adapters' matrices by PEFT's names."""
    out: dict[str, Tensor] = {}
    for name, adapter in adapters(model).items():
        out |= {f"{PREFIX}{name}.lora_A.weight": adapter.a, f"{PREFIX}{name}.lora_B.weight": adapter.b}
    return out


def _settings(data: dict[str, Any], path: Path) -> LoraConfig:
    """The adapters' shape; `ModelError` for an option that would make PEFT compute something else."""
    if data.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type is {data.get('peft_type')!r}; Oriole loads 'LORA'")
    targets = data.get("target_modules")
    if not isinstance(targets, list):
        raise ModelError(f"{path}: target_modules = {targets!r} is not a list of layer names; write it out as one")
    options = {
        "bias": data.get("bias", "none") != "none",
        "use_dora": data.get("use_dora"),
        "fan_in_fan_out": data.get("fan_in_fan_out"),
        "rank_pattern": data.get("rank_pattern"),
        "alpha_pattern": data.get("alpha_pattern"),
        "layers_to_transform": data.get("layers_to_transform") is not None,
        "modules_to_save": (data.get("modules_to_save") or ["score"]) != ["score"],
    }
    for option, present in options.items():
        if present:
            raise ModelError(f"{path} uses {option} = {data[option]!r}, which Oriole's adapters do not have")
    rank, alpha = data.get("r"), data.get("lora_alpha")
    if data.get("use_rslora") and isinstance(rank, int) and isinstance(alpha, int | float):
        alpha = alpha * math.sqrt(rank)  # scaled by alpha / sqrt(r) (Kalajdzievski 2023)
    table = {"rank": rank, "alpha": alpha, "targets": targets, "dropout": data.get("lora_dropout", 0.0)}
    try:
        return validate(LoraConfig, table, str(path))
    except ConfigError as error:
        raise ModelError(f"{error}: no adapter that Oriole can use") from error


def _plain_number(value: float) -> float | int:
    """Whole numbers as such: PEFT says lora_alpha is an int."""
    return round(value) if abs(value - round(value)) < 1e-9 else value
