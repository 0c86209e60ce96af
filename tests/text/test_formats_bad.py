"""Every way that files are bad: named with file and line, counted, in bounded memory, never a crash, never a guess."""

import gzip
import json
import lzma
import os
import resource
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from oriole.errors import DataError
from oriole.text import files
from oriole.text.formats import Skipped, expand, read_chats, read_docs, read_preferences

GOOD = '{"text": "a"}\n'


def texts(path: Path, skipped: Skipped | None = None) -> list[str]:
    return [doc.text for doc in read_docs(path, skip_bad=skipped)]


def test_a_line_of_200_mb_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with path.open("wb") as file:
        file.write(GOOD.encode() + b'{"text": "')
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + GOOD.encode())
    with pytest.raises(DataError, match=r"d\.jsonl, line 2: longer than 32 MB; cut it into records"):
        texts(path)
    code = f"""
        import resource
        from pathlib import Path
        from oriole.text.formats import Skipped, read_docs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        skipped = Skipped()
        assert [doc.text for doc in read_docs(Path({str(path)!r}), skip_bad=skipped)] == ["a", "a"]
        assert skipped.total == 1 and "line 2: longer than" in skipped.examples[0]
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 120_000, "kilobytes: the limit of a line a few times over, not the line"
    array = tmp_path / "d.json"
    array.write_bytes(b"[" + path.read_bytes().split(b"\n")[1] + b"]")
    with pytest.raises(DataError, match=r"d\.json, line 1: a record longer than 32 MB"):
        texts(array)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_zip_bomb_is_refused_in_bounded_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"d.jsonl{suffix}"
    chunk = b"0" * (1 << 22)
    with path.open("wb") as raw:
        match suffix:
            case ".gz":
                out: Any = gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1)
            case ".xz":
                out = lzma.LZMAFile(raw, "wb", preset=0)
            case _:
                out = zstandard.ZstdCompressor().stream_writer(raw, closefd=False)
        with out:
            out.write(GOOD.encode())
            for _ in range(48):
                out.write(chunk)
            out.write(b"\n" + GOOD.encode())
    skipped = Skipped()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert texts(path, skipped) == ["a", "a"]  # 200 MB are a long line only
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000
    assert skipped.total == 1 and "line 2: longer than 32 MB" in skipped.examples[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BOMB_BYTES", 1 << 26)
        patch.setattr(files, "BOMB_RATIO", 100)
        with pytest.raises(DataError, match="unpacks to more than 100 times its size; it looks like a zip bomb"):
            list(files.lines(path, Skipped()))
        skipped = Skipped()
        assert texts(path, skipped) == ["a"]
        assert (
            "looks like a zip bomb" in skipped.examples[-1] and "rest of the file is left out" in skipped.examples[-1]
        )


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt", "d.csv"])
def test_nul_bytes_are_named(tmp_path: Path, name: str) -> None:
    rows = {"d.jsonl": '{"text": "%s"}', "d.txt": "%s", "d.csv": "%s"}
    path = tmp_path / name
    path.write_text("\n".join(["text"] * (name == "d.csv") + [rows[name] % t for t in ("one", "t\0wo", "three")]))
    line = 3 if name == "d.csv" else 2
    with pytest.raises(DataError, match=rf"{name}, line {line}: holds NUL bytes"):
        texts(path)
    skipped = Skipped()
    found = "\n".join(texts(path, skipped))
    assert skipped.total == 1 and found.split() == ["one", "three"]


def test_keys_that_stand_twice_are_named(tmp_path: Path) -> None:
    record = '{"text": "b", "meta": {"n": 1, "n": 2}}'
    path = tmp_path / "d.jsonl"
    path.write_text(f'{GOOD}{record}\n{{"text": "c", "text": "d"}}\n{GOOD}')
    with pytest.raises(DataError, match=r"d\.jsonl, line 2: the key 'n' stands twice in one object; keep one"):
        texts(path)
    skipped = Skipped()
    assert texts(path, skipped) == ["a", "a"] and skipped.total == 2
    assert "line 3: the key 'text' stands twice" in skipped.examples[1]
    array = tmp_path / "d.json"
    array.write_text(f"[{GOOD.strip()},\n{record},\n{GOOD.strip()}]")
    skipped = Skipped()
    assert texts(array, skipped) == ["a", "a"]
    assert "line 2, record 2: the key 'n' stands twice" in skipped.examples[0]


def test_tables_name_their_faults(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('id,text\n1,one\n2,two,more\n3,three\n4,"four\nand five"\n')
    with pytest.raises(DataError, match=r"d\.csv, line 3: 3 cells where the first line names 2"):
        texts(path)
    skipped = Skipped()
    assert texts(path, skipped) == ["one", "three", "four\nand five"] and skipped.total == 1
    path.write_text("text,Text\na,b\n")
    with pytest.raises(DataError, match="two columns are named 'text'"):
        texts(path)
    path.write_bytes(b'text\n"one\nt\xffwo\nthree"\nfour\n')  # a bad line inside a cell spoils the row, not the next
    skipped = Skipped()
    assert texts(path, skipped) == ["four"] and skipped.total == 1 and "line 3: not UTF-8" in skipped.examples[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oriole.text.tables.LONGEST_LINE", 1000)
        path.write_text('text\n"' + "open\n" * 1000)
        with pytest.raises(DataError, match=r"line 2: no valid csv .* is a quotation mark not closed"):
            texts(path)
    for name in ("d.parquet", "d.arrow"):
        (tmp_path / name).write_bytes(b"PAR1 but no more")
        with pytest.raises(DataError, match=f"{name} is no valid .* file"):
            texts(tmp_path / name)
        skipped = Skipped()
        assert texts(tmp_path / name, skipped) == [] and skipped.total == 1
        with pytest.raises(DataError, match=r"no file .*; check the path"):
            texts(tmp_path / f"other_{name}")


def test_damaged_and_locked_pdfs(tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf")
    whole = Path(__file__).parents[2] / "examples" / "data" / "text" / "garden.pdf"
    broken = tmp_path / "broken.pdf"
    broken.write_bytes(b"%PDF-1.4\n" + bytes(range(256)) * 20)
    pictures, locked = tmp_path / "pictures.pdf", tmp_path / "locked.pdf"
    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(pictures)
    writer = pypdf.PdfWriter(clone_from=whole)
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(locked)
    for path, said in ((broken, "is no valid PDF"), (pictures, "only pictures"), (locked, "locked with a password")):
        with pytest.raises(DataError, match=said):
            texts(path)
    skipped = Skipped()
    assert len(list(read_docs([broken, pictures, locked, whole], skip_bad=skipped))) == 1 and skipped.total == 3


# --- folders ---------------------------------------------------------------------------------------------------------


def as_nobody(code: str) -> str:
    """Run code as a user who is not the owner (root may read everything)."""
    if os.geteuid() == 0:
        code = "import os\nos.setgid(65534)\nos.setuid(65534)\n" + code
    # Modules are loaded before the change of user: the interpreter may lie where that user may not look.
    code = "import oriole.text.formats, oriole.text.paths\nfrom pathlib import Path\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that any user may enter: pytest's own are closed, and closed again by whatever other pytest begins."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_folders_and_files_without_permission_are_named(open_folder: Path) -> None:
    base = open_folder
    (base / "locked").mkdir()
    for name in ("a.jsonl", "b.jsonl", "locked/c.jsonl"):
        (base / name).write_text(GOOD)
    (base / "b.jsonl").chmod(0)
    (base / "locked").chmod(0)
    try:
        said = as_nobody(
            textwrap.dedent(f"""
            from oriole.text.formats import Skipped, expand, read_docs
            from oriole.errors import OrioleError
            base = Path({str(base)!r})
            skipped = Skipped()
            paths = expand([base], skip_bad=skipped)
            print(len(paths), len(list(read_docs(paths, skip_bad=skipped))), skipped.total)
            print(*skipped.examples, sep="\\n")
            for pattern in (base, base / "**" / "*.jsonl", base / "locked"):
                try:
                    expand([pattern])
                except OrioleError as error:
                    print("raised", error)
            """)
        ).splitlines()
    finally:
        (base / "locked").chmod(0o755)
        (base / "b.jsonl").chmod(0o644)
    assert said[0] == "2 1 2"
    assert "locked cannot be read (no permission)" in said[1] and "no permission while reading" in said[2]
    assert len(said) == 6 and all(line.startswith("raised") and "no permission" in line for line in said[3:])


def test_links(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data / "sub", elsewhere):
        folder.mkdir(parents=True)
        (folder / "d.jsonl").write_text(GOOD)
    (data / "sub" / "up").symlink_to(data)  # a loop
    (data / "self").symlink_to("self")
    (data / "also").symlink_to(elsewhere)  # a folder elsewhere, twice
    (data / "again").symlink_to(elsewhere)
    expected = ["again/d.jsonl", "sub/d.jsonl"]
    skipped = Skipped()
    assert [str(p.relative_to(data)) for p in expand([data], skip_bad=skipped)] == expected
    assert skipped.total == 2
    assert any("up is a link to a folder that it lies in" in said for said in skipped.examples)
    assert any("self is a link that leads nowhere" in said for said in skipped.examples)
    assert [str(p.relative_to(data)) for p in expand([data])] == expected
    assert "up is a link to a folder" in capfd.readouterr().err
    (data / "lost.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(DataError, match=r"lost\.jsonl cannot be read \(a link that leads nowhere\)"):
        expand([data])
    assert len(expand([data], skip_bad=skipped)) == 2 and skipped.total == 5


def test_one_bad_file_does_not_hide_the_others(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / f"{n}.jsonl").write_text(GOOD)
    (tmp_path / "1.jsonl").write_bytes(b"")
    (tmp_path / "1b.jsonl.xz").write_bytes(b"no xz")
    (tmp_path / "1c.html").write_bytes(b"<p>\xff\xfe\xfd</p>")
    skipped = Skipped()
    assert len(list(read_docs(expand(tmp_path), skip_bad=skipped))) == 2
    assert set(map(Path, skipped.files)) == {tmp_path / name for name in ("1.jsonl", "1b.jsonl.xz", "1c.html")}
    for read in (read_chats, read_preferences):
        assert list(read(tmp_path / "1.jsonl", skip_bad=skipped)) == []


def test_skipping_says_how_much_and_where(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(GOOD + "".join(json.dumps({"txt": n}) + "\n" for n in range(50)) + GOOD)
    skipped = Skipped()
    assert len(texts(path, skipped)) == 2
    assert (skipped.total, skipped.files[str(path)], len(skipped.examples)) == (50, 50, 20)
