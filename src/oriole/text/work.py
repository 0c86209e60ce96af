"""Many independent pieces of work, each done once: in this process, in a pool of processes, or on a Ray cluster.

A piece is one call of a module-level function that writes its own files whole (`new_file`) and returns counts. Only
after it has returned is `done/<name>.json` written, so a run that was killed at any moment goes on with the pieces
that lack one, and ends with the same files as a run that was not.

Nothing is shared by the workers, and each works on one thread: the pieces are what runs side by side.
"""

import contextlib
import glob
import itertools
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO, Literal, final

from oriole.errors import ConfigError, DataError, MissingExtra, OrioleError, ResourceError, raise_for_os_error
from oriole.log import track

__all__ = ["Engine", "Piece", "new_file", "run_pieces", "sync_folder"]

Engine = Literal["local", "ray"]
"""Where pieces are worked on: processes of this machine, or the tasks of a Ray cluster."""

Result = dict[str, Any]
Function = Callable[..., Result]

ONE_THREAD = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
"""Environment of a worker: libraries that would start a thread for each core start one."""

IN_FLIGHT = 1000
"""Tasks that are handed to Ray at a time."""

LOCK_WAIT_S = 20.0
"""Seconds to wait for the workers of a killed run, which end by themselves, before a folder counts as in use."""


@final
@dataclass(frozen=True, slots=True)
class Piece:
    """One call of the function."""

    name: str
    """Names the piece's file in the `done` folder, so it must differ from all others' and hold no `/`."""
    key: str
    """A fingerprint of everything that decides the result: inputs, settings, versions. A changed one means again."""
    args: tuple[Any, ...]
    """The arguments, which must pickle."""
    outputs: tuple[Path, ...] = ()
    """Files that a finished piece has left behind; when one is missing, the piece is done again."""


def run_pieces(
    function: Function,
    pieces: Sequence[Piece],
    done: Path,
    *,
    engine: Engine = "local",
    workers: int = 0,
    what: str,
) -> list[Result]:
    """Call `function(*piece.args)` for every piece that is not `done` yet; the results in the order of the pieces.

    `workers`: processes to use, 0 for one on each core, 1 for none but this one. A result must be JSON; it comes back
    as JSON would give it, whether it was made now or read from an earlier run. An `OrioleError` of a piece is raised
    here as itself; whatever stops the run, no worker outlives it.
    """
    if len({p.name for p in pieces}) < len(pieces) or any(Path(p.name).name != p.name for p in pieces):
        raise ValueError("the names of pieces must differ and be file names")
    with _locked(done) as lock:
        results = {i: result for i, p in enumerate(pieces) if (result := _read(done, p)) is not None}
        todo = [i for i in range(len(pieces)) if i not in results]
        with track(what, total=len(pieces), unit="pieces", done=len(results)) as bar:
            with contextlib.closing(_run(function, [pieces[i] for i in todo], engine, workers, lock)) as answers:
                for i, result in answers:
                    results[todo[i]] = _write(done, pieces[todo[i]], result)
                    bar.update(1)
    return [results[i] for i in range(len(pieces))]


def _run(
    function: Function, pieces: Sequence[Piece], engine: Engine, workers: int, lock: int | None
) -> Generator[tuple[int, Result], None, None]:
    """(place, result) of each piece, as they become ready."""
    if workers < 0:
        raise ConfigError(f"workers={workers} is negative; give a number of processes, or 0 for one on each core")
    processes = min(workers or _cores(), len(pieces))
    match engine:
        case "ray":
            yield from _on_ray(function, pieces, workers)
        case "local" if processes <= 1:
            for i, piece in enumerate(pieces):
                yield i, _result(piece, _call(function, piece.args))
        case "local":
            yield from _in_processes(function, pieces, processes, lock)
        case _:
            raise ConfigError(f"engine='{engine}' is unknown; give local or ray")


