"""Which files a hub holds, with size and checksum: Hugging Face and its mirrors, and ModelScope.

Both tell the SHA-256 of every large file, so that whatever mirror a file comes from, it can be checked. Files are
listed at one commit, and fetched at that commit: a set that is updated meanwhile is not mixed from two versions.

Sources: huggingface_hub 2.4 (`HfApi.list_repo_tree`), modelscope_hub 0.5 (`list_dataset_files_paginated`).
"""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple
from urllib.parse import quote

from oriole.errors import DataError
from oriole.text.catalogue import Entry
from oriole.text.download import Wanted, checked_path
from oriole.text.web import Gated, Web, host

__all__ = ["Listing", "is_data", "list_files", "pick"]

DATA = (
    ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".xml",
    ".gz", ".bz2", ".xz", ".zst", ".zip", ".tgz",
)  # fmt: skip
"""Endings of data files; repositories hold pictures, licences and code besides."""

NOT_DATA = ("readme*", "license*", "dataset_infos.json", "requirements*.txt", "*.md", ".*", "croissant.json")

PAGE = 200
"""Files that ModelScope lists at once."""


class Listing(NamedTuple):
    """The files of a set and the version they are of."""

    files: list[Wanted]
    revision: str
    """The commit, or the branch where the hub does not tell."""


def list_files(entry: Entry, web: Web, huggingface: Sequence[str], modelscope: str, revision: str = "") -> Listing:
    """All files of a set, from the first hub that answers, each with its addresses on every hub.

    `huggingface`, `modelscope`: addresses of the hubs, best first. `DataError` when none answers.
    """
    if not entry.hub and not entry.modelscope:
        return Listing([_link(link.path, link.addresses, link.size, link.sha256) for link in entry.links], "")
    faults: list[str] = []
    gated: Gated | None = None
    for n, endpoint in enumerate(huggingface if entry.hub else (), 1):
        last = n == len(huggingface) and not entry.modelscope
        try:
            commit, found = _huggingface(endpoint, entry.hub, web, revision or "main", last)
        except Gated as error:
            gated = gated or error
        except DataError as error:
            faults.append(str(error))
        else:
            return Listing([_wanted(f, entry, huggingface, modelscope, commit) for f in found], commit)
    if entry.modelscope:
        try:
            found = _modelscope(modelscope, entry.modelscope, web)
        except DataError as error:
            faults.append(str(error))
        else:
            return Listing([_wanted(f, entry, (), modelscope, "") for f in found], "master")
    if gated is not None:
        raise gated
    raise DataError(f"no hub lists the files of '{entry.name}' ({'; '.join(faults)}); check the network, or set proxy=")


def pick(listing: Listing, patterns: Sequence[str], name: str) -> list[Wanted]:
    """The files that match one of the patterns; without patterns, every data file. `DataError` when none does."""
    paths = [f.path for f in listing.files]
    if patterns:
        chosen = [f for f in listing.files if any(fnmatchcase(f.path, p) for p in patterns)]
    else:
        chosen = [f for f in listing.files if is_data(f.path)]
    if not chosen:
        wish = f"no file of '{name}' matches {', '.join(patterns)}" if patterns else f"'{name}' holds no data file"
        more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
        raise DataError(f"{wish}; it holds {', '.join(paths[:8]) or 'nothing'}{more}; choose with files='…'")
    return sorted(chosen, key=lambda f: f.path)


def is_data(path: str) -> bool:
    """Whether a file of a repository or an archive holds data, by its name."""
    name = path.rsplit("/", 1)[-1].lower()
    return name.endswith(DATA) and not any(fnmatchcase(name, p) for p in NOT_DATA)


class _Found(NamedTuple):
    path: str
    size: int | None
    checksum: str


def _wanted(found: _Found, entry: Entry, huggingface: Sequence[str], modelscope: str, commit: str) -> Wanted:
    path = quote(found.path)
    addresses = [f"{endpoint}/datasets/{entry.hub}/resolve/{commit}/{path}" for endpoint in huggingface]
    # A repository of another owner on another hub: only a checksum can tell that it is the same file.
    if entry.modelscope and (found.checksum or not addresses):
        query = f"Revision=master&FilePath={quote(found.path, safe='')}"
        addresses.append(f"{modelscope}/api/v1/datasets/{entry.modelscope}/repo?{query}")
    return _link(found.path, tuple(addresses), found.size, found.checksum)


def _link(path: str, addresses: tuple[str, ...], size: int | None, checksum: str | None) -> Wanted:
    checked_path(path)
    checksum = checksum or ""
    return Wanted(path, addresses, size, checksum if ":" in checksum or not checksum else f"sha256:{checksum}")


def _huggingface(endpoint: str, repo: str, web: Web, revision: str, last: bool) -> tuple[str, list[_Found]]:
    """The commit that a revision means, and the files in it."""
    about, _ = web.json(f"{endpoint}/api/datasets/{repo}/revision/{quote(revision, safe='')}", last)
    commit = _text(about, "sha", endpoint)
    found: list[_Found] = []
    address: str | None = f"{endpoint}/api/datasets/{repo}/tree/{commit}?recursive=true"
    while address:
        page, response = web.json(address)
        for item in _items(page, endpoint):
            if item.get("type") != "file":
                continue
            lfs = item.get("lfs")
            # Small files lie in git itself; their id is git's own checksum.
            checksum = f"sha256:{_text(lfs, 'oid', endpoint)}" if lfs else f"git:{_text(item, 'oid', endpoint)}"
            found.append(_Found(_text(item, "path", endpoint), _size(item.get("size")), checksum))
        following = response.links.get("next", {}).get("url")
        if following and host(following) != host(endpoint):  # a mirror may pass on the first hub's own links
            following = endpoint + following[following.index(host(following)) + len(host(following)) :]
        address = following
    return commit, found


def _modelscope(endpoint: str, repo: str, web: Web) -> list[_Found]:
    found: list[_Found] = []
    for number in range(1, 1_000):
        query = f"Revision=master&Recursive=True&PageNumber={number}&PageSize={PAGE}"
        page, _ = web.json(f"{endpoint}/api/v1/datasets/{repo}/repo/tree?{query}")
        data = page.get("Data") if isinstance(page, dict) else None
        items = list(_items(data.get("Files") if isinstance(data, dict) else None, endpoint))
        for item in items:
            if item.get("Type") == "tree":
                continue
            sha256 = item.get("Sha256")
            checksum = f"sha256:{sha256}" if isinstance(sha256, str) and sha256 else ""
            found.append(_Found(_text(item, "Path", endpoint), _size(item.get("Size")), checksum))
        if len(items) < PAGE:
            break
    return found


def _items(value: Any, endpoint: str) -> Iterator[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{endpoint} lists the files in a form that this version does not know; update Oriole")
    yield from value


def _text(value: Any, key: str, endpoint: str) -> str:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, str) or not found:
        raise DataError(f"{endpoint} answers without '{key}', in a form that this version does not know; update Oriole")
    return found


def _size(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None
