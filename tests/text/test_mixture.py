"""The mixture keeps its shares, visits everything once an epoch, and resumes at any point."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oriole.errors import CheckpointError, ConfigError, DataError
from oriole.text.mixture import Mixture
from oriole.text.shards import Row, Shards, View, write_shards
from oriole.text.tokenizer import Tokenizer


def numbered(n: int, start: int = 0, length: int = 3, source: str = "s") -> Iterator[Row]:
    """Documents that tell their own number: its two digits in base 800, and then length - 2 times id 16."""
    for i in range(start, start + n):
        yield [17 + i // 800, 17 + i % 800, *[16] * (length - 2)], None, source


def number(ids: Any) -> int:
    return (int(ids[0]) - 17) * 800 + int(ids[1]) - 17


@pytest.fixture(scope="module")
def parts(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shards | View]:
    """Parts of 500, 90 and 7 documents, of 3 to 40 tokens."""
    folder = tmp_path_factory.mktemp("parts")
    zh = write_shards((row for i in range(500) for row in numbered(1, i, 3 + i % 38)), tok, folder / "zh")
    en = write_shards(numbered(97, 1000, 11), tok, folder / "en")
    return {"zh": zh, "en": View(en, np.arange(90)), "en/poem": View(en, np.arange(90, 97))}


WEIGHTS = {"zh": 3.0, "en": 1.0, "en/poem": 0.25}


def test_shares_of_tokens_hold_at_every_point(parts: dict[str, Shards | View]) -> None:
    mixture = Mixture(parts, WEIGHTS, seed=1)
    given: Counter[str] = Counter()
    for n, (ids, mask) in enumerate(mixture):
        assert len(ids) == len(mask)
        i = number(ids)
        given["zh" if i < 1000 else "en" if i < 1090 else "en/poem"] += len(ids)
        total = sum(given.values())
        for name, weight in WEIGHTS.items():  # never further off than the longest document
            assert abs(given[name] - total * weight / 4.25) <= 80
        if n == 3000:
            break
    for name, weight in WEIGHTS.items():
        assert given[name] / total == pytest.approx(weight / 4.25, rel=0.01)
    assert mixture.state_dict()["parts"]["zh"]["tokens"] == given["zh"]


def test_each_epoch_visits_each_document_once_in_another_order(parts: dict[str, Shards | View]) -> None:
    mixture = Mixture({"zh": parts["zh"]}, {"zh": 7}, seed=1)
    assert mixture.epochs() == {"zh": 0}
    epochs = []
    for epoch in range(3):
        epochs.append([number(next(mixture)[0]) for _ in range(500)])
        assert mixture.epochs() == {"zh": epoch + 1}
    assert all(sorted(order) == list(range(500)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert all(order != sorted(order) for order in epochs)


@pytest.mark.parametrize("length", [1, 7, 39, 100])
def test_pieces_hold_every_pair_once_and_spread_a_document(parts: dict[str, Shards | View], length: int) -> None:
    zh = parts["zh"]

    def pairs(ids: Any, mask: Any) -> list[tuple[int, int, int]]:
        return list(zip(ids[:-1].tolist(), ids[1:].tolist(), mask[1:].tolist(), strict=True))

    whole = Counter(pair for i in range(len(zh)) for pair in pairs(*zh.doc(i)))
    mixture = Mixture({"zh": zh}, {"zh": 1}, seed=1, length=length)
    seen: Counter[tuple[int, int, int]] = Counter()
    sizes = []
    while mixture.epochs()["zh"] < 1:
        ids, mask = next(mixture)
        sizes.append(len(ids))
        seen.update(pairs(ids, mask))
    assert seen == whole and max(sizes) <= length + 1
    assert json.loads(json.dumps(mixture.state_dict()))["parts"]["zh"]["length"] == length
    with pytest.raises(CheckpointError, match="length"):
        Mixture({"zh": zh}, {"zh": 1}, seed=1, length=length + 1).load_state_dict(mixture.state_dict())


def test_the_order_follows_from_seed_and_name(parts: dict[str, Shards | View]) -> None:
    def order(name: str, seed: int) -> list[int]:
        mixture = Mixture({name: parts["zh"]}, {name: 1}, seed)
        return [number(next(mixture)[0]) for _ in range(500)]

    assert order("zh", 1) == order("zh", 1)
    assert order("zh", 1) != order("zh", 2)
    assert order("zh", 1) != order("en", 1), "parts of one size must not be walked in step"
    assert order("zh", 0)[:8] == FIRST, "runs of earlier versions could not be resumed"


FIRST = [292, 460, 127, 410, 463, 64, 110, 433]


@given(before=st.integers(0, 1500), after=st.integers(0, 400))
@settings(max_examples=25, deadline=None)
def test_a_mixture_resumes_exactly_anywhere(parts: dict[str, Shards | View], before: int, after: int) -> None:
    unbroken = Mixture(parts, WEIGHTS, seed=3)
    for _ in range(before):
        next(unbroken)
    saved = json.dumps(unbroken.state_dict())
    assert len(saved) < 800
    resumed = Mixture(parts, WEIGHTS, seed=3)
    for _ in range(after):  # wherever the loading one stood before
        next(resumed)
    resumed.load_state_dict(json.loads(saved))
    assert resumed.epochs() == unbroken.epochs()
    for _ in range(300):
        assert number(next(resumed)[0]) == number(next(unbroken)[0])
    assert resumed.state_dict() == unbroken.state_dict()


def test_a_position_of_other_data_is_refused(parts: dict[str, Shards | View]) -> None:
    mixture = Mixture(parts, WEIGHTS, seed=1)
    for _ in range(5):
        next(mixture)
    state = mixture.state_dict()
    zh = parts["zh"]
    assert isinstance(zh, Shards)
    others = {
        "seed 1, not 2": Mixture(parts, WEIGHTS, seed=2),
        "zh, en, en/poem, the mixture has zh": Mixture({"zh": zh}, {"zh": 1}, seed=1),
        "part 'zh' had fingerprint": Mixture(parts | {"zh": View(zh, np.arange(499))}, WEIGHTS, seed=1),
        "part 'zh' had share": Mixture(parts, WEIGHTS | {"zh": 4}, seed=1),
    }
    for said, other in others.items():
        fresh = other.state_dict()
        with pytest.raises(CheckpointError, match=said):
            other.load_state_dict(state)
        assert other.state_dict() == fresh, "half of a refused position was taken over"
    with pytest.raises(CheckpointError, match="schema 9"):
        mixture.load_state_dict(state | {"schema": 9})


def test_parts_that_cannot_be_mixed_are_named(parts: dict[str, Shards | View]) -> None:
    zh = parts["zh"]
    assert isinstance(zh, Shards)
    with pytest.raises(ConfigError, match="has parts zh but weights for en"):
        Mixture({"zh": zh}, {"en": 1}, 0)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="weight of part 'zh'"):
            Mixture({"zh": zh}, {"zh": weight}, 0)
    with pytest.raises(ConfigError, match="weight above 0"):
        Mixture({"zh": zh}, {"zh": 0}, 0)
    with pytest.raises(DataError, match="part 'zh' of the mixture is empty"):
        Mixture({"zh": View(zh, [])}, {"zh": 1}, 0)
    mixture = Mixture({"none": View(zh, []), "zh": zh}, {"none": 0, "zh": 1}, 0)
    assert len(next(mixture)[0]) >= 3
    assert list(mixture.epochs()) == ["zh"]
