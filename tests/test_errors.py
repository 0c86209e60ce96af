"""The error tree: every leaf is the user's, has an exit code, and the docstring's picture of it is true."""

import errno
import inspect
import re
import signal

import pytest

from oriole import errors
from oriole.errors import DataError, Interrupted, MissingExtra, OrioleError, ResourceError, raise_for_os_error


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or ""))
    real = {n for n, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, OrioleError)} - {"OrioleError"}
    assert drawn == real
    assert set(errors.__all__) == real | {"OrioleError", "raise_for_os_error"}


def test_exit_codes() -> None:
    assert OrioleError("x").exit_code == 2
    assert Interrupted("x", signal.SIGINT).exit_code == 130
    assert Interrupted("x", signal.SIGTERM).exit_code == 143
    assert "oriole-lm[hf]" in str(MissingExtra("export", "hf"))


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.ENOSPC, ResourceError, "disk is full while writing /x"),
        (errno.EFBIG, ResourceError, "larger than this system allows while writing /x"),
        (errno.EACCES, ResourceError, "no permission while writing /x"),
        (errno.EIO, DataError, "while writing /x"),
    ],
)
def test_system_errors_become_sentences(code: int, kind: type[OrioleError], words: str) -> None:
    with pytest.raises(kind, match=words):
        raise_for_os_error(OSError(code, "text"), "writing", "/x")
