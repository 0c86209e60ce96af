"""Folders of encoder-decoders: written and read without loss, refused by name where they do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from oriole import cli
from oriole.errors import ConfigError, ModelError
from oriole.model.config import preset
from oriole.model.folder import load_model, save_model
from oriole.model.lm import LM
from oriole.model.seq2seq import Seq2Seq
from oriole.model.seq2seqconfig import SEQ2SEQ_PRESETS, Seq2SeqConfig
from oriole.model.seq2seqfolder import is_seq2seq, load_seq2seq, save_seq2seq

SHAPE: dict[str, Any] = {
    "vocab_size": 40, "dim": 16, "encoder_layers": 1, "decoder_layers": 2, "num_heads": 2, "ffn_dim": 24, "context": 16,
}  # fmt: skip


def build(**more: Any) -> Seq2Seq:
    torch.manual_seed(0)
    return Seq2Seq(Seq2SeqConfig.model_validate(SHAPE | more)).eval()


@pytest.mark.parametrize("more", [{}, SEQ2SEQ_PRESETS["tfchat"].model_dump() | SHAPE, {"positions": "relative"}])
def test_a_folder_comes_back_bit_for_bit(tmp_path: Path, more: dict[str, Any]) -> None:
    model = build(**more)
    save_seq2seq(model, tmp_path, chat=True)
    again = load_seq2seq(tmp_path)
    assert again.config == model.config and is_seq2seq(tmp_path) and not again.training
    source, target = torch.randint(0, 40, (1, 9)), torch.randint(0, 40, (1, 7))
    assert torch.equal(again(target, source=source).h, model(target, source=source).h)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_neither_kind_is_taken_for_the_other(tmp_path: Path) -> None:
    save_seq2seq(build(), tmp_path / "a", chat=False)
    with pytest.raises(ModelError, match="holds an encoder-decoder, and here a decoder-only model is needed"):
        load_model(tmp_path / "a")
    save_model(LM(preset("demo", vocab_size=20).model_copy(update={"num_layers": 1})), tmp_path / "b", chat=True)
    with pytest.raises(ModelError, match="holds no encoder-decoder but a model of type 'qwen3'"):
        load_seq2seq(tmp_path / "b")
    with pytest.raises(ModelError, match="no model folder at"):
        load_seq2seq(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"oriole_schema": 2}, "has schema 2, this Oriole reads 1"),
        ({"oriole": SHAPE | {"kind": "seq2seq", "gates": True}}, "unknown key 'gates'.*the file is broken, or a newer"),
        ({"oriole": SHAPE | {"kind": "seq2seq", "decoder_layers": 3}}, "tensor decoder.2.* is missing"),
        ({"oriole": SHAPE | {"kind": "seq2seq", "decoder_layers": 1}}, "unexpected tensor decoder.1"),
        ({"oriole": SHAPE | {"kind": "seq2seq", "ffn_dim": 20}}, "config.json says"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_seq2seq(build(), tmp_path, chat=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        load_seq2seq(tmp_path)


def test_a_plan_of_one_is_refused_by_name() -> None:
    recipe = cli.load_recipe("seq2seq/seq2seq", [])
    with pytest.raises(ConfigError, match="reckons decoder-only models; seq2seq/seq2seq trains an encoder-decoder"):
        cli.plan._shape("seq2seq/seq2seq", recipe, {})
