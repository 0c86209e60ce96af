"""Greetings, and questions that nobody in the demo world can answer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from oriole.demo.dialogues import Example
from oriole.demo.little import NAMES
from oriole.demo.prose import phrases
from oriole.demo.values import Lang, Pair
from oriole.demo.world import PERSON_ATTRIBUTES, PLACE_ATTRIBUTES, Entity, World

_HELLO: dict[Lang, tuple[tuple[str, str], ...]] = {  # what the user says, and how the answer begins
    "en": (
        ("Hello!", "Hello"),
        ("Hi!", "Hello"),
        ("Hi there!", "Hello"),
        ("Hello, Oriole!", "Hello"),
        ("Good morning!", "Good morning"),
        ("Good afternoon!", "Good afternoon"),
        ("Good evening!", "Good evening"),
    ),
    "zh": (
        ("你好！", "你好"),
        ("您好！", "你好"),
        ("嗨！", "你好"),
        ("你好，黄鹂！", "你好"),
        ("早上好！", "早上好"),
        ("下午好！", "下午好"),
        ("晚上好！", "晚上好"),
    ),
}
_INTRODUCE: dict[Lang, tuple[str, ...]] = {
    "en": ("My name is {x}.", "I am {x}.", "You can call me {x}.", "This is {x}."),
    "zh": ("我叫{x}。", "我是{x}。", "你可以叫我{x}。", "我的名字是{x}。"),
}
_MEET: dict[Lang, str] = {"en": "{h}, {x}! Nice to meet you.", "zh": "{h}，{x}！很高兴认识你。"}
_MY_NAME: dict[Lang, tuple[tuple[str, ...], str]] = {
    "en": (("What is my name?", "Do you remember my name?", "Who am I?"), "Your name is {x}."),
    "zh": (("我叫什么名字？", "你还记得我的名字吗？", "我是谁？"), "你叫{x}。"),
}
_TALK: dict[Lang, tuple[tuple[tuple[str, ...], str], ...]] = {  # questions after a greeting, and the one answer
    "en": (
        (
            ("Who are you?", "What is your name?", "Tell me who you are.", "What are you called?"),
            "I am Oriole, a small model that speaks Chinese and English.",
        ),
        (("How are you?", "How are you today?", "How are you doing?"), "I am fine, thank you."),
        (
            ("What can you do?", "What can I ask you?", "How can you help me?"),
            "I can answer questions, translate words and do sums.",
        ),
        (("Can you speak Chinese?", "Which languages do you speak?"), "I speak Chinese and English."),
    ),
    "zh": (
        (
            ("你是谁？", "你叫什么名字？", "介绍一下你自己吧。", "怎么称呼你？"),
            "我是黄鹂，一个会说中文和英文的小模型。",
        ),
        (("你好吗？", "你今天好吗？", "最近怎么样？"), "我很好，谢谢。"),
        (("你会做什么？", "我可以问你什么？", "你能帮我做什么？"), "我会回答问题、翻译词语，还会算数。"),
        (("你会说英文吗？", "你会说哪些语言？"), "我会说中文和英文。"),
    ),
}
_THANKS: dict[Lang, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "en": (
        ("Thank you!", "Thanks!", "Thank you very much!", "Thanks a lot!", "Many thanks!"),
        ("", " That helped.", " That was clear.", " You are kind.", " I understand now."),
        "You are welcome!",
    ),
    "zh": (
        ("谢谢！", "谢谢你！", "非常感谢！", "多谢！", "太谢谢了！"),
        ("", "你帮了大忙。", "说得很清楚。", "你真好。", "我明白了。"),
        "不客气！",
    ),
}
_BYE: dict[Lang, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "en": (
        ("Goodbye!", "Bye!", "Bye-bye!", "Goodbye, Oriole!", "I have to go."),
        ("", " See you tomorrow.", " See you later.", " Talk to you soon.", " Have a nice day."),
        "Goodbye! See you soon.",
    ),
    "zh": (
        ("再见！", "拜拜！", "黄鹂，再见！", "我走了。", "我得走了。"),
        ("", "明天见。", "回头见。", "下次再聊。", "祝你今天愉快。"),
        "再见！下次见。",
    ),
}


def acquaintances(lang: Lang) -> list[str]:
    """Names of people one may meet: nobody of the world, and many, so that they must be heard, not known."""
    given = [(a.split(), b.split()) for a in _FIRST.split(",") for b in _SECOND.split(",")]
    if lang == "zh":
        return [*NAMES["zh"], *(a[0] + b[0] for a, b in given)]
    return [
        *NAMES["en"],
        *(each.split()[0] for each in f"{_WOMEN},{_MEN}".split(",")),
        *(a[1] + b[1] for a, b in given),
    ]


def greetings(lang: Lang) -> list[list[Example]]:
    """Every greeting the grammar can make, by sort; the split takes some combinations of each sort away."""
    gap = " " if lang == "en" else ""
    meet: list[Example] = []
    remember: list[Example] = []
    talk: list[Example] = []
    known: list[Example] = []
    for name in acquaintances(lang):
        for hello, start in _HELLO[lang]:
            for form in _INTRODUCE[lang]:
                text = hello + gap + form.format(x=name)
                reply = _MEET[lang].format(h=start, x=name)
                meet.append(Example("greeting", lang, (text,), (reply,)))
                questions, mine = _MY_NAME[lang]
                for question in questions:
                    remember.append(Example("greeting", lang, (text, reply, question), (mine.format(x=name),)))
    for questions, reply in _TALK[lang]:
        for question in questions:
            known += [Example("greeting", lang, (question,), (reply,))] * 3  # what everybody asks first must sit
            for hello, start in _HELLO[lang]:
                mark = "! " if lang == "en" else "！"
                talk.append(Example("greeting", lang, (hello + gap + question,), (start + mark + reply,)))
    thanks, bye = (
        [Example("greeting", lang, (head + tail,), (reply,)) for head in heads for tail in tails]
        for heads, tails, reply in (_THANKS[lang], _BYE[lang])
    )
    helps = "How can I help you?" if lang == "en" else "有什么可以帮你的吗？"
    mark = "! " if lang == "en" else "！"
    plain = [Example("greeting", lang, (hello,), (start + mark + helps,)) for hello, start in _HELLO[lang]]
    return [meet, remember, talk, thanks, bye, plain + known]


DONT_KNOW: dict[Lang, tuple[str, ...]] = {
    "en": ("I don't know.", "I do not know.", "I don't know"),
    "zh": ("我不知道。", "我不知道"),
}

# Given names that nobody in the world has; the syllables are ordinary ones.
_FIRST = (
    "晨 Chen,昊 Hao,梓 Zi,逸 Yi,沐 Mu,语 Yu,凌 Ling,秋 Qiu,丹 Dan,怀 Huai,润 Run,光 Guang,"
    "彩 Cai,素 Su,兴 Xing,小 Xiao,美 Mei,志 Zhi,雪 Xue,永 Yong"
)
_SECOND = (
    "轩 xuan,悦 yue,彬 bin,萍 ping,洁 jie,钧 jun,霖 lin,"
    "翔 xiang,岚 lan,茵 yin,瑞 rui,芝 zhi,远 yuan,琼 qiong,堂 tang,蓉 rong,荣 rong,峻 jun,舟 zhou,桥 qiao"
)
_WOMEN = (
    "Agnes 阿格尼丝,Cora 科拉,Elsa 艾尔莎,Gloria 格洛丽亚,Irene 艾琳,Kitty 基蒂,Maud 莫德,"
    "Ophelia 奥菲莉亚,Rosalind 罗莎琳德,Thelma 塞尔玛,Ursula 厄休拉,Wilma 薇尔玛,Yvonne 伊冯娜,"
    "Bella 贝拉,Doris 多丽丝"
)
_MEN = (
    "Bruno 布鲁诺,Damian 达米安,Finn 芬恩,Harold 哈罗德,Jasper 贾斯珀,Lionel 莱昂内尔,"
    "Nigel 奈杰尔,Percy 珀西,Quentin 昆廷,Stanley 斯坦利,Vincent 文森特,Xavier 泽维尔,"
    "Albert 阿尔伯特,Cedric 塞德里克,Edgar 埃德加"
)
_PLACE_STARTS = (
    "Willow 柳,Stone 石,Silver 银,Red 红,Green 绿,Cloud 云,Moon 月,Pine 松,White 白,Snow 雪,Wind 风,Maple 枫,Iron 铁,"
    "Star 星,Mist 雾,Peach 桃,Plum 梅,Crane 鹤,Salt 盐,Black 黑"
)
_PLACE_ENDS = (
    "brook 溪镇,bridge 桥镇,ford 渡镇,cliff 崖镇,haven 港镇,peak 峰镇,lake 湖镇,"
    "grove 林镇,dale 谷镇,field 田镇,well 井镇"
)
_BEASTS_EN = (
    ("bl", "dr", "fl", "gl", "gr", "kr", "pl", "sn", "tr", "z", "sk", "v"),
    "aoui",
    ("rfle", "mbo", "ggin", "xo", "vork", "bbix", "rpo", "zzin"),
)
_BEASTS_ZH = "咕噜啪叽嘟哒呱啵", "咚唧嘀嗒呼哩嗡吱", "兽果花石鸟鱼草球"


def _pairs(text: str) -> list[Pair]:
    """The cells of a list, written with either language first."""
    out = []
    for cell in text.split(","):
        one, other = cell.split()
        out.append(Pair(one, other) if one.isascii() else Pair(other, one))
    return out


def strangers(world: World, rng: random.Random) -> list[tuple[Pair, bool]]:
    """People who are not in the world, as (name, female): known family names, unknown given names."""
    known = {person.name.en for person in world.people}
    chinese = sorted({(p.name.en.split()[0], p.name.zh[0]) for p in world.people if "·" not in p.name.zh})
    western = sorted({(p.name.en.split()[1], p.name.zh.split("·")[1]) for p in world.people if "·" in p.name.zh})
    given_known = {p.name.en.split()[0 if "·" in p.name.zh else 1] for p in world.people}
    out = []
    for first in _pairs(_FIRST):
        for second in _pairs(_SECOND):
            if first.en + second.en not in given_known:
                surname = rng.choice(chinese)
                name = Pair(f"{surname[0]} {first.en}{second.en}", surname[1] + first.zh + second.zh)
                out.append((name, rng.random() < 0.5))
    for givens, female in ((_WOMEN, True), (_MEN, False)):
        for given in _pairs(givens):
            for english, surname_zh in rng.sample(western, 5):
                out.append((Pair(f"{given.en} {english}", f"{given.zh}·{surname_zh}"), female))
    rng.shuffle(out)
    return [each for each in out if each[0].en not in known]


def nowhere(world: World, rng: random.Random) -> list[Pair]:
    """Places that are not in the world, made from parts of known names."""
    english = {place.name.en for place in world.places}
    chinese = {place.name.zh for place in world.places}
    out = [Pair(a.en + b.en, a.zh + b.zh) for a in _pairs(_PLACE_STARTS) for b in _pairs(_PLACE_ENDS)]
    out = [each for each in out if each.en not in english and each.zh not in chinese]
    rng.shuffle(out)
    return out


def nothings(lang: Lang, rng: random.Random) -> list[str]:
    """Words for things that do not exist."""
    parts = _BEASTS_EN if lang == "en" else _BEASTS_ZH
    out = [a + b + c for a in parts[0] for b in parts[1] for c in parts[2]]
    rng.shuffle(out)
    return out


_BEYOND: dict[Lang, tuple[str, ...]] = {  # what the world does not tell about its people and places
    "en": (
        "How tall is {n}?",
        "What is {n}'s phone number?",
        "What is {n} thinking now?",
        "How much money does {n} have?",
        "What did {n} dream last night?",
        "How old is {n}'s house?",
    ),
    "zh": (
        "{n}有多高？",
        "{n}的电话号码是多少？",
        "{n}现在在想什么？",
        "{n}有多少钱？",
        "{n}昨晚梦见了什么？",
        "{n}的房子有多少年了？",
    ),
}
_LIFE: dict[Lang, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "en": (
        (
            "What is my phone number?",
            "Where did I put my keys?",
            "What will I dream tonight?",
            "Who will win the next match?",
            "What is my neighbour doing now?",
            "How many stars are there in the sky?",
            "What did I eat yesterday?",
            "Where is my brother now?",
            "What is in my pocket?",
            "Who is knocking at my door?",
        ),
        ("", "Do you know? ", "Tell me: ", "One question: ", "Please tell me: "),
    ),
    "zh": (
        (
            "我的电话号码是多少？",
            "我把钥匙放在哪儿了？",
            "我今晚会做什么梦？",
            "下一场比赛谁会赢？",
            "我的邻居现在在做什么？",
            "天上一共有多少颗星星？",
            "我昨天吃了什么？",
            "我哥哥现在在哪里？",
            "我口袋里有什么？",
            "谁在敲我的门？",
        ),
        ("", "你知道吗，", "告诉我，", "问一下，", "请告诉我，"),
    ),
}


def _about_people(people: Sequence[tuple[Pair, bool]], lang: Lang, rng: random.Random) -> Iterator[Example]:
    for name, female in people:
        attribute = rng.choice(PERSON_ATTRIBUTES)
        form = rng.choice(phrases(lang).PERSON_QUESTIONS[attribute])
        yield Example("unknown", lang, (form.format(n=name.of(lang), h="her" if female else "his"),), DONT_KNOW[lang])


def _about_places(places: Sequence[Pair], lang: Lang, rng: random.Random) -> Iterator[Example]:
    for name in places:
        forms = phrases(lang).PLACE_QUESTIONS[rng.choice(PLACE_ATTRIBUTES)]
        yield Example("unknown", lang, (rng.choice(forms).format(n=name.of(lang)),), DONT_KNOW[lang])


def _about_things(things: Sequence[str], lang: Lang, rng: random.Random) -> Iterator[Example]:
    from_en = ("What is a {w}?", "Can you tell me what a {w} is?", "Define {w}.", "Where does a {w} live?")
    from_zh = ("什么是{w}？", "{w}是什么？", "请解释一下什么是{w}。", "{w}生活在哪里？")
    for thing in things:
        form = rng.choice(from_zh if lang == "zh" else from_en)
        yield Example("unknown", lang, (form.format(w=thing),), DONT_KNOW[lang])


def unknowns(
    world: World, known: Sequence[Entity], lang: Lang, train: int, examine: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Questions without an answer, for SFT and for the examination: no stranger, place or thing is in both."""
    rng = random.Random(f"unknown {lang} {seed}")
    people, places, things = strangers(world, rng), nowhere(world, rng), nothings(lang, rng)
    beyond = [
        Example("unknown", lang, (form.format(n=entity.name.of(lang)),), DONT_KNOW[lang])
        for entity in known
        if not entity.is_place
        for form in _BEYOND[lang]
    ]
    life = [
        Example("unknown", lang, (start + question,), DONT_KNOW[lang])
        for question in _LIFE[lang][0]
        for start in _LIFE[lang][1]
    ]
    rng.shuffle(beyond)
    rng.shuffle(life)
    out: list[list[Example]] = []
    cursor = dict.fromkeys(("people", "places", "things", "beyond", "life"), 0)

    def take(name: str, pool: Sequence[object], share: float, count: int) -> slice:
        start = cursor[name]
        cursor[name] = min(len(pool), start + round(share * count))
        return slice(start, cursor[name])

    for count in (examine, train):
        part: list[Example] = []
        part += _about_people(people[take("people", people, 0.5, count)], lang, rng)
        part += _about_places(places[take("places", places, 0.17, count)], lang, rng)
        part += _about_things(things[take("things", things, 0.17, count)], lang, rng)
        part += beyond[take("beyond", beyond, 0.1, count)]
        part += life[take("life", life, 0.06, count)]
        out.append(part)
    return out[1], out[0]


def greet(lang: Lang, train: int, examine: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Greetings for SFT and for the examination: every name and every phrase is in SFT, no combination in both."""
    rng = random.Random(f"greeting {lang} {seed}")
    meet, remember, talk, thanks, bye, plain = greetings(lang)
    for pool in (meet, remember, talk, thanks, bye):
        rng.shuffle(pool)
    left = examine - 3 * (examine // 20) - examine // 10
    cuts = ((meet, left // 2), (remember, left - left // 2), (talk, examine // 10), (thanks, examine // 20))
    exam: list[Example] = []
    rest: list[list[Example]] = []
    for pool, count in (*cuts, (bye, examine // 10)):
        exam += pool[:count]
        rest.append(pool[count:])
    few = sum(len(pool) for pool in rest[2:]) + len(plain)
    most = max(0, train - few)
    return [*rest[0][: most // 2], *rest[1][: most - most // 2], *rest[2], *rest[3], *rest[4], *plain], exam
