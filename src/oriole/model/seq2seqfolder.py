"""Folders of encoder-decoders: "model_type": "oriole" with the shape under "oriole", and tensors by their own names."""

from pathlib import Path
from typing import Any

import torch

from oriole.config import validate
from oriole.errors import ConfigError, ModelError
from oriole.model.files import read_json, write_folder
from oriole.model.folder import (
    CONFIG,
    END_OF_TEXT,
    END_OF_TURN,
    GENERATION,
    SCHEMA,
    WEIGHTS,
    load_weights,
    read_hf_config,
)
from oriole.model.seq2seq import START, Seq2Seq
from oriole.model.seq2seqconfig import Seq2SeqConfig

__all__ = ["is_seq2seq", "load_seq2seq", "save_seq2seq"]


def is_seq2seq(folder: str | Path) -> bool:
    """Whether the folder's config.json says that an encoder-decoder is in it."""
    path = Path(folder) / CONFIG
    options = read_json(path, "").get("oriole") if path.is_file() else None
    return isinstance(options, dict) and options.get("kind") == "seq2seq"


def save_seq2seq(model: Seq2Seq, folder: str | Path, *, chat: bool, dtype: torch.dtype = torch.float32) -> None:
    """Write `model.safetensors`, `generation_config.json` and `config.json` into `folder`, each in one atomic step.

    `chat` models stop at the end of a turn or of the text, others at the end of the text only. `ResourceError` when the
    disk is full or the folder not writable.
    """
    ends = {"eos_token_id": [END_OF_TURN, END_OF_TEXT] if chat else END_OF_TEXT, "pad_token_id": END_OF_TEXT}
    ends |= {"decoder_start_token_id": START}
    width = str(dtype).removeprefix("torch.")
    config: dict[str, Any] = {
        "architectures": ["OrioleForConditionalGeneration"],
        "model_type": "oriole",
        "oriole": model.config.model_dump(mode="json"),
        "is_encoder_decoder": True,
        "vocab_size": model.config.vocab_size,
        "tie_word_embeddings": True,
        "dtype": width,
        "torch_dtype": width,
        "oriole_schema": SCHEMA,
        **ends,
    }
    objects = {GENERATION: ends, CONFIG: config}
    write_folder(Path(folder), WEIGHTS, dict(model.named_parameters()), dtype, objects)


def load_seq2seq(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Seq2Seq:
    """The encoder-decoder in `folder`, in evaluation mode. `ModelError` names what does not fit."""
    folder = Path(folder)
    data = read_hf_config(folder)
    if not is_seq2seq(folder):
        raise ModelError(
            f"{folder} holds no encoder-decoder but a model of type {data.get('model_type')!r}; give a folder that "
            "oriole train seq2seq/… has made"
        )
    try:
        config = validate(Seq2SeqConfig, data["oriole"], str(folder / CONFIG))
    except ConfigError as error:
        raise ModelError(f"{error}: the file is broken, or a newer Oriole wrote it") from error
    return load_weights(lambda: Seq2Seq(config), lambda model: dict(model.named_parameters()), folder, device, dtype)
