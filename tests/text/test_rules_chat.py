"""Rules for conversations: turns that cannot be learnt from, answers that repeat the question, tasks of other kinds."""

import pytest

from oriole.text.rules import Drop, apply_rules
from oriole.text.ruleschat import ChatRulesConfig, build_chat_rules, dice
from oriole.text.template import Chat, Message, Role, ToolCall

ROLES: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
CALL = (ToolCall("f", {}),)


def chat(*turns: str) -> Chat:
    """ "u:text" and so on; "c:" is an assistant's tool call."""
    messages = []
    for turn in turns:
        role, _, text = turn.partition(":")
        messages.append(Message("assistant", text, CALL) if role == "c" else Message(ROLES[role], text))
    return Chat(tuple(messages))


def reason(conversation: Chat, **config: object) -> str:
    """The rule that drops the conversation, "" where it stays as it is."""
    result = apply_rules(conversation, build_chat_rules(ChatRulesConfig(**config)))  # type: ignore[arg-type]
    if isinstance(result, Drop):
        assert result.detail
        return result.reason
    assert result == conversation
    return ""


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (["u:你好", "a:你好，有什么可以帮你？"], ""),
        (["s:Be kind.", "u:Hi", "a:Hello there!", "u:Bye", "a:See you."], ""),
        (["u:Weather?", "c:", "t:{}", "a:It is sunny."], ""),
        (["u:Weather?", "c:", "t:{}", "t:{}", "c:", "t:", "a:Sunny."], ""),
        (["u:Hi", "u:Hi there", "a:Hello!"], "roles"),
        (["u:Hi", "a:Hello!", "a:Again hello!"], "roles"),
        (["a:Hello!", "u:Hi", "a:Yes?"], "roles"),
        (["u:Hi", "a:Hello!", "u:Bye"], "roles"),
        (["u:Hi", "s:Be kind.", "a:Hello!"], "roles"),
        (["u:Hi", "t:{}", "a:Hello!"], "roles"),
        (["u:Hi", "a:no call", "t:{}", "a:Hello!"], "roles"),
        (["u:Hi", "c:", "u:well?", "a:Hello!"], "roles"),
        (["u:Weather?", "c:"], ""),
        (["u: ", "a:Hello!"], "empty"),
        (["u:Hi", "a:\n"], "empty"),
        (["u:Tell me more", "a:Tell me  more"], "duplicated"),
        (["u:讲个笑话", "a:从前有座山", "u:讲个笑话", "a:从前有座山"], "duplicated"),
        (["u:再讲一个", "a:从前有座山", "u:再讲一个", "a:山上有座庙"], ""),
        (["u:黄鹂是一种什么样的鸟？", "a:黄鹂是一种什么样的鸟"], "same"),
        (["u:What is the oriole's song like in spring", "a:What is the oriole's song like in spring?"], "same"),
        (["u:Is a listener silent?", "a:It is: silent is listen's twin, elates in a lite liner."], ""),
    ],
)  # fmt: skip
def test_validation(turns: list[str], expected: str) -> None:
    assert reason(chat(*turns)) == expected


def test_reasoning_or_a_call_is_no_empty_turn() -> None:
    thought = Message("assistant", "", reasoning="hm")
    assert reason(Chat((Message("user", "Hi"), thought)), answer_characters=0) == ""


@pytest.mark.parametrize(
    ("question", "translation", "tables"),
    [
        ("请把下面的句子翻译成英文：春天来了", True, False),
        ("翻译：good morning", True, False),
        ("中译英：你好", True, False),
        ("Translate the following sentence into Chinese: hello", True, False),
        ("谁是最好的翻译家？", False, False),
        ("《红楼梦》有哪些译本？", False, False),
        ("Who wrote the best translation?", False, False),
        ("用表格列出这三种水果", False, True),
        ("Put the results into a table", False, True),
        ("Who made the round table in the kitchen of the castle?", False, False),
        ("How do I set the table for six?", False, False),
        ("代表团什么时候来？", False, False),
    ],
)
def test_tasks_of_other_kinds(question: str, translation: bool, tables: bool) -> None:
    conversation = chat(f"u:{question}", "a:An answer of some length.")
    assert reason(conversation) == ""
    assert reason(conversation, translation=True) == "translation" * translation
    assert reason(conversation, tables=True) == "tables" * tables


def test_a_table_in_the_answer() -> None:
    assert reason(chat("u:compare", "a:| a | b |\n|---|---|\n| 1 | 2 |"), tables=True) == "tables"
    assert reason(chat("u:compare", "a:one\n---\ntwo"), tables=True) == ""


def test_lengths_and_switches() -> None:
    short = chat("u:好？", "a:好。")
    assert reason(short) == ""
    assert reason(short, question_characters=3) == "question_characters"
    assert reason(short, answer_characters=15) == "answer_characters"
    assert reason(short, max_characters=3) == "max_characters"
    off = {name: False if isinstance(f.default, bool) else 0 for name, f in ChatRulesConfig.model_fields.items()}
    assert build_chat_rules(ChatRulesConfig(**off)) == []


def test_dice() -> None:
    assert dice("", "") == 0.0 and dice("ab", "ba") == 1.0 and dice("abcd", "abef") == 0.5
