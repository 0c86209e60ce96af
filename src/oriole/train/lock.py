"""One process at a time in a run folder."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oriole.errors import ResourceError, raise_for_os_error
from oriole.log import say
from oriole.train import dist

__all__ = ["NAME", "alone_in"]

NAME = ".lock"
"""The file that is locked. It stays when the lock is gone: deleting it would leave two processes with two files."""

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that cannot lock (Lustre mounted without `flock`, some FUSE)."""

_held: dict[Path, tuple[int, int]] = {}
"""Folders that this process has locked: how often it has asked, and the file's descriptor."""
_guard = threading.Lock()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No other process is inside such a block with the same folder; the folder is made where it is missing.

    The lock is the operating system's: it goes with the process, however that ends, and nobody has to clean up. Inside
    of one process the block may be entered again. Raises `ResourceError` that names the process which is in there.
    """
    if dist.rank() > 0 or os.environ.get("RANK", "0") != "0":  # of processes that train together the first is enough
        yield
        return
    folder = folder.resolve()
    with _guard:
        times, fd = _held.get(folder, (0, -1))
        _held[folder] = (times + 1, fd if times else _lock(folder))
    try:
        yield
    finally:
        with _guard:
            times, fd = _held.pop(folder)
            if times > 1:
                _held[folder] = (times - 1, fd)
            else:
                os.close(fd)


def _lock(folder: Path) -> int:
    """Lock the folder's file and write into it who did; returns the descriptor that holds the lock."""
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise_for_os_error(error, "locking", path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(fd)
        os.close(fd)
        raise ResourceError(
            f"{folder} is in use by {holder}; wait for it, stop it, or choose another folder with run=…"
        ) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            os.close(fd)
            raise_for_os_error(error, "locking", path)
        say(f"the file system of {folder} cannot lock files: take care that only one process trains there", "yellow")
        return fd
    with contextlib.suppress(OSError):  # a full disk: locked all the same, only without a name
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    return fd


def _holder(fd: int) -> str:
    try:
        who: dict[str, Any] = json.loads(os.pread(fd, 4096, 0))
        return f"process {who['pid']} on {who['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
