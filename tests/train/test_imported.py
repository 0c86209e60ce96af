"""KHAOSZ's token tensors come back as text, with the tokenizer that made them and with no other."""

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from oriole.errors import DataError, ModelError
from oriole.text.formats import Skipped
from oriole.train import imported
from oriole.train.imported import TokenFile

ZH = "两个黄鹂鸣翠柳。春风吹过小河边，孩子们数着落下的叶子。老师说今天的天气很好，我们一起去公园看花听鸟。"
EN = "The oriole sings in a green willow near our old stone bridge and two small boats drift slowly down the river. "
DOCS = [
    ZH,
    EN,
    "河边的船夫每天天亮前就起来。",
    "Don't count the leaves; listen to them: 3 or 4 songs.",
    EN[:60] + ZH[:20],
]


def khaosz(folder: Path, texts: list[str], vocab: int) -> Tokenizer:
    """A tokenizer built as KHAOSZ builds its own (khaosz/core/tokenizer.py), saved in the folder."""
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation(behavior="isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Metaspace(prepend_scheme="never")])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    tok.add_special_tokens(["<|user|>", "<|system|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    return tok


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("khaosz")


@pytest.fixture(scope="module")
def tok(folder: Path) -> Tokenizer:
    return khaosz(folder, [ZH, EN] * 30, 480)


def ids(tok: Tokenizer, *texts: str) -> list[int]:
    return [i for text in texts for i in tok.encode(text, add_special_tokens=False).ids]


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def exchange(tok: Tokenizer, ask: str, answer: str, first: bool = True) -> tuple[list[int], list[int]]:
    asked = ids(tok, ("" if first else "\n") + f"<|user|> {ask} <|system|> <bos>")
    answered = ids(tok, f"{answer}<eos>")
    return asked + answered, [0] * len(asked) + [1] * len(answered)


def flat(parts: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    return {
        "sequence": torch.tensor([i for part, _ in parts for i in part], dtype=torch.int32),
        "mask": torch.tensor([i for _, part in parts for i in part], dtype=torch.bool),
    }


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [1 << 20, 16])
def test_documents(tmp_path: Path, folder: Path, tok: Tokenizer, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = torch.tensor(ids(tok, *(f"<bos>{doc}<eos>" for doc in DOCS)), dtype=torch.int32)
    path = saved(tmp_path / "seq.pt", {"sequence": sequence})
    file = TokenFile(path, folder)
    monkeypatch.setattr(imported, "LONGEST", longest)
    docs = [doc.text for doc in file.docs()]
    if longest > 1000:
        assert docs == [doc.strip() for doc in DOCS]
    else:
        assert "".join(docs).replace(" ", "") == "".join(DOCS).replace(" ", "") or len(docs) > len(DOCS)
    assert all(doc.source == "seq" for doc in file.docs())


def test_conversations(tmp_path: Path, folder: Path, tok: Tokenizer) -> None:
    parts = [
        exchange(tok, "春风吹过哪里？", "小河边。"),
        exchange(tok, "Who sings?", "The oriole."),
        exchange(tok, "Where?", "In a willow.", first=False),  # goes on
        exchange(tok, "谁数叶子？", "孩子们。"),
    ]
    for mask in ("mask", "loss_mask"):
        table = flat(parts)
        table[mask] = table.pop("mask")
        file = TokenFile(saved(tmp_path / "sft.pt", table), folder / "tokenizer.json")
        chats = [[m.content for m in chat.messages] for chat in file.chats()]
        assert chats == [
            ["春风吹过哪里？", "小河边。"],
            ["Who sings?", "The oriole.", "Where?", "In a willow."],
            ["谁数叶子？", "孩子们。"],
        ]


def test_conversations_without_a_template(tmp_path: Path, folder: Path, tok: Tokenizer) -> None:
    asked, answered = ids(tok, "春风吹过哪里？"), ids(tok, "小河边。<eos>")
    empty = ids(tok, "   ")
    sequence = asked + answered + empty + answered
    mask = [0] * len(asked) + [1] * len(answered) + [0] * len(empty) + [1] * len(answered)
    table = {"sequence": [torch.tensor(sequence)], "mask": [torch.tensor(mask)]}
    file = TokenFile(saved(tmp_path / "sft.pt", table), folder)
    with pytest.raises(DataError, match=r"sft\.pt, ids .* of 'sequence': 'prompt' is empty"):
        list(file.chats())
    skipped = Skipped()
    (chat,) = file.chats(skipped)
    assert [m.content for m in chat.messages] == ["春风吹过哪里？", "小河边。"] and skipped.total == 1


def test_pairs(tmp_path: Path, folder: Path, tok: Tokenizer) -> None:
    good = flat(
        [exchange(tok, "Who sings?", "The oriole."), exchange(tok, "天气？", "很好。"), exchange(tok, "a", "b")]
    )
    bad = flat([exchange(tok, "Who sings?", "Boats."), exchange(tok, "天气？", "我们。"), exchange(tok, "c", "d")])
    table = {"chosen": good["sequence"], "chosen_mask": good["mask"]}
    table |= {"rejected": bad["sequence"], "rejected_mask": bad["mask"]}
    file = TokenFile(saved(tmp_path / "dpo.pt", table), folder)
    with pytest.raises(DataError, match="the two answers have different prompts"):
        list(file.preferences())
    skipped = Skipped()
    found = [(p.prompt[0].content, p.chosen[0].content, p.rejected[0].content) for p in file.preferences(skipped)]
    assert found == [("Who sings?", "The oriole.", "Boats."), ("天气？", "很好。", "我们。")] and skipped.total == 1


# --- refusals --------------------------------------------------------------------------------------------------------


def test_another_tokenizer_is_refused(tmp_path: Path, tok: Tokenizer) -> None:
    path = saved(tmp_path / "seq.pt", {"sequence": torch.tensor(ids(tok, *DOCS * 20))})
    rng = random.Random(3)
    texts = ["".join(rng.choices("abcdefghijkl mnop", k=60)) + "".join(rng.choices(ZH, k=40)) for _ in range(60)]
    other = khaosz(tmp_path / "other", texts, 480)
    assert other.get_vocab_size() >= tok.get_vocab_size()
    with pytest.raises(DataError, match=r"was not made by this tokenizer: only \d+% of its ids come back"):
        TokenFile(path, tmp_path / "other")
    khaosz(tmp_path / "small", [EN], 270)
    with pytest.raises(DataError, match=r"'sequence' has the id \d+, but the tokenizer's go from 0 to \d+"):
        TokenFile(path, tmp_path / "small")
    with pytest.raises(ModelError, match=r"no tokenizer at .*nowhere"):
        TokenFile(path, tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is no tokenizer"):
        TokenFile(path, tmp_path)


class Dangerous:
    """What a hostile file would hold: reading it must not run it."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/oriole-was-here"),))


def test_files_that_hold_more_than_tensors_are_refused(tmp_path: Path, folder: Path) -> None:
    hostile = saved(tmp_path / "hostile.pt", {"sequence": Dangerous()})
    with pytest.raises(DataError, match="is damaged or holds more than tensors"):
        TokenFile(hostile, folder)
    assert not Path("/tmp/oriole-was-here").exists()
    pickled = tmp_path / "seq.pkl"
    pickled.write_bytes(pickle.dumps({"sequence": [1, 2]}))
    with pytest.raises(DataError, match=r"is no \.pt file; token tensors are read from those only: .*pickle\.load"):
        TokenFile(pickled, folder)
    (tmp_path / "cut.pt").write_bytes(hostile.read_bytes()[:200])
    for name, said in (("cut.pt", "is damaged"), ("none.pt", "No such file")):
        with pytest.raises(DataError, match=said):
            TokenFile(tmp_path / name, folder)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({}, "expected a dictionary of token tensors"),
        ([torch.tensor([1])], "holds list; expected a dictionary"),
        ({"sequence": torch.zeros(2, 2, dtype=torch.int64)}, "'sequence' is not flat"),
        ({"sequence": torch.zeros(4)}, "'sequence' is not flat; expected tensors of one dimension with whole numbers"),
        ({"sequence": torch.tensor([-1])}, "'sequence' has the id -1"),
    ],
)
def test_other_shapes_are_refused(tmp_path: Path, folder: Path, tok: Tokenizer, value: Any, why: str) -> None:
    with pytest.raises(DataError, match=why):
        TokenFile(saved(tmp_path / "x.pt", value), folder)


def test_what_a_file_lacks_is_said(tmp_path: Path, folder: Path, tok: Tokenizer) -> None:
    file = TokenFile(saved(tmp_path / "seq.pt", torch.tensor(ids(tok, *DOCS))), folder)  # a bare tensor is a sequence
    assert len(list(file.docs())) == 1
    for read, needed in ((file.chats, "mask"), (file.preferences, "chosen_mask")):
        with pytest.raises(DataError, match=f"has 'sequence', but '({needed}|chosen)' is needed"):
            list(read())
    table = {"sequence": torch.tensor(ids(tok, *DOCS)), "mask": torch.tensor([0, 1])}
    with pytest.raises(DataError, match="ids but 'mask' 2 marks"):
        list(TokenFile(saved(tmp_path / "y.pt", table), folder).chats())
