"""`oriole data fetch NAME`: a public data set from the web into a folder, checked, rewritten where needed, attributed.

    data/NAME/            what Oriole reads: the set's own files, or `….jsonl.zst` made of them
    data/NAME/README      where it comes from, its licence, checksums: keep it with the data
    data/NAME/.original/  the files as downloaded, when they were rewritten

Files arrive side by side. Whatever stops the command (Ctrl-C, a dead network, a full disk), the same command goes on.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, final

from pydantic import Field, field_validator

from oriole.errors import ConfigError, DataError, Interrupted, ResourceError, raise_for_os_error
from oriole.log import Tracker, human, say, track
from oriole.text.catalogue import Entry, catalogue, find
from oriole.text.download import ROOM, Wanted, at_hand, checksum, download, free_space
from oriole.text.hubs import is_data, list_files, pick
from oriole.text.recast import is_archive, recast_file, unpack
from oriole.text.web import NetConfig, Stopped, Web, host
from oriole.text.work import Piece, new_file, run_pieces

__all__ = ["FetchConfig", "Fetched", "fetch", "report"]

BIG = 20e9
"""Bytes above which a download is not begun without `--yes`."""

ORIGINAL = ".original"
MANIFEST = ".fetched.json"


class FetchConfig(NetConfig):
    """The keys of `oriole data fetch`."""

    out: str = ""
    """The folder; empty: data/NAME."""
    files: tuple[str, ...] = ()
    """Patterns of the files to take, such as 'data/train-*.parquet'; empty: what the catalogue says."""
    max_files: int = Field(0, ge=0)
    """Take no more than this many files, the first ones by name; 0: all."""
    mirror: str = ""
    """A part of the address of the hub to try first: huggingface, hf-mirror or modelscope."""
    revision: str = ""
    """Commit, tag or branch on the hub; empty: the newest."""
    connections: int = Field(4, ge=1, le=32)
    """Files downloaded at the same time."""
    convert: bool = True
    """Rewrite records that Oriole's readers do not know; false: only download."""
    workers: int = Field(0, ge=0)
    """Processes that rewrite; 0: one on each core."""
    show: bool = False
    """Only tell what is known of the set."""
    huggingface: tuple[str, ...] = ("https://huggingface.co", "https://hf-mirror.com")
    """Hubs that speak Hugging Face's protocol, best first. HF_ENDPOINT, when set, goes before them."""
    modelscope: str = "https://www.modelscope.cn"
    """Address of ModelScope."""

    @field_validator("files", "huggingface", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


@final
@dataclass
class Fetched:
    """What a fetch has brought."""

    name: str
    folder: Path
    revision: str
    files: list[dict[str, Any]]
    """Each file as downloaded: {"path", "size", "sha256", "address"}."""
    outputs: list[Path]
    """The files to read."""
    rows: int | None = None
    """Records written, where they were rewritten."""
    skipped: int = 0
    """Records that did not fit."""
    examples: list[str] = field(default_factory=list)
    """Why: the first reasons."""
    downloaded: int = 0
    """Bytes that came over the network in this call."""
    following: list[str] = field(default_factory=list)
    """Commands to type next."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {k: ([str(p) for p in v] if k == "outputs" else str(v) if k == "folder" else v)
                for k, v in vars(self).items()}  # fmt: skip


def fetch(name: str, config: FetchConfig, *, yes: bool = False, entries: Mapping[str, Entry] | None = None) -> Fetched:
    """Bring the set `name` of the catalogue (or of `entries`) into its folder; files that are there are not fetched.

    `yes`: begin even when it is very large. Raises `DataError` (unknown set, no address serves), `ConfigError` (too
    large), `ResourceError` (disk), `Interrupted` (a signal; everything that has arrived stays).
    """
    entry = find(name, dict(entries) if entries is not None else catalogue())
    folder = Path(config.out or f"data/{entry.name}").expanduser()
    raw = folder / ORIGINAL if entry.recast and config.convert else folder
    huggingface, modelscope = _hubs(entry, config)
    with Web(config, _tokens(huggingface)) as web, _locked(folder):
        listing = list_files(entry, web, huggingface, modelscope, config.revision)
        wanted = pick(listing, config.files or entry.files, entry.name)[: config.max_files or None]
        notes = _Notes(folder / MANIFEST, entry.name, listing.revision)
        missing = [w for w in wanted if not notes.has(w, raw)]
        _agree(entry, missing, raw, yes)
        moved = _download_all(missing, raw, web, config, notes) if missing else 0
        files = [notes.files[w.path] for w in wanted]
        result = Fetched(entry.name, folder, listing.revision, files, [raw / w.path for w in wanted], downloaded=moved)
        _unpack_and_recast(entry, config, raw, result)
        _write_readme(entry, result)
    result.following = _following(entry, result)
    return result


# --- before ----------------------------------------------------------------------------------------------------------


def _hubs(entry: Entry, config: FetchConfig) -> tuple[tuple[str, ...], str]:
    """The hubs to ask, the wished-for one first."""
    own = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    hubs = [*([own] if own else []), *(h.rstrip("/") for h in config.huggingface if h.rstrip("/") != own)]
    modelscope = config.modelscope.rstrip("/")
    if config.mirror:
        if config.mirror in modelscope and entry.modelscope:
            return (), modelscope
        if not any(config.mirror in hub for hub in (*hubs, modelscope)):
            raise ConfigError(f"mirror={config.mirror} is none of {', '.join(map(host, (*hubs, modelscope)))}")
        hubs.sort(key=lambda hub: config.mirror not in hub)
    return tuple(hubs), modelscope


def _tokens(hubs: Sequence[str]) -> dict[str, str]:
    """HF_TOKEN is shown to huggingface.co and to the hub that the user named in HF_ENDPOINT, and to no other."""
    token = os.environ.get("HF_TOKEN", "").strip()
    trusted = {"huggingface.co", host(os.environ.get("HF_ENDPOINT", ""))}
    return {host(hub): token for hub in hubs if host(hub) in trusted} if token else {}


def _agree(entry: Entry, missing: Sequence[Wanted], raw: Path, yes: bool) -> None:
    """Stop before a download that is larger than anyone expects, or than the disk."""
    size = sum(w.size or 0 for w in missing)
    rest = size - sum(min(w.size, at_hand(w, raw)) for w in missing if w.size)
    if rest > BIG and not yes:
        raise ConfigError(
            f"'{entry.name}' is {size / 1e9:.0f} GB in {len(missing)} files; add --yes to download all of it, or take "
            "a part with max_files=2 or files='PATTERN'"
        )
    if missing and rest + ROOM > free_space(raw):
        raise ResourceError(
            f"'{entry.name}' needs {rest / 1e9:.2f} GB, the disk of {raw.parent} has {free_space(raw) / 1e9:.2f} GB "
            "free; free some space, choose another folder with out=, or take a part with max_files="
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep a second fetch out of it: both would append to the same parts."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise_for_os_error(error, "preparing", folder)
    try:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"another process is fetching into {folder}; wait for it or stop it") from None
            except OSError:  # a disk without locks
                pass
        yield
    finally:
        os.close(handle)


@final
class _Notes:
    """What is known of the files at hand, kept in the folder from file to file."""

    def __init__(self, path: Path, name: str, revision: str) -> None:
        self.path, self.name, self.revision = path, name, revision
        self.files: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or edited: files are looked at anew
            noted = json.loads(path.read_text(encoding="utf-8"))
            if noted["schema"] == 1 and noted["name"] == name:
                self.files = {str(f["path"]): dict(f) for f in noted["files"]}

    def has(self, wanted: Wanted, folder: Path) -> bool:
        """Whether the file is there, and is the wanted version of it."""
        path = folder / wanted.path
        if not path.is_file():
            return False
        size, noted = path.stat().st_size, self.files.get(wanted.path, {})
        known = noted.get("size") == size and wanted.size in (None, size)
        if known and wanted.checksum in ("", noted.get("checksum"), f"sha256:{noted.get('sha256')}"):
            return True
        if not wanted.checksum or wanted.size not in (None, size):
            return False
        sha256, right = checksum(path, wanted.checksum)
        if right:
            self.add(wanted, path, sha256, noted.get("address") or wanted.addresses[0])
        return right

    def add(self, wanted: Wanted, path: Path, sha256: str, address: str) -> None:
        """Note a file that has arrived."""
        with self._lock:
            self.files[wanted.path] = {
                "path": wanted.path,
                "size": path.stat().st_size,
                "sha256": sha256,
                "checksum": wanted.checksum,
                "address": address.partition("?")[0] if "FilePath=" not in address else address,
            }
            files = sorted(self.files.values(), key=lambda f: str(f["path"]))
            noted = {"schema": 1, "name": self.name, "revision": self.revision, "files": files}
            with new_file(self.path) as file:
                file.write(json.dumps(noted, ensure_ascii=False, indent=1).encode())


# --- downloading -----------------------------------------------------------------------------------------------------


def _download_all(wanted: Sequence[Wanted], folder: Path, web: Web, config: FetchConfig, notes: _Notes) -> int:
    """Bring the files, several at a time, in order; the bytes that came. The first fault that stays stops all."""
    sizes = [w.size for w in wanted]
    total = sum(s for s in sizes if s is not None) if None not in sizes else None
    queue, faults, lock, came = iter(wanted), list[BaseException](), threading.Lock(), [0]
    done = [0]

    def work(bar: Tracker) -> None:
        def moved(change: int) -> None:
            with lock:
                came[0] += max(0, change)
                bar.update(change)

        while not web.stop.is_set():
            with lock:
                one = next(queue, None)
            if one is None:
                return
            try:
                path, sha256, address = download(one, folder, web, moved)
                notes.add(one, path, sha256, address)
            except Stopped:
                return
            except BaseException as error:
                faults.append(error)
                web.stop.set()
                return
            with lock:
                done[0] += 1
                bar.update(0, files=f"{done[0]}/{len(wanted)}")

    with track(f"fetching {notes.name}", total=total, unit="B", done=sum(at_hand(w, folder) for w in wanted)) as bar:
        threads = [threading.Thread(target=work, args=(bar,), daemon=True) for _ in range(config.connections)]
        with _stopping(web, threads):
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)
    if faults:
        raise faults[0]
    return came[0]


@contextlib.contextmanager
def _stopping(web: Web, threads: Sequence[threading.Thread]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block with `Interrupted`; the threads get three seconds to let go of their files."""

    def ask(signum: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped; what has arrived stays, and the same command goes on", signum)

    main = threading.current_thread() is threading.main_thread()
    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        web.stop.set()
        until = time.monotonic() + 3
        for thread in threads:
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))


