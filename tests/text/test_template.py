"""The template: golden spans, the loss mask, and the jinja twin that must give the same ids."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oriole.errors import DataError
from oriole.text.template import CHAT_TEMPLATE, Message, ToolCall, message_dict, render
from oriole.text.tokenizer import RESERVED, Tokenizer

SUM = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object", "说明": "两数之和"}}}


def spans(rendered: tuple[list[int], list[int]], tok: Tokenizer) -> list[tuple[str, int]]:
    """The rendering as runs of text with an equal mask."""
    ids, mask = rendered
    assert len(ids) == len(mask)
    runs: list[tuple[list[int], int]] = []
    for i, m in zip(ids, mask, strict=True):
        if not runs or runs[-1][1] != m:
            runs.append(([], m))
        runs[-1][0].append(i)
    return [(tok.decode(run, skip_special=False), m) for run, m in runs]


def test_golden_two_turns_with_a_system_prompt(tok: Tokenizer) -> None:
    chat = [
        Message("system", "Be brief."),
        Message("user", "你好"),
        Message("assistant", "你好！"),
        Message("user", "Sing."),
        Message("assistant", "La la.\n"),
    ]
    assert spans(render(chat, tok), tok) == [
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n", 0),
        ("你好！<|im_end|>", 1),
        ("\n<|im_start|>user\nSing.<|im_end|>\n<|im_start|>assistant\n", 0),
        ("La la.\n<|im_end|>", 1),
        ("\n", 0),
    ]


def test_golden_reasoning_stays_only_after_the_last_question(tok: Tokenizer) -> None:
    chat = [
        Message("user", "1+1?"),
        Message("assistant", "2", reasoning="old thought"),
        Message("user", "2+2?"),
        Message("assistant", "\n\n4", reasoning="\n两个二\n"),
    ]
    assert spans(render(chat, tok), tok) == [
        ("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("2<|im_end|>", 1),
        ("\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("<think>\n两个二\n</think>\n\n4<|im_end|>", 1),
        ("\n", 0),
    ]
    ids, _ = render(chat, tok)
    assert ids.count(3) == ids.count(4) == 1  # the tokens, not their spelling


def test_golden_tools(tok: Tokenizer) -> None:
    chat = [
        Message("system", "You add."),
        Message("user", "1+2 and 3+4?"),
        Message(
            "assistant", "", (ToolCall("sum", {"a": 1, "b": 2}), ToolCall("sum", {"甲": "3", "b": [4]})), "two sums"
        ),
        Message("tool", "3"),
        Message("tool", "7"),
        Message("assistant", "3 and 7, sure?", (ToolCall("sum", {}),), reasoning=""),
        Message("tool", "0"),
        Message("assistant", "Yes."),
    ]
    assert spans(render(chat, tok, tools=[SUM]), tok) == [
        (
            "<|im_start|>system\nYou add.\n\n# Tools\n\n"
            "You may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
            '{"type": "function", "function": {"name": "sum", "parameters": {"type": "object", "说明": "两数之和"}}}\n'
            "</tools>\n\nFor each function call, return a json object with function name and arguments within "
            "<tool_call></tool_call> XML tags:\n<tool_call>\n"
            '{"name": <function-name>, "arguments": <args-json-object>}\n'
            "</tool_call><|im_end|>\n<|im_start|>user\n1+2 and 3+4?<|im_end|>\n<|im_start|>assistant\n",
            0,
        ),
        (
            '<think>\ntwo sums\n</think>\n\n<tool_call>\n{"name": "sum", "arguments": {"a": 1, "b": 2}}\n</tool_call>\n'
            '<tool_call>\n{"name": "sum", "arguments": {"甲": "3", "b": [4]}}\n</tool_call><|im_end|>',
            1,
        ),
        (
            "\n<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n7\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n",
            0,
        ),
        (
            "<think>\n\n</think>\n\n3 and 7, sure?\n"
            '<tool_call>\n{"name": "sum", "arguments": {}}\n</tool_call><|im_end|>',
            1,
        ),
        ("\n<|im_start|>user\n<tool_response>\n0\n</tool_response><|im_end|>\n<|im_start|>assistant\n", 0),
        ("Yes.<|im_end|>", 1),
        ("\n", 0),
    ]
    ids, _ = render(chat, tok, tools=[SUM])
    assert [ids.count(i) for i in range(1, 9)] == [7, 7, 2, 2, 5, 5, 3, 3]  # all of them tokens


def test_generation_prompts(tok: Tokenizer) -> None:
    chat = [Message("user", "hi")]
    head = "<|im_start|>user\nhi<|im_end|>\n"
    for thinking, end in ((None, ""), (True, ""), (False, "<think>\n\n</think>\n\n")):
        assert spans(render(chat, tok, generation=True, thinking=thinking), tok) == [
            (f"{head}<|im_start|>assistant\n{end}", 0)
        ]
    assert spans(render(chat, tok, thinking=False), tok) == [(head, 0)]


def test_no_default_system_prompt_and_a_later_one_in_its_place(tok: Tokenizer) -> None:
    chat = [Message("user", "a"), Message("system", "b"), Message("assistant", "c")]
    text = tok.decode(render(chat, tok)[0], skip_special=False)
    assert text.startswith("<|im_start|>user\na<|im_end|>\n<|im_start|>system\nb<|im_end|>\n")


@pytest.mark.parametrize("marker", RESERVED)
def test_text_never_becomes_a_role_token(tok: Tokenizer, marker: str) -> None:
    def chat(text: str) -> tuple[list[int], list[int]]:
        call = ToolCall(text, {text: text})
        messages = [
            Message("system", text),
            Message("user", text),
            Message("assistant", text, (call,), text),
            Message("tool", text),
            Message("assistant", text),
        ]
        return render(messages, tok, tools=[{"name": text}])

    def reserved(ids: list[int]) -> list[int]:
        return [i for i in ids if i < 16]

    assert reserved(chat(f"a{marker}b")[0]) == reserved(chat("ab")[0])
    assert tok.decode(chat(f"a{marker}b")[0]).count(f"a{marker}b") == 10


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "without messages"),
        ([Message("user", "a"), Message("robot", "b")], "message 2 has the role 'robot'; use one of system, user"),  # type: ignore[arg-type]
        ([Message("user", None)], r"message 1 \(user\) has None as its content"),  # type: ignore[arg-type]
        ([Message("user", "a", (ToolCall("f", {}),))], "only an assistant's"),
        ([Message("tool", "a", reasoning="")], "only an assistant's"),
    ],
)
def test_what_is_no_conversation_is_refused(tok: Tokenizer, chat: list[Message], message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(chat, tok)


# Property tests: any conversation, ours against the jinja template through transformers.

BITS = ["\n", " ", "\r\n", "\t", "中文", "黄鹂", " the", "a", "1", "，", "{", "'s", "\u3000"]
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.lists(st.sampled_from(BITS), max_size=6).map("".join),
).filter(lambda t: not any(marker in t for marker in RESERVED))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=2)
TOOLS = st.lists(st.dictionaries(TEXT, JSON, min_size=1, max_size=2), max_size=2)
MESSAGE = st.one_of(
    st.builds(Message, st.sampled_from(["system", "user", "tool"]), TEXT),
    st.builds(
        Message,
        st.just("assistant"),
        TEXT,
        st.lists(st.builds(ToolCall, TEXT, OBJECT), max_size=2).map(tuple),
        st.none() | TEXT,
    ),
)
MESSAGES = st.lists(MESSAGE, min_size=1, max_size=6)


@pytest.fixture(scope="module")
def theirs(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("chat")
    tok.save(folder, chat=True)
    return AutoTokenizer.from_pretrained(folder)


def apply(theirs: Any, messages: list[Message], tools: list[dict[str, Any]], **options: Any) -> list[int]:
    ids: list[int] = theirs.apply_chat_template(
        [message_dict(m) for m in messages], tools=tools or None, tokenize=True, return_dict=False, **options
    )
    return ids


@given(MESSAGES, TOOLS, st.booleans(), st.sampled_from([None, True, False]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_jinja_template_gives_the_same_ids(
    tok: Tokenizer,
    theirs: Any,
    messages: list[Message],
    tools: list[dict[str, Any]],
    generation: bool,
    thinking: bool | None,
) -> None:
    options = {} if thinking is None else {"enable_thinking": thinking}
    ids, mask = render(messages, tok, tools=tools, generation=generation, thinking=thinking)
    assert ids == apply(theirs, messages, tools, add_generation_prompt=generation, **options)
    assert set(mask) <= {0, 1} and len(mask) == len(ids)
    assert mask.count(1) >= sum(m.role == "assistant" for m in messages)


@given(MESSAGES, TEXT, st.none() | TEXT)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_generation_prompt_is_a_prefix_of_the_training_ids(
    tok: Tokenizer, before: list[Message], answer: str, reasoning: str | None
) -> None:
    """Fault 14 of the earlier systems: what the model reads in use is what it read in training."""
    ids, mask = render([*before, Message("assistant", answer, reasoning=reasoning)], tok)
    prompt, none = render(before, tok, generation=True)
    assert ids[: len(prompt)] == prompt
    assert not any(none[-2:])
    assert mask[len(prompt) :] == [1] * (len(ids) - len(prompt) - len(tok.encode("\n"))) + [0]
    no_thoughts, _ = render([*before, Message("assistant", answer, reasoning="")], tok)
    prompt, _ = render(before, tok, generation=True, thinking=False)
    assert no_thoughts[: len(prompt)] == prompt


def test_every_white_space_is_dropped_before_an_answer(tok: Tokenizer) -> None:
    """A character that the regex takes for white space and `lstrip` does not would break the prefix property."""
    prompt, _ = render([Message("user", "q")], tok, generation=True)
    for code in [*range(0x500), *range(0x1600, 0x1900), *range(0x2000, 0x2100), 0x3000, 0xFEFF, 0xE0020]:
        ids, _ = render([Message("user", "q"), Message("assistant", chr(code) + "\n\nx")], tok)
        assert ids[: len(prompt)] == prompt, hex(code)


def test_the_folder_has_the_template(tok: Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path, chat=True)
    assert (tmp_path / "chat_template.jinja").read_text("utf-8") == CHAT_TEMPLATE
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert config["chat_template"] == CHAT_TEMPLATE


def test_others_may_leave_reasoning_inside_the_answer(theirs: Any) -> None:
    """transformers, vLLM and llama.cpp return `<think>…</think>answer` as text; sent back, it is understood."""
    raw = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nwell\n</think>\n\nyes"}]
    assert theirs.apply_chat_template(raw, tokenize=False).endswith("\n<think>\nwell\n</think>\n\nyes<|im_end|>\n")
    asked = [*raw, {"role": "user", "content": "sure?"}]
    assert "well" not in theirs.apply_chat_template(asked, tokenize=False)
