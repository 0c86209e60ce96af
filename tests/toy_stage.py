"""A whole run, pretraining and fine-tuning, small enough to take a second; and processes that run it, quick to start.

The processes are forked from a server that has imported everything already: they are whole processes of their own, with
signals, locks and exit codes, and are there in milliseconds.
"""

import hashlib
import json
import multiprocessing
import os
import sys
import threading
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from oriole.config import to_toml, validate
from oriole.train.recipe import Recipe

ZH = "春天来了，柳树发芽，两只黄鹂在枝头唱歌。小河的冰化了，孩子们在河边放风筝。"
EN = "Spring has come. Two orioles sing in the willow, and the children fly kites by the river. "
SHAPE = {"vocab_size": 300, "dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
         "ffn_dim": 48, "context": 64}  # fmt: skip


def write_data(folder: Path) -> Path:
    """A few kilobytes of text in both languages, and conversations."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "zh.txt").write_text("\n".join(f"{i}：{ZH[i % 9 :]}" for i in range(80)), encoding="utf-8")
    (folder / "en.txt").write_text("\n".join(f"{i}. {EN[i % 13 :]}" for i in range(80)), encoding="utf-8")
    chats = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{EN[i % 30 :]}"}]}
             for i in range(80)]  # fmt: skip
    (folder / "chat.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats), encoding="utf-8")
    return folder


def recipe(stage: str, data: Path, run: Path, **train: Any) -> Recipe:
    """One stage on the data of `write_data`; `train` are keys of the table [train], or other tables by name."""
    parts = {name: {"files": [f"{name}.txt"], "val": [f"{name}.txt"]} for name in ("zh", "en")}
    if stage == "sft":
        parts = {"chat": {"files": ["chat.jsonl"], "val": ["chat.jsonl"]}}
    table: dict[str, Any] = {
        "stage": stage, "run": run, "data": str(data), "model": SHAPE, "parts": parts,
        "tokenizer": {"vocab_size": 300},
        "train": {"tokens": 2 * 2 * 32 * 20, "batch_size": 2, "length": 32, "accumulate": 2, "dropout": 0.1,
                  "compile": False, "device": "cpu", "dtype": "fp32"},
        "checkpoint": {"every": 1},
        "eval": {"tokens": 256, "every": 7, "prompts": ["春"]},
    }  # fmt: skip
    tables = {key: train.pop(key) for key in list(train) if isinstance(train[key], dict) and key != "train"}
    for name, values in {**tables, "train": train}.items():
        table[name] = table.get(name, {}) | values
    return validate(Recipe, table, "toy")


def write_recipes(folder: Path, data: Path, run: Path, **train: Any) -> Path:
    """The folder with pretrain.toml and sft.toml that `oriole run` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in ("pretrain", "sft"):
        (folder / f"{stage}.toml").write_text(to_toml(recipe(stage, data, run, **train)), encoding="utf-8")
    return folder


def hashes(run: Path) -> dict[str, str]:
    """sha256 of every stage's weights."""
    return {
        stage: hashlib.sha256((run / stage / "model" / "model.safetensors").read_bytes()).hexdigest()
        for stage in ("pretrain", "sft")
    }


def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["oriole.train.stage", "oriole.apps.report", "oriole.cli", "torch._dynamo"])
    return context


def oriole(words: list[str], log: Path, *, hung_disk: bool = False) -> BaseProcess:
    """`oriole words…` in a process of its own, which is running now; what it says goes to the file `log`.

    With a `hung_disk` no checkpoint ever gets written to its end.
    """
    process = _server().Process(target=_main, args=(words, str(log), hung_disk))
    process.start()
    return process


def _main(words: list[str], log: str, hung_disk: bool) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.argv = ["oriole", *words]
    import torch

    from oriole.cli import main

    torch.set_num_threads(1)
    if hung_disk:
        from oriole.train import checkpoint

        sync, main_thread = checkpoint._sync, threading.main_thread()
        hang = threading.Event().wait
        checkpoint._sync = lambda path: sync(path) if threading.current_thread() is main_thread else hang()
    main()
