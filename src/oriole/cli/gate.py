"""After a preference stage: is it better than its parent? What says so is written beside the stage, and said aloud."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from oriole.apps.api import Generation, Oriole, Placement
from oriole.apps.evaluate import read_questions
from oriole.apps.gate import Score, answer_all, choose, compare, fitting, reward_score
from oriole.apps.gatereport import MANY
from oriole.config import read_toml, validate
from oriole.errors import DataError
from oriole.log import Metrics, last_record, say
from oriole.text.clean import language
from oriole.text.formats import Skipped, expand, read_chats, read_prompts
from oriole.text.shards import held_out
from oriole.text.template import Message, message_dict
from oriole.train.recipe import Recipe
from oriole.train.tables import GateTable

__all__ = ["STAGES", "after_stage", "against"]

STAGES: tuple[str, ...] = ("dpo", "ppo", "grpo")
"""The stages that are compared with their parents."""


def after_stage(recipe: Recipe) -> None:
    """Compare the stage with its parent, once for the same settings, and say what comes of it.

    The figures become the last record of the stage's metrics.jsonl, every prompt with both answers a line of its
    gate.jsonl.
    """
    if recipe.stage not in STAGES or not recipe.gate.prompts:
        return
    path = recipe.folder / "metrics.jsonl"
    settings = recipe.gate.model_dump(mode="json")
    found = last_record(path, "gate", after="done")
    if found.get("settings") != settings:
        found = {"event": "gate", "settings": settings, **_compare(recipe, last_record(path, "done"))}
        metrics = Metrics(path)
        metrics.write(found)
        metrics.close()
    style = {"better": "green", "worse": "red"}.get(found["verdict"], "yellow")
    say(f"{recipe.stage} against {found['parent']}: {found['verdict']} ({found['why']})", style)
    if found["verdict"] == "worse":
        say(f"{recipe.run} keeps {found['parent']}: later stages start from it, and so does oriole chat", style)


def _compare(recipe: Recipe, done: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the comparison, without event and settings; writes gate.jsonl."""
    table = recipe.gate
    folder = recipe.run / _parent(recipe)
    stage, parent = (
        Oriole(one).place(Placement(device=recipe.train.device)) for one in (recipe.folder / "model", folder)
    )
    how = Generation(temperature=table.temperature, max_new_tokens=table.max_new_tokens, seed=0)
    prompts = choose(fitting(stage, choose(_prompts(recipe), 2 * table.prompts), how), table.prompts)
    if not prompts:
        raise DataError(
            f"the gate after {recipe.stage} has no held-out prompts that fit into the model's context; name files of "
            "them (gate.files), or leave it out with gate.prompts=0"
        )
    if len(prompts) < min(MANY, table.prompts):
        say(f"only {len(prompts):,} held-out prompts to compare by; a small difference will not be seen", "yellow")
    judge = table.reward_model or recipe.run / "reward" / "model"
    bits = done.get("bpb_before"), done.get("bpb")
    figures, rows = compare(
        prompts,
        answer_all(parent, prompts, how),
        answer_all(stage, prompts, how),
        reward=_reward(judge, stage) if table.reward_model or judge.exists() else None,
        bpb=(bits[0], bits[1]) if bits[0] and bits[1] else None,
        max_bpb_rise=table.max_bpb_rise,
    )
    with (recipe.folder / "gate.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return {"parent": folder.parent.name if folder.name == "model" else str(folder), **figures}


def _reward(folder: Path, stage: Oriole) -> Score:
    return reward_score(folder, stage.tokenizer, stage.model.embedding.weight.device)


def against(stage: Path, parent: Path, questions: Path, reward_model: Path | None) -> dict[str, Any]:
    """The same comparison of any two models, on a file of questions: `oriole eval STAGE against=PARENT`."""
    one, other = Oriole(stage), Oriole(parent)
    table = GateTable()
    how = Generation(temperature=table.temperature, max_new_tokens=table.max_new_tokens, seed=0)
    prompts = fitting(one, read_questions(questions), how)
    said = [answer_all(model, prompts, how) for model in (other, one)]
    reward = _reward(reward_model, one) if reward_model is not None else None
    figures, _ = compare(prompts, said[0], said[1], reward=reward)
    return {"parent": str(parent), **figures}


def _parent(recipe: Recipe) -> str:
    """What the stage was trained from, as env.json says."""
    parent = json.loads((recipe.folder / "env.json").read_text(encoding="utf-8")).get("parent")
    if not parent:
        raise DataError(f"{recipe.folder}/env.json names no parent to compare with; leave the gate out: gate.prompts=0")
    return str(parent)


# --- prompts ---------------------------------------------------------------------------------------------------------


def _prompts(recipe: Recipe) -> list[dict[str, Any]]:
    """What neither the stage nor the run's fine-tuning was trained on, as questions.

    They are those of the files that the recipe names, else those that the stage's parts hold out and, where these are
    few, those of the chats that sft has held out.
    """
    root = Path(recipe.data)
    globs = recipe.gate.files or ([recipe.eval.questions] if recipe.eval.questions else [])
    if globs:
        return [question for path in expand(globs, root) for question in read_questions(path)]
    out = [*_of_parts(recipe, root)]
    path = recipe.run / "sft" / "recipe.toml"
    if len({str(q["messages"]) for q in out}) < recipe.gate.prompts and path.exists():
        sft = validate(Recipe, read_toml(path), str(path))
        if Path(sft.data).is_dir():
            out += _of_chats(sft, Path(sft.data))
    return out


def _of_parts(recipe: Recipe, root: Path) -> Iterator[dict[str, Any]]:
    """The prompts that the stage's parts hold out; the chosen answer of a pair is not the only right one."""
    skipped = Skipped() if recipe.skip_bad else None
    for part in recipe.parts.values():
        if (kind := recipe.format_of(part)) in ("preference", "prompt"):
            for prompt in read_prompts(expand(part.val or part.files, root), skip_bad=skipped):
                if part.val or held_out(_key(prompt.messages), recipe.eval.holdout_pairs):
                    known = prompt.answers if kind == "prompt" else ()
                    yield from _question(prompt.messages, prompt.source, prompt.lang, known)


def _of_chats(recipe: Recipe, root: Path) -> Iterator[dict[str, Any]]:
    skipped = Skipped() if recipe.skip_bad else None
    for part in recipe.parts.values():
        if recipe.format_of(part) == "chat" and part.shards is None:
            for chat in read_chats(expand(part.val or part.files, root), skip_bad=skipped):
                if not chat.tools and (part.val or held_out(_key(chat.messages), recipe.eval.holdout)):
                    yield from _question(chat.messages[:-1], chat.source, chat.lang)


def _key(messages: Sequence[Message]) -> str:
    """By what a conversation is held out, in every stage."""
    return "\x00".join(m.content for m in messages)


def _question(
    messages: Sequence[Message], source: str, lang: str, known: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """The conversation as a question with the answers that are known, if it is one in plain text."""
    if messages and messages[-1].role == "user" and not any(m.tool_calls for m in messages):
        asked = [message_dict(m) for m in messages]
        lang = lang or language(messages[-1].content)
        yield {"kind": source, "lang": lang, "messages": asked, "answers": list(known)}
