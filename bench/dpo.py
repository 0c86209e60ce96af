"""A DPO step beside TRL's DPOTrainer: the same pairs, non-padding tokens a second and peak memory.

    .venv-peers/bin/python -m bench.dpo preset=26m pairs=32 batch=8
    .venv-peers/bin/python -m bench.dpo file=DATA/preference_zh.jsonl.xz tokenizer=runs/26m/tokenizer

A step is an optimizer step on `pairs` pairs: ours packed into rows of `row` positions, TRL's padded, `batch` pairs at a
time, as its collator does it. The policy starts from the same weights and is updated by fused AdamW in bf16 autocast on
every side; TRL's gradient checkpointing and our `recompute` are on or off together. All sides take turns in one
process; peak memory is the median of three processes of their own for each. Reference log-probs that are computed
beforehand are not timed on either side. Needs TRL: `make test-peers` makes the environment.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.record import ratio, save, settings
from oriole.model.config import ModelConfig, preset
from oriole.model.folder import load_model, save_model
from oriole.model.lm import LM
from oriole.text.formats import read_preferences
from oriole.text.tokenizer import Tokenizer, train_tokenizer
from oriole.train.batch import IGNORE, Batch, BestFit, Rows
from oriole.train.device import choose_dtype
from oriole.train.dpo import REFERENCE, DPOObjective
from oriole.train.optim import OptimConfig, Optimizer
from oriole.train.pairs import encode_pairs
from oriole.train.tables import DPOTable

DEFAULTS: dict[str, Any] = {
    "preset": "26m", "pairs": 32, "batch": 8, "row": 1024, "steps": 7, "seed": 0, "compile": False, "recompute": False,
    "file": "", "tokenizer": "", "json": "", "only": "",
}  # fmt: skip
SIDES = ("oriole", "trl", "trl precomputed")
BETA = 0.1

Pair = dict[str, list[int]]
"""prompt_ids, chosen_ids, rejected_ids: what TRL's collator takes."""


def main() -> None:
    chosen = settings(DEFAULTS)
    if chosen["only"]:
        print(json.dumps({"peak_memory_bytes": _alone(chosen)}))
        return
    pairs, shape = _pairs(chosen)
    tokens = sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs)
    # Before this process grows: beside a large one the same step came out up to a third larger.
    memory = _memory()
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        steps = {side: _side(side, chosen, pairs, shape, Path(scratch)) for side in SIDES}
        for step in steps.values():
            step(), step()
        for _ in range(int(chosen["steps"])):
            for side, step in steps.items():
                start = time.perf_counter()
                step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[side].append(time.perf_counter() - start)
    result = {
        "seconds": seconds,
        "tokens_per_step": tokens,
        "positions": {"oriole": _rows_of(pairs, chosen) * int(chosen["row"]), "trl": _padded(pairs, chosen)},
        "tokens_per_second": {side: tokens / statistics.median(samples) for side, samples in seconds.items()},
        "peak_memory_bytes": {side: statistics.median(samples) for side, samples in memory.items()},
        "peak_memory_samples": memory,
        "ratio": {side: ratio(seconds["oriole"], seconds[side]) for side in SIDES[1:]},
        "memory_ratio": {side: ratio(memory[side], memory["oriole"]) for side in SIDES[1:]},
        "trl": _version(),
    }
    save("dpo", chosen, result, str(chosen["json"]) or None)
    _show(result, chosen)


