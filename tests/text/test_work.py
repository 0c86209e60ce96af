"""Pieces of work: done once, in order, whatever stops the run, and no worker left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from oriole.errors import ConfigError, DataError, MissingExtra, OrioleError, ResourceError
from oriole.text.work import Piece, new_file, run_pieces

FUNCTIONS = '''
"""The functions of the pieces, in a module of their own that a worker can import."""

import os, signal, time
from pathlib import Path

from oriole.errors import DataError, MissingExtra
from oriole.text.work import new_file

def square(n, log):
    with open(log, "a") as file:
        file.write(f"{n} {os.getpid()}\\n")
    return {"n": n, "square": n * n, "pair": (n, n)}

def write(path, size, seconds):
    with new_file(Path(path)) as file:
        file.write(b"x" * (size // 2))
        file.flush()
        time.sleep(seconds)
        file.write(b"y" * (size // 2))
    return {"size": size}

def fail(n):
    match n:
        case 2: raise DataError("line 3 is bad; mend it")
        case 3: raise MissingExtra("reading", "pdf")
        case 4: raise KeyError("a fault")
        case 5: os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return {}

def threads():
    return {name: os.environ.get(name) for name in ("TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS")}
'''

PARENT = """
import sys
from pathlib import Path
import functions_of_test_work as functions
from oriole.text.work import Piece, run_pieces

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    seconds = [0, 0, *[float(sys.argv[2])] * 4]
    pieces = [Piece(f"p{i}", "k", (str(folder / f"{i}.bin"), 200_000, s)) for i, s in enumerate(seconds)]
    print("ready", flush=True)
    try:
        run_pieces(functions.write, pieces, folder / ".done", workers=2, what="writing")
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """FUNCTIONS as a module."""
    import importlib

    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "functions_of_test_work.py").write_text(FUNCTIONS)
    (folder / "parent.py").write_text(PARENT)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "functions_of_test_work", raising=False)
    return importlib.import_module("functions_of_test_work")


def squares(log: Path, count: int = 8, key: str = "k") -> list[Piece]:
    return [Piece(f"n{n}", key, (n, str(log))) for n in range(count)]


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_pieces_and_only_once(
    functions: ModuleType, tmp_path: Path, workers: int
) -> None:
    log, done = tmp_path / "log", tmp_path / ".done"
    first = run_pieces(functions.square, squares(log), done, workers=workers, what="squaring")
    assert [r["square"] for r in first] == [n * n for n in range(8)]
    assert first[0]["pair"] == [0, 0]  # as JSON gives it, so that a resumed run sees the same
    assert len(log.read_text().splitlines()) == 8
    pids = {int(line.split()[1]) for line in log.read_text().splitlines()}
    assert (os.getpid() in pids) == (workers == 1) and len(pids) <= workers

    assert run_pieces(functions.square, squares(log), done, workers=workers, what="squaring") == first
    assert len(log.read_text().splitlines()) == 8  # none was called again


def test_a_changed_key_a_missing_note_and_a_broken_note_mean_again(functions: ModuleType, tmp_path: Path) -> None:
    log, done = tmp_path / "log", tmp_path / ".done"
    run_pieces(functions.square, squares(log), done, workers=1, what="squaring")
    (done / "n1.json").unlink()
    (done / "n2.json").write_text('{"key": "k", "resu')
    (done / "n3.json").write_text('["k"]')
    pieces = squares(log)
    pieces[5] = Piece("n5", "other", (50, str(log)))
    log.unlink()
    results = run_pieces(functions.square, pieces, done, workers=1, what="squaring")
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["1", "2", "3", "50"]
    assert results[5]["n"] == 50 and results[4]["n"] == 4


def test_a_piece_whose_output_was_deleted_is_done_again(functions: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    pieces = [Piece("p", "k", (str(out), 10, 0.0), outputs=(out,))]
    run_pieces(functions.write, pieces, tmp_path / ".done", what="writing")
    out.unlink()
    run_pieces(functions.write, pieces, tmp_path / ".done", what="writing")
    assert out.read_bytes() == b"xxxxxyyyyy"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "n, kind, message",
    [
        (2, DataError, r"line 3 is bad; mend it \(in piece2\)"),
        (3, MissingExtra, r"oriole-lm\[pdf\].*piece3"),
        (4, RuntimeError, "KeyError: 'a fault' .in piece4.(.|\n)*functions_of_test_work"),
    ],
)
def test_an_error_arrives_as_itself_with_the_piece_named(
    functions: ModuleType, tmp_path: Path, workers: int, n: int, kind: type[Exception], message: str
) -> None:
    pieces = [Piece(f"piece{i}", "k", (i,)) for i in (0, 1, n)]
    with pytest.raises(kind, match=message) as raised:
        run_pieces(functions.fail, pieces, tmp_path / ".done", workers=workers, what="failing")
    assert not isinstance(raised.value, OrioleError) or raised.value.exit_code == 2
    assert not (tmp_path / ".done" / f"piece{n}.json").exists()


def test_a_worker_that_is_killed_is_reported_with_its_piece(functions: ModuleType, tmp_path: Path) -> None:
    pieces = [Piece(f"piece{i}", "k", (i,)) for i in (0, 1, 5)]
    with pytest.raises(ResourceError, match=r"killed while it worked on piece5.*workers=1"):
        run_pieces(functions.fail, pieces, tmp_path / ".done", workers=2, what="failing")


