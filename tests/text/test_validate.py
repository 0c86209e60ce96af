"""Problems of conversations, each found alone; and what a length cuts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oriole.text.formats import read_chats
from oriole.text.template import Chat, Message, ToolCall
from oriole.text.validate import faults, truncation, validate_chat

CALL = (ToolCall("f", {}),)


def chat(*turns: str) -> Chat:
    """`u:hello` is a user's message, `c:` an assistant's call of a tool."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = []
    for turn in turns:
        word, _, content = turn.partition(":")
        if word == "c":
            messages.append(Message("assistant", content, CALL))
        else:
            messages.append(Message(roles[word], content))  # type: ignore[arg-type]
    return Chat(tuple(messages))


@pytest.mark.parametrize(
    "turns",
    [
        ("u:q", "a:r"),
        ("s:be kind", "u:q", "a:r", "u:p", "a:o"),
        ("u:q", "c:", "t:1", "t:1", "a:r"),
        ("u:q", "c:wait", "t:1", "c:more", "t:2", "a:r", "u:p", "a:o"),
        ("u:q", "c:", "t:", "a:r"),
    ],
)
def test_sound_conversations(turns: tuple[str, ...]) -> None:
    assert validate_chat(chat(*turns)) == []


@pytest.mark.parametrize(
    ("turns", "problems"),
    [
        ((), ["it has no messages"]),
        (("a:r",), ["message 1 is the assistant's at the beginning; expected the user's"]),
        (("u:q",), ["message 1, the last, is the user's, not the assistant's"]),
        (("u:q", "u:p", "a:r"), ["message 2 is the user's after the user's; expected the assistant's"]),
        (("u:q", "a:r", "a:s"), ["message 3 is the assistant's after the assistant's; expected the user's"]),
        (("u:q", "s:x", "u:p", "a:r"), ["message 2 is the system's after the user's; expected the assistant's"]),
        (("u:q", "t:1", "a:r"), ["message 2 is the tool's after the user's; expected the assistant's"]),
        (("u:q", "c:", "a:r"), ["message 3 is the assistant's after the assistant's; expected the tool's"]),
        (("u:q", "c:"), ["message 2, the last, calls a tool and never gets its result"]),
        (("u: ", "a:r"), ["message 1, the user's, is empty"]),
        (("s:", "u:q", "a:r"), ["message 1, the system's, is empty"]),
        (("u:q", "a:r", "u:q", "a:s"), ["message 3 says the same as message 1"]),
        (("u:q", "a:r", "u:p", "a: r"), ["message 4 says the same as message 2"]),
        (("u:q", "a:q"), ["message 2 only repeats the user's message before it"]),
    ],
)
def test_each_problem_is_found_alone(turns: tuple[str, ...], problems: list[str]) -> None:
    assert validate_chat(chat(*turns)) == problems


def test_reasoning_alone_is_an_answer() -> None:
    thought = Message("assistant", "", reasoning="hm")
    assert validate_chat(Chat((Message("user", "q"), thought))) == []


def test_each_fault_has_its_kind() -> None:
    found = faults(chat("s:", "a:r", "u:q", "a:q", "a:r", "u:p", "c:").messages)
    assert [fault.kind for fault in found] == [
        "empty_turn", "begins_without_user", "repeated_turn", "not_alternating", "repeated_turn", "open_call",
    ]  # fmt: skip
    assert [fault.kind for fault in faults(chat("u:q").messages)] == ["ends_without_answer"]
    assert [fault.kind for fault in faults(())] == ["empty_turn"]


def test_the_examples_are_sound() -> None:
    from tests.text.test_formats import EXAMPLES

    for item in read_chats(sorted((EXAMPLES / "chat").iterdir())):
        assert validate_chat(item) == [], item


@given(lengths=st.lists(st.integers(0, 50)), limit=st.integers(1, 50))
def test_truncation_counts_what_a_limit_cuts(lengths: list[int], limit: int) -> None:
    found = truncation(lengths, limit)
    assert found.rows == len(lengths) and found.tokens == sum(lengths)
    assert found.lost == sum(lengths) - sum(min(n, limit) for n in lengths)
    assert found.cut == sum(n > limit for n in lengths)
    assert 0 <= found.rate <= 1 and 0 <= found.lost_rate <= 1


def test_truncation_of_nothing() -> None:
    assert truncation([], 5).rate == truncation([0], 5).lost_rate == 0.0 and truncation([10, 5], 5).lost_rate == 1 / 3
