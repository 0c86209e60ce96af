"""The invented valley: its people and its places, one consistent table for a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from oriole.demo import values
from oriole.demo.values import Pair

# surname | the parent's name with f or m (a mother may have another surname) | two grown-up children
_CHINESE = """
林 Lin|林建国 Lin Jianguo m|林小雨 Lin Xiaoyu f|林志强 Lin Zhiqiang m
陈 Chen|郭美兰 Guo Meilan f|陈大海 Chen Dahai m|陈静怡 Chen Jingyi f
王 Wang|王永福 Wang Yongfu m|王思琪 Wang Siqi f|王浩然 Wang Haoran m
李 Li|谢秀英 Xie Xiuying f|李伟明 Li Weiming m|李佳宁 Li Jianing f
张 Zhang|张国栋 Zhang Guodong m|张雪莹 Zhang Xueying f|张宇航 Zhang Yuhang m
赵 Zhao|宋桂芳 Song Guifang f|赵俊杰 Zhao Junjie m|赵晓彤 Zhao Xiaotong f
周 Zhou|周庆生 Zhou Qingsheng m|周婉清 Zhou Wanqing f|周天佑 Zhou Tianyou m
吴 Wu|唐玉珍 Tang Yuzhen f|吴家豪 Wu Jiahao m|吴若曦 Wu Ruoxi f
徐 Xu|徐立新 Xu Lixin m|徐梦瑶 Xu Mengyao f|徐一鸣 Xu Yiming m
孙 Sun|韩凤霞 Han Fengxia f|孙少峰 Sun Shaofeng m|孙诗韵 Sun Shiyun f
马 Ma|马振东 Ma Zhendong m|马慧敏 Ma Huimin f|马泽楷 Ma Zekai m
朱 Zhu|冯淑贞 Feng Shuzhen f|朱学斌 Zhu Xuebin m|朱欣妍 Zhu Xinyan f
胡 Hu|胡德胜 Hu Desheng m|胡乐萱 Hu Lexuan f|胡嘉木 Hu Jiamu m
高 Gao|曹巧玲 Cao Qiaoling f|高松涛 Gao Songtao m|高紫薇 Gao Ziwei f
罗 Luo|罗铁柱 Luo Tiezhu m|罗海棠 Luo Haitang f|罗云龙 Luo Yunlong m
郑 Zheng|彭爱莲 Peng Ailian f|郑启贤 Zheng Qixian m|郑文君 Zheng Wenjun f
梁 Liang|梁金水 Liang Jinshui m|梁可馨 Liang Kexin f|梁小虎 Liang Xiaohu m
邓 Deng|田雅琴 Tian Yaqin f|邓鹏飞 Deng Pengfei m|邓书蕾 Deng Shulei f
董 Dong|董长庚 Dong Changgeng m|董依娜 Dong Yina f|董睿哲 Dong Ruizhe m
袁 Yuan|潘春梅 Pan Chunmei f|袁成武 Yuan Chengwu m|袁冬妮 Yuan Dongni f
蒋 Jiang|蒋江平 Jiang Jiangping m|蒋青荷 Jiang Qinghe f|蒋宏达 Jiang Hongda m
蔡 Cai|杜丽华 Du Lihua f|蔡维康 Cai Weikang m|蔡念慈 Cai Nianci f
叶 Ye|叶守义 Ye Shouyi m|叶知夏 Ye Zhixia f|叶亦凡 Ye Yifan m
苏 Su|魏红缨 Wei Hongying f|苏百川 Su Baichuan m|苏安琳 Su Anlin f
"""

_WESTERN = """
Reed 里德|Martin 马丁 m|Alma 阿尔玛 f|Carl 卡尔 m
Carter 卡特|Edith 伊迪丝 f|David 大卫 m|Betty 贝蒂 f
Morgan 摩根|Walter 沃尔特 m|Clara 克拉拉 f|Eric 埃里克 m
Bennett 贝内特|Mabel 梅布尔 f|Frank 弗兰克 m|Daisy 黛西 f
Foster 福斯特|George 乔治 m|Flora 弗洛拉 f|Henry 亨利 m
Hudson 哈德森|Helen 海伦 f|Ivan 伊万 m|Grace 格蕾丝 f
Palmer 帕尔默|Arthur 亚瑟 m|Ivy 艾薇 f|Jack 杰克 m
Dawson 道森|Olive 奥利芙 f|Kevin 凯文 m|Julia 朱莉娅 f
Elliot 埃利奥特|Ralph 拉尔夫 m|Kate 凯特 f|Leo 利奥 m
Grant 格兰特|Rose 罗丝 f|Neil 尼尔 m|Lucy 露西 f
Harper 哈珀|Victor 维克托 m|Nora 诺拉 f|Oscar 奥斯卡 m
Lawson 劳森|Vera 薇拉 f|Peter 彼得 m|Polly 波莉 f
Murphy 墨菲|Simon 西蒙 m|Sally 萨莉 f|Toby 托比 m
Norton 诺顿|Wendy 温迪 f|Adam 亚当 m|Tessa 泰莎 f
Parker 帕克|Hugo 雨果 m|Zoe 佐伊 f|Felix 菲利克斯 m
Turner 特纳|Molly 莫莉 f|Dennis 丹尼斯 m|Emma 艾玛 f
"""

_PLACES = """
Willowbrook 柳溪镇|Stonebridge 石桥镇|Oakfield 橡树村|Foxhollow 狐狸谷|Silverford 银渡镇
Redcliff 红崖镇|Greenhaven 绿港镇|Cloudpeak 云峰镇|Moonlake 月湖镇|Pinegrove 松林镇
Whitesand 白沙镇|Goldenfield 金田镇|Deepwell 深井村|Eastgate 东门镇|Blackrock 黑石镇
Larkhill 云雀岗|Snowdale 雪谷镇|Windmere 风湖镇|Elmstead 榆树庄|Bambooford 竹渡村
Maplewood 枫林镇|Sunnyside 向阳镇|Clearwater 清水镇|Dragonpool 龙潭镇|Ironmill 铁坊镇
Kingsport 王港镇|Northshore 北岸镇|Southgate 南门镇|Peachvale 桃谷镇|Plumgarden 梅园镇
Swanbay 天鹅湾|Cranemarsh 鹤泽镇|Longbeach 长滩村|Newharbour 新港镇|Oldcastle 古堡镇
Saltmarsh 盐滩镇|Starfield 星野镇|Mistwood 雾林镇|Thornbury 荆棘镇|Millstone 磨石村
"""

PERSON_ATTRIBUTES = ("home", "job", "food", "animal", "hobby", "birthday", "friend")
PLACE_ATTRIBUTES = ("river", "hill", "product", "founded", "festival", "flag")


@dataclass(frozen=True)
class Entity:
    """A person or a place: a name in both languages, its facts by attribute, and whether SFT may ask about it."""

    name: Pair
    facts: dict[str, Pair]
    held_out: bool
    female: bool | None = None  # None: a place
    kin: dict[str, Pair] = field(default_factory=dict)

    @property
    def is_place(self) -> bool:
        return self.female is None


@dataclass(frozen=True)
class World:
    people: tuple[Entity, ...]
    places: tuple[Entity, ...]

    @property
    def entities(self) -> tuple[Entity, ...]:
        return self.people + self.places


def place_names() -> list[Pair]:
    cells = [cell for line in _PLACES.strip().splitlines() for cell in line.split("|")]
    return [Pair(*cell.split()) for cell in cells]


def families() -> list[list[tuple[Pair, bool]]]:
    """Families of three: a parent and two grown-up children, each as (name, female)."""
    out: list[list[tuple[Pair, bool]]] = []
    for line in _CHINESE.strip().splitlines():
        members = []
        for cell in line.split("|")[1:]:
            chinese, surname, given, gender = cell.split()
            members.append((Pair(f"{surname} {given}", chinese), gender == "f"))
        out.append(members)
    for line in _WESTERN.strip().splitlines():
        first, *cells = line.split("|")
        family = Pair(*first.split())
        members = []
        for cell in cells:
            english, chinese, gender = cell.split()
            members.append((Pair(f"{english} {family.en}", f"{chinese}·{family.zh}"), gender == "f"))
        out.append(members)
    return out


def _spread(table: Sequence[Pair], count: int, rng: random.Random) -> list[Pair]:
    """`count` values, every one as often as every other (give or take one), in random order."""
    out: list[Pair] = []
    while len(out) < count:
        out += rng.sample(list(table), len(table))
    out = out[:count]
    rng.shuffle(out)
    return out


def _dates(count: int, rng: random.Random) -> list[Pair]:
    days = [(month, day) for month in range(1, 13) for day in range(1, values.MONTH_DAYS[month - 1] + 1)]
    return [values.date(*each) for each in rng.sample(days, count)]


def _friends(groups: Sequence[Sequence[Pair]], rng: random.Random) -> list[Pair]:
    """Everybody's best friend: one great circle through all people, and never a member of the family."""
    family = {name: number for number, group in enumerate(groups) for name in group}
    order = list(family)
    rng.shuffle(order)
    for i in range(len(order)):
        while family[order[i - 1]] == family[order[i]]:
            j = rng.randrange(len(order))
            order[i], order[j] = order[j], order[i]
    friend = dict(zip(order, order[1:] + order[:1], strict=True))
    if any(family[one] == family[other] for one, other in friend.items()):
        return _friends(groups, rng)
    return [friend[name] for name in family]


