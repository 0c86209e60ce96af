"""Validation while training: bits per byte for each language, and fixed prompts continued greedily."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from oriole.infer.engine import Engine
from oriole.infer.sample import Sampling
from oriole.model.lm import LM
from oriole.text.shards import Shards, View
from oriole.text.template import Message, render
from oriole.text.tokenizer import END_OF_TEXT, IM_END, Tokenizer
from oriole.train import dist
from oriole.train.batch import IGNORE
from oriole.train.objectives import head_weight, token_log_probs

__all__ = ["acceptance", "bits_per_byte", "continuations"]


@torch.inference_mode()
def bits_per_byte(model: LM, shards: Shards | View, *, length: int, max_tokens: int, batch: int = 16) -> float:
    """Negative log2-likelihood of the trained tokens of `shards`, divided by their UTF-8 bytes.

    Documents are read from the front, each cut into windows of `length` tokens that never see one another, until
    `max_tokens` tokens were used. The first token of a window has no context and is not counted, nor is a reserved
    token (it has no bytes). Independent of the tokenizer up to that, and of batch and packing. Of several processes
    each takes its share of the windows; all must call, and all get the same.
    Returns `nan` when nothing is counted.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    byte_lengths = torch.from_numpy(np.array(shards.byte_lengths)).to(device)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    total_bytes = torch.zeros((), dtype=torch.int64, device=device)
    windows = itertools.islice(_windows(shards, length, max_tokens), dist.rank(), None, dist.world())
    for tokens, targets, doc in _batches(windows, batch, device):
        h = model(tokens, doc=doc).h
        rows = targets != IGNORE  # only those that count reach the head
        wanted = targets[rows]
        log_probs, _ = token_log_probs(h[rows], head_weight(model), wanted)
        nats -= (log_probs * (byte_lengths[wanted] > 0)).double().sum()
        total_bytes += byte_lengths[wanted].sum()
    model.train(was_training)
    nats, total_bytes = dist.sum(nats), dist.sum(total_bytes)
    return float(nats / math.log(2) / total_bytes) if total_bytes > 0 else math.nan


@torch.inference_mode()
def acceptance(model: LM, shards: Shards | View, *, length: int, max_tokens: int, batch: int = 16) -> dict[str, float]:
    """How often the greedy guess at a further token (`LM.supervise`) is the model's own, by the token: {"2": share}.

    The windows are those of `bits_per_byte`. Where the document goes on as it does, the guess from position i at token
    i + 1 + k is held against what the model itself finds likeliest there, having seen all that comes before; that is
    what self-speculative decoding accepts (Leviathan et al. 2023; DeepSeek-V3, section 5.4.3). It counts where the
    token is a trained one: in chats the assistant's words. `nan` when nothing counts.
    """
    assert model.deep is not None, "the caller has asked whether there is anything to measure"
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    hits = torch.zeros(model.deep.table.tokens_ahead - 1, dtype=torch.int64, device=device)
    counts = torch.zeros_like(hits)
    windows = itertools.islice(_windows(shards, length, max_tokens), dist.rank(), None, dist.world())
    for tokens, targets, doc in _batches(windows, batch, device):
        out = model(tokens, doc=doc)
        own = _greedy(model, out.h)
        for k, state in enumerate(out.mid[len(model.deep.table.depths) :], start=1):
            there = (targets[:, k:] != IGNORE) & (doc[:, k:] >= 0)
            hits[k - 1] += ((_greedy(model, state)[:, :-k] == own[:, k:]) & there).sum()
            counts[k - 1] += there.sum()
    model.train(was_training)
    hits, counts = dist.sum(hits), dist.sum(counts)
    shares = (hits / counts).tolist()  # 0 / 0 is nan
    return {str(k): round(share, 4) for k, share in enumerate(shares, start=2)}


def _greedy(model: LM, h: torch.Tensor) -> torch.Tensor:
    """The likeliest tokens (B, T) of states h (B, T, D), in pieces, so that the logits of a batch never exist."""
    pieces = [model.head("logits", part).argmax(-1) for part in torch.split(h.flatten(0, 1), 1024)]
    return torch.cat(pieces).view(h.shape[:2])


def _windows(shards: Shards | View, length: int, max_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows (n,) of token ids and loss mask, at most `max_tokens` tokens in all, longest documents cut."""
    left = max_tokens
    for i in range(len(shards)):
        ids, mask = shards.doc(i)
        for start in range(0, len(ids), length):
            if left <= 0:
                return
            window = slice(start, start + length)
            left -= len(ids[window])
            yield ids[window], mask[window]


def _batches(
    windows: Iterator[tuple[np.ndarray, np.ndarray]], batch: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Padded batches of windows of like length: tokens, targets and doc, each (B, T)."""
    ordered = sorted(windows, key=lambda w: len(w[0]))
    for start in range(0, len(ordered), batch):
        group = ordered[start : start + batch]
        shape = (len(group), max(len(ids) for ids, _ in group))
        tokens = torch.full(shape, END_OF_TEXT, dtype=torch.int64)
        targets = torch.full(shape, IGNORE, dtype=torch.int64)
        doc = torch.full(shape, -1, dtype=torch.int32)
        for row, (ids, mask) in enumerate(group):
            n = len(ids)
            tokens[row, :n] = torch.from_numpy(ids.astype(np.int64))
            doc[row, :n] = 0
            targets[row, : n - 1] = torch.where(
                torch.from_numpy(mask[1:].astype(bool)), tokens[row, 1:n], torch.tensor(IGNORE)
            )
        yield tokens.to(device), targets.to(device), doc.to(device)


def continuations(
    model: LM, tokenizer: Tokenizer, prompts: Sequence[str], *, chat: bool, new_tokens: int = 48
) -> list[dict[str, str]]:
    """Each prompt continued greedily (as a user's turn when `chat`): `[{"prompt", "text"}]`."""
    was_training = model.training
    model.eval()
    if chat:
        ids = [render([Message("user", p)], tokenizer, generation=True)[0] for p in prompts]
    else:
        ids = [tokenizer.encode(p) for p in prompts]
    sampling = Sampling(max_new_tokens=new_tokens, temperature=0.0, stop_ids=(END_OF_TEXT, IM_END))
    answers = Engine(model, max_batch=max(1, len(ids))).run([(i, sampling) for i in ids])
    model.train(was_training)
    return [{"prompt": p, "text": tokenizer.decode(a)} for p, a in zip(prompts, answers, strict=True)]
