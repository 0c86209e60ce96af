"""Recipes and the latent block: what no stage trains is refused for a new model, and left as it is in a parent."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy_stage

from oriole.errors import ConfigError
from oriole.model.config import ModelConfig
from oriole.model.folder import save_model
from oriole.model.lm import LM
from oriole.text.tokenizer import Tokenizer
from oriole.train.batch import Batch
from oriole.train.objectives import LMObjective
from oriole.train.recipe import StageName
from oriole.train.task import model_for

CROSS = toy_stage.SHAPE | {"reasoning": {"steps": 2, "cross": True, "step_embedding": True}}


def test_a_block_that_looks_beside_is_refused_in_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.reasoning\.cross=true is for models trained in Python"):
        toy_stage.recipe("pretrain", tmp_path, tmp_path, model=CROSS)
    toy_stage.recipe("pretrain", tmp_path, tmp_path, model=CROSS | {"reasoning": {"steps": 2}})


@pytest.mark.parametrize("stage, left", [("sft", {"cross"}), ("dpo", {"cross", "confidence"})])
def test_every_parameter_of_a_parent_is_trained_or_frozen(tmp_path: Path, stage: StageName, left: set[str]) -> None:
    """A parameter that is neither would keep a group of processes waiting for its gradient."""
    tokenizer = Tokenizer([])
    save_model(LM(ModelConfig.model_validate(CROSS | {"vocab_size": tokenizer.vocab_size})), tmp_path, chat=True)
    recipe = toy_stage.recipe("sft", tmp_path, tmp_path).model_copy(update={"stage": stage})
    model = model_for(recipe, tokenizer, tmp_path)
    x = torch.randint(16, 200, (2, 9))
    batch = Batch(x, x.roll(-1, 1), torch.zeros_like(x).int(), torch.arange(9).expand(2, 9))
    if stage == "sft":
        LMObjective()(model, batch).sum.backward()
    else:
        model.head("logits", model(batch.tokens, batch.doc, batch.pos).h).logsumexp(-1).sum().backward()
    frozen: dict[str, Any] = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert {word for name in frozen for word in ("cross", "confidence") if word in name} == left
    assert all("cross" in name or "confidence" in name for name in frozen)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
