"""Deduplication: what is dropped is what a comparison of all with all would drop, wherever it runs."""

import gc
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from oriole.config import validate
from oriole.errors import ConfigError, DataError
from oriole.text import dedup, sketches
from oriole.text.dedup import DedupConfig, find_duplicates
from oriole.text.shingles import grams, tokens

LETTERS = "abcdefghijklmnopqrstuvwxyz"
HAN = "".join(map(chr, range(0x4E00, 0x4E00 + 800)))


def document(rng: random.Random, lang: str, size: int = 200) -> str:
    """Random words in sentences and paragraphs: no two documents have a 5-gram in common but by chance."""
    parts = []
    for n in range(size):
        parts.append(rng.choice(HAN) if lang == "zh" else "".join(rng.choices(LETTERS, k=rng.randint(2, 7))))
        if n % 25 == 24:
            parts[-1] += "。\n" if lang == "zh" else ".\n"
    return ("" if lang == "zh" else " ").join(parts)


def write(path: Path, texts: Sequence[str]) -> Path:
    rows = ({"text": text, "lang": "", "source": "s"} for text in texts)
    raw = "".join(json.dumps(row, ensure_ascii="\ud800" in row["text"]) + "\n" for row in rows).encode()
    path.write_bytes(zstandard.compress(raw) if path.suffix == ".zst" else raw)
    return path


@pytest.fixture
def dropped(tmp_path: Path) -> Callable[..., dict[int, str]]:
    """`dropped(texts, key=value…)`: {place: reason} for one file of these texts."""
    count = iter(range(10**6))

    def find(texts: Sequence[str], **keys: Any) -> dict[int, str]:
        name = f"{next(count)}"
        path = write(tmp_path / f"{name}.jsonl", texts)
        return find_duplicates([path], DedupConfig(**keys), tmp_path / name, workers=1)[path]

    return find


def jaccard(a: str, b: str, n: int = 5) -> float:
    left, right = (
        {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))} if words else set()
        for words in ([word for word, _, _ in tokens(text)] for text in (a, b))
    )
    return len(left & right) / len(left | right) if left | right else 0.0


# --- exact -----------------------------------------------------------------------------------------------------------


def test_equal_but_for_white_space_is_exact_and_the_first_stays(dropped: Callable[..., dict[int, str]]) -> None:
    texts = [
        "E\u0301t\u00e9 sang",
        "other",
        "\u00c9te\u0301\n\n  sang ",
        "Other",
        "",
        "!?",
        " ",
        "!?",
        "\ud800",
        "\ud800",
    ]
    assert dropped(texts, near=False) == {2: "exact", 6: "exact", 7: "exact", 9: "exact"}
    assert dropped(texts, near=False, exact=False) == {}


def test_near_finds_exact_copies_too_but_not_texts_without_a_word(dropped: Callable[..., dict[int, str]]) -> None:
    assert dropped(["hello", "!?", "!?", "hello you"], exact=False) == {}
    assert dropped(["hello you", "other", "hello you"], exact=False) == {2: "near"}


# --- near ------------------------------------------------------------------------------------------------------------


def test_the_longest_stays_and_of_equally_long_ones_the_first(dropped: Callable[..., dict[int, str]]) -> None:
    text = document(random.Random(1), "en")
    shorter, longer = text[:-20], text + " and a little more"
    assert dropped([shorter, text, longer]) == {0: "near", 1: "near"}
    assert dropped([longer, text, shorter]) == {1: "near", 2: "near"}
    assert dropped([text.upper(), text, text.title()]) == {1: "near", 2: "near"}


def test_short_documents_are_near_only_when_all_their_words_are_equal(dropped: Callable[..., dict[int, str]]) -> None:
    texts = ["你好", "你好！", "你好吗", "Yes, sir", "yes sir", "yes", "a b c d e", "a b c d f"]
    assert dropped(texts) == {0: "near", 4: "near"}  # "你好！" is longer than "你好"


EDITS: dict[str, Callable[[str, random.Random], str]] = {
    "exact": lambda text, rng: text.replace("\n", "\n\n"),
    "one character": lambda text, rng: text[: (at := rng.randrange(len(text)))] + "x" + text[at + 1 :],
    "paragraphs": lambda text, rng: "\n".join(rng.sample(parts := text.split("\n"), len(parts))),
    "5 % in a run": lambda text, rng: _replaced(text, rng, run=True),
    "5 % all over": lambda text, rng: _replaced(text, rng, run=False),
}