def _show(result: dict[str, Any], chosen: dict[str, Any]) -> None:
    table = Table(
        title=f"DPO, {chosen['preset']}, {chosen['pairs']} pairs a step, {result['tokens_per_step']:,} tokens"
    )
    for column in ("", "ms a step", "non-padding tokens/s", "peak memory, MB", "Oriole is faster", "of its memory"):
        table.add_column(column, justify="right" if column else "left")
    for side, samples in result["seconds"].items():
        faster, memory = result["ratio"].get(side), result["memory_ratio"].get(side)
        table.add_row(
            side,
            f"{1e3 * statistics.median(samples):.0f}",
            f"{result['tokens_per_second'][side]:,.0f}",
            f"{result['peak_memory_bytes'][side] / 1e6:,.0f}",
            f"{faster['median']:.2f} ({faster['low']:.2f} … {faster['high']:.2f})" if faster else "",
            f"{memory['median']:.2f} ({memory['low']:.2f} … {memory['high']:.2f})" if memory else "",
        )
    Console().print(table)
    where = result["positions"]
    Console().print(f"positions computed: {where['oriole']:,} packed, {where['trl']:,} padded (TRL {result['trl']})")


# --- the pairs -------------------------------------------------------------------------------------------------------


def _pairs(chosen: dict[str, Any]) -> tuple[list[Pair], ModelConfig]:
    """The pairs of a step, the same for all sides, from a file of preferences or of made-up lengths."""
    shape, count = preset(str(chosen["preset"])), int(chosen["pairs"])
    rng = np.random.default_rng(int(chosen["seed"]))
    if not chosen["file"]:
        # Prompts of about 50 tokens and answers of about 120, some of them several times as long.
        lengths = np.exp(rng.normal([3.7, 4.5, 4.5], [0.6, 0.7, 0.7], (count, 3))).astype(int)
        lengths = lengths.clip(4, int(chosen["row"]) // 4)
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        ids = [
            {n: rng.integers(16, shape.vocab_size, k).tolist() for n, k in zip(names, row, strict=True)}
            for row in lengths
        ]
        return ids, shape
    tok = Tokenizer.load(str(chosen["tokenizer"]))
    read = read_preferences(str(chosen["file"]))
    rows = encode_pairs(read, tok, row=int(chosen["row"]), context=shape.context, cut=True, left_out=Counter())
    out: list[Pair] = []
    sides = [(list(ids), list(mask or ())) for ids, mask, _ in rows]
    for k in rng.permutation(len(sides) // 2)[:count]:
        (better, mask), (worse, _) = sides[2 * k], sides[2 * k + 1]
        start = mask.index(1)
        out.append({"prompt_ids": better[:start], "chosen_ids": better[start:], "rejected_ids": worse[start:]})
    return out, shape.model_copy(update={"vocab_size": tok.vocab_size})


def _packed(pairs: list[Pair], chosen: dict[str, Any]) -> list[list[Pair]]:
    room: BestFit[Pair] = BestFit()
    for pair in pairs:
        room.add(2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) - 2, pair)
    rows = []
    while room.tokens:
        rows.append(list(room.row(int(chosen["row"]))))
    return rows


def _rows_of(pairs: list[Pair], chosen: dict[str, Any]) -> int:
    return len(_packed(pairs, chosen))


def _padded(pairs: list[Pair], chosen: dict[str, Any]) -> int:
    total = 0
    for group in _groups(pairs, int(chosen["batch"])):
        longest = max(len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in group)
        total += 2 * len(group) * longest
    return total


def _groups(pairs: list[Any], size: int) -> Iterable[list[Any]]:
    return (pairs[start : start + size] for start in range(0, len(pairs), size))


# --- the sides -------------------------------------------------------------------------------------------------------


def _side(
    side: str, chosen: dict[str, Any], pairs: list[Pair], shape: ModelConfig, scratch: Path
) -> Callable[[], None]:
    folder = scratch / "model"
    if not folder.exists():
        torch.manual_seed(0)
        save_model(LM(shape), folder, chat=True)
        train_tokenizer([("en", "two orioles sing in the green willows")], 272).save(folder, chat=True)
    if side == "oriole":
        return _oriole(chosen, pairs, folder)
    return _trl(chosen, pairs, folder, scratch / side.replace(" ", "-"), precomputed=side != "trl")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _oriole(chosen: dict[str, Any], pairs: list[Pair], folder: Path) -> Callable[[], None]:
    device, length = _device(), int(chosen["row"])
    dtype, _ = choose_dtype(device, "bf16")
    model = load_model(folder, device).train()
    model.recompute = bool(chosen["recompute"])
    call = torch.compile(model) if chosen["compile"] else model
    objective = DPOObjective(DPOTable(beta=BETA))
    # As many positions at a time as TRL has in a batch of its pairs.
    rows = _packed(pairs, chosen)
    at_once = max(1, round(len(rows) * int(chosen["batch"]) / len(pairs)))
    batches = [_batch(group, length).to(device) for group in _groups(rows, at_once)]
    optimizer = Optimizer(model, OptimConfig(lr=1e-6), 1_000_000)

    def step() -> None:
        total = torch.zeros((), device=device)
        for batch in batches:
            with torch.autocast(device.type, dtype):
                loss = objective(call, batch).sum / len(pairs)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        optimizer.step(1, total)

    return step


def _batch(rows: list[list[Pair]], length: int) -> Batch:
    made = Rows(len(rows), length)
    known = np.zeros((len(rows), length), np.float32)
    for number, held in enumerate(rows):
        for pair in held:
            for which in ("chosen_ids", "rejected_ids"):
                ids = np.array(pair["prompt_ids"] + pair[which])
                targets = np.where(np.arange(1, len(ids)) >= len(pair["prompt_ids"]), ids[1:], IGNORE)
                known[number, made.add(number, ids[:-1], targets).stop - 1] = -50.0
    return made.batch({REFERENCE: known})


def _trl(
    chosen: dict[str, Any], pairs: list[Pair], folder: Path, scratch: Path, *, precomputed: bool
) -> Callable[[], None]:
    try:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise SystemExit(f"this case needs TRL ({error}); `make test-peers` makes an environment with it") from error

    class Ready(DPOTrainer):  # type: ignore[misc]
        """Its data is ids already."""

        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset

    device = _device()
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = None if precomputed else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    args = DPOConfig(
        output_dir=str(scratch), beta=BETA, bf16=True, use_cpu=device.type == "cpu", report_to="none",
        gradient_checkpointing=bool(chosen["recompute"]), per_device_train_batch_size=int(chosen["batch"]),
        precompute_ref_log_probs=precomputed, learning_rate=1e-6, optim="adamw_torch_fused", disable_tqdm=True,
    )  # fmt: skip
    trainer = Ready(
        policy, reference, args=args, train_dataset=Dataset.from_list(pairs),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
    )  # fmt: skip
    rows = [trainer.train_dataset[i] for i in range(len(pairs))]
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    model = trainer.model.train().to(device)
    if chosen["recompute"]:  # the trainer would do so at the start of train()
        model.gradient_checkpointing_enable()

    def step() -> None:
        for group in _groups(rows, int(chosen["batch"])):
            inputs = {k: v.to(device) for k, v in trainer.data_collator(group).items()}
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(model, inputs) * (len(group) / len(rows))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _version() -> str:
    from importlib.metadata import version

    return version("trl")


# --- memory ----------------------------------------------------------------------------------------------------------


def _memory() -> dict[str, list[float]]:
    """Peak bytes of three steps of each side in processes of their own, beyond what these had after their imports."""
    words = [word for word in sys.argv[1:] if not word.startswith(("json=", "only="))]
    out: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(3):
        for side, samples in out.items():
            command = [sys.executable, "-m", "bench.dpo", *words, f"only={side}"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            samples.append(float(json.loads(said.strip().splitlines()[-1])["peak_memory_bytes"]))
    return out


def _alone(chosen: dict[str, Any]) -> int:
    side = str(chosen["only"])
    if side != "oriole":
        from trl import DPOTrainer  # noqa: F401
    if not torch.cuda.is_available():
        before = _status("VmRSS:")
    with tempfile.TemporaryDirectory() as scratch:
        pairs, shape = _pairs(chosen)
        step = _side(side, chosen, pairs, shape, Path(scratch))
        step(), step(), step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM:") - before


def _status(name: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(name)[1].split()[0])


if __name__ == "__main__":
    main()