def test_a_worker_has_one_thread_and_the_parent_keeps_its_own(
    functions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    results = run_pieces(
        functions.threads, [Piece(n, "k", ()) for n in "ab"], tmp_path / ".done", workers=2, what="looking"
    )
    assert results == [{"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}] * 2
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_mistakes_are_named(functions: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workers=-1 is negative"):
        run_pieces(functions.square, squares(tmp_path / "log"), tmp_path / ".done", workers=-1, what="")
    with pytest.raises(ConfigError, match="engine='spark' is unknown; give local or ray"):
        run_pieces(functions.square, squares(tmp_path / "log"), tmp_path / ".done", engine="spark", what="")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must differ"):
        run_pieces(functions.square, squares(tmp_path / "log") * 2, tmp_path / ".done", what="")
    with pytest.raises(ValueError, match="file names"):
        run_pieces(functions.square, [Piece("a/b", "k", ())], tmp_path / ".done", what="")
    assert run_pieces(functions.square, [], tmp_path / ".done", what="") == []


def test_a_second_run_in_the_same_folder_is_refused(
    functions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    (tmp_path / ".done").mkdir()
    monkeypatch.setattr("oriole.text.work.LOCK_WAIT_S", 0.05)
    with open(tmp_path / ".done" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another command is at work in"):
            run_pieces(functions.square, squares(tmp_path / "log"), tmp_path / ".done", what="")


def test_new_file_leaves_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    (tmp_path / ".a.bin.999999.part").write_bytes(b"left by a killed worker")
    with new_file(path) as file:
        file.write(b"first")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), new_file(path) as file:
        file.write(b"second")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["a.bin"]


# --- stopped from outside --------------------------------------------------------------------------------------------


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that works on six files with two workers, in a session of its own."""
    code = folder / "code"
    environment = {**os.environ, "PYTHONPATH": str(code)}
    process = subprocess.Popen(
        [sys.executable, str(code / "parent.py"), str(folder), str(seconds)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def session(leader: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, sid = rest.split()[:4]
        if int(sid) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def check_whole(folder: Path) -> None:
    """Every file that has a name is whole, and so is every note."""
    for path in folder.glob("*.bin"):
        assert path.stat().st_size == 200_000
    for path in (folder / ".done").glob("*.json"):
        assert json.loads(path.read_text())["result"] == {"size": 200_000}
        assert (folder / f"{path.stem[1:]}.bin").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_killed_parent_leaves_no_worker_and_no_torn_file(functions: ModuleType, tmp_path: Path) -> None:
    process = start(tmp_path, 60)
    wait_for(lambda: (tmp_path / ".done" / "p0.json").exists())
    wait_for(lambda: list(tmp_path.glob(".*.part")))  # in the middle of a file
    assert len(session(process.pid)) >= 3
    process.kill()
    process.wait()
    wait_for(lambda: not session(process.pid))
    process.communicate()
    check_whole(tmp_path)
    assert len(list((tmp_path / ".done").glob("*.json"))) < 6

    again = start(tmp_path, 0)
    assert again.wait() == 0
    again.communicate()
    check_whole(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".done", *(f"{i}.bin" for i in range(6)), "code"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_ctrl_c_stops_all_of_it_quietly(functions: ModuleType, tmp_path: Path) -> None:
    process = start(tmp_path, 60)
    wait_for(lambda: list(tmp_path.glob(".*.part")))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers too
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors == ""
    wait_for(lambda: not session(process.pid))
    check_whole(tmp_path)


# --- Ray -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ray_gives_the_same_results_and_the_same_errors(functions: ModuleType, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    log = tmp_path / "log"
    local = run_pieces(functions.square, squares(log), tmp_path / "local", workers=1, what="squaring")
    log.unlink()
    environment = {"env_vars": {"PYTHONPATH": str(tmp_path / "code")}}
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        far = run_pieces(functions.square, squares(log), tmp_path / "ray", engine="ray", what="squaring")
        assert far == local
        pids = {int(line.split()[1]) for line in log.read_text().splitlines()}
        assert os.getpid() not in pids
        for a in (tmp_path / "local").glob("*.json"):
            assert a.read_bytes() == (tmp_path / "ray" / a.name).read_bytes()
        for n, kind, message in (
            (2, DataError, r"mend it \(in piece2\)"),
            (3, MissingExtra, "piece3"),
            (5, ResourceError, "Ray lost the work on piece5"),
        ):
            with pytest.raises(kind, match=message):
                pieces = [Piece(f"piece{i}", "k", (i,)) for i in (0, n)]
                run_pieces(functions.fail, pieces, tmp_path / ".done", engine="ray", what="failing")
        assert ray.is_initialized()  # a cluster that was there before stays
    finally:
        ray.shutdown()


def test_a_ray_that_cannot_be_reached_is_one_sentence(
    functions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")

    def init(*args: Any, **settings: Any) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ResourceError, match=r"Ray could not be started or reached \(nobody answers\).*engine=local"):
        run_pieces(functions.square, squares(tmp_path / "log"), tmp_path / ".done", engine="ray", what="")
