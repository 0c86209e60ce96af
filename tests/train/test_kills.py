"""Runs that are killed at random moments, inside of saves too, end with the very weights of the unbroken run."""

import os
import random
import re
import signal
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import toy_stage

from oriole.apps.report import read_events

STAGES = ("pretrain", "sft")
TOKENS = 2 * 2 * 32
"""Of a step."""
SHORT, LONG = 20, 100
"""Steps of each stage; every one of them is followed by a checkpoint."""


def reached(run: Path, stage: str) -> tuple[int, bool]:
    """The last step that a checkpoint was begun for, -1 without; and whether one is being written."""
    try:
        names = os.listdir(run / stage / "checkpoints")
    except OSError:
        return -1, False
    steps = [int(match[1]) for name in names if (match := re.match(r"step-(\d+)", name))]
    return max(steps, default=-1), any(name.endswith(".tmp") for name in names)


def kill(process: BaseProcess, run: Path, stage: str, step: int, inside: bool, delay: float) -> bool:
    """Kill once the run has come to `step` of `stage`, inside of a save or `delay` seconds later; whether in time."""
    while process.is_alive():
        begun, writing = reached(run, stage)
        if begun >= step and (writing or not inside):
            time.sleep(0 if inside else delay)
            break
        time.sleep(0.0005)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def moments(count: int, rng: random.Random, length: int) -> list[tuple[str, int, bool, float]]:
    """`count` random moments of a run in their order: stage, step (-1: from the start on), inside of a save, delay."""
    steps = sorted(rng.sample(range(2 * (length - 1)), count))
    out = []
    for i, step in enumerate(steps):
        stage, at = STAGES[step // (length - 1)], step % (length - 1) + 1
        early = i % 5 == 1  # before the first checkpoint that this process makes
        out.append((stage, -1 if early else at, i % 2 == 0, rng.uniform(0, 0.3 if early else 0.02)))
    return out


def recipes(folder: Path, name: str, optimizer: str, length: int) -> list[str]:
    """The words of the command that trains `folder / name`."""
    data, run = toy_stage.write_data(folder / "data"), folder / name
    made = toy_stage.write_recipes(folder / f"{name}-recipes", data, run, optimizer=optimizer, tokens=TOKENS * length)
    return ["run", str(made)]


def run_with_kills(words: list[str], run: Path, when: Sequence[tuple[str, int, bool, float]]) -> tuple[int, int]:
    """Kill the run at the moments, then let it end: how many kills came in time and how many left half a checkpoint."""
    log = run.with_suffix(".log")
    killed = halves = 0
    for stage, step, inside, delay in when:
        killed += kill(toy_stage.oriole(words, log), run, stage, step, inside, delay)
        halves += step >= 0 and any(run.glob("*/checkpoints/*.tmp"))
    last = toy_stage.oriole(words, log)
    last.join()
    assert last.exitcode == 0, log.read_text()
    return killed, halves


def check(folder: Path, optimizer: str, kills: int, seed: int, length: int) -> tuple[int, int]:
    """Kill, resume, compare with the unbroken run; returns (kills in time, half checkpoints left)."""
    process = toy_stage.oriole(recipes(folder, "run", optimizer, length), folder / "log")
    process.join()
    assert process.exitcode == 0, (folder / "log").read_text()
    words = recipes(folder, "killed", optimizer, length)
    counts = run_with_kills(words, folder / "killed", moments(kills, random.Random(seed), length))
    assert toy_stage.hashes(folder / "killed") == toy_stage.hashes(folder / "run")
    for stage in STAGES:
        events = read_events(folder / "killed" / stage)  # whole lines, whatever was cut off
        assert events[-1]["event"] == "done" and events[-1]["tokens"] == TOKENS * length
    return counts


@pytest.mark.timeout(600)  # some processes, on a machine that may be busy
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_three_kills_change_nothing(tmp_path: Path, optimizer: str) -> None:
    killed, _ = check(tmp_path, optimizer, 3, seed=1, length=SHORT)
    assert killed == 3


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_twenty_kills_change_nothing(tmp_path: Path, optimizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    killed, halves = check(tmp_path, optimizer, 20, seed=time.time_ns(), length=LONG)
    with capsys.disabled():
        print(f"\n{optimizer}: {killed} kills, {halves} of them left half a checkpoint")
    assert killed == 20 and halves >= 3
