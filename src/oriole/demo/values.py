"""The values that people and places of the demo world can have, in both languages."""

from __future__ import annotations

from typing import Literal, NamedTuple

Lang = Literal["zh", "en"]
LANGS: tuple[Lang, Lang] = ("zh", "en")


class Pair(NamedTuple):
    """One thing, said in English and in Chinese."""

    en: str
    zh: str

    def of(self, lang: Lang) -> str:
        return self.zh if lang == "zh" else self.en


def _table(text: str) -> tuple[Pair, ...]:
    rows = [line.split("|") for line in text.strip().splitlines()]
    cells = [cell.strip() for row in rows for cell in row]
    pairs = []
    for cell in cells:
        english, _, chinese = cell.rpartition(" ")
        pairs.append(Pair(english, chinese))
    return tuple(pairs)


def article(noun: str) -> str:
    """The noun phrase with its indefinite article: a baker, an otter."""
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


JOBS = _table("""
baker 面包师|teacher 老师|doctor 医生|nurse 护士|farmer 农民
tailor 裁缝|carpenter 木匠|painter 画家|singer 歌手|writer 作家
librarian 图书管理员|engineer 工程师|pilot 飞行员|sailor 水手|barber 理发师
gardener 园丁|beekeeper 养蜂人|clockmaker 钟表匠|blacksmith 铁匠|plumber 水管工
electrician 电工|mechanic 修理工|judge 法官|lawyer 律师|journalist 记者
photographer 摄影师|dentist 牙医|vet 兽医|chef 厨师|guide 导游
bus driver 公交车司机|firefighter 消防员|police officer 警察|actor 演员|architect 建筑师
scientist 科学家|translator 翻译|miner 矿工|accountant 会计|musician 音乐家
""")

FOODS = _table("""
dumplings 饺子|noodle soup 汤面|fried rice 炒饭|apple pie 苹果派|roast duck 烤鸭
tofu 豆腐|pancakes 煎饼|porridge 粥|fried noodles 炒面|spring rolls 春卷
tomato soup 番茄汤|grilled fish 烤鱼|mushroom soup 蘑菇汤|potato salad 土豆沙拉|pizza 披萨
chicken curry 咖喱鸡|beef stew 炖牛肉|lamb skewers 羊肉串|rice cakes 年糕|mooncakes 月饼
ice cream 冰淇淋|pumpkin pie 南瓜派|sausages 香肠|scrambled eggs 炒鸡蛋|corn bread 玉米面包
sweet potatoes 红薯|cold noodles 凉面|hot pot 火锅|fish balls 鱼丸|egg tarts 蛋挞
sushi 寿司|pickled cabbage 泡菜|chocolate cake 巧克力蛋糕|onion soup 洋葱汤|fried chicken 炸鸡
waffles 华夫饼|fruit salad 水果沙拉|popcorn 爆米花|wontons 馄饨|spaghetti 意大利面
""")

ANIMALS = _table("""
otter 水獭|heron 苍鹭|panda 熊猫|tiger 老虎|lion 狮子
elephant 大象|giraffe 长颈鹿|zebra 斑马|rabbit 兔子|fox 狐狸
wolf 狼|bear 熊|deer 鹿|squirrel 松鼠|hedgehog 刺猬
owl 猫头鹰|eagle 老鹰|swan 天鹅|penguin 企鹅|parrot 鹦鹉
peacock 孔雀|crane 鹤|swallow 燕子|dolphin 海豚|whale 鲸鱼
seal 海豹|tortoise 乌龟|frog 青蛙|horse 马|goat 山羊
camel 骆驼|monkey 猴子|kangaroo 袋鼠|koala 考拉|leopard 豹子
beaver 河狸|donkey 驴|butterfly 蝴蝶|bee 蜜蜂|hippo 河马
""")

HOBBIES = _table("""
painting 画画|swimming 游泳|hiking 徒步|playing chess 下棋|playing the flute 吹笛子
playing the piano 弹钢琴|playing the violin 拉小提琴|playing the guitar 弹吉他|singing 唱歌|dancing 跳舞
baking 烤点心|growing flowers 种花|fishing 钓鱼|cycling 骑自行车|running 跑步
skating 滑冰|skiing 滑雪|rowing 划船|reading 读书|knitting 织毛衣
making pottery 做陶艺|taking photographs 摄影|collecting stamps 集邮|collecting coins 收集硬币
collecting shells 收集贝壳
watching birds 观鸟|watching the stars 看星星|practising calligraphy 练书法
flying kites 放风筝|playing table tennis 打乒乓球
playing basketball 打篮球|playing football 踢足球|doing yoga 练瑜伽|writing poems 写诗|folding paper 折纸
camping 露营|rock climbing 攀岩|riding horses 骑马|doing magic tricks 变魔术|carving wood 刻木头
""")

RIVERS = _table("""
Jade River 玉河|Amber River 琥珀河|Long River 长河|White River 白河|Winding River 弯河
Reed River 苇河|Green River 绿河|Stone River 石河|Cold River 寒河|Lotus River 莲河
Misty River 雾河|Snow River 雪河|Pearl River 珍珠河|Golden River 金河|Thunder River 雷河
Copper River 铜河|Moon River 月河|Pine River 松河|Black River 黑河|Orchid River 兰河
""")

HILLS = _table("""
Tiger Hill 虎山|Bell Hill 钟山|Kite Hill 风筝山|Drum Hill 鼓山|Tea Hill 茶山
Lantern Hill 灯笼山|Turtle Hill 龟山|Eagle Hill 鹰山|Honey Hill 蜜山|Candle Hill 烛山
Crown Hill 冠山|Lion Hill 狮山|Cherry Hill 樱山|Harp Hill 琴山|Iron Hill 铁山
Needle Hill 针山|Pepper Hill 椒山|Rabbit Hill 兔山|Shell Hill 贝山|Wolf Hill 狼山
""")

PRODUCTS = _table("""
honey 蜂蜜|silk 丝绸|tea 茶叶|porcelain 瓷器|cheese 奶酪
wool 羊毛|candles 蜡烛|umbrellas 雨伞|kites 风筝|knives 刀具
violins 小提琴|bells 铃铛|baskets 篮子|carpets 地毯|clocks 时钟
glass 玻璃|boots 靴子|hats 帽子|ink 墨水|salt 盐
soap 肥皂|furniture 家具|toys 玩具|drums 鼓|folding fans 折扇
lanterns 灯笼|mirrors 镜子|ropes 绳子|bricks 砖头|buttons 纽扣
combs 梳子|dolls 洋娃娃|perfume 香水|pencils 铅笔|vinegar 醋
jam 果酱|raisins 葡萄干|walnuts 核桃|cotton 棉花|paper 纸
""")

FESTIVALS = _table("""
Kite Festival 风筝节|Drum Festival 鼓节|Rice Festival 稻米节|Ice Festival 冰雪节|Rose Festival 玫瑰节
Tulip Festival 郁金香节|Apple Festival 苹果节|Mask Festival 面具节|Music Festival 音乐节|Book Festival 读书节
Candle Festival 烛光节|Torch Festival 火把节|Bread Festival 面包节|Puppet Festival 木偶节|Dance Festival 舞蹈节
Dumpling Festival 饺子节|Fishing Festival 钓鱼节|Story Festival 故事节|Poetry Festival 诗歌节|Pumpkin Festival 南瓜节
""")

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def date(month: int, day: int) -> Pair:
    """A day of the year, as 3 May and as 5月3日."""
    return Pair(f"{day} {MONTHS[month - 1]}", f"{month}月{day}日")