# --- after -----------------------------------------------------------------------------------------------------------


def _unpack_and_recast(entry: Entry, config: FetchConfig, raw: Path, result: Fetched) -> None:
    """Unpack archives, rewrite records; sets the outputs and counts of the result."""
    sha256 = {raw / f["path"]: f["sha256"] for f in result.files}
    groups: dict[str, list[Path]] = {}
    """Name of an output -> the files it is made of: one, or those of one folder of an archive."""
    keys: dict[str, str] = {}
    for path in result.outputs:
        relative = path.relative_to(raw)
        if not is_archive(path):
            name = _flat(relative)
            name = "-".join(relative.parts) if name in groups else name  # a.csv beside a.json
            groups[name], keys[name] = [path], sha256[path]
            continue
        into = raw / f"{relative}.d" if raw != result.folder else raw
        for file in unpack(path, into, is_data):
            name = _flat(file.parent.relative_to(into)) or _flat(Path(relative.name))
            groups.setdefault(name, []).append(file)
            keys[name] = keys.get(name, "") + sha256[path]
    if not (entry.recast and config.convert):
        result.outputs = [p for files in groups.values() for p in files]
        return
    recast, lang = entry.recast.model_dump(), entry.languages[0] if len(entry.languages) == 1 else ""
    pieces = [
        Piece(
            name, f"1 {key} {json.dumps(recast, sort_keys=True)}",
            ([str(p) for p in groups[name]], str(result.folder / f"{name}.jsonl.zst"), recast, entry.name, lang),
            (result.folder / f"{name}.jsonl.zst",),
        )
        for name, key in keys.items()
    ]  # fmt: skip
    counts = run_pieces(recast_file, pieces, result.folder / ".done", workers=config.workers, what="rewriting")
    result.outputs = [path for piece in pieces for path in piece.outputs]
    result.rows = sum(c["rows"] for c in counts)
    result.skipped = sum(c["skipped"] for c in counts)
    result.examples = [e for c in counts for e in c["examples"]][:3]
    if not result.rows:
        reason = result.examples[0] if result.examples else "they are empty"
        raise DataError(f"no record of '{entry.name}' could be rewritten ({reason}); the set has changed its form")


