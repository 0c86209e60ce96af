"""Pairs keep together: both sides in one row, only the answer marked, none lost, and none taken that cannot teach."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oriole.text.shards import Shards, write_shards
from oriole.text.template import Message, Preference, render
from oriole.text.tokenizer import IM_END, Tokenizer, train_tokenizer
from oriole.train.batch import IGNORE, Batch
from oriole.train.pairs import PairPacker, Pairs, encode_pairs, pair_batches

EN = "Spring has come. Two orioles sing in the willow, and the children fly kites by the river. "


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train_tokenizer([("en", EN * 3), ("zh", "两只黄鹂在枝头唱歌。你好！")], 300)


def preference(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference((Message("user", prompt),), (Message("assistant", chosen),), (Message("assistant", rejected),))


def encoded(
    tok: Tokenizer, given: list[Preference], *, row: int = 64, context: int = 64, cut: bool = True
) -> tuple[list[Any], Counter[str]]:
    left_out: Counter[str] = Counter()
    rows = encode_pairs(given, tok, row=row, context=context, cut=cut, left_out=left_out)
    return list(rows), left_out


def pairs_of(tok: Tokenizer, folder: Path, count: int = 60, number: int = 0) -> Pairs:
    given = [
        preference(f"{number}.{i}", EN[i % 30 : i % 30 + 10 + i % 23], "x" + EN[: 3 + i % 17]) for i in range(count)
    ]
    rows, left_out = encoded(tok, given)
    assert not left_out and len(rows) == 2 * count
    return Pairs(write_shards(rows, tok, folder), number)


# --- rendering -------------------------------------------------------------------------------------------------------


def test_a_side_is_the_conversation_as_sft_reads_it_with_only_its_answer_marked(tok: Tokenizer) -> None:
    prompt = (Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    pair = Preference(prompt, (Message("assistant", "good one"),), (Message("assistant", "bad", reasoning="hm"),))
    rows, _ = encoded(tok, [pair], row=256, context=256)
    for (ids, mask, _), answer in zip(rows, (pair.chosen, pair.rejected), strict=True):
        whole, sft = render([*prompt, *answer], tok)
        asked, _ = render(prompt, tok, generation=True)
        assert ids == whole and ids[: len(asked)] == asked
        assert mask == [0] * len(asked) + sft[len(asked) :]
        assert sum(mask) and ids[max(i for i, m in enumerate(mask) if m)] == IM_END


def test_an_answer_of_several_turns_is_marked_as_a_whole_even_where_the_prompts_thoughts_fall_away(
    tok: Tokenizer,
) -> None:
    prompt = (Message("user", "a"), Message("assistant", "b", reasoning="thought"), Message("tool", "r"))
    answer = (Message("assistant", "x"), Message("user", "y"), Message("assistant", "z"))
    rows, _ = encoded(tok, [Preference(prompt, answer, (Message("assistant", "no"),))], row=400, context=400)
    ids, mask, _ = rows[0]
    marked = "".join(tok.decode([i]) if m else "|" for i, m in zip(ids, mask, strict=True))
    assert [part for part in marked.split("|") if part] == ["x", "z"]


# --- what cannot teach -----------------------------------------------------------------------------------------------


def test_what_cannot_teach_is_counted_by_name(tok: Tokenizer) -> None:
    given = [
        preference("p", "fine", "bad"),
        preference("p", "same", "  same"),  # the template drops leading white space
        preference("p", " \n", "bad"),
        preference("p", "good", ""),
        preference(EN * 3, "good", "bad"),
        preference("p", EN + "a", EN + "b"),  # equal as far as there is room
    ]
    rows, left_out = encoded(tok, given)
    assert len(rows) == 2
    assert left_out == {"equal sides": 2, "empty completion": 2, "prompt too long": 1}


def test_without_cutting_long_answers_are_left_out(tok: Tokenizer) -> None:
    rows, left_out = encoded(tok, [preference("p", "good", EN * 2), preference("p", "a", "b")], cut=False)
    assert len(rows) == 2 and left_out == {"answer too long": 1}


@pytest.mark.parametrize(("row", "context"), [(64, 64), (65, 64), (200, 40), (48, 1000)])
@pytest.mark.parametrize(("long", "short"), [(EN * 4, "no"), ("no", EN * 4), (EN * 4, "x" + EN * 3)])
def test_long_answers_lose_their_end_and_the_pair_fits(
    tok: Tokenizer, row: int, context: int, long: str, short: str
) -> None:
    whole, _ = encoded(tok, [preference("p", long, short)], row=10_000, context=10_000)
    rows, _ = encoded(tok, [preference("p", long, short)], row=row, context=context)
    sizes = [len(ids) - 1 for ids, _, _ in rows]
    full = [len(ids) - 1 for ids, _, _ in whole]
    assert sum(sizes) <= row and max(sizes) <= context
    assert sum(sizes) >= min(row - 1, sum(min(n, context) for n in full))  # nothing is cut that would have fitted
    for cut, kept in zip(rows, whole, strict=True):
        assert kept[0][: len(cut[0])] == cut[0] and kept[1][: len(cut[1])] == cut[1] and sum(cut[1])


# --- packing ---------------------------------------------------------------------------------------------------------


def sides(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """(tokens, targets, value) of every document of a batch."""
    out = []
    for row in range(len(batch.tokens)):
        for number in range(int(batch.doc[row].max()) + 1):
            where = batch.doc[row] == number
            assert batch.pos[row][where].tolist() == list(range(int(where.sum())))
            value = float(batch.extra["value"][row][where].sum())
            out.append((tuple(batch.tokens[row][where].tolist()), tuple(batch.targets[row][where].tolist()), value))
    return out


def expected(pairs: Pairs, k: int) -> list[Any]:
    out = []
    for side, (ids, mask) in enumerate(pairs.pair(k)):
        targets = [int(t) if m else IGNORE for t, m in zip(ids[1:], mask[1:], strict=True)]
        out.append((tuple(int(i) for i in ids[:-1]), tuple(targets), float(pairs.values["value"][2 * k + side])))
    return out


def packer(parts: list[Pairs], weights: dict[str, float] | None = None) -> PairPacker:
    for pairs in parts:
        pairs.values["value"] = 1.0 + np.arange(2 * len(pairs)) / 8 + 100 * pairs.number
    return PairPacker(parts, weights or {str(p.number): 1.0 for p in parts}, 7, 3, 64)


def test_an_epoch_holds_every_pair_once_and_both_sides_in_one_row(tok: Tokenizer, tmp_path: Path) -> None:
    pairs = pairs_of(tok, tmp_path / "a")
    batches = packer([pairs])
    seen: list[Any] = []
    for batch in itertools.islice(batches, 100):
        for row in range(3):
            found = sides(batch.cut(row, row + 1))  # a row alone has whole pairs, better side first
            seen += [tuple(found[i : i + 2]) for i in range(0, len(found), 2)]
    waiting = [tuple(expected(pairs, k)) for _, _, _, k in batches.state_dict()["waiting"]]
    counted = Counter(seen + waiting)
    each = [counted[tuple(expected(pairs, k))] for k in range(len(pairs))]
    assert sum(each) == len(seen) + len(waiting)
    assert max(each) - min(each) <= 1


def test_parts_have_their_shares_of_the_pairs(tok: Tokenizer, tmp_path: Path) -> None:
    parts = [pairs_of(tok, tmp_path / str(n), number=n) for n in range(2)]
    batches = packer(parts, {"0": 3.0, "1": 1.0})
    values = [value for batch in itertools.islice(batches, 60) for _, _, value in sides(batch)]
    assert np.mean([value < 100 for value in values]) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_resumed_equals_unbroken(tok: Tokenizer, tmp_path: Path, stop: int) -> None:
    parts = [pairs_of(tok, tmp_path / str(n), 20 + n, number=n) for n in range(2)]
    unbroken, resumed = packer(parts), packer(parts)
    for _ in range(stop):
        next(unbroken)
    resumed.load_state_dict(json.loads(json.dumps(unbroken.state_dict())))
    for _ in range(20):
        a, b = next(unbroken).tensors(), next(resumed).tensors()
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_rows_for_counts_what_packing_takes(tok: Tokenizer, tmp_path: Path) -> None:
    pairs = pairs_of(tok, tmp_path / "a")
    needed = packer([pairs]).rows_for(2 * len(pairs))
    batches = packer([pairs])
    given = [len(sides(batch.cut(row, row + 1))) // 2 for batch in itertools.islice(batches, 100) for row in range(3)]
    assert sum(given[: needed - 1]) < 2 * len(pairs) <= sum(given[:needed])


def test_measuring_sees_every_pair_once_and_knows_where(tok: Tokenizer, tmp_path: Path) -> None:
    pairs = pairs_of(tok, tmp_path / "a")
    packer([pairs])
    found = []
    for batch, rows in pair_batches(pairs, 4, 64):
        assert len(batch.tokens) == len(rows) <= 4
        assert sides(batch) == [side for row in rows for k in row for side in expected(pairs, k)]
        found += [k for row in rows for k in row]
    assert sorted(found) == list(range(len(pairs)))


def test_rows_are_full(tok: Tokenizer, tmp_path: Path) -> None:
    pairs = pairs_of(tok, tmp_path / "a", 300)
    batches = PairPacker([pairs], {"a": 1.0}, 1, 4, 256)
    filled = [float((b.doc >= 0).float().mean()) for b in itertools.islice(batches, 20)]
    assert np.mean(filled) > 0.95
    assert isinstance(pairs.shards, Shards)
