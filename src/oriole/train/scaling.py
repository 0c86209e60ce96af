"""One dial: from a model's size and the number of tokens to its shape, batch, learning rates and weight decay.

`train.lr = "auto"` and its like in a recipe are replaced by numbers when the recipe is read, so that everything behind
it, and the recipe.toml of the run, has numbers only. N are the parameters without the embedding and an untied head,
D the training tokens, B the tokens of a step. All rules were found for pretraining from random weights.
Nothing here imports torch.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from oriole.model.config import PRESETS, ModelConfig, preset

__all__ = ["best_batch", "best_lr", "best_weight_decay", "matching_muon_lr", "settle", "shape_of"]

AUTO = ("lr", "muon_lr", "weight_decay", "accumulate")
ADAFACTOR_LR = 0.01
WIDTH_STEP = 64


def best_batch(tokens: float) -> float:
    """Tokens of one step, B = 0.58 D^0.571 (Li et al. 2025, "Step Law", found for N = 0.06 … 1 B).

    Zhang et al. 2024 agree that it grows with the tokens and not with the model (B ~ D^0.47). Nanochat's rule, 2^19
    (D / 1.32e9)^0.383, gives four to six times as much at its own sizes and 15 times at five million tokens: a choice
    for the time on many GPUs, where this one is for the fewest tokens.
    """
    return float(0.58 * tokens**0.571)


def best_lr(parameters: float, tokens: float, batch: float) -> float:
    """Peak learning rate of AdamW, 1.79 N^-0.713 D^0.307 at the best batch (Li et al. 2025, "Step Law"), times
    sqrt(B / best B) at another (Malladi et al. 2022: what keeps the noise of Adam's steps the same)."""
    return float(1.79 * parameters**-0.713 * tokens**0.307 * math.sqrt(batch / best_batch(tokens)))


def matching_muon_lr(lr: float, dim: int) -> float:
    """Peak learning rate of Muon whose steps have the size of AdamW's: 0.2 sqrt(d) lr.

    AdamW's steps have a root mean square of 0.2 to 0.4 lr, those of an orthogonal matrix (n, m) 1 / sqrt(max(n, m));
    Liu et al. 2025 ("Muon is scalable") therefore multiply it by 0.2 sqrt(max(n, m)). Here sqrt(max(1, n / m)) of that
    is in Muon's step already, and what is left, sqrt(m), is the root of the width.
    """
    return 0.2 * math.sqrt(dim) * lr


def best_weight_decay(lr: float, parameters: float, tokens: float, batch: float) -> float:
    """Weight decay, 1 / (lr tau S) for S = D / B steps, with tau = 1.084 (D / N)^-0.527.

    AdamW's weights are an average over the last 1 / (lr decay) updates (Wang & Aitchison 2024), and as a share tau of
    all steps its best length depends on the tokens for each parameter only (Bergsma et al. 2025, "Power Lines"). With
    Muon `lr` is that of Muon, for it moves what is decayed.
    """
    tau = 1.084 * (tokens / parameters) ** -0.527
    return float(1 / (lr * tau * tokens / batch))


# --- shapes ----------------------------------------------------------------------------------------------------------


def shape_of(name: str, vocab_size: int) -> ModelConfig | None:
    """The shape that "d384" (a width) or "30M", "1.5B" (parameters in all, embedding included) means; None for others.

    Depth: width / 64, as nanochat's and about GPT-3's small models (Kaplan et al. 2020: the loss hardly depends on it
    between 25 and 100). Heads of 64, two for each key head (Ainslie et al. 2023), SwiGLU of 8/3 of the width (Shazeer
    2020), rounded up to 64. A number of parameters becomes the width that comes nearest.
    """
    if found := re.fullmatch(r"d(\d+)", name):
        width = int(found[1])
        if width < WIDTH_STEP or width % WIDTH_STEP:
            raise ValueError(f"model={name}: a width must be a multiple of {WIDTH_STEP}, for example d384")
        return _of_width(width, vocab_size)
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)([MB])", name):
        budget = float(found[1]) * {"M": 1e6, "B": 1e9}[found[2]]
        shapes = [_of_width(width, vocab_size) for width in range(WIDTH_STEP, 16384, WIDTH_STEP)]
        nearest = min(shapes, key=lambda shape: abs(math.log(shape.num_params() / budget)))
        if not 0.5 < nearest.num_params() / budget < 2:
            raise ValueError(
                f"model={name}: no width comes near it with {vocab_size:,} ids; the nearest has "
                f"{nearest.num_params() / 1e6:.3g}M parameters"
            )
        return nearest
    return None


