"""llama.cpp gives the same ids, so an exported model sees the text it learnt from (on real text: bench.tokenizer)."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from oriole.demo.corpus import make_splits
from oriole.text.tokcheck import CASES
from oriole.text.tokenizer import RESERVED, Tokenizer, train_tokenizer

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.llama import Llama, serve, write_gguf

HAND_WRITTEN = [
    "子曰：「學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？」",
    "北冥有魚，其名為鯤。鯤之大，不知其幾千里也；化而為鳥，其名為鵬。",
    "关关雎鸠，在河之洲。窈窕淑女，君子好逑。",
    "两个黄鹂鸣翠柳，一行白鹭上青天。窗含西岭千秋雪，门泊东吴万里船。",
    "醉翁之意不在酒，在乎山水之间也……山水之乐，得之心而寓之酒也。",
    "def f(xs: list[int]) -> dict[str, int]:\n    return {str(x): x ** 2 for x in xs if x % 3}\n\n\n",
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }  // O(n)\r\n",
    "SELECT name, COUNT(*) FROM birds WHERE song LIKE '%li%' GROUP BY 1 ORDER BY 2 DESC;",
    '{"name": "黄鹂", "size_cm": 26.5, "tags": ["bird", "鸟"], "ok": true, "none": null}',
    "<div class='a'>&nbsp;你好</div>\t<!-- x -->",
    "git commit -m \"don't\" && ls -la | grep '^d' > /dev/null 2>&1",
    "我今天超开心😂😂🎉！！！ see you @ 8pm 👋🏽~",
    "👩‍👩‍👧‍👦一家人🇨🇳🇫🇷❤️‍🔥 ok👌1️⃣2️⃣",
    "价格：￥1,234.56（含税）≈ $170.3；温度 −3℃～5℃",
    "E = mc², ∑_{i=1}^{n} i = n(n+1)/2, α≤β ⇒ ∀x∃y",
    "I'LL you'Re WE'VE it'S 'tis 'Twas don’t",
    "   leading, trailing   \n \n\t\n  next",
    "混合mixed文本text，没有space的English和中文123abc四五六",
    "a\u00a0b\u3000c\u2003d\u200be\ufefff",
    "ﬁne ＦＵＬＬ　ｗｉｄｔｈ ①②③ Ⅳ ½",
    "नमस्ते, สวัสดี, ሰላም, გამარჯობა, 𝒳𝓎𝔷, 𠮷𨋢",
]


def lines() -> list[str]:
    """About 500: the demo's sentences, lines of our own, and these two mixed, cut and joined at random."""
    rng = random.Random(0)
    sentences = [text for each in rng.sample(make_splits(0).sentences, 90) for text in (each.text.zh, each.text.en)]
    own = [*HAND_WRITTEN, *CASES.values(), *RESERVED, "".join(RESERVED)]
    mixed = []
    for _ in range(280):
        a, b = rng.choice(own), rng.choice(sentences)
        at = rng.randrange(len(a) + 1)
        mixed.append(a[:at] + b + a[at:])
    return [*sentences, *own, *mixed]


@pytest.fixture(scope="module")
def learnt() -> Tokenizer:
    """Learnt mostly from the lines above, so that it has merges which another regex would never allow."""
    sentences = make_splits(0).sentences[:3000]
    texts = [(lang, text) for each in sentences for lang, text in (("zh", each.text.zh), ("en", each.text.en))]
    texts += [("zh", line) for line in HAND_WRITTEN] * 100
    return train_tokenizer(texts, 2000)


@pytest.fixture(scope="module")
def llama(learnt: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(learnt, path)
    with serve(path) as server:
        yield server


def test_ids_are_llama_cpps(learnt: Tokenizer, llama: Llama) -> None:
    texts = lines()
    assert len(texts) >= 480
    for text, ids in zip(texts, learnt.encode_batch(texts), strict=True):
        assert llama.tokenize(text) == ids, text


def test_text_comes_back_from_llama_cpp(learnt: Tokenizer, llama: Llama) -> None:
    for text in (t for t in lines()[::7] if "\0" not in t):
        assert llama.detokenize(learnt.encode(text)) == text


@pytest.mark.parametrize("kind", ["char", "added"])
def test_the_other_kinds_too(kind: str, learnt: Tokenizer, tmp_path: Path) -> None:
    if kind == "char":
        tokenizer = train_tokenizer([("zh", line) for line in HAND_WRITTEN], 900, kind="char")
    else:
        tokenizer = learnt.with_tokens(["两个黄鹂", "GPT-4 ", "山水之乐", "…"])
    write_gguf(tokenizer, tmp_path / "tiny.gguf")
    texts = [*lines()[::5], "GPT-4 听见两个黄鹂……GPT-4"]
    with serve(tmp_path / "tiny.gguf") as server:
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert server.tokenize(text) == ids, text
