"""Decoding speed of the engine: prefill, one user, many users.

python -m bench.decode preset=demo prompt=128 new=128 users=8
"""

import time

import torch
from rich.console import Console
from rich.table import Table

from bench.record import save, settings
from oriole.infer.engine import Engine
from oriole.infer.sample import Sampling
from oriole.model.config import preset
from oriole.model.lm import LM

DEFAULTS = {"preset": "demo", "prompt": 128, "new": 128, "users": 8, "runs": 3, "dtype": "float32", "json": ""}


def main() -> None:
    """Measure and print."""
    chosen = settings(DEFAULTS)
    shape = preset(str(chosen["preset"]))
    prompt, new, users = int(chosen["prompt"]), int(chosen["new"]), int(chosen["users"])
    torch.manual_seed(0)
    model = LM(shape).to(getattr(torch, str(chosen["dtype"]))).eval()
    result: dict[str, list[float]] = {"prefill": [], "one": [], "many": []}
    for _ in range(int(chosen["runs"])):
        result["prefill"].append(prompt / _seconds(model, 1, prompt, 1))
        result["one"].append(new / _seconds(model, 1, prompt, new))
        result["many"].append(users * new / _seconds(model, users, prompt, new))
    best = {name: max(rates) for name, rates in result.items()}
    save("decode", chosen, {"tokens_per_second": result}, str(chosen["json"]) or None)
    table = Table(title=f"{chosen['preset']}, prompt {prompt}, {new} new tokens, {chosen['dtype']}, cpu")
    table.add_column("")
    table.add_column("tokens/s", justify="right")
    table.add_row("prefill", f"{best['prefill']:,.0f}")
    table.add_row("one user, prefill included", f"{best['one']:,.0f}")
    table.add_row(f"{users} users in all, prefill included", f"{best['many']:,.0f}")
    Console().print(table)


def _seconds(model: LM, users: int, prompt: int, new: int) -> float:
    """Seconds for `users` requests of `prompt` tokens to be answered with `new` tokens each."""
    ids = torch.randint(16, model.config.vocab_size, (users, prompt)).tolist()
    sampling = Sampling(max_new_tokens=new, temperature=0.0, stop_ids=())
    start = time.perf_counter()
    Engine(model, max_batch=users).run([(row, sampling) for row in ids])
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
