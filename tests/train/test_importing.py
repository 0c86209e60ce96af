"""`oriole import`: token tensors become files that the other verbs read; a second call does only what has changed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from oriole.errors import DataError, ModelError
from oriole.text.formats import read_chats, read_docs, read_preferences
from oriole.train.importing import ImportConfig, import_files
from tests.train.test_imported import DOCS, EN, ZH, exchange, flat, ids, khaosz, saved


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    folder = tmp_path_factory.mktemp("khaosz")
    return khaosz(folder, [ZH, EN] * 30, 480), folder


@pytest.fixture
def cached(tmp_path: Path, tok: tuple[Tokenizer, Path]) -> Path:
    """A folder as KHAOSZ leaves it: running text, chats and pairs."""
    folder = tmp_path / "cached"
    folder.mkdir()
    made, _ = tok
    saved(folder / "seq.pt", {"sequence": torch.tensor(ids(made, *(f"<bos>{doc}<eos>" for doc in DOCS)))})
    talk = [exchange(made, "春风吹过哪里？", "小河边。"), exchange(made, "Who sings?", "The oriole.")]
    saved(folder / "sft.pt", flat(talk))
    good, bad = flat(talk), flat([exchange(made, "春风吹过哪里？", "不知道。"), exchange(made, "Who sings?", "Boats.")])
    pairs = {"chosen": good["sequence"], "chosen_mask": good["mask"]}
    saved(folder / "dpo.pt", pairs | {"rejected": bad["sequence"], "rejected_mask": bad["mask"]})
    return folder


def test_the_verb_writes_what_the_others_read(cached: Path, tok: tuple[Tokenizer, Path]) -> None:
    words = ["import", "cached/*.pt", "imported", f"tokenizer={tok[1]}", "workers=1"]
    command = [sys.executable, "-m", "oriole.cli", *words, "--json"]
    done = subprocess.run(command, cwd=cached.parent, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    found = {file["name"]: (file["kind"], file["rows"]) for file in json.loads(done.stdout)}
    assert found == {"dpo": ("preference", 2), "seq": ("text", len(DOCS)), "sft": ("chat", 2)}
    out = cached.parent / "imported"
    docs = list(read_docs(out / "seq.jsonl.zst"))
    assert [doc.text for doc in docs] == [doc.strip() for doc in DOCS] and {doc.source for doc in docs} == {"seq"}
    assert [doc.lang for doc in docs[:2]] == ["zh", "en"]
    chats = list(read_chats(out / "sft.jsonl.zst"))
    assert [[m.content for m in chat.messages] for chat in chats] == [
        ["春风吹过哪里？", "小河边。"],
        ["Who sings?", "The oriole."],
    ]
    assert [chat.lang for chat in chats] == ["zh", "en"]
    pairs = list(read_preferences(out / "dpo.jsonl.zst"))
    assert [(p.chosen[0].content, p.rejected[0].content) for p in pairs] == [
        ("小河边。", "不知道。"),
        ("The oriole.", "Boats."),
    ]


def test_a_second_call_does_what_has_changed(cached: Path, tmp_path: Path, tok: tuple[Tokenizer, Path]) -> None:
    config, out = ImportConfig(tokenizer=tok[1] / "tokenizer.json", workers=1), tmp_path / "out"
    first = import_files([str(cached)], out, config)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.zst")}
    assert import_files([str(cached)], out, config) == first
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.zst")} == times
    saved(cached / "seq.pt", {"sequence": torch.tensor(ids(tok[0], f"{EN}<eos>"))})
    assert import_files([str(cached)], out, config)[1]["rows"] == 1
    now = {path.name: path.stat().st_mtime_ns for path in out.glob("*.zst")}
    assert {name for name in now if now[name] != times[name]} == {"seq.jsonl.zst"}


def test_what_cannot_be_imported_is_named(cached: Path, tmp_path: Path, tok: tuple[Tokenizer, Path]) -> None:
    config, out = ImportConfig(tokenizer=tok[1], workers=1), tmp_path / "out"
    khaosz(tmp_path / "other", ["abc def " * 20], 300)
    for tokenizer, error in ((tmp_path / "other", DataError), (tmp_path / "none", ModelError)):
        with pytest.raises(error, match="tokenizer"):
            import_files([str(cached / "seq.pt")], out, ImportConfig(tokenizer=tokenizer, workers=1))
        assert not list(out.glob("*.zst"))
    with pytest.raises(DataError, match=r"no file of token tensors at .*nothing"):
        import_files([str(tmp_path / "nothing*.pt")], out, config)
    with pytest.raises(DataError, match="not made by oriole import"):
        import_files([str(cached)], cached, config)
    with pytest.raises(DataError, match="'chosen' is needed"):
        import_files([str(cached / "seq.pt")], out, config.model_copy(update={"kind": "preference"}))
    lost = exchange(tok[0], "   ", "   ")
    saved(cached / "bad.pt", flat([lost]))
    with pytest.raises(DataError, match="ids 0 to"):
        import_files([str(cached / "bad.pt")], out, config)
    with pytest.raises(DataError, match=r"holds no chat that could be read, for example .*ids 0 to"):
        import_files([str(cached / "bad.pt")], out, config.model_copy(update={"skip_bad": True}))
    with pytest.raises(DataError, match="oriole import makes text of them"):
        list(read_docs(cached / "seq.pt"))
