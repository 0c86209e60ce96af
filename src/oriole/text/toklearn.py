"""Learning a vocabulary: a bounded sample of the text, and the merges or the characters found in it.

Memory depends on the size of the sample, never on that of the corpus.
"""

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from oriole.log import track
from oriole.text.tokspec import QWEN2_REGEX, Merge, byte_to_char

__all__ = ["PIECE", "encodable", "learn_characters", "learn_merges", "merges_of", "sample_text"]

PIECE = 4096
"""Characters that are sampled together: many short pieces see more of a corpus than a few long ones."""

SLACK = 1.02
"""Merges are trained beyond the number asked for, because some spell a token that an earlier one already spells."""


# --- the sample ------------------------------------------------------------------------------------------------------


def sample_text(texts: Iterable[tuple[str, str]], sample_bytes: int, seed: int) -> list[str]:
    """Pieces of (language, text) pairs, at most `sample_bytes` of UTF-8 in all, the same for the same input and seed.

    In each language those pieces stay that drew the smallest random numbers (reservoir sampling: Li 1994, "Reservoir-
    sampling algorithms of time complexity O(n(1 + log(N/n)))", with keys instead of jumps). Room is taken from the
    language that holds the most characters, so that in the end all have equally many, or all they have. Characters,
    not bytes: a Chinese one has three of those, and a vocabulary learnt from equal bytes would neglect Chinese.
    """
    rng = random.Random(seed)
    kept: dict[str, list[tuple[float, int, int, str]]] = {}  # language -> heap of (-key, order, bytes, piece)
    characters: dict[str, int] = {}
    total = order = 0
    with track("reading text for the tokenizer", unit="B") as bar:
        for lang, text in texts:
            for piece in _pieces(text):
                size = len(piece.encode())
                bar.update(size)
                order += 1
                total += size
                heapq.heappush(kept.setdefault(lang, []), (-rng.random(), order, size, piece))
                characters[lang] = characters.get(lang, 0) + len(piece)
                while total > sample_bytes:
                    largest = max(characters, key=characters.__getitem__)
                    if len(kept[largest]) == 1:
                        break
                    _, _, size, piece = heapq.heappop(kept[largest])
                    total -= size
                    characters[largest] -= len(piece)
    return [piece for _, _, _, piece in sorted((e for heap in kept.values() for e in heap), key=lambda e: e[1])]


def _pieces(text: str) -> Iterator[str]:
    text = encodable(text)
    for start in range(0, len(text), PIECE):
        yield text[start : start + PIECE]


def encodable(text: str) -> str:
    """The text with surrogate pairs joined and lone ones replaced by U+FFFD; nearly always the text itself."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


# --- byte-level BPE --------------------------------------------------------------------------------------------------


def learn_merges(sample: Sequence[str], count: int) -> list[Merge]:
    """Up to `count` merges, best first (BPE: Sennrich et al. 2016, arXiv:1508.07909)."""
    return merges_of(_train(sample, int(count * SLACK) + 64))[:count]


def _train(sample: Sequence[str], count: int) -> list[bytes]:
    """Up to `count` merged tokens, best first, from rustbpe, or from `tokenizers` where rustbpe has no wheel."""
    try:
        import rustbpe
    except ImportError:
        return _train_with_tokenizers(sample, count)
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(sample), 256 + count, buffer_size=1024, pattern=QWEN2_REGEX)
    return [bytes(token) for token, rank in sorted(trainer.get_mergeable_ranks(), key=lambda r: r[1]) if rank >= 256]


def _train_with_tokenizers(sample: Sequence[str], count: int) -> list[bytes]:
    """As `_train`, slower and with more memory; ties between equally frequent pairs may fall the other way."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    alphabet = byte_to_char()
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN2_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=256 + count, show_progress=False, initial_alphabet=list(alphabet), min_frequency=0
    )
    model.train_from_iterator(sample, trainer)
    to_byte = {c: b for b, c in enumerate(alphabet)}
    vocab: dict[str, int] = model.get_vocab()
    return [bytes(to_byte[c] for c in token) for token in sorted(vocab, key=vocab.__getitem__) if len(token) > 1]


def merges_of(tokens: Iterable[bytes]) -> list[Merge]:
    """The merge that makes each token, found by merging its own bytes with all the merges before it.

    Trainers report tokens, files want pairs. A token that repeats an earlier spelling, or that its own bytes never lead
    to, would be dead weight in the vocabulary and is left out; the ones after it get by without.
    """
    ranks: dict[Merge, int] = {}
    for token in tokens:
        parts = _apply(token, ranks)
        if len(parts) == 2:  # 1: there already; more: out of reach
            ranks[parts[0], parts[1]] = len(ranks)
    return list(ranks)


def _apply(token: bytes, ranks: dict[Merge, int]) -> list[bytes]:
    """Merge the bytes of `token`, the best-ranked pair first, the leftmost of equals, until none is left."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 1:
        rank, i = min((ranks.get((parts[i], parts[i + 1]), len(ranks)), i) for i in range(len(parts) - 1))
        if rank == len(ranks):
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


# --- characters ------------------------------------------------------------------------------------------------------


def learn_characters(texts: Iterable[tuple[str, str]], count: int) -> list[Merge]:
    """Merges that make a token of each character of the (language, text) pairs, the most frequent first; `count` ids.

    A character outside ASCII is two to four bytes, so it is reached over the tokens of its first two or three; those
    are shared by many characters and cost some hundreds of ids. Such merges never join two characters, because a first
    byte never stands second. Every language weighs the same; all of the text is counted.
    """
    counts: dict[str, Counter[str]] = {}
    with track("counting characters", unit="chars") as bar:
        for lang, text in texts:
            counts.setdefault(lang, Counter()).update(encodable(text))
            bar.update(len(text))
    shares: defaultdict[str, float] = defaultdict(float)
    for counter in counts.values():
        total = counter.total()
        for character, n in counter.items():
            shares[character] += n / total
    merges: dict[Merge, None] = {}  # a set that keeps its order
    for character in sorted(shares, key=lambda c: (-shares[c], c)):
        data = character.encode()
        new = [m for i in range(1, len(data)) if (m := (data[:i], data[i : i + 1])) not in merges]
        if len(merges) + len(new) <= count:
            merges.update(dict.fromkeys(new))
    return list(merges)