def _cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- what is done ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_file(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path`, whole and on disk, when the block ends well; else nothing is left.

    Without `sync` a power cut may still lose it, or leave it empty: for what can be made again.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):  # of a worker that was killed
            left.unlink(missing_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(part, path)
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise_for_os_error(error, "writing", path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read(done: Path, piece: Piece) -> Result | None:
    """What an earlier run noted of the piece, if that is still true."""
    try:
        noted = json.loads((done / f"{piece.name}.json").read_text(encoding="utf-8"))
        current = noted["key"] == piece.key and all(path.exists() for path in piece.outputs)
        return dict(noted["result"]) if current else None
    except (OSError, ValueError, KeyError, TypeError):  # missing, or somebody edited it: do the piece again
        return None


def _write(done: Path, piece: Piece, result: Result) -> Result:
    """Note that the piece is done; the result as JSON gives it back."""
    text = json.dumps({"key": piece.key, "result": result}, ensure_ascii=True)
    with new_file(done / f"{piece.name}.json", sync=False) as file:  # one that is lost costs its piece, nothing else
        file.write(text.encode())
    return dict(json.loads(text)["result"])


@contextlib.contextmanager
def _locked(done: Path) -> Iterator[int | None]:
    """Make the folder and hold its lock: two runs in one folder would undo each other's work.

    The lock belongs to the open file, and the workers hold that file, too. So the rerun of a killed run begins only
    when its last worker has ended. None where the system or the disk has no such locks.
    """
    try:
        done.mkdir(parents=True, exist_ok=True)
        handle = os.open(done / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise_for_os_error(error, "preparing", done)
    try:
        yield handle if _lock(handle, done) else None
    finally:
        os.close(handle)


def _lock(handle: int, done: Path) -> bool:
    if sys.platform == "win32":
        return False
    import fcntl

    until = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                raise DataError(
                    f"another command is at work in {done.parent}; wait for it to end, or stop it"
                ) from None
            time.sleep(0.02)
        except OSError:
            return False


# --- one call --------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class _Failure:
    """An error on its way out of a worker, in parts, because not every exception survives pickling."""

    kind: type[OrioleError] | None
    message: str
    exit_code: int
    trace: str


def _call(function: Function, args: tuple[Any, ...]) -> Result | _Failure:
    try:
        return function(*args)
    except OrioleError as error:
        return _Failure(type(error), str(error), error.exit_code, traceback.format_exc())
    except Exception as error:
        return _Failure(None, f"{type(error).__name__}: {error}", 1, traceback.format_exc())


def _result(piece: Piece, answer: Result | _Failure) -> Result:
    """The result of a piece, or its error raised again."""
    if not isinstance(answer, _Failure):
        return answer
    where = "" if piece.name in answer.message else f" (in {piece.name})"
    if answer.kind is None:
        raise RuntimeError(f"{answer.message}{where}\n\nIn the worker:\n{answer.trace}")
    error = answer.kind.__new__(answer.kind)  # its own __init__ may take other arguments than a message
    Exception.__init__(error, answer.message + where)
    error.exit_code = answer.exit_code
    raise error


# --- processes -------------------------------------------------------------------------------------------------------


def _in_processes(
    function: Function, pieces: Sequence[Piece], workers: int, lock: int | None
) -> Generator[tuple[int, Result], None, None]:
    """Each worker takes the next piece when it has answered; all of them are gone when this ends, however it ends."""
    waiting = iter(enumerate(pieces))
    at_work: dict[Connection, tuple[int, Any]] = {}
    started: list[tuple[Any, Connection]] = []

    def give(process: Any, line: Connection) -> None:
        for i, piece in waiting:
            at_work[line] = (i, process)
            with contextlib.suppress(BrokenPipeError):  # it has died; its end of the line says so below
                line.send(piece.args)
            return

    try:
        for _ in range(workers):
            give(*_start(function, lock, started))
        while at_work:
            for line in connection.wait(list(at_work)):
                assert isinstance(line, Connection)
                i, process = at_work.pop(line)
                try:
                    answer = line.recv()
                except (EOFError, ConnectionResetError):
                    process.join()
                    raise ResourceError(_death(process.exitcode, pieces[i].name)) from None
                give(process, line)
                yield i, _result(pieces[i], answer)
    finally:
        for process, line in started:
            process.kill()  # harmless to their files, which are renamed when they are whole
            line.close()
        for process, _ in started:
            process.join()
            process.close()


def _start(function: Function, lock: int | None, started: list[tuple[Any, Connection]]) -> tuple[Any, Connection]:
    """A new worker and the line to it.

    Never a plain fork, which copies locks that other threads hold. A fork server imports the function's module once
    and then forks, before anything has started a thread; where there is none, each worker starts from scratch.
    """
    context: Any = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["__main__", function.__module__])
    mine, theirs = context.Pipe()
    process = context.Process(target=_work, args=(function, theirs, None if lock is None else _Held(lock)), daemon=True)
    with _environment(ONE_THREAD):
        process.start()
    theirs.close()
    started.append((process, mine))
    return process, mine


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables set, for a process that is started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Held:
    """An open file that a worker inherits and keeps open."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __reduce__(self) -> Any:
        return _inherit, (reduction.DupFd(self.handle),)


def _inherit(passed: Any) -> _Held:
    return _Held(passed.detach())


def _work(function: Function, line: Connection, lock: _Held | None) -> None:
    """A worker's life: answer calls until the line is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    os.environ.update(ONE_THREAD)
    threading.Thread(target=_follow_parent, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            line.send(_call(function, line.recv()))


def _follow_parent() -> None:
    """End with the parent, even when it was killed and even in the middle of a piece."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _death(exit_code: int | None, name: str) -> str:
    if exit_code == -getattr(signal, "SIGKILL", 9):
        return (
            f"a worker was killed while it worked on {name}, most likely because memory ran out; run the same command "
            "again with fewer workers (workers=1), it goes on where it was"
        )
    return f"a worker died (exit code {exit_code}) while it worked on {name}; run the same command again"


# --- Ray -------------------------------------------------------------------------------------------------------------


def _on_ray(function: Function, pieces: Sequence[Piece], workers: int) -> Generator[tuple[int, Result], None, None]:
    """A task for each piece, on the cluster that `RAY_ADDRESS` names or else on one of this machine's own cores.

    On a cluster of several machines the paths in the arguments must mean the same files everywhere. The connection, or
    the cluster of this machine, stays for the next pieces of this process and ends with it.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("engine=ray", "cluster") from error
    if not pieces:
        return
    if not ray.is_initialized():
        try:
            _connect(ray, workers)
        except Exception as error:  # Ray raises plain ones, for example when its processes take 30 s to start
            raise ResourceError(f"Ray could not be started or reached ({error}); try again, or engine=local") from error
    task = ray.remote(num_cpus=1, max_retries=2)(_call_alone)
    waiting = iter(enumerate(pieces))
    at_work: dict[Any, int] = {}
    try:
        while True:
            for i, piece in itertools.islice(waiting, (workers or IN_FLIGHT) - len(at_work)):
                at_work[task.remote(function, piece.args)] = i
            if not at_work:
                return
            for answered in ray.wait(list(at_work))[0]:
                i = at_work.pop(answered)
                try:
                    answer = ray.get(answered)
                except ray.exceptions.RayTaskError:
                    raise  # not the function's error, which comes as an answer, but one before or after it
                except ray.exceptions.RayError as error:
                    raise ResourceError(
                        f"Ray lost the work on {pieces[i].name} ({type(error).__name__}); run the same command again, "
                        "it goes on where it was"
                    ) from error
                yield i, _result(pieces[i], answer)
    finally:
        for left in at_work:
            ray.cancel(left, force=True)


def _connect(ray: Any, workers: int) -> None:
    """To the cluster that `RAY_ADDRESS` names, or to a new one of this machine's cores."""
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        ray.init("local", num_cpus=workers or _cores(), include_dashboard=False, **quiet)


def _call_alone(function: Function, args: tuple[Any, ...]) -> Result | _Failure:
    os.environ.update(ONE_THREAD)
    return _call(function, args)
