"""Preferences that help, shown on the built-in corpus: every stage of them with three seeds, from one parent.

The parent is the demo's, fine-tuned for half a minute only (0.3M tokens), so that there is something left to learn;
each stage takes at most five minutes on two cores. The figures that docs/results.md gives are printed (`pytest -s`).
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from oriole.apps.curves import read_stage
from oriole.log import last_record

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
SEEDS = (1, 2, 3)
STAGES: Mapping[str, list[str]] = {
    "reward": [],
    "dpo": [
        "train.tokens=1.2e6", "train.lr=3e-4", "parts.pairs.weight=2.0", "parts.own.files=['../own.jsonl']",
        "parts.own.val=['val_preference.jsonl']",
    ],
    "grpo": ["train.epochs=0.5"],
    "ppo": [],
}  # fmt: skip
"""What is set beside the recipes demo/STAGE."""


def oriole(*words: str) -> None:
    """Run the command on all cores; the tests themselves hold to one."""
    env = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run([sys.executable, "-m", "oriole.cli", *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a short fine-tuning, and `own.jsonl`: pairs in which a checkpoint of it is the worse side."""
    run = tmp_path_factory.mktemp("parent") / "run"
    oriole("train", "demo/pretrain", f"run={run}")
    oriole("train", "demo/sft", f"run={run}", "train.tokens=3e5", "checkpoint.keep_every=100")
    oriole("data", "prefer", str(run), "checkpoint=step-100", "limit=6000", f"output={run / 'own.jsonl'}")
    return run


def trained(parent: Path, run: Path, stage: str, seed: int, *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last evaluation and the gate's record of the stage, trained from the parent."""
    words = [f"run={run}", f"data={parent / 'data'}", f"init={parent / 'sft' / 'model'}", f"train.seed={seed}"]
    oriole("train", f"demo/{stage}", *words, *STAGES[stage], *more)
    last = read_stage(run / stage).last("eval")
    gate = last_record(run / stage / "metrics.jsonl", "gate")
    drop = ("samples", "settings", "rule", "event")
    print(json.dumps({stage: seed} | {k: v for k, v in (last | gate).items() if k not in drop}))
    return last, gate


@pytest.fixture(scope="module")
def reward_model(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first seed's."""
    run = tmp_path_factory.mktemp("reward")
    trained(parent, run, "reward", SEEDS[0])
    return run / "reward" / "model"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_reward_model_tells_held_out_pairs_apart(parent: Path, reward_model: Path, tmp_path: Path, seed: int) -> None:
    if seed == SEEDS[0]:
        last = read_stage(reward_model.parent).last("eval")
    else:
        last, _ = trained(parent, tmp_path, "reward", seed)
    assert last["pairs"] == 600 and last["accuracy"] >= 0.80 and last["auc"] >= 0.85, last


@pytest.mark.parametrize("seed", SEEDS)
def test_dpo_makes_better_answers(parent: Path, tmp_path: Path, seed: int) -> None:
    last, gate = trained(parent, tmp_path, "dpo", seed)
    assert last["eval_rewards/accuracies"] >= 0.88
    rules = gate["judges"]["rules"]
    assert gate["verdict"] == "better"
    assert rules["wins"] / (rules["wins"] + rules["losses"]) >= 0.70, "of the answers of which one is better"
    assert gate["exact_match"]["difference"]["value"] >= -0.01
    bpb = gate["bpb"]
    assert all(bpb["stage"][lang] <= 1.02 * bpb["parent"][lang] for lang in ("zh", "en")), "of held-out chats"


@pytest.mark.parametrize("seed", SEEDS)
def test_grpo_lifts_held_out_arithmetic(parent: Path, tmp_path: Path, seed: int) -> None:
    last, gate = trained(parent, tmp_path, "grpo", seed)
    assert last["reward_gain_interval"][0] > 0, "share of right sums, more than the parent's"
    assert gate["verdict"] != "worse", "on questions of all kinds"


@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_raises_the_held_out_reward_near_its_parent(
    parent: Path, reward_model: Path, tmp_path: Path, seed: int
) -> None:
    last, _ = trained(
        parent, tmp_path, "ppo", seed, f"rollout.reward_model={reward_model}", f"gate.reward_model={reward_model}"
    )
    assert last["reward_gain_interval"][0] > 0
    assert read_stage(tmp_path / "ppo").last("step")["objective/kl"] <= 1.5, "nats an answer"
