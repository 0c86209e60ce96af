"""Bits per byte, on which every comparison rests, equals the definition read aloud: token by token, in fp64."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oriole.model.config import ModelConfig
from oriole.model.lm import LM
from oriole.model.seq2seq import START, Seq2Seq
from oriole.model.seq2seqconfig import Seq2SeqConfig
from oriole.text.shards import Shards, View, write_shards
from oriole.text.template import Message, render
from oriole.text.tokenizer import IM_END, Tokenizer, train_tokenizer
from oriole.train import objectives
from oriole.train.seq2seq import target_bits_per_byte
from oriole.train.validate import bits_per_byte, continuations

TEXTS = (
    "两个黄鹂鸣翠柳，一行白鹭上青天。",
    "Two orioles sing amid the green willows; 窗含西岭千秋雪。",
    "春",
    "A line.",
)
LENGTH = 8
SHAPE = {"dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "ffn_dim": 24, "context": 64}


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train_tokenizer([("zh", text) for text in TEXTS * 4], 300)


@pytest.fixture(scope="module")
def shards(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Two texts as they are, a conversation whose answer alone counts, a text of one token, and another text."""
    chat = render([Message("user", TEXTS[0]), Message("assistant", TEXTS[1])], tok)
    texts = [([*tok.encode(text), 0], None, "") for text in TEXTS[:3]]
    rows = [*texts[:2], (*chat, ""), ([tok.encode("A")[0]], None, ""), texts[2]]
    return write_shards(rows, tok, tmp_path_factory.mktemp("shards") / "all")


@pytest.fixture(scope="module")
def model(tok: Tokenizer) -> LM:
    torch.manual_seed(0)
    model = LM(ModelConfig.model_validate(SHAPE | {"vocab_size": tok.vocab_size}))
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # far from uniform
    return model


def slowly(model: LM, shards: Shards | View, most: int = 10**9) -> float:
    """A token at a time, each from all of its window that stands before it."""
    exact = copy.deepcopy(model).double().eval()
    nats, total = 0.0, 0
    for i in range(len(shards)):
        ids, mask = shards.doc(i)
        for start in range(0, len(ids), LENGTH):
            if most <= 0:
                break
            window, counts = ids[start : start + LENGTH].tolist(), mask[start : start + LENGTH]
            most -= len(window)
            for n in range(1, len(window)):
                size = int(shards.byte_lengths[window[n]])
                if counts[n] and size:
                    logits = exact.head("logits", exact(torch.tensor([window[:n]])).h[0, -1])
                    nats -= float(logits.log_softmax(-1)[window[n]].detach())
                    total += size
    return nats / math.log(2) / total


@pytest.mark.parametrize("most", [10**9, 40, 1])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_it_is_the_definition_in_windows_whatever_the_batch(
    model: LM, shards: Shards, most: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "CHUNK", 32)
    found = bits_per_byte(model, shards, length=LENGTH, max_tokens=most, batch=batch)
    assert found == pytest.approx(slowly(model, shards, most), rel=1e-5) and found > 1


def test_documents_do_not_see_one_another_and_only_what_is_trained_counts(model: LM, shards: Shards) -> None:
    parts = [View(shards, [i]) for i in (0, 1, 2, 4)]
    found = [bits_per_byte(model, part, length=LENGTH, max_tokens=1000) for part in parts]
    assert found == pytest.approx([slowly(model, part) for part in parts], rel=1e-5)
    ids, mask = shards.doc(2)
    assert 0 < mask.sum() < len(ids)  # an answer, behind a question that does not count
    assert IM_END in ids.tolist() and shards.byte_lengths[IM_END] == 0


def test_a_model_that_knows_nothing_has_the_entropy_of_its_vocabulary(
    model: LM, shards: Shards, tok: Tokenizer
) -> None:
    blank = copy.deepcopy(model)
    torch.nn.init.zeros_(blank.embedding.weight)
    ids, _ = shards.doc(0)
    counted = [i for n, i in enumerate(ids.tolist()) if n % LENGTH and shards.byte_lengths[i]]
    size = sum(int(shards.byte_lengths[i]) for i in counted)
    found = bits_per_byte(blank, View(shards, [0]), length=LENGTH, max_tokens=1000)
    assert found == pytest.approx(len(counted) * math.log2(tok.vocab_size) / size, rel=1e-6)


def test_where_nothing_counts_there_is_no_figure(model: LM, shards: Shards) -> None:
    assert math.isnan(bits_per_byte(model, View(shards, [3]), length=LENGTH, max_tokens=1000))
    assert math.isnan(bits_per_byte(model, shards, length=LENGTH, max_tokens=0))


def test_training_goes_on_as_before(model: LM, shards: Shards) -> None:
    for mode in (True, False):
        model.train(mode)
        bits_per_byte(model, shards, length=LENGTH, max_tokens=100)
        assert model.training is mode


class _Largest(TorchDispatchMode):
    """The most rows of logits that any result has."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.rows = vocab_size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor) and made.dim() > 1 and made.shape[-1] == self.vocab_size:
                self.rows = max(self.rows, made.numel() // self.vocab_size)
        return out


def test_the_logits_of_a_batch_never_exist_at_once(model: LM, shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "CHUNK", 32)
    with _Largest(model.config.vocab_size) as seen:
        bits_per_byte(model, shards, length=64, max_tokens=1000)
    assert 0 < seen.rows <= 32 < sum(len(shards.doc(i)[0]) for i in range(len(shards)))


def test_of_an_encoder_decoder_it_is_the_targets_given_their_sources(tok: Tokenizer) -> None:
    torch.manual_seed(0)
    table = {"dim": 16, "encoder_layers": 1, "decoder_layers": 2, "num_heads": 2, "ffn_dim": 24, "context": 64}
    model = Seq2Seq(Seq2SeqConfig.model_validate(table | {"vocab_size": tok.vocab_size}))
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    pairs = [(tok.encode(a), [*tok.encode(b), IM_END]) for a, b in zip(TEXTS, reversed(TEXTS), strict=True)]
    sizes = torch.from_numpy(tok.byte_lengths().copy())
    exact, nats, total = copy.deepcopy(model).double().eval(), 0.0, 0
    for source, target in pairs:
        h = exact(torch.tensor([[START, *target[:-1]]]), source=torch.tensor([source])).h
        for n, token in enumerate(target):
            if sizes[token]:
                nats -= float(exact.head("logits", h)[0, n].log_softmax(-1)[token].detach())
                total += int(sizes[token])
    for batch in (1, 3, 32):
        found = target_bits_per_byte(model, pairs, sizes, batch)
        assert found == pytest.approx(nats / math.log(2) / total, rel=1e-5)
    assert math.isnan(target_bits_per_byte(model, [(pairs[0][0], [IM_END])], sizes))


@pytest.mark.parametrize("chat", [False, True])
def test_continuations_are_the_likeliest_tokens_one_after_the_other(model: LM, tok: Tokenizer, chat: bool) -> None:
    prompts = ["两个黄鹂", "A line"]
    for prompt, found in zip(prompts, continuations(model, tok, prompts, chat=chat, new_tokens=6), strict=True):
        ids = render([Message("user", prompt)], tok, generation=True)[0] if chat else tok.encode(prompt)
        new: list[int] = []
        while len(new) < 6 and not {0, IM_END} & set(new):
            new.append(int(model.eval().head("logits", model(torch.tensor([[*ids, *new]])).h[0, -1]).argmax()))
        assert found == {"prompt": prompt, "text": tok.decode([i for i in new if i not in (0, IM_END)])}
