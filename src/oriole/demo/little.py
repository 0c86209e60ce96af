"""Running text that is not about the table of facts: the calendar, the weather and little stories."""

from __future__ import annotations

import random
from collections.abc import Iterator

from oriole.demo.prose import Text, join
from oriole.demo.values import MONTH_DAYS, MONTHS, Lang

# First names of people who come and go: in stories, and as the names that users of the chat give.
NAMES: dict[Lang, tuple[str, ...]] = {
    "en": (
        *("Tom", "Anna", "Sam", "Lily", "Ben", "Mia", "Max", "Ella", "Jim", "Sophie", "Nick", "Laura"),
        *("Paul", "Maria", "Luke", "Amy", "Dan", "Ruth", "Mark", "Jenny", "Tim", "Susan", "Joe", "Linda"),
        *("Alex", "Cathy", "Bob", "Diana", "Fred", "Eva", "Harry", "Fiona", "Ken", "Hannah", "Owen", "Iris"),
        *("Philip", "Judy", "Roy", "Karen", "Steve", "Lena", "Will", "Megan", "Andy", "Nina", "Gary", "Tina"),
    ),
    "zh": (
        *("小明", "小红", "小华", "小丽", "小刚", "小芳", "小军", "小燕", "小杰", "小玲", "小龙", "小梅"),
        *("阿强", "阿珍", "阿宝", "阿月", "阿福", "阿秀", "阿力", "阿香", "阿文", "阿花", "阿东", "阿云"),
        *("乐乐", "圆圆", "明明", "婷婷", "豆豆", "欢欢", "亮亮", "甜甜", "佳佳", "洋洋", "星星", "朵朵"),
        *("老李", "老王", "老张", "老刘", "大伟", "大勇", "大山", "大林", "建华", "国强", "丽娟", "晓峰"),
    ),
}

DAYS_EN = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DAYS_ZH = ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期天")
_SEASONS = (("spring", "春天"), ("summer", "夏天"), ("autumn", "秋天"), ("winter", "冬天"))
_SEASON_MONTHS = ((3, 4, 5), (6, 7, 8), (9, 10, 11), (12, 1, 2))


def _calendar_facts(lang: Lang) -> list[str]:
    out = []
    for i in range(7):
        before, after = (i - 1) % 7, (i + 1) % 7
        if lang == "en":
            out.append(f"{DAYS_EN[after]} comes after {DAYS_EN[i]}.")
            out.append(f"The day before {DAYS_EN[i]} is {DAYS_EN[before]}.")
        else:
            out.append(f"{DAYS_ZH[i]}之后是{DAYS_ZH[after]}。")
            out.append(f"{DAYS_ZH[i]}的前一天是{DAYS_ZH[before]}。")
    for month, days in enumerate(MONTH_DAYS, 1):
        if lang == "en":
            often = " in most years" if month == 2 else ""
            out.append(f"{MONTHS[month - 1]} has {days} days{often}.")
            out.append(f"{MONTHS[month - 1]} is month number {month} of the year.")
        else:
            often = "一般" if month == 2 else ""
            out.append(f"{month}月{often}有{days}天。")
            out.append(f"{month}月是一年的第{month}个月。")
    for (english, chinese), months in zip(_SEASONS, _SEASON_MONTHS, strict=True):
        if lang == "en":
            one, two, three = (MONTHS[month - 1] for month in months)
            out.append(f"In the valley, {english} lasts from {one} to {three}; in {two} it is at its best.")
        else:
            one_, two_, three_ = months
            out.append(f"山谷里的{chinese}从{one_}月到{three_}月，{two_}月最像{chinese}。")
    if lang == "en":
        out += ["A week has seven days.", "A year has twelve months.", "A day has 24 hours.", "An hour has 60 minutes."]
        out += ["Saturday and Sunday make the weekend.", "A year has four seasons."]
    else:
        out += ["一个星期有七天。", "一年有十二个月。", "一天有24个小时。", "一个小时有60分钟。"]
        out += ["星期六和星期天是周末。", "一年有四个季节。"]
    return out


_SKY = {
    "en": ("sunny", "cloudy", "rainy", "foggy", "windy", "snowy", "warm and dry", "cold and clear"),
    "zh": ("晴", "多云", "下雨", "有雾", "刮风", "下雪", "暖和干燥", "又冷又晴"),
}
_ADVICE = {
    "en": (
        ("Wear a hat.", "A good day for a walk."),
        ("Perhaps the sun will come out later.", "A quiet grey day."),
        ("Take an umbrella.", "The farmers are pleased."),
        ("Drive slowly.", "You can hardly see the bridge."),
        ("Hold on to your hat.", "The children fly their kites."),
        ("Put on warm boots.", "The children build a snowman."),
        ("Water the garden.", "The washing dries quickly."),
        ("Put on a scarf.", "At night you can see many stars."),
    ),
    "zh": (
        ("记得戴帽子。", "正好出去散步。"),
        ("晚一点太阳也许会出来。", "这是安静的一天。"),
        ("别忘了带伞。", "农民们很高兴。"),
        ("开车要慢一点。", "连桥都看不清了。"),
        ("小心帽子被吹走。", "孩子们去放风筝。"),
        ("穿上暖和的靴子。", "孩子们堆了一个雪人。"),
        ("该给花园浇水了。", "衣服干得很快。"),
        ("围上围巾再出门。", "夜里能看到很多星星。"),
    ),
}


