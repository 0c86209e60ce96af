"""Which language a document is in: the script first, then function words, then py3langid.

The script settles Chinese, Japanese and Korean; English function words settle nearly all English; only what is left,
and no more than about five hundred characters of it, goes to py3langid (a naive Bayes model over byte n-grams, 4.6 MB,
BSD), whose pure-Python walk would cost more than all other rules together.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from oriole.text.rulescode import without_code
from oriole.text.rulesmeasure import ALPHA, CLASS, HAN, codes

__all__ = ["HAN_SHARE", "identify"]

_SAMPLE = 512
HAN_SHARE = 0.2
"""More than this share of the letters is Han: Chinese. The same as `text.clean.language`, which says why."""
_KANA_SHARE = 0.2  # of kana and Han; Japanese prose has half, a Chinese text that quotes it seldom a tenth
_SURE = 0.65  # FineWeb asks this score of English; below it py3langid's word is no word
_FEW = 20  # letters; fewer say nothing about a language
_FUNCTION_WORDS = frozenset(
    "the of and to in is that it for was with as on be are this by from not or at an have which you".split()
)
_FUNCTION_SHARE = 0.15


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@lru_cache(maxsize=2)
def identify(text: str) -> str:
    """The language of a text as an ISO 639-1 code; "" where it has too few letters to tell.

    Of long texts the beginning, middle and end are looked at, without code blocks if anything is left then.
    """
    if len(text) > 12 * _SAMPLE:  # code blocks are cut out of the pieces
        middle = (len(text) - 4 * _SAMPLE) // 2
        text = "\n".join([text[: 4 * _SAMPLE], text[middle : middle + 4 * _SAMPLE], text[-4 * _SAMPLE :]])
    text = without_code(text).strip() or text
    if len(text) > 3 * _SAMPLE:
        middle = (len(text) - _SAMPLE) // 2
        text = "\n".join([text[:_SAMPLE], text[middle : middle + _SAMPLE], text[-_SAMPLE:]])
    points = codes(text)
    kinds = CLASS.take(points)
    han = int(np.count_nonzero(kinds == HAN))
    letters = han + int(np.count_nonzero(kinds == ALPHA))
    kana = int(np.count_nonzero((points >= 0x3041) & (points <= 0x30FA) & (kinds == ALPHA)))
    if kana > _KANA_SHARE * (kana + han) and kana + han > HAN_SHARE * letters:
        return "ja"
    if han and han > HAN_SHARE * letters:
        return "zh"
    hangul = int(np.count_nonzero((points >= 0xAC00) & (points <= 0xD7A3)))
    if hangul > HAN_SHARE * letters:
        return "ko"
    if letters < _FEW:
        return ""
    words = text.lower().split()
    if sum(map(_FUNCTION_WORDS.__contains__, words)) > _FUNCTION_SHARE * len(words):
        return "en"
    code, probability = _identifier().classify(text[:_SAMPLE])
    latin = int(np.count_nonzero((points < 0x250) & (kinds == ALPHA)))
    return "en" if latin > letters / 2 and probability < _SURE else str(code)
