"""Who answers and who judges in `oriole data prefer`: a checkpoint of training can answer, too."""

from pathlib import Path

from oriole.apps.api import Oriole
from oriole.apps.gate import Score, reward_score
from oriole.apps.prefer import PreferConfig
from oriole.errors import ModelError
from oriole.log import say
from oriole.train import checkpoint

__all__ = ["judge_for", "model_for"]


def model_for(run: Path, how: PreferConfig) -> Oriole:
    """The model that answers, where `how` wants it to be."""
    folder = _answering(run, how)
    if not (folder / "manifest.json").exists():
        say(f"answers come from {folder}")
        return Oriole(folder).place(how)
    stage = folder.parent.parent
    if not (stage / "model" / "config.json").exists():
        raise ModelError(f"{stage} is not finished, so its checkpoints cannot answer yet; go on training it first")
    found = checkpoint.load(folder)
    say(f"answers come from {stage.name} as it was after step {found.step:,}")
    oriole = Oriole(stage)
    try:
        # What a stage trains beside its model ([deep]) has no part in answers.
        own = {name: tensor for name, tensor in found.tensors["model"].items() if not name.startswith("deep.")}
        oriole.model.load_state_dict(own)
    except (RuntimeError, KeyError) as error:
        raise ModelError(
            f"{folder} holds more than a language model (adapters, a value model), and cannot answer alone; name a "
            "stage's model, or a checkpoint of sft"
        ) from error
    return oriole.place(how)


def _answering(run: Path, how: PreferConfig) -> Path:
    kept = run / "sft" / "checkpoints"
    if how.checkpoint:
        return kept / how.checkpoint if (kept / how.checkpoint).exists() else Path(how.checkpoint)
    steps = checkpoint.steps(kept) if how.chosen == "data" else []
    return kept / f"step-{min(steps)}" if steps else run


def judge_for(run: Path, how: PreferConfig, oriole: Oriole) -> Score | None:
    """The reward model's scores, where it judges."""
    if how.judge == "rules":
        return None
    folder = how.reward_model or run / "reward" / "model"
    if not folder.exists():
        raise ModelError(
            f"no reward model at {folder}; train one first (stage reward), name it with reward_model=FOLDER, or let "
            "rules judge: judge=rules"
        )
    return reward_score(folder, oriole.tokenizer, oriole.model.embedding.weight.device)
