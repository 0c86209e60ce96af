"""Ten recorded steps of a tiny model: a change that claims to leave training alone must reproduce them.

After a change that is meant to alter the numbers, record them anew and say why in the commit:

    ORIOLE_RECORD_GOLDEN=1 python -m pytest tests/golden
"""

import json
import os
from pathlib import Path

import pytest
import torch
from toy_training import trainer

RECORD = Path(__file__).parent / "losses.json"


def ten_steps(folder: Path) -> list[dict[str, float]]:
    """Loss and gradient norm of ten steps in fp32, one thread, with accumulation, unequal masks and a schedule."""
    made = trainer(folder, dropout=0.0, steps=10, accumulate=2, log_every=1)
    made.fit()
    return [{key: record[key] for key in ("loss", "grad_norm", "lr")} for record in made.metrics.of("step")]


def test_ten_steps_are_as_recorded(tmp_path: Path) -> None:
    steps = ten_steps(tmp_path)
    if os.environ.get("ORIOLE_RECORD_GOLDEN"):
        RECORD.write_text(json.dumps({"schema": 1, "torch": torch.__version__, "steps": steps}, indent=1) + "\n")
    recorded = json.loads(RECORD.read_text())
    # Another version of torch may sum in another order, and draw other initial weights only if it breaks its promise.
    tolerance = 1e-5 if recorded["torch"] == torch.__version__ else 1e-3
    assert len(steps) == len(recorded["steps"]) == 10
    for ours, theirs in zip(steps, recorded["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
