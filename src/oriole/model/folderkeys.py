"""How a config.json says windows, experts and rotary positions, in the words of transformers 4.57 and of 5."""

import math
from pathlib import Path
from typing import Any

from oriole.errors import ModelError
from oriole.model.config import ModelConfig

__all__ = ["experts_from_hf", "experts_to_hf", "rope_from_hf", "rope_to_hf", "windows_from_hf", "windows_to_hf"]

NTK = "oriole_rope"
"""transformers knows ntk only as another rope_theta; what it was made of stands under this key."""


def windows_to_hf(c: ModelConfig) -> dict[str, Any]:
    """`layer_types` decides; `max_window_layers`, the first layer with a window, is what older programs read."""
    windows = [layer.window for layer in c.layers]
    if not any(windows):
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": c.window,
        "max_window_layers": next(i for i, window in enumerate(windows) if window),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


def windows_from_hf(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """`pattern` and `window` of a Qwen3, with transformers' defaults where a key is absent.

    `ModelError` for layers that are neither, and for layer_types and use_sliding_window that contradict each other.
    """
    layers, on = data["num_hidden_layers"], bool(data.get("use_sliding_window"))
    window = _or(data.get("sliding_window"), 4096)
    types = data.get("layer_types")
    if types is None:
        first = _or(data.get("max_window_layers"), 28) if on else layers
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    kinds = {"full_attention": "G", "sliding_attention": "L"}
    if not isinstance(types, list) or len(types) != layers or any(kind not in kinds for kind in types):
        names = sorted(set(map(str, types))) if isinstance(types, list) else types
        raise ModelError(
            f"{path}: layer_types={names} for {layers} layers; Oriole's model has full_attention and "
            "sliding_attention, one for each layer"
        )
    word = "".join(kinds[kind] for kind in types)
    if "L" not in word:
        return {}
    if not on:
        raise ModelError(
            f"{path}: layer_types={sorted(set(types))} but use_sliding_window is off; the file contradicts itself"
        )
    period = next(n for n in range(1, layers + 1) if word == (word[:n] * layers)[:layers])
    return {"pattern": word[:period], "window": window}


def experts_to_hf(c: ModelConfig) -> dict[str, Any]:
    """What Qwen3-MoE's config has more than Qwen3's."""
    return {
        "num_experts": c.moe.experts,
        "num_experts_per_tok": c.moe.active,
        "moe_intermediate_size": c.expert_dim,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, layer in enumerate(c.layers) if not layer.experts],
        "router_aux_loss_coef": c.moe.balance_weight,
        "output_router_logits": False,
    }


