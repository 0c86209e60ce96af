"""Which model folder a path means, and with what its answers end."""

import contextlib
import json
from pathlib import Path
from typing import Any

from oriole.errors import ModelError
from oriole.log import judged_worse, say
from oriole.model.adapter import is_adapter
from oriole.text.tokenizer import END_OF_TEXT, IM_END

__all__ = ["find_model", "stop_ids"]

STAGE_ORDER = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo", "distill", "seq2seq")
"""Which of two stages is the later one where their files bear the same time."""


def find_model(path: str | Path) -> Path:
    """The model folder that a run, a stage or a model folder means; an adapter folder is one, too.

    In a run it is the newest stage that can chat, or where none can, the newest that can write. A stage that was found
    worse than its parent is passed over, and that is said.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file() or is_adapter(folder):
            return folder
    found = [f.parent for f in path.glob("*/model/config.json") if _writes(f)]
    if not found:
        what = "has no finished stage yet" if path.is_dir() else "does not exist"
        if any(path.glob("*/model/config.json")):
            what = "holds a reward model, which scores answers and writes none"
        raise ModelError(f"no model at {path}: it {what}; give a run, a stage or a model folder")
    worse = {folder for folder in found if judged_worse(folder.parent)}
    chosen = max(found, key=lambda folder: (IM_END in stop_ids(folder), folder not in worse, _age(folder)))
    passed = sorted(folder.parent.name for folder in worse if _age(folder) > _age(chosen))
    if passed:
        say(
            f"using {chosen.parent.name}: {', '.join(passed)} of {path} came out worse than the parent (oriole report "
            f"{path} says why)",
            "yellow",
        )
    return chosen


def _age(folder: Path) -> tuple[float, int]:
    stage = folder.parent.name
    return (folder / "config.json").stat().st_mtime, STAGE_ORDER.index(stage) if stage in STAGE_ORDER else -1


def _writes(config: Path) -> bool:
    """Whether it is a language model, unlike a reward model or an embedder."""
    kinds = _read_json(config).get("architectures") or ["CausalLM"]
    return any(str(kind).endswith(("CausalLM", "ConditionalGeneration")) for kind in kinds)


def stop_ids(folder: Path) -> tuple[int, ...]:
    """The end marks the folder names, in `generation_config.json` or else in `config.json`."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        if isinstance(ids, int):
            return (ids,)
        if isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids):
            return tuple(ids)
    return (END_OF_TEXT,)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; nothing where there is none: whoever needs more says what is missing."""
    with contextlib.suppress(OSError, ValueError):
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict):
            return data
    return {}
