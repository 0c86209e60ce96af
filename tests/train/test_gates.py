"""Gates, temperatures, residual scales and dropout by depth in training."""

from pathlib import Path

import pytest
import toy_stage
from toy_training import Records, model, trainer

from oriole.model.layers import Block
from oriole.train.prepare import make_tokenizer
from oriole.train.task import model_for


@pytest.mark.parametrize("letter", "gctsrz")
def test_an_option_learns_and_moves_from_where_it_began(tmp_path: Path, letter: str) -> None:
    lm = model(pattern=f"G{letter}")
    plain = dict(model().named_parameters())
    before = {name: p.detach().clone() for name, p in lm.named_parameters() if name not in plain}
    made = trainer(tmp_path, lm=lm, dropout=0.0, steps=40, log_every=1)
    made.fit()
    assert isinstance(made.metrics, Records)
    losses = [record["loss"] for record in made.metrics.of("step")]
    assert sum(losses[-5:]) / 5 < 0.8 * sum(losses[:5]) / 5
    assert before and all((lm.get_parameter(name) - p).abs().max() > 1e-3 for name, p in before.items())


def test_the_recipe_sets_the_dropouts_of_the_model(tmp_path: Path) -> None:
    data = toy_stage.write_data(tmp_path / "data")
    dropouts = {"dropout": 0.2, "head_dropout": 0.1, "dropout_depth": "linear"}
    recipe = toy_stage.recipe("pretrain", data, tmp_path / "run", **dropouts)
    lm = model_for(recipe, make_tokenizer(recipe, None), None)
    last = lm.blocks[-1]
    first = lm.blocks[0]
    assert isinstance(first, Block) and isinstance(last, Block)
    assert (last.dropout, last.attention.head_dropout) == (0.2, 0.1)
    assert first.dropout == pytest.approx(0.2 / len(lm.blocks))
