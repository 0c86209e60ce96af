"""Records of public sets, rewritten as records that every reader knows: one rule for each shape that sets come in.

    text             {"text"} from the fields that hold it
    chat             {"conversations"} from fields of question and answer
    turns            {"conversations"} from lists of {"human", "assistant"} and their like
    human_assistant  chats and preference pairs written as one string with `Human:` and `Assistant:` before each turn
    moss, oasst      MOSS-003's numbered turns; OpenAssistant's trees (the path of the best-ranked answers)
    preference       {"prompt", "chosen", "rejected"}
    choices, squad, gsm8k   {"messages", "answers"}, as `oriole eval` asks them: multiple choice, questions on a
                     passage, sums with `####` before the result; no answers where the makers keep them secret
    medquad          questions and answers in XML

Nothing is mended here: that is `oriole data clean`'s work.
"""

import contextlib
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

import zstandard

from oriole.errors import DataError, raise_for_os_error
from oriole.text import tables
from oriole.text.catalogue import Recast
from oriole.text.download import checked_path
from oriole.text.files import Skipped, file_kind, refuse, values
from oriole.text.work import new_file

__all__ = ["is_archive", "recast_file", "unpack"]

Record = dict[str, Any]

BOMB = 200
"""An archive that unpacks to more than this many times its own size is refused."""

_TURN = re.compile(r"(?:\A|\n\s*)(Human|Assistant|人类|助手)\s*[:：]\s*")
_MOSS = re.compile(r"<\|[^|>]*\|>:|<eo[hmatcr]>")


class _Unfit(Exception):
    """Why a record cannot be rewritten."""


def recast_file(sources: Sequence[str], target: str, recast: Record, name: str, lang: str) -> dict[str, Any]:
    """Rewrite files as one of JSON lines, packed with zstd; records that do not fit are left out and counted.

    Returns `{"rows", "skipped", "examples"}`. Module-level and deterministic, as `run_pieces` wants it.
    """
    how = Recast.model_validate(recast)
    skipped, rows = Skipped(), 0
    with new_file(Path(target)) as file, zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False) as out:
        for source in map(Path, sources):
            for where, record in _records(source, skipped):
                try:
                    made = list(_RULES[how.to](record, how))
                except _Unfit as error:
                    refuse(source, where, str(error), skipped)
                    continue
                for row in made:
                    row = row | {"source": name} | ({"lang": lang} if lang and "lang" not in row else {})
                    out.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
                    rows += 1
    return {"rows": rows, "skipped": skipped.total, "examples": skipped.examples[:3]}


# --- reading ---------------------------------------------------------------------------------------------------------