def experts_from_hf(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """`pattern` and `moe` of a Qwen3-MoE, with transformers' defaults where a key is absent.

    `ModelError` where the weights of a token's experts are not divided by their sum.
    """
    if not data.get("norm_topk_prob"):  # transformers' default is false
        raise _lacking("norm_topk_prob=false", path)
    step, dense = _or(data.get("decoder_sparse_step"), 1), set(data.get("mlp_only_layers") or ())
    layers = range(data["num_hidden_layers"])
    words = ["G" if i in dense or (i + 1) % step else "Ge" for i in layers]
    period = next(n for n in range(1, len(words) + 1) if all(words[i] == words[i % n] for i in layers))
    moe = {
        "experts": _or(data.get("num_experts", data.get("num_local_experts")), 128),
        "active": _or(data.get("num_experts_per_tok"), 8),
        "ffn_dim": _or(data.get("moe_intermediate_size"), 768),
        "balance_weight": _or(data.get("router_aux_loss_coef"), 0.001),
    }
    return {"pattern": "".join(words[:period]), "moe": moe}


def rope_to_hf(c: ModelConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` for transformers 4, `rope_parameters` for 5."""
    plain = {"rope_theta": c.scaled_theta, "rope_parameters": {"rope_type": "default", "rope_theta": c.scaled_theta}}
    match c.rope_scaling:
        case "none":
            return plain
        case "ntk":
            return plain | {NTK: {"type": "ntk", "factor": c.rope_factor, "rope_theta": c.rope_theta}}
        case "linear":
            scaling: dict[str, Any] = {"rope_type": "linear", "factor": c.rope_factor}
        case "yarn":
            original = c.trained_context
            scaling = {"rope_type": "yarn", "factor": c.rope_factor, "original_max_position_embeddings": original}
    return {
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": scaling | {"rope_theta": c.rope_theta},
    }


def rope_from_hf(data: dict[str, Any], context: int, path: Path) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling`, `rope_factor` and what yarn's context was, from either dialect or both.

    `ModelError` for what the two say differently, and for a scaling that Oriole's model does not have.
    """
    new, old = (_table(data, key, path) for key in ("rope_parameters", "rope_scaling"))
    tables = [table for table in (new, old) if table]
    bases = (data.get("rope_theta"), new.get("rope_theta"), old.get("rope_theta"))
    base = _one("rope_theta", {float(t) for t in bases if t is not None}, path)
    kind = _one("rope_type", {t.get("rope_type") or t.get("type") or "default" for t in tables}, path) or "default"
    theta = 10_000.0 if base is None else base
    rope = old | new
    partial = rope.get("partial_rotary_factor") or data.get("partial_rotary_factor") or 1
    if partial != 1:
        raise _lacking(f"partial_rotary_factor={partial}", path)
    if kind == "default":
        return _ntk(data, theta, path)
    if kind not in ("linear", "yarn"):
        raise _lacking(f"rope_type={kind}", path)
    factor = _one("factor", {float(t["factor"]) for t in tables if t.get("factor") is not None}, path)
    if factor is None:
        raise ModelError(f"{path}: rope_type={kind} without a factor; the file is broken")
    out = {"rope_theta": theta, "rope_scaling": kind, "rope_factor": factor}
    if factor == 1:
        return {"rope_theta": theta}
    if kind == "linear":
        return out
    usual: dict[str, Any] = {
        "attention_factor": 0.1 * math.log(factor) + 1, "beta_fast": 32, "beta_slow": 1, "truncate": True,
        "mscale": None, "mscale_all_dim": None,
    }  # fmt: skip
    for key, value in usual.items():
        given = _or(rope.get(key), value)
        if given != value and not (key == "attention_factor" and math.isclose(given, value, rel_tol=1e-6)):
            raise _lacking(f"yarn with {key}={given}", path)
    original = int(_or(rope.get("original_max_position_embeddings"), context))
    # Folders whose owner has only added the scaling still give the shorter length as their context.
    longer = max(context, round(original * factor))
    return out | {"context": longer, "rope_original": 0 if round(longer / factor) == original else original}


def _ntk(data: dict[str, Any], theta: float, path: Path) -> dict[str, Any]:
    table = _table(data, NTK, path)
    if not table:
        return {"rope_theta": theta}
    head_dim = data.get("head_dim") or data["hidden_size"] // data["num_attention_heads"]
    try:
        base, factor = float(table["rope_theta"]), float(table["factor"])
        stretched = base * factor ** (head_dim / (head_dim - 2))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{path}: {NTK} = {table!r} is not what Oriole writes; the file is broken") from error
    if not math.isclose(stretched, theta, rel_tol=1e-9):
        raise ModelError(
            f"{path}: rope_theta is {theta:g}, but {NTK} makes it {stretched:g}; remove {NTK} if rope_theta is right"
        )
    return {"rope_theta": base, "rope_scaling": "ntk", "rope_factor": factor}


def _table(data: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    if data.get(key) is not None and not isinstance(data[key], dict):
        raise ModelError(f"{path}: {key} = {data[key]!r} is not a table; the file is broken")
    return data.get(key) or {}


def _one(key: str, values: set[Any], path: Path) -> Any:
    """The value that all places agree on, None where there is none."""
    if len(values) > 1:
        raise ModelError(f"{path}: {key} says {sorted(values)} in two places; keep the one the model was trained with")
    return next(iter(values), None)


def _lacking(option: str, path: Path) -> ModelError:
    return ModelError(f"{path} uses {option}, which Oriole's model does not have; choose a model without it")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
