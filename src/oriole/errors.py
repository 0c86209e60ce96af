"""What can go wrong, as one tree. A command turns every `OrioleError` into one sentence and its exit code.

    OrioleError              the user's to mend: says what, where, what to do          exit 2
    ├── ConfigError          a recipe, key or value that cannot be used
    ├── DataError            a file or record that cannot be read, or too little of it
    ├── ModelError           a model folder or tokenizer that is missing, broken or of another shape
    ├── CheckpointError      a checkpoint that cannot be used to go on
    ├── ResourceError        disk, memory or device that does not suffice
    ├── MissingExtra         an optional library that is not installed
    ├── PeerFailed           another of the processes that train together has failed
    └── Interrupted          a signal stopped the work after everything was saved      exit 130 / 143

Anything else that escapes is a fault of Oriole's own and keeps its traceback.
"""

import errno
import os
from typing import NoReturn

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Interrupted",
    "MissingExtra",
    "ModelError",
    "OrioleError",
    "PeerFailed",
    "ResourceError",
    "raise_for_os_error",
]


class OrioleError(Exception):
    """The user's mistake or misfortune, in one sentence: what, where, what to do."""

    exit_code = 2


class ConfigError(OrioleError):
    """A recipe, key or value that cannot be used."""


class DataError(OrioleError):
    """A file or record that cannot be read, or too little data for what was asked."""


class ModelError(OrioleError):
    """A model folder or tokenizer that is missing, broken, or of another shape."""


class CheckpointError(OrioleError):
    """A checkpoint that cannot be used to go on."""


class ResourceError(OrioleError):
    """Disk, memory or a device that does not suffice."""


class MissingExtra(OrioleError):
    """An optional library that is not installed; names the extra that brings it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional library: pip install 'oriole-lm[{extra}]'")


class PeerFailed(OrioleError):
    """Another of the processes that train together has failed; says which and why."""


class Interrupted(OrioleError):
    """SIGINT or SIGTERM arrived and the state was saved; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def raise_for_os_error(error: OSError, doing: str, path: str | os.PathLike[str]) -> NoReturn:
    """Turn an `OSError` met while `doing` something at `path` into a `ResourceError` or `DataError`."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            raise ResourceError(
                f"the disk is full while {doing} {path}; free some space and run the same command again"
            ) from error
        case errno.EFBIG:
            raise ResourceError(
                f"the file would be larger than this system allows while {doing} {path}; raise the limit (ulimit -f)"
            ) from error
        case errno.EACCES | errno.EPERM | errno.EROFS:
            raise ResourceError(
                f"no permission while {doing} {path}; check the folder's owner and mode, or choose another path"
            ) from error
        case _:
            raise DataError(f"{error.strerror or error} while {doing} {path}") from error