def _records(path: Path, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    """(place, record) of each record of a file."""
    if path.suffix.lower() == ".xml":
        try:
            yield "the document", ElementTree.parse(path).getroot()  # noqa: S314 - expat 2.4 limits expansion
        except ElementTree.ParseError as error:
            refuse(path, "", f"is not valid XML ({error})", skipped)
    elif file_kind(path) in ("json", "text"):
        yield from values(path, skipped)
    else:
        yield from tables.rows(path, frozenset(), skipped)


# --- rules -----------------------------------------------------------------------------------------------------------


def _text(record: Any, how: Recast) -> Iterator[Record]:
    parts = [p for key in how.text if (p := _string(record, key)).strip()]
    if not parts:
        raise _Unfit(f"none of {', '.join(how.text)} holds text")
    yield {"text": "\n".join(parts)}


def _chat(record: Any, how: Recast) -> Iterator[Record]:
    question, answer = _question(record, how), _string(record, how.answer)
    if not question or not answer.strip():
        raise _Unfit("question or answer is empty")
    system = _string(record, how.system) if how.system else ""
    messages = [("system", system)] if system.strip() else []
    yield _conversation([*messages, ("user", question), ("assistant", answer)])


def _question(record: Any, how: Recast) -> str:
    """The fields of the question, one after another; titles are often repeated in the description."""
    parts: list[str] = []
    for part in (_string(record, key).strip() for key in how.ask):
        if part and not any(part in other for other in parts):
            parts = [p for p in parts if p not in part] + [part]
    return "\n".join(parts)


def _turns(record: Any, how: Recast) -> Iterator[Record]:
    turns = record.get(how.turns, record.get(how.turns.lower())) if isinstance(record, dict) else None
    if not isinstance(turns, list):
        raise _Unfit(f"'{how.turns}' is no list of turns")
    messages: list[tuple[str, str]] = []
    for turn in turns:
        if not isinstance(turn, dict) or not ("human" in turn and "assistant" in turn):
            raise _Unfit(f"a turn of '{how.turns}' has no 'human' and 'assistant'")
        messages += [("user", _string(turn, "human")), ("assistant", _string(turn, "assistant"))]
    yield _conversation(messages)


def _human_assistant(record: Any, how: Recast) -> Iterator[Record]:
    if isinstance(record, dict) and how.chosen in record:
        chosen, rejected = (_split(_string(record, key)) for key in (how.chosen, how.rejected))
        prompt = 0
        while prompt < min(len(chosen), len(rejected)) and chosen[prompt] == rejected[prompt]:
            prompt += 1
        if not prompt or prompt == len(chosen) or prompt == len(rejected):
            raise _Unfit("the two answers do not follow one prompt")
        yield {
            "prompt": _messages(chosen[:prompt]),
            "chosen": _messages(chosen[prompt:]),
            "rejected": _messages(rejected[prompt:]),
        }
        return
    turns = _split("\n".join(_string(record, key) for key in how.ask))
    answer = _string(record, how.answer) if how.answer else ""
    if turns and turns[-1] == ("assistant", ""):
        turns.pop()
    yield _conversation([*turns, ("assistant", answer)] if answer.strip() else turns)


def _split(text: str) -> list[tuple[str, str]]:
    pieces = _TURN.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        raise _Unfit("it does not begin with 'Human:' or 'Assistant:'")
    roles = {"Human": "user", "人类": "user", "Assistant": "assistant", "助手": "assistant"}
    return [(roles[role], said.strip()) for role, said in zip(pieces[1::2], pieces[2::2], strict=True)]


def _moss(record: Any, how: Recast) -> Iterator[Record]:
    turns = record.get("chat") if isinstance(record, dict) else None
    if not isinstance(turns, dict):
        raise _Unfit("'chat' is no table of turns")
    messages: list[tuple[str, str]] = []
    for number in range(1, len(turns) + 1):
        turn = turns.get(f"turn_{number}")
        for key, role in (("Human", "user"), ("MOSS", "assistant")):
            messages.append((role, _MOSS.sub("", _string(turn, key)).strip()))
    yield _conversation(messages)


def _oasst(record: Any, how: Recast) -> Iterator[Record]:
    """From the root always to the reply of the lowest rank (the best); a path ends with an assistant's message."""
    node = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(node, dict):
        raise _Unfit("it has no 'prompt', so it is no message tree")
    lang = str(node.get("lang", ""))[:2]
    if lang not in ("zh", "en"):
        return  # the set has 35 languages
    messages: list[tuple[str, str]] = []
    while isinstance(node, dict):
        messages.append(("user" if node.get("role") == "prompter" else "assistant", _string(node, "text")))
        replies = [r for r in node.get("replies") or [] if isinstance(r, dict) and not r.get("deleted")]
        node = min(replies, key=_rank, default=None)
    if messages[-1][0] == "user":
        messages.pop()
    if messages:
        yield _conversation(messages) | {"lang": lang}


def _rank(reply: Record) -> float:
    rank = reply.get("rank")
    return rank if isinstance(rank, int) else float("inf")


def _preference(record: Any, how: Recast) -> Iterator[Record]:
    prompt, chosen, rejected = _question(record, how), _string(record, how.chosen), _string(record, how.rejected)
    if not prompt or not chosen.strip() or not rejected.strip() or chosen.strip() == rejected.strip():
        raise _Unfit("prompt or an answer is empty, or the answers are the same")
    yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _choices(record: Any, how: Recast) -> Iterator[Record]:
    table = {str(k).strip().lower(): v for k, v in record.items()} if isinstance(record, dict) else {}
    question, answer = table.get("question"), table.get("answer")
    options = table.get("choices")
    if not isinstance(options, list):
        options = [table[letter] for letter in "abcd" if letter in table]
    letters = "ABCDEFGHIJ"[: len(options)]
    if isinstance(answer, int) and 0 <= answer < len(letters):
        answer = letters[answer]
    answer = "" if answer is None else str(answer).strip()
    if not isinstance(question, str) or len(letters) < 2 or (answer and answer not in letters):
        raise _Unfit("it has no question, choices and the letter or number of the right one")
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    right = str(options[letters.index(answer)]).strip() if answer else ""
    accepted = [answer, f"{answer}. {right}", *([right] if right else [])]
    yield _asked(f"{question.strip()}\n{listed}", accepted if answer else [])


def _squad(record: Any, how: Recast) -> Iterator[Record]:
    articles = record.get("data") if isinstance(record, dict) else None
    for article in articles if isinstance(articles, list) else [record]:
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            raise _Unfit("it has no 'paragraphs'")
        for paragraph in paragraphs:
            for qa in paragraph["qas"]:
                accepted = list(dict.fromkeys(str(a["text"]) for a in qa.get("answers", []) if a.get("text")))
                if accepted:
                    yield _asked(f"{paragraph['context'].strip()}\n{qa['question'].strip()}", accepted)


def _gsm8k(record: Any, how: Recast) -> Iterator[Record]:
    question, answer = _string(record, "question"), _string(record, "answer")
    _, mark, result = answer.rpartition("####")
    if not question.strip() or not mark:
        raise _Unfit("it has no question, or no '####' before the result")
    yield _asked(question.strip(), [result.strip(), *({result.strip().replace(",", "")} - {result.strip()})])


def _medquad(record: Any, how: Recast) -> Iterator[Record]:
    if not isinstance(record, ElementTree.Element):
        raise _Unfit("it is no XML document")
    for pair in record.iter("QAPair"):
        question, answer = (" ".join((pair.findtext(key) or "").split()) for key in ("Question", "Answer"))
        if question and answer:  # the publishers of some parts had the answers removed
            yield _conversation([("user", question), ("assistant", answer)])


_RULES: dict[str, Callable[[Any, Recast], Iterator[Record]]] = {
    "text": _text, "chat": _chat, "turns": _turns, "human_assistant": _human_assistant, "moss": _moss,
    "oasst": _oasst, "preference": _preference, "choices": _choices, "squad": _squad, "gsm8k": _gsm8k,
    "medquad": _medquad,
}  # fmt: skip


def _string(record: Any, key: str) -> str:
    """The text of a field, "" where there is none; of a list of answers the first. Tables have lower-case names."""
    value = record.get(key, record.get(key.lower())) if isinstance(record, dict) else None
    if isinstance(value, list):
        value = next((v for v in value if isinstance(v, str) and v.strip()), None)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _Unfit(f"'{key}' is no string")
    return value


def _messages(turns: Sequence[tuple[str, str]]) -> list[Record]:
    return [{"role": role, "content": said} for role, said in turns]


def _conversation(turns: Sequence[tuple[str, str]]) -> Record:
    if not any(role == "assistant" and said.strip() for role, said in turns):
        raise _Unfit("the assistant says nothing")
    return {"conversations": _messages(turns)}


def _asked(question: str, answers: list[str]) -> Record:
    return {"messages": [{"role": "user", "content": question}], "answers": answers}


# --- archives --------------------------------------------------------------------------------------------------------


def is_archive(path: Path) -> bool:
    """Whether a file holds other files."""
    return path.name.lower().endswith((".zip", ".tgz", ".tar.gz", ".tar", ".tar.bz2", ".tar.xz"))


def unpack(archive: Path, folder: Path, wanted: Callable[[str], bool]) -> list[Path]:
    """The `wanted` files of an archive, below `folder`; links and paths that lead out of it are refused."""
    out: list[Path] = []
    room = BOMB * archive.stat().st_size + (64 << 20)
    try:
        with _members(archive) as members:
            for name, size, opened in members:
                if not wanted(name):
                    continue
                room -= size
                if room < 0:
                    raise DataError(f"{archive} unpacks to more than {BOMB} times its size; it is not trusted")
                target = folder / checked_path(name)
                out.append(target)
                if _is_unpacked(target, size, archive):
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened() as source, new_file(target) as file:
                    _copy(source, file, size, archive)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{archive} cannot be unpacked ({error}); remove it and fetch again") from error
    except OSError as error:
        raise_for_os_error(error, "unpacking", archive)
    return sorted(out)


def _is_unpacked(target: Path, size: int, archive: Path) -> bool:
    """Whether an earlier call has left the file, from this archive and not from an older one."""
    if not target.is_file():
        return False
    stat = target.stat()
    return stat.st_size == size and stat.st_mtime_ns >= archive.stat().st_mtime_ns


@contextlib.contextmanager
def _members(archive: Path) -> Iterator[Iterator[tuple[str, int, Callable[[], IO[bytes]]]]]:
    """(name, size, how to open) of each plain file of an archive."""
    if archive.suffix.lower() == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            infos = [i for i in zipped.infolist() if not i.is_dir()]
            yield ((i.filename, i.file_size, lambda i=i: zipped.open(i)) for i in infos)  # type: ignore[misc]
    else:
        with tarfile.open(archive) as tar:
            yield ((m.name, m.size, lambda m=m: tar.extractfile(m)) for m in tar if m.isfile())  # type: ignore[misc]


def _copy(source: IO[bytes], file: IO[bytes], size: int, archive: Path) -> None:
    left = size
    while chunk := source.read(1 << 20):
        left -= len(chunk)
        if left < 0:
            raise DataError(f"{archive} holds a file that is longer than it says; it is not trusted")
        file.write(chunk)
