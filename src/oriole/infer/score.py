"""Scores of a reward model for whole conversations, as ids: for PPO, GRPO, best-of-n and the gate."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from oriole.errors import ModelError
from oriole.model.lm import LM

__all__ = ["score"]

TOKENS = 16_384
"""At most so many padded positions in one forward pass, unless one conversation alone has more."""


@torch.inference_mode()
def score(model: LM, conversations: Sequence[Sequence[int]]) -> Tensor:
    """The reward (N,), fp32, of each conversation (ids as `text.template.render` gives them), on the model's device.

    It is read at the last id, so the whole rendered conversation must be given: through the end mark of the last answer
    and the line break behind it. A conversation's score does not depend on which others are scored beside it, up to
    the rounding of the arithmetic. `ModelError` for one that is empty, longer than the model's context, or has ids
    outside its vocabulary, and for a model without a reward head.
    """
    if "reward" not in model.scalar_heads:
        raise ModelError("a language model cannot score answers; load a reward model (model.folder.load_reward_model)")
    for number, ids in enumerate(conversations, 1):
        _check(model, ids, f"conversation {number} of {len(conversations)}")
    device = model.embedding.weight.device
    scores = torch.empty(len(conversations), device=device)
    was_training = model.training
    model.eval()
    try:
        for places in _groups(conversations):
            rows = [torch.as_tensor(conversations[i], dtype=torch.int64) for i in places]
            lengths = torch.tensor([len(row) for row in rows])
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            doc = torch.where(torch.arange(tokens.shape[1]) < lengths[:, None], 0, -1).to(torch.int32)
            h = model(tokens.to(device), doc=doc.to(device)).h
            last = h[torch.arange(len(rows), device=device), (lengths - 1).to(device)]  # (B, D)
            scores[torch.tensor(places, device=device)] = model.head("reward", last).float()
    finally:
        model.train(was_training)
    return scores


def _check(model: LM, ids: Sequence[int], what: str) -> None:
    if not len(ids):
        raise ModelError(f"{what} is empty and cannot be scored; give at least one token")
    if len(ids) > model.config.context:
        raise ModelError(
            f"{what} has {len(ids):,} tokens, the reward model's context is {model.config.context:,}; shorten it"
        )
    if max(ids) >= model.config.vocab_size or min(ids) < 0:
        raise ModelError(
            f"{what} has an id outside the vocabulary of {model.config.vocab_size:,}; the reward model is one of "
            "another tokenizer"
        )


def _groups(conversations: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Places of conversations of like length, the longest first, which pads least."""
    group: list[int] = []
    for place in sorted(range(len(conversations)), key=lambda i: len(conversations[i]), reverse=True):
        if group and len(conversations[group[0]]) * (len(group) + 1) > TOKENS:
            yield group
            group = []
        group.append(place)
    if group:
        yield group
