"""Both kinds of reasoning: a block that is kept apart and ended in time, and steps in a latent block that are told."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from oriole.apps import chat as chat_module
from oriole.apps.api import Generation, Options, Oriole
from oriole.apps.chat import ChatSettings, Session
from oriole.apps.evaluate import evaluate_questions
from oriole.apps.generate import generate_file
from oriole.apps.thinking import AnswerText, Piece, budget, without_thought
from oriole.errors import ConfigError, DataError, ModelError
from oriole.infer.engine import Engine
from oriole.infer.sample import Sampling
from oriole.model.config import ModelConfig
from oriole.model.folder import save_model
from oriole.model.lm import LM
from oriole.text.template import Message, render
from oriole.text.tokenizer import THINK, THINK_END, Tokenizer
from oriole.train.batch import Rows, shifted
from oriole.train.objectives import iteration_loss

WORDS = ("golden", "willow", "白鹭", "千秋雪")
GREEDY: Options = {"temperature": 0.0, "max_new_tokens": 24}


@pytest.fixture
def thinker(tmp_path: Path, tokenizer: Tokenizer) -> Oriole:
    """A random model with a latent block."""
    torch.manual_seed(4)
    config = ModelConfig.model_validate({
        "vocab_size": tokenizer.vocab_size, "dim": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 8, "ffn_dim": 48, "context": 160, "init_std": 0.4, "tie_embeddings": False,
        "reasoning": {"threshold": 0.7},
    })  # fmt: skip
    save_model(LM(config), tmp_path / "latent", chat=True)
    tokenizer.save(tmp_path / "latent", chat=True, context=160)
    return Oriole(tmp_path / "latent")


@pytest.fixture
def writer(oriole: Oriole, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Oriole:
    """The tiny model, made to say one text with a block in it, whatever it is asked."""
    said = [THINK, *tokenizer.encode("\nsing 黄鹂\n"), THINK_END, *tokenizer.encode("\n\ngolden 柳"), 2]

    def say(logits: torch.Tensor, samplings: Any, histories: Sequence[list[int]], *_: Any) -> torch.Tensor:
        out = []
        for ids in histories:
            start = len(ids) - 1 - ids[::-1].index(1)  # <|im_start|>
            new = len(ids) - start - len(tokenizer.encode("assistant\n")) - 1
            out.append(said[new])
        return torch.tensor(out)

    monkeypatch.setattr("oriole.infer.engine.sample", say)
    return oriole


def pieces(tokenizer: Tokenizer, ids: list[int], stops: Sequence[str] = ()) -> list[Piece]:
    text, made = AnswerText(tokenizer, stops), []
    for n, id in enumerate(ids):
        made.append(text.add(id, "length" if n == len(ids) - 1 else None))
        if text.ended:
            break
    return made


def both(made: list[Piece]) -> tuple[str, str]:
    return "".join(p.text for p in made if p.thought), "".join(p.text for p in made if not p.thought)


# --- the block -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thought", ["", "sing\n\n黄鹂 l"])
def test_thought_and_answer_come_apart_as_the_template_joined_them(tokenizer: Tokenizer, thought: str) -> None:
    messages = [Message("user", "?"), Message("assistant", "golden\n柳", reasoning=thought)]
    ids, mask = render(messages, tokenizer)
    trained = [id for id, m in zip(ids, mask, strict=True) if m][:-1]
    assert both(pieces(tokenizer, trained)) == (thought, "golden\n柳")
    assert tokenizer.decode(without_thought(trained)).lstrip() == "golden\n柳"
    assert both(pieces(tokenizer, trained, ["l", "柳"])) == (thought, "go")  # a stop string is one of the answer


def test_a_block_that_never_ends_is_no_answer(tokenizer: Tokenizer) -> None:
    ids = [THINK, *tokenizer.encode("\nsing 黄鹂")]
    assert both(pieces(tokenizer, ids)) == ("sing 黄鹂", "")
    assert without_thought(ids) == []


def test_a_budget_ends_the_block(oriole: Oriole, tokenizer: Tokenizer) -> None:
    allowed = budget(3, tokenizer.vocab_size)
    for free in ([], [50, 60], [THINK, 50, 60], [THINK, 50, 60, 70, THINK_END, 80]):
        assert allowed(free) is None
    mask = allowed([9, THINK, 50, 60, 70])
    assert mask is not None and mask.nonzero().tolist() == [[THINK_END]]
    # In the engine: a prompt's own block does not count, the one that is forced open here does.
    open_first = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    open_first[THINK] = True

    def constraint(ids: Sequence[int]) -> torch.Tensor | None:
        return allowed(ids) if ids else open_first

    engine = Engine(oriole.model, vocab_size=tokenizer.vocab_size)
    engine.submit([1, THINK, 60, 70, 80, 90], Sampling(max_new_tokens=8, temperature=0.0), constraint)
    ids = []
    while engine:
        ids += [event.token for event in engine.step()]
    assert ids[0] == THINK and THINK_END in ids[1:5]


def test_what_is_thought_is_returned_beside_the_answer(writer: Oriole) -> None:
    assert writer.generate("天?", **GREEDY) == "golden 柳"
    past = [Message("user", "a"), Message("assistant", "b")]
    *_, (answer, history) = writer.stream_generate("天?", past, **GREEDY)
    assert answer == "golden 柳" and history[-1] == Message("assistant", "golden 柳", reasoning="sing 黄鹂")
    *_, (_, records) = writer.stream_generate("天?", [{"role": "user", "content": "a"}], **GREEDY)
    assert records[-1] == {"role": "assistant", "content": "golden 柳", "reasoning_content": "sing 黄鹂"}
    *_, (_, pairs) = writer.stream_generate("天?", **GREEDY)
    assert pairs == [("天?", "golden 柳")]


def test_thinking_off_begins_the_answer_with_an_empty_block(oriole: Oriole, tokenizer: Tokenizer) -> None:
    asked = [Message("user", "天?")]
    off = oriole.prompt(asked, Generation(thinking=False))
    assert tokenizer.decode(off, skip_special=False).endswith("assistant\n<think>\n\n</think>\n\n")
    assert oriole.prompt(asked, Generation(thinking=True)) == oriole.prompt(asked, Generation()) != off
    assert oriole.generate("天?", thinking=False, **GREEDY) != oriole.generate("天?", **GREEDY)
    with pytest.raises(ConfigError, match="think_tokens"):
        oriole.generate("天?", think_tokens=0)


def test_a_chat_shows_the_thought_dimmed_and_forgets_it(writer: Oriole, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(writer, ChatSettings(temperature=0.0))
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard", highlight=False)
    chat_module._answer(session, "天?", console)
    shown = screen.getvalue()
    assert "\x1b[2msing" in shown and "\x1b[2m\n\ngolden" not in shown
    assert shown.replace("\x1b[2m", "").replace("\x1b[0m", "").endswith("sing 黄鹂\n\ngolden 柳\n")
    assert session.history == [("天?", "golden 柳")]
    assert "".join(session.ask("天?")) == "golden 柳"


def test_a_file_of_questions_keeps_the_thoughts_and_goes_on(writer: Oriole, tmp_path: Path) -> None:
    asked, said = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text('{"question": "天?"}\n{"question": "船?"}\n', encoding="utf-8")
    keys = [f"input={asked}", f"output={said}", "temperature=0", "device=cpu"]
    assert generate_file(writer.folder, keys) == 2
    lines = said.read_text("utf-8").splitlines(keepends=True)
    assert json.loads(lines[0]) == {"question": "天?", "thought": "sing 黄鹂", "answer": "golden 柳"}
    said.write_text(lines[0], encoding="utf-8")
    assert generate_file(writer.folder, keys) == 1
    assert said.read_text("utf-8") == "".join(lines)
    asked.write_text('{"question": "天?", "thought": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="'thought' already; choose another key with thought_key"):
        generate_file(writer.folder, keys)


# --- the latent block ------------------------------------------------------------------------------------------------


def test_the_steps_and_confidence_told_are_those_of_the_model(thinker: Oriole) -> None:
    made = thinker.generate_with_reasoning("天?", [("两个", "sing")], max_steps=5, threshold=0.6, **GREEDY)
    assert len(made.ids) == len(made.steps) == len(made.confidence) == 24
    prompt = thinker.prompt(
        [Message("user", "两个"), Message("assistant", "sing"), Message("user", "天?")], Generation()
    )
    ids = [*prompt, *made.ids]
    for n, (step, sure) in enumerate(zip(made.steps, made.confidence, strict=True), len(prompt)):
        with torch.inference_mode():  # the reference: every iteration of the whole sequence, no engine
            thinker.model.reasoning.config = thinker.model.config.reasoning.model_copy(update={"steps": 5})  # type: ignore
            every = [h[0, -1] for h in thinker.model(torch.tensor([ids[:n]])).mid]
            odds = [float(thinker.model.head("confidence", h).sigmoid()) for h in every]
            assert step == next((i for i, p in enumerate(odds, 1) if p > 0.6), 5)
            assert sure == pytest.approx(odds[step - 1], abs=1e-4)
            assert int(thinker.model.head("logits", every[step - 1]).argmax()) == ids[n]
    assert len(set(made.steps)) > 1
    assert made.text == thinker.tokenizer.decode(made.ids)


def test_steps_may_be_chosen_and_are_otherwise_the_models_own(thinker: Oriole) -> None:
    one = thinker.generate_with_reasoning("天?", max_steps=1, **GREEDY)
    assert set(one.steps) == {1}
    usual = thinker.generate_with_reasoning("天?", **GREEDY)
    assert usual.text == thinker.generate("天?", **GREEDY) and max(usual.steps) <= 4
    assert set(thinker.generate_with_reasoning("天?", threshold=1, **GREEDY).steps) == {4}
    for bad in ({"max_steps": 0}, {"threshold": 0.0}):
        with pytest.raises(ConfigError, match="max_steps, threshold"):
            thinker.generate_with_reasoning("天?", **bad)  # type: ignore[arg-type]


def test_a_model_without_the_block_says_so(oriole: Oriole) -> None:
    with pytest.raises(ModelError, match=r"without a latent block .* train one with model\.reasoning\.steps=4"):
        oriole.generate_with_reasoning("天?")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Oriole:
    """A model that was trained in Python to answer with the word that stands in a passage beside the conversation."""
    torch.manual_seed(1)
    lm = LM(ModelConfig.model_validate({
        "vocab_size": tokenizer.vocab_size, "dim": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 8, "ffn_dim": 48, "context": 64, "reasoning": {"steps": 2, "cross": True},
    }))  # fmt: skip
    chats = [render([Message("user", "?"), Message("assistant", word)], tokenizer) for word in WORDS]
    packed = Rows(len(chats), max(len(ids) for ids, _ in chats))
    for row, (ids, mask) in enumerate(chats):
        packed.add(row, *shifted(np.array(ids), np.array(mask)))
    batch = packed.batch()
    optimizer = torch.optim.Adam(lm.parameters(), 1e-2)
    for _ in range(60):
        beside = lm.context_of([[tokenizer.encode("two orioles"), tokenizer.encode(word)] for word in WORDS])
        loss = iteration_loss(
            lm, lm(batch.tokens, batch.doc, batch.pos, context=beside).mid, batch.targets.flatten(), batch.rows
        )
        optimizer.zero_grad()
        loss.sum.backward()
        assert all(p.grad is not None for p in lm.parameters())
        optimizer.step()
    folder = tmp_path_factory.mktemp("reader")
    save_model(lm, folder, chat=True)
    tokenizer.save(folder, chat=True, context=64)
    return Oriole(folder)


def test_passages_beside_the_conversation_decide_the_answer(reader: Oriole) -> None:
    for word in WORDS:
        told = reader.generate_with_reasoning("?", passages=["two orioles", word], **GREEDY)
        assert told.text == word and len(told.ids) == len(told.steps)
    assert reader.generate_with_reasoning("?", **GREEDY).text == reader.generate("?", **GREEDY)


def test_passages_for_a_model_that_cannot_look_at_them_are_refused(thinker: Oriole) -> None:
    with pytest.raises(ModelError, match="looks at no context beside the tokens"):
        thinker.generate_with_reasoning("天?", passages=["sing"])


def test_a_request_does_not_depend_on_those_beside_it(thinker: Oriole) -> None:
    """Continuous batching: rows of other lengths halt at other steps, join and leave."""
    prompts = [thinker.tokenizer.encode(text) for text in ("两个黄鹂", "sing amid the green", "窗", "egrets 千秋")]
    requests = [
        (ids, Sampling(max_new_tokens=n, temperature=0.0)) for ids, n in zip(prompts, (9, 4, 12, 7), strict=True)
    ]
    together = sorted(Engine(thinker.model, max_batch=3).complete(requests))
    for request, done in zip(requests, together, strict=True):
        [alone] = Engine(thinker.model, max_batch=1).complete([request])
        assert alone.ids == done.ids
        assert [p.steps for p in alone.pondered] == [p.steps for p in done.pondered]
        torch.testing.assert_close(
            torch.tensor([p.confidence for p in alone.pondered]), torch.tensor([p.confidence for p in done.pondered]),
            atol=1e-4, rtol=1e-3,
        )  # fmt: skip
    assert len({p.steps for done in together for p in done.pondered}) > 1


def test_an_evaluation_says_how_far_confidence_can_be_trusted(thinker: Oriole, oriole: Oriole) -> None:
    asked = ("天?", "船?")
    questions = [{"messages": [{"role": "user", "content": text}], "answers": ["x"]} for text in asked]
    figures = evaluate_questions(thinker, questions)
    told = [thinker.generate_with_reasoning(text, temperature=0.0, max_new_tokens=64) for text in asked]
    steps = [step for one in told for step in one.steps]
    assert figures["reasoning"]["steps"] == pytest.approx(sum(steps) / len(steps), abs=1e-3)
    means = [float(torch.tensor(one.confidence, dtype=torch.float64).prod()) for one in told]
    assert figures["reasoning"]["ece"] == pytest.approx(sum(means) / 2, abs=1e-4)  # never right
    assert "reasoning" not in evaluate_questions(oriole, questions)
