"""One process or many: the few questions a run asks, answered alike whether torch.distributed is running or not.

Tensors are added up by collectives. Everything else that processes tell each other (a failure, where to resume, that
something is made) is text in the store through which they met, so that no pickle is ever sent, and so that whoever
waits there can still hear a signal.
"""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from oriole import errors
from oriole.errors import ConfigError, Interrupted, OrioleError, PeerFailed, ResourceError
from oriole.log import console
from oriole.train.batch import Batch

__all__ = [
    "agree",
    "awaited",
    "barrier",
    "first",
    "key",
    "publish",
    "rank",
    "rows_each",
    "seed",
    "share",
    "started",
    "sum",
    "told",
    "world",
]

T = TypeVar("T")

TIMEOUT = timedelta(minutes=20)
"""How long a process waits for the others inside a step before it gives up."""
POLL_S = 0.02
"""Seconds between two looks into the store."""
LINGER_S = 0.1
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process, and what any other launcher must."""

_FAILED = "failed"


class _Session:
    """What a group of processes shares beside torch's own state."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.keys = itertools.count()  # every process asks the same questions in the same order


_session: _Session | None = None


# --- starting and ending ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(device: str = "auto") -> Iterator[None]:
    """Join the processes that a launcher has started along with this one; alone, or once joined, do nothing.

    `device` is the recipe's: GPUs speak by nccl, CPUs by gloo, and each process takes the GPU of its LOCAL_RANK. Only
    process 0 shows progress. An error in one process ends all: the others raise `PeerFailed` with its message instead
    of what their broken collectives say. `ConfigError` or `ResourceError` when the group cannot be formed.
    """
    global _session
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or _session is not None:
        yield
        return
    own, size, local = _environment()
    quiet, console.quiet = console.quiet, own > 0
    gpu = _gpu(device, local)
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=TIMEOUT)))
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        torch_dist.init_process_group(backend, store=store, rank=own, world_size=size, timeout=TIMEOUT)
        _session = _Session(PrefixStore("oriole", store))
        with _failing_together():
            yield
    finally:
        _session, console.quiet = None, quiet
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()
            # A thread of gloo may still wait for the interpreter, to let go of what the last collective held; if that
            # had ended by then, it would abort the process (torch 2.13).
            time.sleep(LINGER_S)


def _environment() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK."""
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} asks for several processes, but {', '.join(missing)} is not set; "
            "start them with torchrun (docs/distributed.md)"
        )
    own, size, local = (int(os.environ[name]) for name in VARIABLES[:3])
    return own, size, local


def _gpu(device: str, local: int) -> bool:
    """Whether to train on GPUs; if so this process takes its own."""
    kind, _, number = device.partition(":")
    if number:
        raise ConfigError(
            f"train.device={device} with several processes, of which each takes a GPU of its own; use {kind}"
        )
    if kind not in ("auto", "cuda") or not torch.cuda.is_available():
        return False
    if local >= torch.cuda.device_count():
        raise ResourceError(
            f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}; "
            "start as many processes as there are GPUs (torchrun --nproc_per_node)"
        )
    torch.cuda.set_device(local)
    return True


@contextlib.contextmanager
def _failing_together() -> Iterator[None]:
    """Publish this process's error, or replace it by the one that another has published."""
    assert _session is not None
    try:
        yield
    except (Interrupted, PeerFailed):
        raise
    except BaseException as error:
        text = str(error) if isinstance(error, OrioleError) else f"{type(error).__name__}: {error}"
        # A peer that is gone breaks this process's collectives; what it published before it went is the reason.
        broken = isinstance(error, RuntimeError) and _is_broken_collective(error)
        try:
            if not broken:
                _session.store.compare_set(_FAILED, "", json.dumps([rank(), text]))
            elif not (_session.store.check([_FAILED])):
                raise PeerFailed("another process has ended without a word (killed, or out of memory?)") from error
            _raise_if_failed(error)
        except torch_dist.DistStoreError:
            if broken:
                raise PeerFailed("the process that holds the store has ended") from error
        raise


def _is_broken_collective(error: RuntimeError) -> bool:
    text = str(error)
    signs = ("Connection closed", "Connection reset", "Broken pipe", "gloo", "Timed out")
    return isinstance(error, torch_dist.DistError) or any(sign in text for sign in signs)


