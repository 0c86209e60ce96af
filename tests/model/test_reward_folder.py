"""A reward model's folder is transformers' Qwen3ForSequenceClassification, scores and all; other kinds are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from oriole.errors import ModelError
from oriole.infer.score import score
from oriole.model.folder import load_model, load_reward_model, save_model, to_hf
from oriole.model.lm import LM


def with_head(model: LM) -> LM:
    """The same weights, and a head that is far from its initial value."""
    made = LM(model.config.model_copy(update={"tie_embeddings": True}), heads=("reward",)).eval()
    body = {name: t for name, t in model.state_dict().items() if not name.startswith("lm_head")}
    made.load_state_dict(body, strict=False)
    with torch.no_grad():
        made.scalar_heads["reward"].get_parameter("weight").normal_(0.0, 0.3)
    return made


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_scores_equal_transformers_on_the_saved_folder(make: Any, tmp_path: Path, qk_norm: bool, tied: bool) -> None:
    from transformers import AutoModelForSequenceClassification

    model = with_head(make(qk_norm=qk_norm, tie_embeddings=tied, head_dim=20))
    save_model(model, tmp_path, chat=True)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(theirs).__name__ == ("Qwen3" if qk_norm else "Llama") + "ForSequenceClassification"
    assert theirs.config.num_labels == 1
    drawn = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 97, (n,), generator=drawn) for n in (40, 17, 5)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=theirs.config.pad_token_id)
    with torch.inference_mode():
        reference = theirs(padded, attention_mask=(padded != 0).long()).logits.squeeze(-1)
    assert reference.std() > 0.1, "scores that do not vary prove nothing"
    ids = [row.tolist() for row in rows]
    torch.testing.assert_close(score(model, ids), reference, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(score(load_reward_model(tmp_path), ids), reference, atol=1e-5, rtol=1e-5)


def test_on_disk_there_is_a_score_and_nothing_that_generates(small: LM, tmp_path: Path) -> None:
    save_model(with_head(small), tmp_path, chat=True)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["score.weight"].shape == (1, 48) and "lm_head.weight" not in tensors
    assert not (tmp_path / "generation_config.json").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"] and config["num_labels"] == 1


def test_save_load_save_is_the_identity(small: LM, tmp_path: Path) -> None:
    save_model(with_head(small), tmp_path / "a", chat=True)
    save_model(load_reward_model(tmp_path / "a"), tmp_path / "b", chat=True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_folder_saved_by_transformers_loads(make: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    save_model(with_head(make(tie_embeddings=False)), tmp_path / "ours", chat=True)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine = load_reward_model(tmp_path / "theirs")
    for name, tensor in to_hf(load_reward_model(tmp_path / "ours")).items():
        assert torch.equal(to_hf(mine)[name], tensor), name


def test_each_kind_is_refused_where_the_other_is_wanted(small: LM, tmp_path: Path) -> None:
    save_model(small, tmp_path / "lm", chat=True)
    save_model(with_head(small), tmp_path / "reward", chat=True)
    with pytest.raises(ModelError, match=r"lm holds a language model \(Qwen3ForCausalLM\).* cannot score"):
        load_reward_model(tmp_path / "lm")
    with pytest.raises(ModelError, match="reward holds a reward model: it scores answers and cannot write any"):
        load_model(tmp_path / "reward")
    with pytest.raises(ModelError, match="no model folder"):
        load_reward_model(tmp_path / "nothing")


def test_a_classifier_of_several_labels_is_no_reward_model(small: LM, tmp_path: Path) -> None:
    save_model(with_head(small), tmp_path, chat=True)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_labels": 3, "id2label": {"0": "a", "1": "b", "2": "c"}}))
    with pytest.raises(ModelError, match="3 classes; a reward model has one label"):
        load_reward_model(tmp_path)
    del config["num_labels"], config["id2label"]  # which means two to transformers
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="2 classes"):
        load_reward_model(tmp_path)


def test_a_head_that_is_missing_is_named(small: LM, tmp_path: Path) -> None:
    save_model(with_head(small), tmp_path, chat=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"tensor score.weight is missing"):
        load_reward_model(tmp_path)
