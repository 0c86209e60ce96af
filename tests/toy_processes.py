"""What each of the processes of test_parallel.py does: `torchrun toy_processes.py SCENARIO FOLDER`."""

import json
import os
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from toy_training import SHAPE, VOCAB, Counting, Records, digest, model, trainer

from oriole.config import validate
from oriole.errors import ConfigError, Interrupted, OrioleError, PeerFailed
from oriole.model.costs import OptimizerName
from oriole.model.deepconfig import DeepConfig
from oriole.model.lm import LM
from oriole.model.seq2seq import Seq2Seq
from oriole.model.seq2seqconfig import Seq2SeqConfig
from oriole.train import dist
from oriole.train.batch import Batch, Packer
from oriole.train.loop import Trainer
from oriole.train.objectives import LMObjective, Loss
from oriole.train.optim import OptimConfig
from oriole.train.recipe import Recipe
from oriole.train.seq2seq import Seq2SeqObjective
from oriole.train.seq2seqdata import Pair, PairStream, Seq2SeqPacker
from oriole.train.stage import run_stage

STEPS = 20


class Uneven(Counting):
    """Every other document is hardly trained on, so that the processes' weights differ."""

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = super().__next__()
        return ids % VOCAB, mask if self.given % 2 else np.eye(1, len(ids), 1, dtype=np.uint8)[0]


class Signals(Packer):
    """The process of that number gets a signal while it fetches the batches of one step."""

    def __init__(self, step: int, rank: int) -> None:
        super().__init__(Uneven(), 4, 32)
        self.left = step if dist.rank() == rank else -1

    def __next__(self) -> Batch:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), 15)
        return super().__next__()


class Broken(LMObjective):
    """The second step gives NaN in one process."""

    calls = 0

    def __call__(self, lm: LM, batch: Batch) -> Loss:
        self.calls += 1
        loss = super().__call__(lm, batch)
        return Loss(loss.sum * float("nan"), {}) if self.calls == 2 and dist.rank() == 1 else loss