def build_world(seed: int = 0, held_out: float = 0.25, count_families: int = 40) -> World:
    """The whole world, with so many of the families, three Chinese for every two Western ones.

    A share of the families and of the places is held out: SFT never asks about them.
    """
    rng = random.Random(f"world {seed}")
    chinese = len(_CHINESE.strip().splitlines())
    groups = families()
    three_fifths = count_families * 3 // 5
    groups = [*groups[:three_fifths], *groups[chinese : chinese + count_families - three_fifths]]
    names = [name for group in groups for name, _ in group]
    columns = {
        "home": _spread(place_names(), len(names), rng),
        "job": _spread(values.JOBS, len(names), rng),
        "food": _spread(values.FOODS, len(names), rng),
        "animal": _spread(values.ANIMALS, len(names), rng),
        "hobby": _spread(values.HOBBIES, len(names), rng),
        "birthday": _dates(len(names), rng),
        "friend": _friends([[name for name, _ in group] for group in groups], rng),
    }
    hidden = set(rng.sample(range(len(groups)), round(held_out * len(groups))))
    people: list[Entity] = []
    for number, ((parent, mother), *children) in enumerate(groups):
        for name, female in groups[number]:
            row = len(people)
            kin: dict[str, Pair] = {}
            if name == parent:
                kin = {"daughter" if girl else "son": child for child, girl in children}
            else:
                kin["mother" if mother else "father"] = parent
                other, girl = next(each for each in children if each[0] != name)
                kin["sister" if girl else "brother"] = other
            facts = {attribute: column[row] for attribute, column in columns.items()}
            people.append(Entity(name, facts, number in hidden, female, kin))
    towns = place_names()
    years = [Pair(str(year), str(year)) for year in rng.sample(range(1050, 1900), len(towns))]
    table = {
        "river": _spread(values.RIVERS, len(towns), rng),
        "hill": _spread(values.HILLS, len(towns), rng),
        "product": _spread(values.PRODUCTS, len(towns), rng),
        "founded": years,
        "festival": _spread(values.FESTIVALS, len(towns), rng),
        "flag": _spread(values.ANIMALS, len(towns), rng),
    }
    hidden = set(rng.sample(range(len(towns)), round(held_out * len(towns))))
    places = [
        Entity(name, {attribute: column[row] for attribute, column in table.items()}, row in hidden)
        for row, name in enumerate(towns)
    ]
    return World(tuple(people), tuple(places))
