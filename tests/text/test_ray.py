"""The same work on a real Ray cluster of this machine: every file comes out as from the local engine, byte for byte."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oriole.text.dedup import DedupConfig, find_duplicates
from oriole.text.formats import read_docs
from oriole.text.pack import PackConfig, pack
from oriole.text.pipeline import CleanConfig, clean
from oriole.text.shards import Shards
from oriole.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

Text = Callable[..., list[tuple[str, str]]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def data(tmp_path: Path, bilingual: Text) -> Path:
    """Three files of text, the third with copies and near copies of the first's documents, and evaluation data."""
    (tmp_path / "data").mkdir()
    texts = [[(lang, t * 3) for lang, t in bilingual(40, seed=n)] for n in range(3)]
    texts[2] += [*texts[0][:10], *((lang, t + "End. 完。") for lang, t in texts[0][20:30])]
    for n, some in enumerate(texts):
        rows = [{"text": t, "source": f"{lang}{n}"} for lang, t in some]
        write(tmp_path / "data" / f"part_{n}.jsonl", rows)
    write(tmp_path / "eval.jsonl", [{"question": texts[1][3][1]}])
    return tmp_path / "data"


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    """All files, the working state among them: it must fit whichever engine goes on with it."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock" and "page" not in p.name
    }


def test_pack_clean_and_dedup_are_the_same_on_ray(cluster: Any, data: Path, tok: Tokenizer, tmp_path: Path) -> None:
    made = {}
    for engine in ("local", "ray"):
        config = CleanConfig(
            engine=engine, workers=1, heldout=0.05, decontaminate=(str(tmp_path / "eval.jsonl"),),
            rules={"preset": "light"},
        )  # fmt: skip
        made[engine] = clean([data], tmp_path / engine / "clean", config)
    local, ray = (contents(tmp_path / engine / "clean") for engine in made)
    final = {name for name in local if ".done" not in Path(name).parts}
    assert {name for name in final if local[name] != ray.get(name)} == set()
    assert final == {name for name in ray if ".done" not in Path(name).parts}
    assert {"part_0.jsonl.zst", "report.json", "report.html"} <= final
    kept = list(read_docs([tmp_path / "ray" / "clean" / f"part_{n}.jsonl.zst" for n in range(3)]))
    assert 0 < len(kept) <= 240  # of 260: the copies have gone

    tok.save(tmp_path / "tok")
    for engine in ("local", "ray"):
        packing = PackConfig(tokenizer=tmp_path / "tok", engine=engine, workers=2)
        pack([tmp_path / "ray" / "clean"], tmp_path / engine / "packed", packing)
    assert contents(tmp_path / "local" / "packed") == contents(tmp_path / "ray" / "packed")
    assert len(Shards.open(tmp_path / "ray" / "packed")) == len(kept)

    files = [tmp_path / "ray" / "clean" / f"part_{n}.jsonl.zst" for n in range(3)]
    found = [
        find_duplicates(files, DedupConfig(), tmp_path / engine / "dedup", engine=engine, workers=2)
        for engine in ("local", "ray")
    ]
    assert found[0] == found[1] and found[0].keys() <= set(files)