def _weather(lang: Lang, rng: random.Random) -> str:
    day, sky = rng.randrange(7), rng.randrange(8)
    least, most = {5: (0, 2), 6: (16, 24), 7: (1, 5)}.get(sky, (6, 24))
    low = rng.randrange(least, most)
    high = low + (rng.randrange(1, 3) if sky == 5 else rng.randrange(3, 9))
    advice = rng.choice(_ADVICE[lang][sky])
    if lang == "en":
        return f"The weather on {DAYS_EN[day]}: {_SKY[lang][sky]}, {low} to {high} degrees. {advice}"
    return f"{DAYS_ZH[day]}的天气：{_SKY[lang][sky]}，{low}到{high}度。{advice}"


# {a} and {b} are two names. One slot each: what is lost, where it is, who helps.
_STORIES: dict[Lang, tuple[str, ...]] = {
    "en": (
        "{a} lost {thing}. {a} looked in the kitchen and in the garden, but it was not there. Then {b} came and found "
        "it {spot}. “Thank you, {b}!” said {a}. “You are welcome,” said {b}.",
        "One day {a} and {b} found {thing} {spot}. “Whose is it?” asked {a}. “I don't know,” said {b}. So they put it "
        "on the wall by the road, and in the evening it was gone.",
        "“Hello, {a}!” said {b}. “Hello, {b}! Come in and have some tea,” said {a}. They talked until it was dark. "
        "Then {b} said goodbye and went home.",
        "It was raining, and {a} had no umbrella. {b} had a big one. “Come under mine,” said {b}. They walked home "
        "together, and from that day they were friends.",
        "{a} wanted to give {b} a present and bought {thing}. {b} wanted to give {a} a present too, and chose the very "
        "same. How they laughed!",
        "Every morning a small bird sang in the willow by {a}'s window. One morning it was quiet. {a} and {b} looked "
        "{spot} and found the bird with a nest and three eggs.",
        "{a} wanted to learn to swim, but was afraid of the water. {b} said, “First put in one foot.” The next day it "
        "was two feet. By the end of summer {a} swam across the river.",
    ),
    "zh": (
        "{a}把{thing}弄丢了，在厨房和花园里找了半天都没有找到。后来{b}来了，在{spot}找到了它。“谢谢你，{b}！”{a}说。“不客气。”{b}说。",
        "有一天，{a}和{b}在{spot}捡到了{thing}。“这是谁的？”{a}问。“我不知道。”{b}说。他们把它放在路边的墙上，到了晚上，它就不见了。",
        "“你好，{a}！”{b}说。“你好，{b}！进来喝杯茶吧。”{a}说。他们一直聊到天黑，{b}才说再见，回家去了。",
        "下雨了，{a}没有带伞，{b}有一把大伞。“来，一起打伞吧。”{b}说。他们一起走回家，从那天起就成了朋友。",
        "{a}想送{b}一件礼物，买了{thing}。{b}也想送{a}一件礼物，买的竟然一模一样。两个人都笑了。",
        "每天早上，{a}窗外的柳树上都有一只小鸟唱歌。有一天早上，四周静悄悄的。{a}和{b}到{spot}去找，看见小鸟正守着窝里的三个蛋。",
        "{a}想学游泳，可是怕水。{b}说：“先把一只脚放进水里。”第二天，两只脚都放进去了。夏天结束的时候，{a}已经能游到河对岸了。",
    ),
}
_THINGS: dict[Lang, tuple[str, ...]] = {
    "en": ("a red hat", "a silver key", "a blue scarf", "a small bell", "a wooden flute", "an old map", "a green kite"),
    "zh": (
        "一顶红帽子",
        "一把银钥匙",
        "一条蓝围巾",
        "一个小铃铛",
        "一支木笛",
        "一张旧地图",
        "一只绿风筝",
    ),
}
_SPOTS: dict[Lang, tuple[str, ...]] = {
    "en": ("under the old tree", "behind the door", "by the well", "near the bridge", "in the long grass"),
    "zh": ("老树下面", "门后面", "水井旁边", "小桥附近", "草丛里"),
}


def _story(lang: Lang, rng: random.Random) -> str:
    one, other = rng.sample(NAMES[lang], 2)
    return rng.choice(_STORIES[lang]).format(
        a=one, b=other, thing=rng.choice(_THINGS[lang]), spot=rng.choice(_SPOTS[lang])
    )


def little_texts(lang: Lang, rng: random.Random, *, calendar: int, weather: int, stories: int) -> Iterator[Text]:
    """`calendar` passes over the facts of the calendar, and so many weather reports and stories."""
    facts = _calendar_facts(lang)
    for _ in range(calendar):
        rng.shuffle(facts)
        for start in range(0, len(facts), 4):
            yield Text(join(lang, facts[start : start + 4]), "calendar")
    for _ in range(weather):
        yield Text(_weather(lang, rng), "weather")
    for _ in range(stories):
        yield Text(_story(lang, rng), "stories")
