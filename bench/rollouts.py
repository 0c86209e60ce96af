"""Answers of a rollout a second: the engine's batched decoding with a cache against a loop that has neither.

python -m bench.rollouts preset=demo prompts=16 group=8 prompt=24 new=32 runs=7

The naive loop is what small toolkits do: one prompt at a time, the whole sequence through the model again for every
token. Both draw the same ids from the same model with the same random numbers. `model=FOLDER` takes a trained model's
answers, which end when they end; without it every answer has `new` tokens.
"""

import statistics
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from bench.record import ratio, save, settings
from oriole.infer.sample import Sampling, sample
from oriole.model.config import preset
from oriole.model.folder import load_model
from oriole.model.lm import LM
from oriole.train.rollout import STOP, Written, generate

DEFAULTS = {
    "preset": "demo", "model": "", "prompts": 16, "group": 8, "prompt": 24, "new": 32, "runs": 7, "naive": 16,
    "json": "",
}  # fmt: skip


def main() -> None:
    """Measure and print. `naive`: so many of the answers are written by the naive loop, whose time is then scaled."""
    chosen = settings(DEFAULTS)
    torch.manual_seed(0)
    folder = str(chosen["model"])
    model = load_model(folder) if folder else LM(preset(str(chosen["preset"]))).eval()
    prompts, group, new = int(chosen["prompts"]), int(chosen["group"]), int(chosen["new"])
    rows = torch.randint(16, model.config.vocab_size, (prompts, int(chosen["prompt"]))).tolist()
    asked = [row for row in rows for _ in range(group)]
    stop = STOP if folder else ()
    how = [Sampling(new, temperature=1.0, top_k=0, top_p=1.0, stop_ids=stop, seed=i) for i in range(len(asked))]
    part = min(int(chosen["naive"]), len(asked))
    ours: list[float] = []
    theirs: list[float] = []
    tokens = 0
    for _ in range(int(chosen["runs"])):
        start = time.perf_counter()
        written = generate(model, asked, how, max_batch=len(asked), vocab_size=model.config.vocab_size)
        ours.append(time.perf_counter() - start)
        tokens = sum(len(one.ids) for one in written)
        start = time.perf_counter()
        slow = [naive(model, ids, one) for ids, one in zip(asked[:part], how[:part], strict=True)]
        share = sum(len(one.ids) for one in slow) / tokens
        theirs.append((time.perf_counter() - start) / share)
    alike = sum(a == b for a, b in zip(slow, written, strict=False)) / part
    result = {"engine_s": ours, "naive_s": theirs, "ratio": ratio(ours, theirs), "tokens": tokens, "alike": alike}
    save("rollouts", chosen, result, str(chosen["json"]) or None)
    table = Table(title=f"{len(asked)} answers, {tokens:,} tokens, {folder or chosen['preset']}, cpu")
    for name in ("", "tokens/s", "answers/s"):
        table.add_column(name, justify="right" if name else "left")
    for name, seconds in (("engine", statistics.median(ours)), ("naive loop", statistics.median(theirs))):
        table.add_row(name, f"{tokens / seconds:,.0f}", f"{len(asked) / seconds:,.1f}")
    Console().print(table)
    r = result["ratio"]
    print(f"{r['median']:.1f} times as fast ({r['low']:.1f} to {r['high']:.1f}); same answers: {alike:.0%} of {part}")


@torch.inference_mode()
def naive(model: LM, prompt: Sequence[int], how: Sampling) -> Written:
    """One answer, every token of it from a forward pass over the whole sequence."""
    generator = torch.Generator()
    generator.manual_seed(how.seed or 0)
    ids = list(prompt)
    while len(ids) - len(prompt) < how.max_new_tokens:
        logits = model.head("logits", model(torch.tensor([ids])).h[:, -1])
        ids.append(int(sample(logits, [how], [ids], [generator])[0]))
        if ids[-1] in how.stop_ids:
            return Written(ids[len(prompt) :], True)
    return Written(ids[len(prompt) :], False)


if __name__ == "__main__":
    main()