def _of_width(width: int, vocab_size: int) -> ModelConfig:
    heads = width // 64
    return ModelConfig(
        vocab_size=vocab_size,
        dim=width,
        num_layers=max(2, width // 64),
        num_heads=heads,
        num_kv_heads=heads // 2 if heads % 2 == 0 else heads,
        head_dim=64,
        ffn_dim=-(-8 * width // 3 // 64) * 64,
    )


# --- recipes ---------------------------------------------------------------------------------------------------------


def settle(table: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's table with numbers in place of "auto", a shape in place of "30M", and `derived`, which says where
    they come from. `defaults` are those of its train table. `ValueError` where a rule lacks what it needs.

    `train.batch_tokens` is the size of a step that `train.accumulate = "auto"` is to reach; by default `best_batch`.
    """
    given = table.get("train")
    train = dict(given) if isinstance(given, Mapping) else {}
    vocab_size = _vocab_size(table)
    name = table.get("model", "demo")
    shape = shape_of(name, vocab_size) if isinstance(name, str) and name not in PRESETS else None
    wanted = [key for key in AUTO if train.get(key) == "auto"]
    if shape is None and not wanted and "batch_tokens" not in train:
        return table

    derived = dict(table.get("derived") or {})
    table = {**table, "derived": derived}
    if shape is not None:
        table["model"] = shape.model_dump()
        derived["model"] = (
            f"{name} = {shape.num_params() / 1e6:.3g}M: {shape.num_layers} layers of {shape.dim} "
            f"(width / 64 layers, SwiGLU of 8/3)"
        )
    if not wanted and "batch_tokens" not in train:
        return table

    if table.get("stage") != "pretrain" or table.get("init", "") not in ("", "random"):
        raise ValueError(f"train.{(wanted or ['batch_tokens'])[0]}=auto is for pretraining from random weights")
    tokens = _number(train, "tokens")
    if shape is None:
        shape = preset(name, vocab_size) if isinstance(name, str) else ModelConfig.model_validate(name)
    full = {**defaults, **train}
    micro = _number(full, "batch_size") * _number(full, "length")

    goal = _number(train, "batch_tokens") if "batch_tokens" in train else best_batch(tokens)
    if full["accumulate"] == "auto":
        train["accumulate"] = max(1, round(goal / micro))
        rule = "as asked" if "batch_tokens" in train else f"0.58 D^0.571 = {goal:.3g} tokens a step, Li et al. 2025"
        derived["train.accumulate"] = f"{train['accumulate']} ({rule})"
    elif "batch_tokens" in train:
        raise ValueError("train.batch_tokens is reached by train.accumulate=auto; set that, or leave batch_tokens out")
    train.pop("batch_tokens", None)
    batch = micro * _number({**defaults, **train}, "accumulate")

    parameters = shape.num_params() - shape.embedding_params
    kind = full["optimizer"]
    if full["lr"] == "auto":
        adafactor = kind == "adafactor"
        train["lr"] = _round(ADAFACTOR_LR if adafactor else best_lr(parameters, tokens, batch))
        rule = (
            "relative step of Shazeer & Stern 2018"
            if adafactor
            else "1.79 N^-0.713 D^0.307 sqrt(B / best B), Li et al. 2025"
        )
        derived["train.lr"] = f"{train['lr']:g} ({rule})"
    lr = _number({**defaults, **train}, "lr")
    if full["muon_lr"] == "auto":
        train["muon_lr"] = _round(matching_muon_lr(lr, shape.dim))
        derived["train.muon_lr"] = f"{train['muon_lr']:g} (0.2 sqrt(d) lr, Liu et al. 2025)"
    if full["weight_decay"] == "auto":
        mover = _number({**defaults, **train}, "muon_lr") if kind in ("muon", "normuon") else lr
        train["weight_decay"] = _round(best_weight_decay(mover, parameters, tokens, batch))
        rule = "1 / (lr tau steps), tau = 1.084 (D / N)^-0.527, Bergsma et al. 2025"
        derived["train.weight_decay"] = f"{train['weight_decay']:g} ({rule})"
    table["train"] = train
    return table


def _vocab_size(table: Mapping[str, Any]) -> int:
    tokenizer = table.get("tokenizer")
    size = tokenizer.get("vocab_size", 16384) if isinstance(tokenizer, Mapping) else 16384
    return int(size) if isinstance(size, int | float) else 16384


def _number(table: Mapping[str, Any], key: str) -> float:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"train.{key} must be a number above 0, for what is derived from it; it is {value!r}")
    return float(value)


def _round(value: float) -> float:
    """Three digits: what a rule knows."""
    return float(f"{value:.3g}")
