"""A small grammar of everyday sentences, the same in both languages: who does what, where and when."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from oriole.demo.prose import Text
from oriole.demo.values import Lang, Pair

# English, Chinese, and whether the verb takes an s
_SUBJECTS = (
    ("I", "我", False),
    ("we", "我们", False),
    ("they", "他们", False),
    ("my mother", "我妈妈", True),
    ("my father", "我爸爸", True),
    ("my brother", "我哥哥", True),
    ("my sister", "我姐姐", True),
    ("my grandmother", "我奶奶", True),
    ("my friends", "我的朋友们", False),
    ("the teacher", "老师", True),
    ("the children", "孩子们", False),
    ("our neighbour", "我们的邻居", True),
)

# verb, third person, Chinese verb, objects, and where it is done
_ACTIONS = (
    ("buy", "buys", "买", "apples 苹果,bread 面包,flowers 花,fish 鱼,vegetables 蔬菜", "market town village"),
    ("sell", "sells", "卖", "apples 苹果,bread 面包,flowers 花,fish 鱼,hats 帽子,tea 茶", "market town village"),
    ("eat", "eats", "吃", "noodles 面条,rice 米饭,dumplings 饺子,eggs 鸡蛋,apples 苹果", "home school garden kitchen"),
    ("drink", "drinks", "喝", "tea 茶,milk 牛奶,coffee 咖啡,water 水", "home school garden kitchen park"),
    ("read", "reads", "读", "books 书,newspapers 报纸,stories 故事,letters 信", "home school library park garden"),
    ("paint", "paints", "画", "flowers 花,birds 鸟,boats 小船,mountains 山", "home school river park garden"),
    ("watch", "watches", "看", "films 电影", "home school village"),
    ("watch", "watches", "看", "birds 鸟,boats 小船", "river park village"),
    ("watch", "watches", "看", "the stars 星星", "garden river village"),
    ("make", "makes", "做", "bread 面包,dumplings 饺子,cakes 蛋糕,kites 风筝", "home school kitchen village"),
    ("wash", "washes", "洗", "vegetables 蔬菜,clothes 衣服,dishes 盘子", "home river kitchen"),
)
_PLACES = {
    "home": Pair("at home", "在家"),
    "school": Pair("at school", "在学校"),
    "market": Pair("at the market", "在市场"),
    "park": Pair("in the park", "在公园"),
    "garden": Pair("in the garden", "在花园"),
    "river": Pair("by the river", "在河边"),
    "kitchen": Pair("in the kitchen", "在厨房"),
    "town": Pair("in town", "在城里"),
    "village": Pair("in the village", "在村里"),
    "library": Pair("in the library", "在图书馆"),
}
_TIMES = (
    Pair("every day", "每天"),
    Pair("every morning", "每天早上"),
    Pair("every evening", "每天晚上"),
    Pair("every week", "每个星期"),
    Pair("on Saturdays", "星期六"),
    Pair("on Sundays", "星期天"),
    Pair("in spring", "春天"),
    Pair("in summer", "夏天"),
    Pair("in autumn", "秋天"),
    Pair("in winter", "冬天"),
)


class Sentence(NamedTuple):
    """One sentence in both languages, and whether its combination is held out."""

    text: Pair
    held_out: bool


def grammar_words() -> set[str]:
    """The English words whose translation the sentences show."""
    found: set[str] = set()
    phrases = [subject for subject, _, _ in _SUBJECTS] + [each.en for each in (*_PLACES.values(), *_TIMES)]
    for verb, third, _, objects, _ in _ACTIONS:
        phrases += [verb, third] + [cell.rpartition(" ")[0] for cell in objects.split(",")]
    for phrase in phrases:
        for word in phrase.split():
            found |= {word, word.removesuffix("s"), word.removesuffix("es")}
    return {word.lower() for word in found} | {"family", "friend", "child", "story", "mountain", "saturday", "sunday"}


def all_sentences(seed: int = 0, share: float = 0.15) -> list[Sentence]:
    """Every sentence of the grammar with a place, a time or both; about `share` of the combinations held out."""
    rng = random.Random(f"sentences {seed}")
    out = []
    for subject_en, subject_zh, third in _SUBJECTS:
        for verb, verb_s, verb_zh, objects, places in _ACTIONS:
            for cell in objects.split(","):
                object_en, _, object_zh = cell.rpartition(" ")
                for place in (None, *places.split()):
                    for time in (None, *_TIMES):
                        if place is None and time is None:
                            continue
                        if object_zh == "星星" and time and time.en == "every morning":
                            continue
                        english = [subject_en, verb_s if third else verb, object_en]
                        chinese = [subject_zh]
                        if time:
                            chinese.append(time.zh)
                        if place:
                            english.append(_PLACES[place].en)
                            chinese.append(_PLACES[place].zh)
                        if time:
                            english.append(time.en)
                        chinese += [verb_zh, object_zh]
                        line = " ".join(english)
                        pair = Pair(line[0].upper() + line[1:] + ".", "".join(chinese) + "。")
                        out.append(Sentence(pair, rng.random() < share))
    return out


_QUESTIONS: dict[tuple[Lang, Lang], tuple[str, ...]] = {
    ("en", "zh"): ("Translate into Chinese: {e}", "Say this in Chinese: {e}", "Put this into Chinese: {e}"),
    ("en", "en"): ("Translate into English: {z}", "Say this in English: {z}", "Put this into English: {z}"),
    ("zh", "zh"): ("翻译成中文：{e}", "请用中文说：{e}", "把这句话译成中文：{e}"),
    ("zh", "en"): ("翻译成英文：{z}", "请用英文说：{z}", "把这句话译成英文：{z}"),
}


def ask(sentence: Sentence, lang: Lang, target: Lang, rng: random.Random) -> str:
    return rng.choice(_QUESTIONS[lang, target]).format(e=sentence.text.en, z=sentence.text.zh)


def parallel_texts(sentences: list[Sentence], count: int, rng: random.Random) -> Iterator[Text]:
    """Pages of sentences with their translation below, two to a page, either language first."""
    train = [each for each in sentences if not each.held_out]
    for _ in range(count):
        lines = []
        first: Lang = rng.choice(("zh", "en"))
        for each in rng.sample(train, 2):
            pair = (each.text.zh, each.text.en) if first == "zh" else (each.text.en, each.text.zh)
            lines.append("\n".join(pair))
        yield Text("\n".join(lines), "parallel")
