"""Saving beside training: what is written is the moment it was asked for, and nothing of it is lost or left unsaid."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_stage
from toy_training import Counting, digest, model, trainer

from oriole.errors import Interrupted, ResourceError
from oriole.train import checkpoint
from oriole.train.batch import Batch, Packer

TIMEOUT_S = 60


class At(Packer):
    """Calls `act` while the batch of one step is fetched."""

    def __init__(self, step: int, act: Callable[[], Any]) -> None:
        super().__init__(Counting(), 4, 32)
        self.left, self.act = step, act

    def __next__(self) -> Batch:
        self.left -= 1
        if self.left == 0:
            self.act()
        return super().__next__()


class Disk:
    """Stands between the checkpoints and the disk: every flush waits until `free` is set, then may fail."""

    def __init__(self, fsync: Callable[[int], None]) -> None:
        self.free, self.full, self.asked, self._fsync = threading.Event(), False, threading.Event(), fsync

    def fsync(self, fd: int) -> None:
        self.asked.set()
        assert self.free.wait(TIMEOUT_S)
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._fsync(fd)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk(os.fsync)
    monkeypatch.setattr(os, "fsync", made.fsync)
    yield made
    made.free.set()


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").iterdir())


def test_training_goes_on_and_the_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path: Path, disk: Disk) -> None:
    made = trainer(tmp_path / "a", checkpoint_every=5, more={"data": At(9, disk.free.set)})
    made.fit()  # would wait for ever, were steps 6, 7 and 8 not done while step 5 is being written
    assert steps(tmp_path / "a") == [10, 12]

    kept = trainer(tmp_path / "b", checkpoint_every=5, keep=3)
    kept.fit()
    late = trainer(tmp_path / "c", checkpoint_every=5, keep=3, more={"data": At(9, disk.free.set)})
    disk.free.clear()
    late.fit()
    one, other = (checkpoint.load(tmp_path / run / "checkpoints" / "step-5") for run in "bc")
    assert one.tensors.keys() == other.tensors.keys() == {"model", "optimizer", "rng"}
    for stem, named in one.tensors.items():
        assert all(torch.equal(tensor, other.tensors[stem][name]) for name, tensor in named.items())
    assert {k: v for k, v in one.state.items() if "seconds" not in k} == {
        k: v for k, v in other.state.items() if "seconds" not in k
    }


def test_a_disk_that_fills_while_training_goes_on_is_noticed_at_the_next_step(tmp_path: Path, disk: Disk) -> None:
    def fail() -> None:
        disk.full = True
        disk.free.set()
        made.saver._writing._thread.join(TIMEOUT_S)

    made = trainer(tmp_path, checkpoint_every=5, steps=100, more={"data": At(8, fail)})
    with pytest.raises(ResourceError, match=r"disk is full while saving the checkpoint .*step-5"):
        made.fit()
    assert made.now.step == 8 and steps(tmp_path) == []
    disk.full = False
    made.saver.save()  # not believed to be saved
    made.saver.wait()
    assert steps(tmp_path) == [8]


def test_a_signal_while_a_checkpoint_is_written_leaves_two_whole_ones(tmp_path: Path, disk: Disk) -> None:
    def act() -> None:
        assert disk.asked.wait(TIMEOUT_S)
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Timer(0.2, disk.free.set).start()

    with pytest.raises(Interrupted, match="after step 7 of 12; all is saved"):
        trainer(tmp_path, checkpoint_every=5, more={"data": At(7, act)}).fit()
    assert steps(tmp_path) == [5, 7]
    assert all(checkpoint.load(tmp_path / "checkpoints" / f"step-{n}").step == n for n in (5, 7))


def test_a_signal_during_the_last_save_is_not_forgotten(tmp_path: Path, disk: Disk) -> None:
    def act() -> None:
        assert disk.asked.wait(TIMEOUT_S)
        os.kill(os.getpid(), signal.SIGTERM)
        disk.free.set()

    threading.Thread(target=act).start()
    with pytest.raises(Interrupted, match="after step 12 of 12; all is saved") as stopped:
        trainer(tmp_path).fit()
    assert stopped.value.exit_code == 143
    assert steps(tmp_path) == [12]


def test_an_error_of_training_waits_for_the_checkpoint_and_is_the_one_that_is_raised(
    tmp_path: Path, disk: Disk, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        threading.Timer(0.2, disk.free.set).start()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tmp_path / "a", checkpoint_every=5, more={"data": At(7, fail)}).fit()
    assert steps(tmp_path / "a") == [5]
    disk.free.clear()
    disk.full = True
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tmp_path / "b", checkpoint_every=5, more={"data": At(7, fail)}).fit()
    assert "disk is full while saving the checkpoint" in capfd.readouterr().err


def test_a_second_signal_waits_for_nothing(tmp_path: Path, disk: Disk) -> None:
    def act() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    made = trainer(tmp_path, checkpoint_every=5, more={"data": At(7, act)})
    with pytest.raises(KeyboardInterrupt):
        made.fit()
    assert not disk.free.is_set()
    disk.free.set()
    made.saver.wait()  # it is written all the same where the process lives on
    assert steps(tmp_path) == [5]


@pytest.mark.timeout(600)  # a process, on a machine that may be busy
def test_a_second_ctrl_c_ends_the_process_in_the_middle_of_a_save(tmp_path: Path) -> None:
    data = toy_stage.write_data(tmp_path / "data")
    recipes = toy_stage.write_recipes(tmp_path / "recipes", data, tmp_path / "run")
    process = toy_stage.oriole(["run", str(recipes)], tmp_path / "log", hung_disk=True)
    while not list(tmp_path.glob("run/pretrain/checkpoints/*.tmp")):
        assert process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.01)
    while process.is_alive():  # once more after every tenth of a second: two that come together count as one
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(0.1)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 130 and "Traceback" not in said and "Exception ignored" not in said


# --- which ones stay -------------------------------------------------------------------------------------------------

BPB = {0: 9.0, 3: 4.0, 6: 2.0, 9: 3.0, 12: 2.5}


def evaluate(step: int) -> dict[str, Any]:
    return {"bpb": {"zh": BPB[step] - 1, "en": BPB[step] + 1}}


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [10, 12]),
        ({"keep": 1}, [12]),
        ({"keep": 1, "keep_best": 1}, [6, 12]),
        ({"keep": 1, "keep_best": 3}, [6, 9, 12]),
        ({"keep": 1, "keep_every": 4}, [4, 8, 12]),
        ({"keep": 2, "keep_best": 1, "keep_every": 4}, [4, 6, 8, 10, 12]),
    ],
)
def test_last_best_and_every(tmp_path: Path, settings: dict[str, int], expected: list[int]) -> None:
    trainer(tmp_path, checkpoint_every=2, eval_every=3, **settings, more={"evaluate": evaluate}).fit()
    assert steps(tmp_path) == expected


def test_the_best_of_a_broken_run_is_remembered_by_the_resumed_one(tmp_path: Path) -> None:
    def run(data: Packer) -> None:
        settings = {"checkpoint_every": 2, "eval_every": 3, "keep": 1, "keep_best": 1}
        trainer(tmp_path, **settings, lm=model(0.1), more={"evaluate": evaluate, "data": data}).fit()

    with pytest.raises(Interrupted):
        run(At(8, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert steps(tmp_path) == [6, 8]
    run(Packer(Counting(), 4, 32))
    assert steps(tmp_path) == [6, 12]
    best = trainer(tmp_path / "b", resume=str(tmp_path / "checkpoints" / "step-6"), more={"evaluate": evaluate})
    best.fit()
    unbroken = trainer(tmp_path / "c", more={"evaluate": evaluate})
    unbroken.fit()
    assert digest(best.model) == digest(unbroken.model)