def _replaced(text: str, rng: random.Random, run: bool) -> str:
    words = tokens(text)
    count = len(words) // 20
    start = rng.randrange(len(words) - count)
    places = range(start, start + count) if run else sorted(rng.sample(range(len(words)), count))
    for place in reversed(places):
        _, begin, end = words[place]
        text = text[:begin] + rng.choice(words)[0] + text[end:]
    return text


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_planted_duplicates_are_found_and_nothing_else(dropped: Callable[..., dict[int, str]], lang: str) -> None:
    rng = random.Random(lang)
    kinds = list(EDITS)
    rows = []
    for n in range(500):
        text = document(rng, lang, rng.randint(60, 400))
        rows += [(n, text), (n, EDITS[kinds[n % 5]](text, rng))]
    rows += [(-1 - n, document(rng, lang)) for n in range(500)]  # these have no twin
    rng.shuffle(rows)
    found = dropped([text for _, text in rows])

    pairs: dict[int, list[int]] = {}
    for place, (n, _) in enumerate(rows):
        pairs.setdefault(n, []).append(place)
    right, high, hits = 0, 0, 0
    for places in pairs.values():
        similarity = jaccard(*(rows[p][1] for p in places)) if len(places) == 2 else 0.0
        hit = any(place in found for place in places)
        right += hit and similarity >= 0.8
        high += similarity >= 0.85
        hits += hit and similarity >= 0.85
    assert high > 280
    assert hits >= 0.98 * high
    assert right >= 0.99 * len(found)


@pytest.mark.parametrize(("threshold", "size"), [(0.3, 5), (0.5, 1), (0.8, 5), (0.8, 2), (1.0, 3)])
def test_the_result_is_that_of_comparing_all_with_all(
    dropped: Callable[..., dict[int, str]], threshold: float, size: int
) -> None:
    rng = random.Random(size)
    texts: list[str] = []
    for _ in range(60):
        words = (
            rng.choice(texts).split() if texts and rng.random() < 0.8 else rng.choices("abc一二三", k=rng.randrange(30))
        )
        for _ in range(rng.randrange(3)):
            words.insert(rng.randrange(len(words) + 1), rng.choice("abc一二三"))
        texts.append(" ".join(words[rng.randrange(2) :]))
    # Bands of one row: whatever is alike is a candidate (missed with a probability of 0.7 ** 60 at most).
    found = dropped(texts, exact=False, threshold=threshold, size=size, bands=60, rows=1)
    group = list(range(len(texts)))
    for i, a in enumerate(texts):
        for k, b in enumerate(texts[:i]):
            if jaccard(a, b, size) >= threshold and group[i] != group[k]:
                group = [group[k] if g == group[i] else g for g in group]
    kept = {g: min((-len(t), n) for n, t in enumerate(texts) if group[n] == g)[1] for g in set(group)}
    assert found == {n: "near" for n in range(len(texts)) if kept[group[n]] != n}
    assert 5 < len(found) < 55


def test_the_sketch_is_unbiased_and_bands_match_as_often_as_the_curve_says() -> None:
    rng = np.random.default_rng(0)
    for similarity in (0.5, 0.85):
        common = round(400 * similarity / (1 + similarity))
        texts = []
        for _ in range(200):
            points = rng.permutation(4000)[: 400 - common] + 0x4E00
            points = [chr(p) for p in points]
            texts += [" ".join(points[:200]), " ".join(points[200 - common :])]
        real = np.array([jaccard(a, b, 1) for a, b in zip(texts[::2], texts[1::2], strict=True)])
        keys = sketches.band_keys(grams(texts, 1), 126, 1)
        guess = (keys[::2] == keys[1::2]).mean(1)
        assert abs((guess - real).mean()) < 4 * np.sqrt(0.25 / 126 / 200)
        assert np.sqrt(np.square(guess - real).mean()) < 1.2 * np.sqrt(similarity * (1 - similarity) / 126)
        keys = sketches.band_keys(grams(texts, 1), 18, 7)
        any_band = (keys[::2] == keys[1::2]).any(1).mean()
        assert abs(any_band - (1 - (1 - real**7) ** 18).mean()) < 0.12


