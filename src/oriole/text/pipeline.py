"""`oriole data clean`: from files as they are found to a corpus that is worth training on, with a report to tune it by.

    read          each input by itself, in parallel, record by record
    rules         `text.rules`, each document through all of them until one drops it
    decontaminate documents that share 13 words with an evaluation file go
    held out      a share of the documents, chosen by the hash of their text, is set aside before anything is learnt
    dedup         `text.dedup`, within and across all inputs, held-out ones included: no twin of one stays to train on
    write         OUT/<input>.jsonl.zst, OUT/heldout/<input>.jsonl.zst, OUT/report.json, OUT/report.html

Every step works on pieces that are written whole and noted in OUT/.done (`text.work`): a run that was killed goes on
where it was and ends with the same bytes, and one whose settings have changed repeats only what they touch. Memory does
not grow with the corpus, but for dedup's signatures. OUT/.done also keeps the cleaned documents between the steps; it
may be deleted when the corpus is as it should be.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import xxhash
from pydantic import Field, field_validator

from oriole import __version__
from oriole.config import Config, apply_overrides, parse_overrides, read_toml, to_toml, validate
from oriole.errors import DataError, raise_for_os_error
from oriole.text import cleanreport
from oriole.text.cleansteps import DECONTAMINATE, bad_records, chat_rules, clean_input, finish
from oriole.text.dedup import DedupConfig, Duplicates, find_duplicates
from oriole.text.llamafactory import data_sets
from oriole.text.paths import DESCRIPTION, Skipped, expand, names_sets, plain_stem
from oriole.text.rules import RulesConfig, build_rules
from oriole.text.ruleschat import ChatRulesConfig, build_chat_rules
from oriole.text.twins import near_pairs
from oriole.text.work import Engine, Piece, run_pieces

__all__ = ["CleanConfig", "Input", "clean", "read_config"]

SCHEMA = 1
"""Changes when the steps do: pieces of another schema are done again."""
PARTS = ("cleaned", "heldout")
GROUP_BYTES = 64 << 20
"""Text files of one folder are one input up to this size, since a folder may hold a hundred thousand."""
PAGES = (".txt", ".md", ".markdown", ".html", ".htm", ".pdf")
"""Kinds of files of which each is one document."""


class CleanConfig(Config):
    """The keys of `oriole data clean`, on the command line or in the file that `config=` names."""

    kind: Literal["text", "chat", "preference"] = "text"
    """What the inputs hold: running text, conversations, or preference pairs. A wiki dump is read as either of the
    first two: articles, or questions about them."""
    rules: RulesConfig = RulesConfig()
    """Which rules, with what thresholds; `rules=light` or `rules=full` for a preset."""
    chat: ChatRulesConfig = ChatRulesConfig()
    """Which rules drop conversations and preference pairs. Of `rules` those that are safe mend their messages."""
    dedup: DedupConfig = DedupConfig()
    """Which duplicates count as such."""
    decontaminate: tuple[str, ...] = ()
    """Evaluation files (paths, folders, globs; any format): documents that share a 13-gram with one are dropped."""
    heldout: float = Field(0.005, ge=0, lt=1)
    """Share of the documents to set aside in OUT/heldout."""
    samples: int = Field(8, ge=0, le=100)
    """Dropped and changed documents that the report shows for each rule and language."""
    seed: int = 0
    """Decides which samples the report shows and how wiki entries are asked about; never what is kept."""
    length: int = Field(2048, ge=16)
    """Tokens of a training example, for the share of chats that would be cut."""
    tokenizer: str = ""
    """A tokenizer's folder to count those tokens with; without one they are estimated."""
    engine: Engine = "local"
    """Processes of this machine, or a Ray cluster."""
    workers: int = Field(0, ge=0)
    """Processes to use; 0 for one on each core."""
    skip_bad: bool = False
    """Count and list records that cannot be read instead of stopping at the first."""

    @field_validator("rules", mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        return {"preset": value} if isinstance(value, str) else value

    @field_validator("decontaminate", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def read_config(settings: Sequence[str]) -> CleanConfig:
    """The config that `key=value` settings give, over those of the TOML file that `config=FILE` names."""
    given = parse_overrides(settings)
    path = given.pop("config", "")
    table = read_toml(Path(path)) if path else {}
    preset = given.get("rules")
    if isinstance(preset, str):  # else it could not stand beside rules.KEY=VALUE
        given = {"rules.preset": given.pop("rules"), **given}
    apply_overrides(table, given)
    return validate(CleanConfig, table, path or "oriole data clean")


@final
@dataclass(frozen=True)
class Input:
    """One file, or some text files of one folder, under the name of its output."""

    name: str
    paths: tuple[Path, ...]


# --- the whole -------------------------------------------------------------------------------------------------------


def clean(patterns: Sequence[str | Path], out: Path, config: CleanConfig) -> dict[str, Any]:
    """Clean what the paths, folders and globs mean into the folder `out`; the report that lies there as report.json.

    `DataError` for what cannot be read, or when `out` holds something else; `ResourceError` when the disk is full.
    """
    bad = Skipped() if config.skip_bad else None
    evaluation = expand(config.decontaminate) if config.decontaminate else []
    inputs = _inputs(expand(patterns, skip_bad=bad), out, evaluation, config.kind)
    done = _prepare(out)
    _forget(done, out, [each.name for each in inputs])

    keys = {each.name: _key(each, evaluation, config) for each in inputs}
    work = {name: {part: done / part / f"{name}.jsonl.zst" for part in PARTS} for name in keys}
    samples = {name: done / "samples" / f"{name}.json" for name in keys}
    options: dict[str, Any] = {"engine": config.engine, "workers": config.workers}
    pieces = [
        Piece(
            each.name,
            keys[each.name],
            (each.name, each.paths, evaluation, config, work[each.name], samples[each.name]),
            (*work[each.name].values(), samples[each.name]),
        )
        for each in inputs
    ]
    try:
        cleaned = run_pieces(clean_input, pieces, done / "clean", what="cleaning", **options)
    except DataError as error:
        raise DataError(f"{error}{_hint(str(error))}") from error
    left = {
        work[name][part]: sum(documents for documents, _ in counts[part].values())
        for name, counts in zip(keys, cleaned, strict=True)
        for part in PARTS
    }

    files = [path for path, documents in left.items() if documents]
    drops, lines = _duplicates(files, config, done / "dedup") if files else ({}, None)
    targets = {"cleaned": out, "heldout": out / "heldout"}
    pieces = []
    for name, parts in work.items():
        for part, path in parts.items():
            mine = drops.get(path, {})
            target = targets[part] / path.name
            whole = (target,) if left[path] > len(mine) else ()
            key = _hash(keys[name], sorted(mine.items()), [_key_of(path) for path in files] if lines else "")
            pieces.append(Piece(f"{part}-{name}", key, (path, target, mine, lines), whole))
    finished = run_pieces(finish, pieces, done / "final", what="writing", **options)
    _remove_empty(out / "heldout")

    by_name = {name: dict(zip(PARTS, finished[2 * i : 2 * i + 2], strict=True)) for i, name in enumerate(keys)}
    pairs = near_pairs(files, drops, done / "dedup", config.dedup.size, 2 * config.samples, config.seed)
    report = cleanreport.build(
        inputs, config, _described(config), cleaned, by_name, samples.values(), pairs,
        bad_records(bad) if bad is not None else None,
    )  # fmt: skip
    cleanreport.write(report, to_toml(_as_reported(config)), out)
    return report


def _hint(fault: str) -> str:
    """What to do about records of another kind than was said."""
    for kind, looks in (("text", "running text"), ("chat", "a chat"), ("preference", "a preference pair")):
        if f"it looks like {looks}" in fault:
            return f"; clean it with kind={kind}"
    return ""


def _as_reported(config: CleanConfig) -> CleanConfig:
    """Without what cannot change the result, so that neither can it change the report."""
    return config.model_copy(update={"engine": "local", "workers": 0})


def _duplicates(files: Sequence[Path], config: CleanConfig, folder: Path) -> tuple[Duplicates, Path | None]:
    """The rows to drop, and the boilerplate lines where they are to go, too."""
    dedup = config.dedup if config.kind == "text" else config.dedup.model_copy(update={"lines": False})
    if not (dedup.exact or dedup.near or dedup.lines):
        return {}, None
    drops = find_duplicates(files, dedup, folder, engine=config.engine, workers=config.workers)
    return drops, folder / "lines" / "lines.npz" if dedup.lines else None


# --- inputs ----------------------------------------------------------------------------------------------------------


def _inputs(paths: Sequence[Path], out: Path, evaluation: Sequence[Path], kind: str) -> list[Input]:
    """The files to clean, each under a name of its own; small text files of one folder together.

    Neither what `out` holds nor an evaluation file is cleaned, where a folder or glob means them, too.
    """
    inside, known = out.resolve(), {path.resolve() for path in evaluation}
    chosen = [p for p in paths if p.resolve() not in known and inside not in p.resolve().parents]
    if not chosen:
        raise DataError(
            f"nothing is left to clean: what was named is evaluation data or lies in {out}; name other files"
        )
    groups: dict[Path, list[Path]] = {}
    single: list[tuple[str, list[Path]]] = []
    for path in chosen:
        if kind == "text" and path.suffix.lower() in PAGES:
            groups.setdefault(path.parent, []).append(path)
        else:
            single.append((_stem(path), [path]))
    for folder, pages in groups.items():
        if len(pages) == 1:
            single.append((plain_stem(pages[0]), pages))
        else:
            single += [(folder.resolve().name or "text", part) for part in _by_size(pages)]
    taken: Counter[str] = Counter()
    inputs = []
    for name, files in sorted(single, key=lambda item: (item[0], item[1])):
        taken[name] += 1
        inputs.append(Input(name if taken[name] == 1 else f"{name}-{taken[name]}", tuple(files)))
    return inputs


def _stem(path: Path) -> str:
    """The file's name without endings; the names of the sets where the path means some of a description's."""
    return path.name.partition("#")[2].replace("/", "-") if names_sets(path) else plain_stem(path)


def _by_size(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Runs of files of some 64 MB."""
    group: list[Path] = []
    size = 0
    for path in paths:
        group.append(path)
        size += path.stat().st_size
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _key(each: Input, evaluation: Sequence[Path], config: CleanConfig) -> str:
    """Changes with everything that decides what the rules leave of an input."""
    decisive = config.model_dump_json(exclude={"dedup", "engine", "workers", "decontaminate"})
    files = [key for path in (*each.paths, *evaluation) for key in _keys_of(path)]
    tokenizer = sorted(Path(config.tokenizer).glob("*.json")) if config.tokenizer else []
    words = [Path(config.rules.evalweb_words)] if config.rules.evalweb_words else []
    return _hash(
        SCHEMA, __version__, each.name, files, len(evaluation), [*map(_key_of, [*tokenizer, *words])], decisive
    )


def _keys_of(path: Path) -> list[tuple[str, int, int]]:
    """Of a file; of a description of data sets, those of the files that it names, too."""
    if path.name.partition("#")[0] != DESCRIPTION:
        return [_key_of(path)]
    named = {file for one in data_sets(path) for file in one.files}
    return [(str(path), 0, 0), *map(_key_of, [path.with_name(DESCRIPTION), *sorted(named)])]


def _key_of(path: Path) -> tuple[str, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise_for_os_error(error, "reading", path)
    return str(path), stat.st_size, stat.st_mtime_ns


def _hash(*parts: Any) -> str:
    return xxhash.xxh3_128_hexdigest(repr(parts).encode("utf-8", "backslashreplace"))


# --- the folder ------------------------------------------------------------------------------------------------------


def _prepare(out: Path) -> Path:
    """OUT/.done; `DataError` when OUT holds something that no cleaning has left."""
    done = out / ".done"
    try:
        if out.exists() and not done.is_dir() and any(out.iterdir()):
            raise DataError(f"{out} exists and holds other files; name a new folder for the cleaned corpus")
        for folder in (*PARTS, "samples"):
            (done / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise_for_os_error(error, "preparing", out)
    return done


def _forget(done: Path, out: Path, names: Sequence[str]) -> None:
    """Delete what an earlier run made of inputs that are no longer named, so that the folder holds this corpus only."""
    for note in sorted((done / "clean").glob("*.json")) if (done / "clean").is_dir() else ():
        name = note.stem
        if name in names:
            continue
        for part, folder in zip(PARTS, (out, out / "heldout"), strict=True):
            for path in (
                folder / f"{name}.jsonl.zst",
                done / part / f"{name}.jsonl.zst",
                done / "final" / f"{part}-{name}.json",
            ):
                path.unlink(missing_ok=True)
        (done / "samples" / f"{name}.json").unlink(missing_ok=True)
        note.unlink()


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it holds something, or was never made
        folder.rmdir()


def _described(config: CleanConfig) -> list[tuple[str, str, str]]:
    """(name, setting, what it does) of the rules in their order, as their keys in the recipe say it."""
    rules = [(rule.name, "rules") for rule in build_rules(config.rules)]
    if config.kind != "text":
        chat = {rule.name for rule in build_chat_rules(config.chat)}
        rules = [(name, "chat" if name in chat else "rules") for name, _ in chat_rules(config)]
    out = []
    for name, table in rules:
        keys: RulesConfig | ChatRulesConfig = config.chat if table == "chat" else config.rules
        field = type(keys).model_fields.get(name)
        value = _plain(getattr(keys, name)) if field is not None else ""
        said = f"{field.description} Set by `{table}.{name}`." if field is not None else _ABOUT.get(name, "")
        out.append((name, "" if value == "true" else value, said))
    if config.decontaminate:
        said = "Documents that share a 13-gram with an evaluation file (Brown et al. 2020, appendix C)."
        out.append((DECONTAMINATE, "", said))
    return out


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_ABOUT = {
    "markup": "Remains of HTML and wiki pages. Set by `rules.html` and `rules.wiki`.",
    "identify": "Finds the language of documents that do not say it. Never drops.",
    "c4_lines": "English lines that C4 leaves out. Set by `c4_terminal`, `c4_line_words` and `c4_word_characters`.",
    "mask_numbers": "Telephone, identity and IP numbers masked. Set by `mask_phones`, `mask_ids` and `mask_ips`.",
    "tidy": "Blank lines and ends of lines once more, after the rules that remove things.",
    "length": "Set by `rules.min_characters` and `rules.max_characters`.",
}
"""Rules that have no key of their own."""
