"""The Python API: what it promises about history, streams, stop strings, batches, folders and mistakes."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oriole.apps.api import Generation, Options, Oriole, Placement
from oriole.apps.conversation import conversation, to_message
from oriole.apps.found import find_model
from oriole.apps.thinking import AnswerText
from oriole.errors import ConfigError, DataError, ModelError, ResourceError
from oriole.model.folder import load_model, save_model
from oriole.model.lm import LM
from oriole.text.template import Message, render
from oriole.text.tokenizer import Tokenizer

GREEDY: Options = {"temperature": 0.0, "max_new_tokens": 30}
SAMPLED: Options = {"seed": 7, "max_new_tokens": 30}


def greedy_answer(oriole: Oriole, messages: list[Message], n: int) -> str:
    """The reference: the whole sequence through the model for every id, no engine."""
    ids = render(messages, oriole.tokenizer, generation=True)[0]
    new: list[int] = []
    with torch.inference_mode():
        while len(new) < n:
            h = oriole.model(torch.tensor([ids + new])).h
            new.append(int(oriole.model.head("logits", h[0, -1]).argmax()))
            if new[-1] in (0, 2):
                return oriole.tokenizer.decode(new[:-1])
    return oriole.tokenizer.decode(new)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_the_answer_is_the_models_own_after_the_rendered_conversation(oriole: Oriole) -> None:
    messages = [
        Message("system", "唱歌"),
        Message("user", "两个"),
        Message("assistant", "sing"),
        Message("user", "天?"),
    ]
    want = greedy_answer(oriole, messages, 30)
    assert oriole.generate("天?", [("两个", "sing")], system="唱歌", **GREEDY) == want != ""
    assert oriole.generate("天?", messages[:-1], **GREEDY) == want
    records = [{"role": m.role, "content": m.content} for m in messages[:-1]]
    assert oriole.generate("天?", records, **GREEDY) == want
    assert oriole.generate("天?", messages[1:3], system="唱歌", **GREEDY) == want
    assert oriole.generate("天?", [Message("system", "other"), *messages[1:3]], system="唱歌", **GREEDY) == want
    assert oriole.generate("天?", [("两个", "sing")], **GREEDY) != want


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_stream_equals_whole_and_leaves_the_history_alone(oriole: Oriole, options: Options) -> None:
    history = [("hello", "白鹭")]
    steps = list(oriole.stream_generate("sing!", history, **options))
    whole = oriole.generate("sing!", history, **options)
    assert history == [("hello", "白鹭")]
    assert steps[-1] == (whole, [("hello", "白鹭"), ("sing!", whole)])
    assert len(steps) > 5
    for (before, _), (after, new_history) in itertools.pairwise(steps):
        assert after.startswith(before) and after != before
        assert new_history == [*history, ("sing!", after)]


def test_the_new_history_has_the_form_of_the_old(oriole: Oriole) -> None:
    def last(history: Any) -> list[Any]:
        return list(oriole.stream_generate("b", history, max_new_tokens=3, temperature=0.0))[-1][1]

    assert isinstance(last(None)[-1], tuple) and len(last(None)) == 1
    assert [m.role for m in last([Message("user", "a"), Message("assistant", "x")])] == ["user", "assistant"] * 2
    assert [m["role"] for m in last([{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}])] == [
        "user", "assistant", "user", "assistant",
    ]  # fmt: skip


def test_batch_equals_one_by_one(oriole: Oriole) -> None:
    queries = ["a", "白鹭上青天 " * 4, "sing", "sing", "。"]
    histories = [None, [("q", "a")], [], [("窗", "雪"), ("blue", "sky")], None]
    for options in (GREEDY, SAMPLED):
        one_by_one = [oriole.generate(q, h, **options) for q, h in zip(queries, histories, strict=True)]
        assert oriole.batch_generate(queries, histories, **options) == one_by_one
        assert len(set(one_by_one)) == len(queries)
    assert oriole.batch_generate([]) == []
    with pytest.raises(DataError, match="2 queries but 1 histories"):
        oriole.batch_generate(["a", "b"], [None])


def test_seeds(oriole: Oriole) -> None:
    assert oriole.generate("a", seed=1, max_new_tokens=20) == oriole.generate("a", seed=1, max_new_tokens=20)
    assert len({oriole.generate("a", temperature=1.5, max_new_tokens=20) for _ in range(4)}) > 1


def test_text_generate_gives_the_completion_only(oriole: Oriole) -> None:
    ids = oriole.tokenizer.encode("two golden")
    with torch.inference_mode():
        for _ in range(8):
            ids.append(int(oriole.model.head("logits", oriole.model(torch.tensor([ids])).h[0, -1]).argmax()))
    want = oriole.tokenizer.decode(ids[len(oriole.tokenizer.encode("two golden")) :])
    assert oriole.text_generate("two golden", temperature=0.0, max_new_tokens=8) == want
    with pytest.raises(DataError, match="prompt is empty"):
        oriole.text_generate("")


# --- stop strings ----------------------------------------------------------------------------------------------------


def test_stop_strings_cut_the_answer_and_never_leak(oriole: Oriole) -> None:
    whole = oriole.generate("sing", temperature=0.0, max_new_tokens=60)
    assert len(whole) > 30
    for start in range(0, len(whole) - 5, 8):
        for length in (1, 2, 5):
            stop = whole[start : start + length]
            want = whole[: whole.index(stop)]
            options: Options = {"temperature": 0.0, "max_new_tokens": 60, "stop": stop}
            assert oriole.generate("sing", **options) == want
            streamed = [answer for answer, _ in oriole.stream_generate("sing", **options)]
            assert streamed[-1] == want
            assert all(want.startswith(answer) for answer in streamed), "a piece of the stop string was shown"


text_of_two_letters = st.text("ab白", max_size=30)


@settings(max_examples=200)
@given(text_of_two_letters, st.lists(st.text("ab白", min_size=1, max_size=4), max_size=3))
def test_the_first_complete_stop_string_decides(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    cut = next((text[:n] for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stops)), None)
    want = text if cut is None else cut[: len(cut) - max(len(s) for s in stops if cut.endswith(s))]
    for ids in (tokenizer.encode(text), [b + 16 for b in text.encode()]):  # however the text is cut into tokens
        answer = AnswerText(tokenizer, stops)
        got = ""
        for n, i in enumerate(ids):
            got += answer.add(i, "length" if n == len(ids) - 1 else None).text
            assert want.startswith(got)
            if answer.ended:
                break
        assert got == want


def test_within_one_token_too_the_first_complete_stop_string_decides(tokenizer: Tokenizer) -> None:
    [golden] = tokenizer.encode(" golden")
    answer = AnswerText(tokenizer, ["olden", "l"])
    assert answer.add(golden, None).text == " go" and answer.ended


def test_half_a_character_at_the_end_is_marked_not_lost(tokenizer: Tokenizer) -> None:
    answer = AnswerText(tokenizer, ())
    first, second = (b + 16 for b in "白".encode()[:2])
    assert answer.add(first, None).text == ""
    assert answer.add(second, "length").text == "\ufffd" and answer.ended


# --- context ---------------------------------------------------------------------------------------------------------


def test_the_oldest_turns_are_left_out_when_the_context_is_full(oriole: Oriole) -> None:
    turns = [(f"question {i} 白鹭", f"answer {i} 青天") for i in range(20)]
    how = Generation(max_new_tokens=500)
    prompt = oriole.prompt(conversation("窗含西岭", turns, "系统"), how)
    kept = next(
        n
        for n in range(21)
        if prompt == render(conversation("窗含西岭", turns[n:], "系统"), oriole.tokenizer, generation=True)[0]
    )
    assert 0 < kept < 20
    assert len(prompt) <= oriole.context - oriole.context // 4
    one_more = render(conversation("窗含西岭", turns[kept - 1 :], "系统"), oriole.tokenizer, generation=True)[0]
    assert len(one_more) > oriole.context - oriole.context // 4
    history = list(turns)
    oriole.generate("窗含西岭", history, max_new_tokens=4)
    assert history == turns
    assert (
        oriole.prompt(conversation("a", turns[:1], None), Generation(max_new_tokens=1))
        == (render(conversation("a", turns[:1], None), oriole.tokenizer, generation=True)[0])
    )


def test_a_query_that_alone_is_too_long_is_refused(oriole: Oriole) -> None:
    with pytest.raises(ModelError, match=r"the question has \d+ tokens .* the model's context is 160; shorten it"):
        oriole.generate("窗" * 400, [("a", "b")])
    long = "窗" * 130
    assert 120 < len(oriole.prompt([Message("user", long)], Generation())) < 160
    assert oriole.generate(long, temperature=0.0)  # less room than usual, yet an answer
    with pytest.raises(ModelError, match="the model's context is 160"):
        oriole.text_generate("窗" * 400)


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_a_pretrained_model_can_write_but_not_chat(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    base = Oriole(save_tiny(tmp_path / "pretrain" / "model", chat=False))
    assert not base.can_chat and base.stop_ids == (0,)
    assert base.text_generate("two golden", **GREEDY)
    for ask in (base.generate, base.stream_generate):
        with pytest.raises(ModelError, match=r"cannot chat yet; fine-tune it first .* text_generate"):
            ask("hello")


def test_options_that_do_not_exist_or_fit_are_named(oriole: Oriole) -> None:
    with pytest.raises(ConfigError, match="unknown key 'temprature'; did you mean 'temperature'"):
        oriole.generate("a", temprature=0.1)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="top_p = 2"):
        oriole.generate("a", top_p=2.0)
    with pytest.raises(ConfigError, match=r"stop.*empty string"):
        oriole.generate("a", stop="")
    with pytest.raises(DataError, match="query is None"):
        oriole.generate(None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"neither a .* pair"):
        oriole.generate("a", ["no pair"])  # type: ignore[list-item]
    with pytest.raises(DataError, match="no message"):
        to_message({"role": "robot", "content": "x"})


def test_type_checkers_see_the_options_there_are() -> None:
    assert set(Options.__annotations__) == set(Generation.model_fields)


# --- folders and devices ---------------------------------------------------------------------------------------------


def aged(folder: Path, seconds: int) -> Path:
    os.utime(folder / "config.json", (seconds, seconds))
    return folder


def test_which_model_a_path_means(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    run = tmp_path / "run"
    with pytest.raises(ModelError, match=r"does not exist; give a run, a stage or a model folder"):
        find_model(run)
    (run / "sft" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ModelError, match="has no finished stage yet"):
        find_model(run)
    pretrain = aged(save_tiny(run / "pretrain" / "model", chat=False), 1000)
    assert find_model(run) == find_model(run / "pretrain") == find_model(pretrain) == pretrain
    dpo = aged(save_tiny(run / "dpo" / "model"), 500)
    sft = aged(save_tiny(run / "sft" / "model"), 400)
    assert find_model(run) == dpo, "the newest that can chat, not the newest"
    aged(sft, 600)
    assert find_model(run) == sft
    aged(sft, 500)
    assert find_model(run) == dpo, "of equal age, the later stage"
    reward = aged(save_tiny(run / "reward" / "model"), 2000)
    config = (reward / "config.json").read_text(encoding="utf-8")
    (reward / "config.json").write_text(config.replace("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"))
    assert find_model(run) == dpo, "a reward model has no answers"


def test_a_reward_model_says_that_it_is_none_to_talk_to(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    lm = load_model(save_tiny(tmp_path / "lm"))
    reward = tmp_path / "run" / "reward" / "model"
    save_model(LM(lm.config, heads=("reward",)), reward, chat=True)
    Tokenizer.load(tmp_path / "lm").save(reward, chat=True)
    for path in (tmp_path / "run" / "reward", reward):
        with pytest.raises(ModelError, match="reward model: it scores answers and cannot write"):
            Oriole(path)
    with pytest.raises(ModelError, match="run: it holds a reward model, which scores answers and writes none"):
        Oriole(tmp_path / "run")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny(tmp_path)
    Tokenizer([(bytes([65 + i]), bytes([66 + j])) for i in range(25) for j in range(12)]).save(folder)
    with pytest.raises(ModelError, match="tokenizer of 572 ids but a model of 500"):
        Oriole(folder)


def test_to_moves_and_casts(model_folder: Path) -> None:
    m = Oriole(model_folder)
    assert m.to(device="cpu", dtype=torch.bfloat16) is m
    assert m.model.embedding.weight.dtype == torch.bfloat16
    assert isinstance(m.generate("两个", **GREEDY), str)
    assert m.place(Placement(device="cpu")).model.embedding.weight.dtype == torch.float32
    with pytest.raises(ResourceError, match="no device 'cuda:99' here; use one of: cpu"):
        m.to(device="cuda:99")
    with pytest.raises(ConfigError, match="'tpu9' is not a device"):
        m.place(Placement(device="tpu9"))


def test_import_is_lazy() -> None:
    code = "import sys, oriole; assert 'Oriole' in dir(oriole) and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    import oriole

    assert oriole.Oriole is Oriole
