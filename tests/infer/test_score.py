"""A conversation's score is its own, whoever is scored beside it, and stands at its last token."""

import pytest
import torch

from oriole.errors import ModelError
from oriole.infer import score as module
from oriole.infer.score import score
from oriole.model.lm import LM

from .conftest import VOCAB, tiny


@pytest.fixture(scope="module")
def reward() -> LM:
    torch.manual_seed(3)
    return LM(tiny().config, heads=("reward",)).eval()


def conversations(lengths: list[int], seed: int = 0) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=drawn).tolist() for n in lengths]


def test_batched_equals_single_and_packed(reward: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = conversations([7, 1, 40, 12, 12, 63, 3])
    alone = torch.stack([reward.head("reward", reward(torch.tensor([row])).h[0, -1]) for row in ids]).detach()
    assert alone.std() > 0.1
    torch.testing.assert_close(score(reward, ids), alone, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(module, "TOKENS", 64)  # several groups
    torch.testing.assert_close(score(reward, ids), alone, atol=1e-5, rtol=1e-5)

    few = [ids[i] for i in (0, 2, 3)]  # one row, told apart by `doc`
    tokens = torch.tensor([[token for row in few for token in row]])
    doc = torch.tensor([[n for n, row in enumerate(few) for _ in row]], dtype=torch.int32)
    pos = torch.tensor([[n for row in few for n in range(len(row))]])
    ends = torch.tensor([len(row) for row in few]).cumsum(0) - 1
    packed = reward.head("reward", reward(tokens, doc=doc, pos=pos).h[0, ends])
    torch.testing.assert_close(packed, alone[[0, 2, 3]], atol=1e-5, rtol=1e-5)


def test_the_pad_id_at_the_end_of_a_conversation_is_a_token_like_others(reward: LM) -> None:
    with_zero, without = [5, 6, 0], [5, 6]
    scores = score(reward, [with_zero, without, [9] * 20])
    torch.testing.assert_close(scores[:1], score(reward, [with_zero]), atol=1e-5, rtol=1e-5)
    assert (scores[0] - scores[1]).abs() > 1e-3


def test_scoring_changes_nothing_of_the_model(reward: LM) -> None:
    reward.set_dropout(0.5)
    reward.train()
    try:
        once, again = (score(reward, conversations([9, 20])) for _ in range(2))
        assert torch.equal(once, again), "no dropout"
        assert reward.training
    finally:
        reward.set_dropout(0.0)
        reward.eval()


def test_nothing_to_score(reward: LM) -> None:
    assert score(reward, []).shape == (0,)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1], []], "conversation 2 of 2 is empty"),
        ([[1] * 65], "has 65 tokens, the reward model's context is 64"),
        ([[VOCAB]], "outside the vocabulary of 97; the reward model is one of another tokenizer"),
        ([[-1]], "outside the vocabulary"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(reward: LM, ids: list[list[int]], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        score(reward, ids)


def test_a_language_model_is_refused(lm: LM) -> None:
    with pytest.raises(ModelError, match="cannot score answers; load a reward model"):
        score(lm, [[1]])