def test_the_curve_in_the_text_is_the_formula() -> None:
    lines = str(dedup.__doc__).splitlines()
    at = next(n for n, line in enumerate(lines) if line.split()[:1] == ["J"])
    similarity = [float(word) for word in lines[at].split()[1:]]
    for line in lines[at + 1 : at + 3]:
        bands, rows = (int(n) for n in re.findall(r"\d+", line)[:2])
        for j, said in zip(similarity, line.split(")")[1].split(), strict=True):
            assert 1 - (1 - j**rows) ** bands == pytest.approx(float(said), abs=0.51 * 10 ** -len(said.split(".")[1]))
    assert 1 - (1 - 0.85 ** DedupConfig().rows) ** DedupConfig().bands > 0.999


def test_large_groups_are_linked_without_all_pairs(dropped: Callable[..., dict[int, str]], tmp_path: Path) -> None:
    rng = random.Random(3)
    one, other = document(rng, "en"), document(rng, "en")
    texts = [f"{one} {document(rng, 'en', 3)}" for _ in range(100)] + [f"{other} x{n}" for n in range(100)]
    rng.shuffle(texts)
    assert len(dropped(texts)) == 198
    report = json.loads((tmp_path / "0" / "duplicates.json").read_text())["report"]
    assert report["candidates"] < 5000  # of 9900 pairs
    keys = np.repeat(np.array([5, 9, 11], np.uint64), [3, 40, 2])
    pairs = sketches._pairs(keys, np.arange(45))
    links = [(int(p) >> 32, int(p) & 0xFFFFFFFF) for p in pairs]
    assert len(links) == len(set(links)) and all(keys[a] == keys[b] and a < b for a, b in links)
    assert sum(1 for a, _ in links if a < 3) == 3
    assert {b for a, b in links if a == 3} == set(range(4, 43))  # the first is paired with all
    assert len(links) < 40 * sketches.GROUP + 4


# --- files -----------------------------------------------------------------------------------------------------------


