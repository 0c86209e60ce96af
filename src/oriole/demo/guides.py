"""A few short documents about the places of the world, for retrieval."""

from __future__ import annotations

import random

from oriole.demo.prose import fact_sentence, join
from oriole.demo.values import Lang
from oriole.demo.world import PLACE_ATTRIBUTES, Entity, World

_HEADS: dict[Lang, tuple[str, str, str]] = {
    "en": ("The place", "The people", "For visitors"),
    "zh": ("地方", "居民", "给游客"),
}
_TIPS: dict[Lang, tuple[str, ...]] = {
    "en": (
        "Come in spring, when the fields are green. The inn by the bridge has twelve rooms.",
        "The bus stops at the square three times a day. The last one leaves at six.",
        "The small museum is open every day but Monday. Children need no ticket.",
        "The market opens at seven in the morning. Come early, for the best things go first.",
        "In winter the road over the hill is closed. Take the boat instead.",
        "The tea house behind the school is known for its quiet garden.",
    ),
    "zh": (
        "春天来最好，那时田野一片翠绿。桥边的客栈有十二间客房。",
        "汽车每天在广场停三次，末班车六点开走。",
        "小博物馆除了星期一每天开放，孩子不用买票。",
        "集市早上七点开始，要早点来，好东西卖得最快。",
        "冬天山路封闭，可以改坐船。",
        "学校后面的茶馆有一个安静的花园，很有名。",
    ),
}


def guide(place: Entity, world: World, lang: Lang, rng: random.Random) -> str:
    """One page about a place: its facts, who lives there, and advice."""
    where, who, tips = _HEADS[lang]
    facts = [
        fact_sentence(place, attribute, lang, wording=rng.choice((0, 1)), named=number % 2 == 0)
        for number, attribute in enumerate(PLACE_ATTRIBUTES)
    ]
    people = []
    for person in world.people:
        if person.facts["home"] == place.name:
            people += [fact_sentence(person, "home", lang), fact_sentence(person, "job", lang, named=False)]
            people.append(fact_sentence(person, rng.choice(("food", "hobby", "animal")), lang, named=False))
    parts = [f"# {place.name.of(lang)}", f"## {where}", join(lang, facts), f"## {who}", join(lang, people)]
    parts += [f"## {tips}", rng.choice(_TIPS[lang])]
    return "\n\n".join(parts) + "\n"


def guides(world: World, lang: Lang, count: int, seed: int) -> dict[str, str]:
    """File name to text, for `count` places; the same places in both languages."""
    places = random.Random(f"guides {seed}").sample(world.places, count)
    rng = random.Random(f"guide texts {seed}")  # the same choices in both languages
    return {f"{place.name.en.lower()}.md": guide(place, world, lang, rng) for place in places}