class Fails(LMObjective):
    """One process fails in its third step, with an error of Oriole's or with its own."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.calls = error, 0

    def __call__(self, lm: LM, batch: Batch) -> Loss:
        self.calls += 1
        if self.calls == 3 and dist.rank() == 1:
            raise self.error
        return super().__call__(lm, batch)


class Pairs:
    """Sources and targets of uneven length, which say the source again."""

    def __init__(self) -> None:
        self.given = 0

    def __next__(self) -> list[Pair]:
        rng = np.random.default_rng(self.given)
        self.given += 1
        source = rng.integers(16, VOCAB, int(rng.integers(3, 12))).tolist()
        return [(source, [*source[: int(rng.integers(1, 9))], 2])]

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}


def packed_pairs() -> Seq2SeqPacker:
    return Seq2SeqPacker(cast(PairStream, Pairs()), 4, 24, 16)


def make(folder: Path, *, kind: OptimizerName = "adamw", more: dict[str, Any] | None = None, **config: Any) -> Trainer:
    """A trainer whose step has 16 rows, on uneven data, without dropout unless it is asked for."""
    optim = OptimConfig(lr=1e-2, kind=kind, cautious=kind == "normuon")
    more = {"data": Packer(Uneven(), 4, 32), "optim": optim} | (more or {})
    return trainer(folder, **({"steps": STEPS, "accumulate": 4, "log_every": 1, "dropout": 0.0} | config), more=more)


def experts(folder: Path, **config: Any) -> Trainer:
    """A trainer of a mixture of experts, balanced by the load in all micro-batches of a step."""
    moe = {"experts": 5, "active": 2, "ffn_dim": 24, "balance": "bias", "balance_weight": 0.01}
    torch.manual_seed(1)
    lm = LM(SHAPE.model_validate(SHAPE.model_dump() | {"pattern": "Ge", "moe": moe}))
    return make(folder, kind="normuon", lm=lm, **config)


def option(name: str, folder: Path, **config: Any) -> Trainer:
    """A trainer of a model that has many of the options at once."""
    torch.manual_seed(1)
    lm: LM | Seq2Seq
    more: dict[str, Any] = {}
    match name:
        case "layers":  # gates, temperatures, residual scales, experts, a supervised depth, a further token
            moe = {"experts": 5, "active": 2, "ffn_dim": 24, "shared_ffn_dim": 16, "balance": "bias"}
            lm = LM(SHAPE.model_validate(SHAPE.model_dump() | {"pattern": "GcsrLgtze", "window": 8, "moe": moe}))
            lm.supervise(DeepConfig(depths=(1,), tokens_ahead=2), seed=2)
        case "latent":
            reasoning = {"steps": 3, "layers": 2, "step_embedding": True}
            lm = LM(SHAPE.model_validate(SHAPE.model_dump() | {"pattern": "GcrL", "reasoning": reasoning}))
        case _:
            table = {"vocab_size": VOCAB, "dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_heads": 4}
            lm = Seq2Seq(Seq2SeqConfig.model_validate(table | {"ffn_dim": 48, "positions": "relative"}))
            more = {"objective": Seq2SeqObjective(0.1), "data": packed_pairs()}
    return make(folder, lm=lm, more=more, **({"steps": 8} | config))


OPTIONS = ("layers", "latent", "seq2seq")


def losses(made: Trainer) -> list[float]:
    assert isinstance(made.metrics, Records)
    return [record["loss"] for record in made.metrics.of("step")]


def weights(made: Trainer) -> str:
    with made.parallel.gathered():
        return digest(LM_of(made))


def LM_of(made: Trainer) -> torch.nn.Module:
    plain = torch.nn.Module()
    for name, tensor in plain_weights(made).items():
        plain.register_buffer(name.replace(".", "/"), tensor)
    return plain


def plain_weights(made: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}


def half(folder: Path, **config: Any) -> list[float]:
    """Ten steps, then a signal."""
    first = make(folder, more={"data": Signals(4 * 9 + 1, 1)}, **config)
    try:
        first.fit()
    except Interrupted as stopped:
        assert stopped.exit_code == 143
    else:
        raise AssertionError("the signal was not heeded")
    return losses(first)


def trajectories(folder: Path) -> dict[str, Any]:
    """20 steps whole, and 10 and 10 in all combinations, also from a checkpoint `one` of a single process."""
    found: dict[str, Any] = {}
    for kind in ("ddp", "fsdp"):
        made = make(folder / kind, parallel=kind)
        made.fit()
        found[kind] = losses(made)
        other = "fsdp" if kind == "ddp" else "ddp"
        found[f"{kind}+{other}"] = half(folder / f"{kind}-half", parallel=kind)
        second = make(folder / f"{kind}-half", parallel=other)
        second.fit()
        found[f"{kind}+{other}"] += losses(second)
        of_one = make(folder / kind / "again", parallel=kind, resume=str(folder / "one" / "checkpoints" / "step-10"))
        of_one.fit()
        found[f"one+{kind}"] = losses(of_one)
        found[f"normuon {kind}+{other}"] = half(folder / f"normuon-{kind}", kind="normuon", parallel=kind)
        third = make(folder / f"normuon-{kind}", kind="normuon", parallel=other)
        third.fit()
        found[f"normuon {kind}+{other}"] += losses(third)
        for name in OPTIONS:
            optional = option(name, folder / f"{name}-{kind}", parallel=kind)
            optional.fit()
            found[f"{name} {kind}"] = losses(optional)
            with optional.parallel.gathered():
                if dist.rank() == 0:
                    save_file(plain_weights(optional), folder / f"{name}-{kind}.safetensors")
        mixture = experts(folder / f"experts-{kind}", parallel=kind)
        mixture.fit()
        found[f"experts {kind}"] = losses(mixture)
    return found


def behaviour(folder: Path) -> dict[str, Any]:
    """Dropout that is resumed, rows that are cut, NaN in one process."""
    found: dict[str, Any] = {}
    for kind in ("ddp", "fsdp"):
        whole = make(folder / kind, parallel=kind, dropout=0.1, accumulate=1)
        whole.fit()
        found[f"{kind} drawn"] = torch.rand(()).item()
        broken = make(folder / f"{kind}-2", parallel=kind, dropout=0.1, accumulate=1, more={"data": Signals(8, 0)})
        try:
            broken.fit()
        except Interrupted:
            found[f"{kind} stopped"] = broken.now.step
        second = make(folder / f"{kind}-2", parallel=kind, dropout=0.1, accumulate=1)
        second.fit()
        found[f"{kind} dropout"] = [weights(whole), weights(second)]

        nan = make(folder / f"{kind}-nan", parallel=kind, accumulate=2, steps=6, more={"objective": Broken()})
        found[f"{kind} skipped"] = nan.fit()["skipped"]
        found[f"{kind} nan"] = [r["loss"] for r in nan.metrics.of("step")]  # type: ignore[attr-defined]
        found[f"{kind} weights"] = weights(nan)
    try:
        make(folder / "odd", more={"data": Packer(Uneven(), 3, 32)}, accumulate=1).fit()
    except ConfigError as error:
        found["odd"] = str(error)
    return found


def compiled(folder: Path) -> dict[str, Any]:
    """Both kinds through torch.compile, with an evaluation in between that calls the plain model."""
    found: dict[str, Any] = {}
    tokens = torch.arange(40).view(2, 20) % VOCAB
    for kind in ("ddp", "fsdp"):
        lm = model()

        def evaluate(step: int, lm: LM = lm) -> dict[str, Any]:
            with torch.inference_mode():
                return {"bpb": {"en": float(lm(tokens).h.square().mean())}}

        made = make(
            folder / kind, parallel=kind, compile=True, steps=8, eval_every=4, more={"evaluate": evaluate}, lm=lm
        )
        made.fit()
        found[kind] = losses(made)
        found[f"{kind} compiled"] = made.gradients.compiled
        found[f"{kind} evaluations"] = [r["bpb"]["en"] for r in made.metrics.of("eval")]  # type: ignore[attr-defined]
    return found


def preferences(folder: Path) -> dict[str, Any]:
    """The stages whose recipes lie in the folder as JSON; what each ended with."""
    out: dict[str, Any] = {}
    for stage in ("reward", "dpo", "grpo", "ppo"):
        table = json.loads((folder / f"{stage}.json").read_text())
        done = run_stage(validate(Recipe, table, "toy"))
        out[stage] = {key: done[key] for key in ("steps", "tokens", "loss") if key in done}
    return out


def fails(folder: Path) -> dict[str, Any]:
    make(folder, more={"objective": Fails(OrioleError("the disk of this machine is on fire"))}).fit()
    return {}


def crashes(folder: Path) -> dict[str, Any]:
    make(folder, parallel="fsdp", more={"objective": Fails(ValueError("a fault of our own"))}).fit()
    return {}


if __name__ == "__main__":
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    try:
        with dist.started("cpu"):
            rank = dist.rank()
            found = globals()[scenario](folder)
    except PeerFailed as error:
        print(f"peer: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OrioleError as error:
        print(f"own: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