def corpus(seed: int = 5, count: int = 120) -> list[str]:
    rng = random.Random(seed)
    texts = [document(rng, rng.choice(["zh", "en"]), 80) for _ in range(count)]
    texts += [rng.choice(texts[:count]) for _ in range(count // 4)]
    texts += [rng.choice(texts[:count]) + rng.choice(["", " end", "完"]) for _ in range(count // 2)]
    rng.shuffle(texts)
    return texts


def test_how_rows_lie_in_files_and_who_works_on_them_makes_no_difference(tmp_path: Path) -> None:
    texts = corpus()
    config = DedupConfig()
    whole = write(tmp_path / "whole.jsonl", texts)
    expected = find_duplicates([whole], config, tmp_path / "one", workers=1)[whole]
    assert {*expected.values()} == {"exact", "near"}
    cuts = [0, 1, 90, 90, len(texts)]
    parts = [write(tmp_path / f"part{n}.jsonl.zst", texts[a:b]) for n, (a, b) in enumerate(itertools.pairwise(cuts))]
    (tmp_path / "empty.jsonl").write_bytes(b"")
    parts.append(tmp_path / "empty.jsonl")
    found = find_duplicates(parts, config, tmp_path / "many", workers=2)
    assert list(found) == parts
    again = {cuts[n] + line: reason for n, path in enumerate(parts[:4]) for line, reason in found[path].items()}
    assert again == expected
    assert find_duplicates([], config, tmp_path / "none", workers=1) == {}
    assert find_duplicates(parts[4:], config, tmp_path / "empty", workers=1) == {parts[4]: {}}


@pytest.mark.slow
def test_ray_finds_the_same(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    texts = corpus(6)
    files = [write(tmp_path / f"{n}.jsonl", texts[n::3]) for n in range(3)]
    local = find_duplicates(files, DedupConfig(lines=True), tmp_path / "local", workers=2)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        far = find_duplicates(files, DedupConfig(lines=True), tmp_path / "ray", engine="ray")
    finally:
        ray.shutdown()
        with warnings.catch_warnings(action="ignore"):
            gc.collect()  # Ray leaves processes of its own to the collector, and that warns
    assert far == local
    for path in (tmp_path / "local").rglob("*.npy"):
        assert path.read_bytes() == (tmp_path / "ray" / path.relative_to(tmp_path / "local")).read_bytes()


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "one"}\n \n{"text": "two"}\n{"text": "One!"}')
    assert find_duplicates([path], DedupConfig(), tmp_path / "w", workers=1) == {path: {0: "near", 2: "exact"}}


def test_a_finished_run_is_read_and_a_changed_file_is_worked_on_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write(tmp_path / f"{n}.jsonl", corpus(n, 20)) for n in range(2)]
    folder = tmp_path / "w"
    first = find_duplicates(files, DedupConfig(), folder, workers=1)
    calls: list[Path] = []

    def sketch(path: Path, *args: Any) -> dict[str, Any]:
        calls.append(path)
        return original(path, *args)

    original = sketches.sketch
    monkeypatch.setattr(sketches, "sketch", sketch)
    assert find_duplicates(files, DedupConfig(), folder, workers=1) == first
    assert calls == []
    (folder / "duplicates.json").unlink()
    assert find_duplicates(files, DedupConfig(), folder, workers=1) == first
    assert calls == []
    assert find_duplicates(files[::-1], DedupConfig(), folder, workers=1).keys() == first.keys()
    calls.clear()
    write(files[1], corpus(1, 20)[:-1])
    fresh = tmp_path / "fresh"
    changed = find_duplicates(files, DedupConfig(), folder, workers=1)
    assert calls == files  # the order had changed, too
    assert changed == find_duplicates(files, DedupConfig(), fresh, workers=1)
    strict = DedupConfig(threshold=1.0)
    calls.clear()
    assert find_duplicates(files, strict, folder, workers=1) == find_duplicates(
        files, strict, tmp_path / "v", workers=1
    )
    assert calls == files  # for the second folder only: a sketch does not depend on the threshold


PROGRAM = """
import sys
from pathlib import Path
from oriole.text.dedup import DedupConfig, find_duplicates
if __name__ == "__main__":
    files = sorted(Path(sys.argv[1]).glob("*.jsonl"))
    find_duplicates(files, DedupConfig(lines=True), Path(sys.argv[2]), workers=2)
"""


def killed_runs_end_alike(tmp_path: Path, times: int) -> None:
    for n in range(4):
        write(tmp_path / f"{n}.jsonl", corpus(n, 150))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def command(folder: str) -> list[str]:
        return [sys.executable, str(program), str(tmp_path), str(tmp_path / folder)]

    def progress(folder: str) -> int:
        return len([*(tmp_path / folder).glob("*/done/*.json")])

    subprocess.run(command("whole"), check=True)
    rng = random.Random(times)
    killed = 0
    for n in range(times):
        target = progress("whole") * (n + rng.random()) / (times + 1)
        process = subprocess.Popen(command("killed"), start_new_session=True)
        while process.poll() is None and progress("killed") < target:
            time.sleep(0.003)
        if process.poll() is None:
            time.sleep(rng.uniform(0, 0.02))
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed
    subprocess.run(command("killed"), check=True)
    result = (tmp_path / "whole" / "duplicates.json").read_bytes()
    assert json.loads(result)["report"]["near"] > 50
    assert (tmp_path / "killed" / "duplicates.json").read_bytes() == result
    names = [{p.name for p in (tmp_path / f).rglob("*") if p.is_file()} for f in ("whole", "killed")]
    assert names[0] == names[1]


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process group")
def test_killed_runs_end_like_an_unbroken_one(tmp_path: Path) -> None:
    killed_runs_end_alike(tmp_path, 3)


@pytest.mark.soak
@pytest.mark.skipif(sys.platform == "win32", reason="kills a process group")
def test_twenty_killed_runs_end_like_an_unbroken_one(tmp_path: Path) -> None:
    killed_runs_end_alike(tmp_path, 20)


def test_faults_are_named(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.jsonl", ["x"]), tmp_path / "bad.jsonl"
    with pytest.raises(DataError, match="named twice"):
        find_duplicates([good, tmp_path / "." / "good.jsonl"], DedupConfig(), tmp_path / "w", workers=1)
    with pytest.raises(DataError, match=r"No such file.*missing\.jsonl"):
        find_duplicates([tmp_path / "missing.jsonl"], DedupConfig(), tmp_path / "w", workers=1)
    for row in ('{"text": 3}', '{"txt": ""}', "[1]", "{", '"text"'):
        bad.write_text(f'{{"text": "a"}}\n{row}\n')
        with pytest.raises(DataError, match=r"bad\.jsonl, line 2: no JSON record with a 'text'"):
            find_duplicates([good, bad], DedupConfig(), tmp_path / "w", workers=1)
    with pytest.raises(ConfigError, match=r"treshold.*did you mean 'threshold'"):
        validate(DedupConfig, {"treshold": 0.5}, "dedup")
