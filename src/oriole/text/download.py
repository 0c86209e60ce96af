"""Files from the web: resumed where they were left, checked, and never half there under their own name.

A file arrives as `NAME.part`, with `NAME.part.state` beside it that says of which version it is a part. A later call
asks for the rest only (RFC 9110: `Range` with `If-Range`), and a server that has another version by then sends it
whole. The file takes its name when its size and checksum are right. A killed process loses nothing that has arrived.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, final

import httpx

from oriole.errors import DataError, ResourceError, raise_for_os_error
from oriole.text.web import Again, Elsewhere, Gated, Stopped, Web, check_status, host
from oriole.text.work import new_file

__all__ = ["ROOM", "Wanted", "at_hand", "checked_path", "checksum", "download", "free_space"]

ROOM = 64 << 20
"""Bytes of the disk that are never used up."""


@final
@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to have."""

    path: str
    """Where it goes, below the folder; parts are joined by `/`."""
    addresses: tuple[str, ...]
    """Where it can be had, best first; each must give the same bytes."""
    size: int | None = None
    """Bytes, where known."""
    checksum: str = ""
    """`sha256:…` of the file or `git:…`, the id that git gives it (SHA-1); empty where unknown."""


def download(
    wanted: Wanted, folder: Path, web: Web, moved: Callable[[int], None] = lambda _: None
) -> tuple[Path, str, str]:
    """The file in `folder`, its SHA-256 and the address that gave it.

    `moved` is told of every change of the number of bytes at hand, so of fewer ones, too, where a part was of no use.
    Raises `DataError` when no address gives the file, `Gated` when one wants a token and none other serves,
    `ResourceError` for a full disk, `Stopped`.
    """
    target = folder / checked_path(wanted.path)
    faults: list[str] = []
    gated: Gated | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        reachable = sorted(wanted.addresses, key=lambda a: host(a) in web.unreachable)  # stable: best first
        for address in reachable:
            try:
                return target, _from(address, address == reachable[-1], wanted, target, web, moved), address
            except Gated as error:
                gated = gated or error
            except Elsewhere as fault:
                faults.append(f"{host(address)}: {fault}")
    except OSError as error:
        raise_for_os_error(error, "downloading", target)
    if gated is not None:
        raise gated
    raise DataError(f"{wanted.path} could not be downloaded ({'; '.join(faults) or 'it has no address'}); try later")


def _from(address: str, last: bool, wanted: Wanted, target: Path, web: Web, moved: Callable[[int], None]) -> str:
    """Have the file from one address; its SHA-256."""
    part = target.with_name(target.name + ".part")
    state = target.with_name(target.name + ".part.state")

    def attempt() -> str:
        sha256 = _attempt(address, wanted, part, state, web, moved)
        os.replace(part, target)
        state.unlink(missing_ok=True)
        return sha256

    return web.patiently(attempt, address, last, lambda: part.stat().st_size if part.exists() else 0)


def _attempt(address: str, wanted: Wanted, part: Path, state: Path, web: Web, moved: Callable[[int], None]) -> str:
    noted = _read_state(state)
    have = part.stat().st_size if part.exists() else 0
    headers = web.headers(address) | (_ask_for_rest(address, wanted, noted, have) if have else {})
    with web.client.stream("GET", address, headers=headers) as response:
        resumed, size = response.status_code == 206, _total(response)
        if response.status_code == 416:  # there is no rest: all of it is here, or it is no part of this file
            if size != have or wanted.size not in (None, have):
                _discard(part, state, have, moved)
                raise Again("the part at hand is none of the server's file")
            resumed = True
        else:
            check_status(response, address)
            if resumed and not _continues(response, noted, have, address):
                _discard(part, state, have, moved)
                raise Again("the server went on somewhere else than asked")
            if wanted.size is not None and size is not None and size != wanted.size:
                raise Elsewhere(f"its file has {size} bytes where {wanted.size} were expected, so it is another one")
            have = have if resumed else _discard(part, state, have, moved)
            size = size if size is not None else wanted.size
            _check_room(part, size, have)
            _write_state(state, address, response, size)
            _take(response, part, have, size, web, moved)
    now = part.stat().st_size if part.exists() else 0
    if size is not None and now < size:
        raise Again(f"the file ended after {now} of {size} bytes")
    sha256, right = checksum(part, wanted.checksum)
    if not right or (size is not None and now > size):
        _discard(part, state, now, moved)
        reason = f"its checksum is wrong (sha256:{sha256}, expected {wanted.checksum})"
        raise Again(reason) if resumed else Elsewhere(reason)
    return sha256