def _flat(path: Path) -> str:
    """`data/train-0.parquet` -> `data-train-0`."""
    name = "-".join(part for part in path.parts if part not in (".", ""))
    for ending in (".gz", ".xz", ".bz2", ".zst", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".xml",
                   ".txt", ".zip", ".tgz", ".tar"):  # fmt: skip
        name = name.removesuffix(ending)
    return name


def _write_readme(entry: Entry, result: Fetched) -> None:
    """Attribution: licences such as CC BY ask that name, source, licence and changes go with the data.

    The file has no ending, so that no reader takes it for data.
    """
    lines = [
        f"{entry.title}",
        "",
        f"Source:   {entry.homepage}",
        f"Licence:  {entry.licence}",
        *([f"Note:     {entry.trap}"] if entry.trap else []),
        *([f"Version:  {result.revision}"] if result.revision else []),
        f"Changes:  {_changes(entry, result)}",
        "",
        "Files as downloaded (bytes, SHA-256, name, address):",
        *(f"{f['size']:>13} {f['sha256']} {f['path']} {f['address']}" for f in result.files),
        "",
        "The licence is the one that was known when Oriole's catalogue was written; read the source's page before you",
        "publish data or models. Keep this file with the data.",
    ]
    with new_file(result.folder / "README") as file:
        file.write(("\n".join(lines) + "\n").encode())


def _changes(entry: Entry, result: Fetched) -> str:
    if result.rows is None:
        return "none"
    left = f", {result.skipped} that did not fit left out" if result.skipped else ""
    rule = entry.recast.to if entry.recast else ""
    return f"{result.rows} records rewritten as JSON lines by Oriole's rule '{rule}'{left}"


def _following(entry: Entry, result: Fetched) -> list[str]:
    """What one would do next with a set of this kind."""
    match entry.kind:
        case "text":
            return [f"oriole data clean {result.folder} clean/{entry.name}"]
        case "chat" | "preference":
            return [f"oriole data clean {result.folder} clean/{entry.name} kind={entry.kind}"]
        case "eval":
            return [f"oriole data clean IN... OUT decontaminate={result.folder}"]


def report(result: Fetched) -> None:
    """Tell a person what came."""
    came = f"{human(result.downloaded)}B downloaded" if result.downloaded else "everything was there already"
    say(f"{result.name}: {len(result.files)} files, {came}; source and licence are in {result.folder / 'README'}")
    if result.rows is not None:
        say(f"{result.rows} records rewritten into {len(result.outputs)} files")
    if result.skipped:
        say(f"{result.skipped} records did not fit and were left out, for example {result.examples[0]}")