def _raise_if_failed(cause: BaseException | None = None) -> None:
    """`PeerFailed` when another process has published an error."""
    if _session is not None and _session.store.check([_FAILED]):
        who, text = json.loads(_session.store.get(_FAILED))
        if who != rank():
            raise PeerFailed(f"process {who} failed: {text}") from cause


# --- tensors ---------------------------------------------------------------------------------------------------------


def world() -> int:
    """Number of processes that train together."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 … world() - 1."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def sum(tensor: Tensor) -> Tensor:
    """The tensor summed over all processes; with one process the tensor itself. The argument is not changed."""
    if world() == 1:
        return tensor
    total = tensor.detach().clone()
    torch_dist.all_reduce(total)
    return total


def agree(number: int) -> int:
    """The largest of the processes' numbers, by way of the hosts: no GPU is waited for."""
    if world() == 1:
        return number
    most = torch.tensor(number, dtype=torch.int64)
    torch_dist.all_reduce(most, torch_dist.ReduceOp.MAX)
    return int(most)


def barrier() -> None:
    """Return when every process has come here."""
    agree(0)


def seed(number: int, step: int) -> None:
    """Start torch's random numbers anew, for this step and this process; the device is not waited for."""
    state = np.random.SeedSequence((number % 2**32, step, rank())).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


# --- data ------------------------------------------------------------------------------------------------------------


def rows_each(rows: int) -> int:
    """Rows of each process when a step has `rows`; `ConfigError` when they cannot be divided."""
    if rows % world():
        raise ConfigError(
            f"a step of {rows} rows (train.batch_size x train.accumulate) cannot be divided among {world()} processes; "
            f"make it a multiple of {world()}"
        )
    return rows // world()


def share(micro: Sequence[Batch]) -> list[Batch]:
    """This process's part of a step's micro-batches, in micro-batches that are no larger.

    All processes read the same batches and keep different rows of them, so that a step is the same step for any number
    of processes, and where the data stand is the same number everywhere.
    """
    count = world()
    if count == 1:
        return list(micro)
    if len(micro) % count == 0:
        return list(micro[rank() :: count])
    each = rows_each(len(micro) * len(micro[0].tokens))
    most = len(micro[0].tokens)
    pieces = next(n for n in range(-(-each // most), each + 1) if each % n == 0)
    own = Batch.joined(micro).cut(rank() * each, (rank() + 1) * each)
    size = each // pieces
    return [own.cut(start, start + size) for start in range(0, each, size)]


# --- words -----------------------------------------------------------------------------------------------------------


def key(what: str) -> str:
    """A name for a piece of news, the same in all processes as long as they ask in the same order; in the main thread
    only."""
    return f"{what}/{next(_session.keys)}" if _session is not None else what


def publish(name: str, news: Any) -> None:
    """Let all processes know `news`, something that JSON can hold, under a name from `key`; alone, nothing happens."""
    if _session is not None:
        _session.store.set(name, json.dumps(news))


def awaited(name: str) -> Any:
    """What some process publishes under `name`, for hours if need be; raises what went wrong with another meanwhile."""
    assert _session is not None, "one process has nobody to wait for"
    while not _session.store.check([name]):
        _raise_if_failed()
        time.sleep(POLL_S)
    return json.loads(_session.store.get(name))


@contextlib.contextmanager
def first() -> Iterator[bool]:
    """Process 0 does what is inside before the others do it; whether this is process 0.

    Whatever is made and kept on a disk that all can see is made once and found by the others.
    """
    name = key("first")
    if rank() > 0:
        awaited(name)
    yield rank() == 0
    if rank() == 0:
        publish(name, None)


def told(find: Callable[[], T]) -> T:
    """What `find` gives in process 0, told to all; something that JSON can hold. Only process 0 calls it.

    An `OrioleError` there is raised in all of them, so that all may deal with it alike.
    """
    if _session is None:
        return find()
    name = key("told")
    if rank() == 0:
        try:
            publish(name, {"value": find()})
        except OrioleError as error:
            publish(name, {"error": type(error).__name__, "text": str(error)})
            raise
    news = awaited(name)
    if "error" in news:
        raise getattr(errors, news["error"])(news["text"])
    value: T = news["value"]
    return value