def _ask_for_rest(address: str, wanted: Wanted, noted: dict[str, Any], have: int) -> dict[str, str]:
    """The headers that ask for what is missing; none when nothing proves that the part belongs to this file."""
    if wanted.size is not None and have > wanted.size:
        return {}
    rest = {"Range": f"bytes={have}-"}
    etag, modified = str(noted.get("etag") or ""), str(noted.get("modified") or "")
    if noted.get("address") == address and (etag or modified):
        strong = bool(etag) and not etag.startswith("W/")
        # A weak tag is not allowed in If-Range; it is compared when the answer comes.
        return rest | ({"If-Range": etag} if strong else {"If-Range": modified} if modified else {})
    # Another address, or a server that marks no versions: the checksum at the end decides.
    return rest if noted and wanted.checksum else {}


def _continues(response: httpx.Response, noted: dict[str, Any], have: int, address: str) -> bool:
    """Whether a 206 goes on where the part ends, in the same version of the file."""
    span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if not span or int(span[1]) != have or _encoded(response):
        return False
    same_size = noted.get("size") in (None, _total(response))
    etag = response.headers.get("ETag")
    other = noted.get("address") == address and etag and noted.get("etag") and etag != noted["etag"]
    return same_size and not other


def _take(
    response: httpx.Response, part: Path, have: int, size: int | None, web: Web, moved: Callable[[int], None]
) -> None:
    """Append the body to the part. Unbuffered, so that a killed process leaves all that it had received."""
    # As it comes, in no fixed portions: those would wait in memory, and be lost with a broken connection.
    chunks = response.iter_bytes() if _encoded(response) else response.iter_raw()
    with open(part, "ab" if have else "wb", buffering=0) as file:
        for chunk in chunks:
            if web.stop.is_set():
                raise Stopped
            if size is not None and have + len(chunk) > size:
                raise Elsewhere(f"it sends more than the {size} bytes of the file")
            file.write(chunk)
            have += len(chunk)
            moved(len(chunk))
        os.fsync(file.fileno())


def at_hand(wanted: Wanted, folder: Path) -> int:
    """Bytes of an unfinished file that earlier calls have left."""
    target = folder / checked_path(wanted.path)
    part = target.with_name(target.name + ".part")
    return part.stat().st_size if part.is_file() else 0


def _discard(part: Path, state: Path, have: int, moved: Callable[[int], None]) -> int:
    part.unlink(missing_ok=True)
    state.unlink(missing_ok=True)
    if have:
        moved(-have)
    return 0


def _check_room(part: Path, size: int | None, have: int) -> None:
    free = free_space(part.parent)
    if size is not None and size - have + ROOM > free:
        raise ResourceError(
            f"the disk of {part.parent} has {free / 1e9:.2f} GB free, {part.name.removesuffix('.part')} needs "
            f"{(size - have) / 1e9:.2f} GB; free some space or choose another folder with out="
        )


def free_space(folder: Path) -> int:
    """Bytes free on the disk where a folder is or will be."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def _read_state(state: Path) -> dict[str, Any]:
    try:
        noted = json.loads(state.read_text(encoding="utf-8"))
        return noted if isinstance(noted, dict) and noted.get("schema") == 1 else {}
    except (OSError, ValueError):  # none, or cut short by a crash: the part proves nothing then
        return {}


def _write_state(state: Path, address: str, response: httpx.Response, size: int | None) -> None:
    noted = {
        "schema": 1,
        "address": address,
        "etag": response.headers.get("ETag"),
        "modified": response.headers.get("Last-Modified"),
        "size": size if not _encoded(response) else None,
    }
    with new_file(state) as file:
        file.write(json.dumps(noted).encode())


# --- checks ----------------------------------------------------------------------------------------------------------


def checked_path(path: str) -> PurePosixPath:
    """A path that stays below the folder it is joined to; `DataError` for any other.

    Names come from servers and archives. Those that other systems cannot write are refused here, too.
    """
    pure = PurePosixPath(path)
    bad = pure.is_absolute() or not pure.parts or any(part in ("..", ".") for part in pure.parts)
    if bad or any(ord(c) < 32 or c in '\\:*?"<>|' for c in path) or pure.name.endswith((".part", ".part.state")):
        raise DataError(
            f"the file name {path!r} cannot be written safely; the set is not what it should be, or was tampered with"
        )
    return pure


def checksum(path: Path, expected: str = "") -> tuple[str, bool]:
    """The SHA-256 of a file, and whether the file is the `expected` one (see `Wanted.checksum`)."""
    sha256, git = hashlib.sha256(), hashlib.sha1(usedforsecurity=False)
    kind, _, value = expected.partition(":")
    git.update(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            if kind == "git":
                git.update(chunk)
    found = {"sha256": sha256.hexdigest(), "git": git.hexdigest(), "": value}
    return sha256.hexdigest(), found.get(kind) == value.lower()


def _total(response: httpx.Response) -> int | None:
    """The size of the whole file, as far as the answer tells."""
    if response.status_code in (206, 416):
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        return int(total) if total.isdigit() else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() and not _encoded(response) else None


def _encoded(response: httpx.Response) -> bool:
    """Whether the body is packed for the way, although nobody asked for it: then its length is not the file's."""
    return response.headers.get("Content-Encoding", "identity").lower() not in ("identity", "")
