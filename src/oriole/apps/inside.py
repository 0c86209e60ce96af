"""What a model does with one text, described: tokens, embeddings, attention, experts, each depth's guess, what comes
next.

Everything is one JSON-able description, which `insidetext` shows on a terminal and `insidepage` as a page. Layers,
heads and experts are counted from 1 where a person reads; place 0 of the residual stream is the embedding.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from oriole.apps.api import Generation, Oriole
from oriole.config import Config
from oriole.errors import DataError, ModelError
from oriole.model.inside import Chosen, Inside, Stack, entropy, lens, look, look_across, nearest, principal
from oriole.model.lm import LM
from oriole.model.seq2seq import START, Seq2Seq
from oriole.text.template import Message
from oriole.text.tokenizer import RESERVED, Tokenizer

__all__ = ["InsideConfig", "describe", "kind_of", "spelled", "split_characters"]

SCHEMA = 2
"""2: `source`, `crossed`, `cross`, `norm_at` and `experts` are new; all that 1 had is as it was."""
LONGEST = 256
"""Tokens that a page shows: the weights of attention grow with their square."""
NEIGHBOURS, TOP, LENS = 6, 10, 5

_HAN = re.compile("[\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


class InsideConfig(Config):
    """What `oriole inspect` looks at."""

    mode: Literal["auto", "text", "question"] = "auto"
    """text: the text as it stands; question: as a user's message, in the roles the model was trained with (none for an
    encoder-decoder of plain questions), with the answer that it gives. auto: a question for a model that can chat."""
    answer: int | None = Field(None, ge=0)
    """Tokens that the model may write after the text, always its likeliest, and that are looked at as well; by default
    32 after a question and for an encoder-decoder, which says nothing otherwise, and none after a text."""
    html: Path = Path("inspect.html")
    """The page that is written."""


def describe(oriole: Oriole, text: str, config: InsideConfig) -> dict[str, Any]:
    """What the model computes over the text, as numbers and words.

    {"schema", "model", "mode", "layers", "heads", "vocab_size", "parameters", "norm_at" (pre or post), "written" (the
    first token that the model wrote itself), "tokens": [{"id", "text", "bytes", "kind"}], "split": [{"text", "from",
    "to"}] (characters in several tokens), "embedding": {"norms" (S + T), "mean_norm" (of the vocabulary), "neighbours":
    {id: [[text, cosine]]}, "map": {"ids", "points", "shares"} or None}, "residual", "attended", "transformed": norms
    [L + 1 or L][T], "attention": [L][H][query][key], "lens": [L + 1][T][[text, probability]], "next": [{"top": [[text,
    probability]], "entropy" and "loss" (nats; None at the end), "rank" (of the token that follows, 1 the likeliest)}],
    "steps": [{"lens" [T], "confidence" [T]}] (iterations of a latent block), "experts": [{"layer" and experts from 0,
    "count", "shared", "chosen": [T][[expert, weight]], "share": [count]}] (of each layer with experts, "share" of the
    tokens), "source", "crossed": norms [L][T], "cross": [L][H][query][key of the source]}

    Of an encoder-decoder the text is the source: {"layers", "tokens", "split", "residual", "attended", "transformed",
    "attention"} of S tokens and the encoder's layers. All else is the decoder's, whose T tokens are its start mark and
    the answer. What a model does not have is empty, and "source" None.

    `DataError` for a text that is empty, `ModelError` for one longer than the context or than a page can show.
    """
    if not text:
        raise DataError('the text is empty; give some, in quotes: oriole inspect RUN "两个黄鹂鸣翠柳"')
    model, tok = oriole.model, oriole.tokenizer
    mode = config.mode if config.mode != "auto" else "question" if oriole.can_chat else "text"
    prompt = _prompt(oriole, text, mode)
    room = min(oriole.context, LONGEST) - len(prompt)
    if room < 0:
        bound = "the model's context is" if oriole.context <= LONGEST else "a page of attention maps shows at most"
        roles = mode == "question" and not oriole.plain_questions
        raise ModelError(
            f"the text has {len(prompt):,} tokens{' in its roles' * roles}, {bound} "
            f"{min(oriole.context, LONGEST):,}; give a shorter one"
        )
    silent = mode == "text" and isinstance(model, LM)
    count = min(room, config.answer if config.answer is not None else 0 if silent else 32)
    written = _continued(oriole, prompt, count)
    source, ids, inside = _looked(model, prompt, written)
    known = tok.vocab_size
    return {
        "schema": SCHEMA,
        "model": str(oriole.folder),
        "mode": mode,
        "layers": len(inside.stack.weights),
        "heads": model.config.num_heads,
        "vocab_size": known,
        "parameters": model.config.num_params(),
        "norm_at": model.config.norm_at if isinstance(model, Seq2Seq) else "pre",
        "written": len(ids) - len(written),
        **_tokens(tok, ids),
        "embedding": _embedding(model.embedding.weight.detach()[:known], tok, [*source, *ids]),
        **_stack(inside.stack, causal=True),
        "lens": [_likeliest(lens(model, stream)[:, :known], tok, LENS) for stream in inside.stack.residual],
        "next": _next(inside.logits[:, :known].float(), ids, tok),
        "steps": [_step(model, h, tok) for h in inside.steps],
        "experts": [_experts(chosen) for chosen in inside.chosen],
        "source": None if inside.encoder is None else {
            "layers": len(inside.encoder.weights), **_tokens(tok, source), **_stack(inside.encoder, causal=False)
        },
        "crossed": [] if inside.crossed is None else _norms(inside.crossed),
        "cross": _weights(inside.cross, causal=False),
    }  # fmt: skip


def _prompt(oriole: Oriole, text: str, mode: str) -> list[int]:
    if mode == "text":
        return oriole.tokenizer.encode(text)
    oriole.require_chat()
    return oriole.rendered([Message("user", text)])


def _continued(oriole: Oriole, prompt: Sequence[int], count: int) -> list[int]:
    """The likeliest tokens after the prompt, the end mark among them."""
    if not count:
        return []
    engine = oriole.engine(1)
    engine.submit(prompt, Generation(max_new_tokens=count, temperature=0).sampling(oriole.stop_ids))
    out: list[int] = []
    while True:
        for event in engine.step():
            out.append(event.token)
            if event.finish is not None:
                return out


def _looked(model: LM | Seq2Seq, prompt: list[int], written: list[int]) -> tuple[list[int], list[int], Inside]:
    """Ids of the source, if there is one, and of what the decoder reads, and what one pass over them computes."""
    device = model.embedding.weight.device
    if isinstance(model, LM):
        ids = [*prompt, *written]
        return [], ids, look(model, torch.tensor(ids, device=device))
    ids = [START, *written]
    return prompt, ids, look_across(model, *(torch.tensor(side, device=device) for side in (prompt, ids)))


# --- words -----------------------------------------------------------------------------------------------------------


def spelled(tok: Tokenizer, id: int) -> str:
    """A token as people can read it: its text, its name if it is a reserved one, and bytes that are no whole character
    as ⟨E9B9⟩."""
    if id >= tok.vocab_size:
        return f"⟨id {id}⟩"
    if id < len(RESERVED):
        return RESERVED[id]
    data, out = tok.token_bytes(id), ""
    while data:
        try:
            return out + data.decode()
        except UnicodeDecodeError as error:
            whole = data[: error.start].decode()
            broken = data[error.start : error.end]
            out += f"{whole}⟨{broken.hex().upper()}⟩"
            data = data[error.end :]
    return out.replace("⟩⟨", "")


def kind_of(tok: Tokenizer, id: int) -> str:
    """ "mark" for a reserved token, "bytes" for one that is no whole character, "zh", "en" or "other" for text."""
    if id < len(RESERVED):
        return "mark"
    try:
        text = tok.token_bytes(id).decode()
    except UnicodeDecodeError:
        return "bytes"
    return "zh" if _HAN.search(text) else "en" if any(c.isalpha() for c in text) else "other"


def split_characters(pieces: Sequence[bytes]) -> list[tuple[str, int, int]]:
    """(character, first piece, last piece) of each character whose UTF-8 bytes lie in several pieces."""
    owner = [n for n, piece in enumerate(pieces) for _ in piece]
    data = b"".join(pieces)
    out: list[tuple[str, int, int]] = []
    at = 0
    while at < len(data):
        size = next(n for least, n in ((0xF0, 4), (0xE0, 3), (0xC0, 2), (0, 1)) if data[at] >= least)
        try:
            char = data[at : at + size].decode()
        except UnicodeDecodeError:
            at += 1
            continue
        if owner[at] != owner[at + size - 1]:
            out.append((char, owner[at], owner[at + size - 1]))
        at += size
    return out


def _tokens(tok: Tokenizer, ids: Sequence[int]) -> dict[str, Any]:
    """The tokens, and the characters that several of them share."""
    return {
        "tokens": [
            {"id": i, "text": spelled(tok, i), "bytes": tok.token_bytes(i).hex(" "), "kind": kind_of(tok, i)}
            for i in ids
        ],
        "split": [
            {"text": char, "from": first, "to": last}
            for char, first, last in split_characters([tok.token_bytes(i) or b"\xff" for i in ids])
        ],
    }


# --- numbers ---------------------------------------------------------------------------------------------------------


def _rounded(values: Tensor, digits: int = 4) -> list[float]:
    return [round(float(v), digits) for v in values.tolist()]


def _norms(vectors: Tensor) -> list[list[float]]:
    """Euclidean norms [L][T] of (L, T, D)."""
    return [_rounded(row) for row in vectors.float().norm(dim=-1)]


def _stack(stack: Stack, *, causal: bool) -> dict[str, Any]:
    """Norms of the stream and of what is added to it, and the attention weights."""
    return {
        "residual": _norms(stack.residual),
        "attended": _norms(stack.attended),
        "transformed": _norms(stack.transformed),
        "attention": _weights(stack.weights, causal=causal),
    }


def _weights(layers: Sequence[Tensor], *, causal: bool) -> list[list[list[list[float]]]]:
    """[L][H][query][key] of weights (H, T, S) of each layer; of causal ones only the keys up to the query."""
    return [
        [[_rounded(row[: t + 1] if causal else row) for t, row in enumerate(head)] for head in layer]
        for layer in layers
    ]  # fmt: skip


def _experts(chosen: Chosen) -> dict[str, Any]:
    """Of each token the experts with their weights, and the share of the tokens that each expert gets."""
    load = torch.bincount(chosen.experts.flatten(), minlength=chosen.num_experts) / len(chosen.experts)
    return {
        "layer": chosen.layer,
        "count": chosen.num_experts,
        "shared": chosen.shared,
        "chosen": [
            [[e, round(w, 4)] for e, w in zip(*pair, strict=True)]
            for pair in zip(chosen.experts.tolist(), chosen.weights.tolist(), strict=True)
        ],
        "share": _rounded(load),
    }


def _embedding(table: Tensor, tok: Tokenizer, ids: Sequence[int]) -> dict[str, Any]:
    unique = sorted(set(ids))
    at = torch.tensor(unique, device=table.device)
    found, cosines = nearest(table, at, min(NEIGHBOURS, len(table) - 1))
    norms = table[at].float().norm(dim=1)
    by_id = dict(zip(unique, norms.tolist(), strict=True))
    plane = None
    if len(unique) > 2:
        points, shares = principal(table[at])
        plane = {"ids": unique, "points": [_rounded(p) for p in points], "shares": _rounded(shares)}
    return {
        "norms": [round(by_id[i], 4) for i in ids],
        "mean_norm": round(float(table.float().norm(dim=1).mean()), 4),
        "neighbours": {
            i: [[spelled(tok, n), round(c, 4)] for n, c in zip(near, cosine, strict=True)]
            for i, near, cosine in zip(unique, found.tolist(), cosines.tolist(), strict=True)
        },
        "map": plane,
    }


def _likeliest(logits: Tensor, tok: Tokenizer, count: int) -> list[list[list[Any]]]:
    """Of each position the `count` likeliest tokens and their probabilities."""
    top = logits.float().softmax(-1).topk(min(count, logits.shape[-1]), dim=-1)
    return [
        [[spelled(tok, i), round(p, 4)] for i, p in zip(ids, chances, strict=True)]
        for ids, chances in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


@torch.no_grad()
def _step(model: LM | Seq2Seq, h: Tensor, tok: Tokenizer) -> dict[str, Any]:
    """What an iteration of the latent block would say at each place, and how sure it is of it."""
    return {
        "lens": _likeliest(model.head("logits", h)[:, : tok.vocab_size], tok, LENS),
        "confidence": _rounded(model.head("confidence", h).float().sigmoid()),
    }


def _next(logits: Tensor, ids: Sequence[int], tok: Tokenizer) -> list[dict[str, Any]]:
    top = _likeliest(logits, tok, TOP)
    spread = _rounded(entropy(logits))
    log_p = logits.log_softmax(-1)[:-1]
    of_next = log_p.gather(1, torch.tensor(ids[1:], dtype=torch.int64, device=logits.device)[:, None])
    losses: list[float | None] = [*_rounded(-of_next[:, 0]), None]
    ranks: list[int | None] = [*((log_p > of_next).sum(1) + 1).tolist(), None]
    return [
        {"top": t, "entropy": e, "loss": loss, "rank": rank}
        for t, e, loss, rank in zip(top, spread, losses, ranks, strict=True)
    ]
