"""Two processes in one run folder: the second is told who is there."""

import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import toy_stage
from toy_training import trainer

from oriole.errors import ResourceError
from oriole.train.lock import alone_in
from oriole.train.stage import run_stage


def _stands(pid: int) -> bool:
    """Whether every thread has stopped: a signal is sent in an instant, and a write that goes on ends first."""
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in threads)


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[BaseProcess]:
    """`oriole run`, held in the middle of pretraining in tmp_path/run."""
    data = toy_stage.write_data(tmp_path / "data")
    recipes = toy_stage.write_recipes(tmp_path / "recipes", data, tmp_path / "run", tokens=1e6)
    process = toy_stage.oriole(["run", str(recipes)], tmp_path / "log")
    while not (tmp_path / "run" / "pretrain" / "checkpoints" / "step-1").exists():
        assert process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    while not _stands(process.pid):
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


@pytest.mark.timeout(600)  # processes, on a machine that may be busy
def test_a_second_process_is_refused_by_name_until_the_first_is_gone(tmp_path: Path, busy: BaseProcess) -> None:
    refused = f"is in use by process {busy.pid} on {socket.gethostname()}; wait for it, stop it, or choose another"
    recipes = tmp_path / "recipes"
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for words in (
        ["run", str(recipes)],
        ["train", str(recipes / "sft.toml")],
        ["run", str(recipes), "train.resume=no"],
    ):
        second = toy_stage.oriole(words, tmp_path / "second.log")
        second.join()
        said = (tmp_path / "second.log").read_text()
        assert second.exitcode == 2 and said.startswith("oriole: ") and refused in said and "Traceback" not in said
        (tmp_path / "second.log").unlink()
    with pytest.raises(ResourceError, match=refused):
        run_stage(toy_stage.recipe("pretrain", tmp_path / "data", tmp_path / "run"))
    with pytest.raises(ResourceError, match=refused):
        trainer(tmp_path / "run" / "pretrain").fit()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()} == before

    busy.kill()  # held as it is: nobody cleans up
    busy.join()
    with alone_in(tmp_path / "run"), alone_in(tmp_path / "run" / "pretrain"):
        pass


def test_one_process_may_enter_again_and_leaves_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "other name").symlink_to(tmp_path)
    with alone_in(tmp_path):
        with alone_in(tmp_path / "other name"):
            pass
        with pytest.raises(BlockingIOError):
            _flock(tmp_path)  # still locked after the inner block
    _flock(tmp_path)
    trainer(tmp_path / "run").fit()
    _flock(tmp_path / "run")


def _flock(folder: Path) -> None:
    with open(folder / ".lock", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_without_a_name(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("{")
    with open(tmp_path / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ResourceError, match="is in use by another process;"), alone_in(tmp_path):
            pass
    with alone_in(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / ".lock").read_text()


def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def unsupported(fd: int, how: int) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with alone_in(tmp_path):
        pass
    assert "cannot lock files: take care that only one process trains there" in capfd.readouterr().err
