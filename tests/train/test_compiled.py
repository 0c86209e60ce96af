"""A compiled training step is one graph, made once, with the loss and the gradients of the plain one.

The short form stops before code is generated; `make soak` has the real compiler, which takes most of a minute a model.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from toy_processes import Uneven, packed_pairs
from toy_training import SHAPE, VOCAB

from oriole.model.deepconfig import DeepConfig
from oriole.model.lm import LM
from oriole.model.seq2seq import Seq2Seq
from oriole.model.seq2seqconfig import SEQ2SEQ_PRESETS
from oriole.train.batch import Batch, Packer
from oriole.train.objectives import LMObjective
from oriole.train.seq2seq import Seq2SeqObjective

# torch.compile's own imports
pytestmark = [pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning"), pytest.mark.timeout(900)]

Made = tuple[LM | Seq2Seq, LMObjective | Seq2SeqObjective, Iterator[Batch]]


def pairs(preset: str, **more: Any) -> Made:
    small = {"vocab_size": VOCAB, "dim": 32, "num_heads": 4, "ffn_dim": 48, "encoder_layers": 1, "decoder_layers": 1}
    config = SEQ2SEQ_PRESETS[preset].model_copy(update=small | {"context": 64} | more)
    return Seq2Seq(config), Seq2SeqObjective(0.1), packed_pairs()


def text(**changes: Any) -> Made:
    shape = SHAPE.model_validate(SHAPE.model_dump() | {"context": 256} | changes)
    return LM(shape), LMObjective(), Packer(Uneven(), 2, 256 if "window" in changes else 32)


def supervised() -> Made:
    made = text(pattern="GcsrGgtz")
    assert isinstance(made[0], LM)
    made[0].supervise(DeepConfig(depths=(1,), tokens_ahead=2), 0)
    return made


MODELS: dict[str, Callable[[], Made]] = {
    "modern": lambda: pairs("demo"),
    "classic": lambda: pairs("classic"),
    "relative": lambda: pairs("demo", positions="relative"),
    "window": lambda: text(pattern="LG", window=24),
    "windows": lambda: text(pattern="LLLG", num_layers=4, window=24),
    "layers": supervised,
    "latent": lambda: text(reasoning={"steps": 2}),
}


def check(name: str, backend: str, graphs: int) -> None:
    """Three batches, one after the other, through the compiled model and the plain one."""
    torch.manual_seed(0)
    model, objective, batches = MODELS[name]()
    torch.compiler.reset()
    counters.clear()
    run = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    plain = type(objective)(0.1) if isinstance(objective, Seq2SeqObjective) else LMObjective()
    if backend == "inductor":
        objective.compile()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in islice(batches, 3):
            found = []
            for loss, call in ((plain, model), (objective, run)):
                model.zero_grad()
                value = loss(call, batch).sum
                value.backward()
                found.append(
                    (value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
                )
            (expected, by_plain), (value, by_compiled) = found
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-3)
            assert by_plain.keys() == by_compiled.keys() == dict(model.named_parameters()).keys()
            for parameter, gradient in by_plain.items():
                size = float(gradient.abs().max())
                torch.testing.assert_close(by_compiled[parameter], gradient, rtol=1e-3, atol=1e-4 * size, msg=parameter)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


@pytest.mark.parametrize("name", ["modern", "classic", "window"])
def test_a_step_is_one_graph_for_all_batches(name: str) -> None:
    check(name, "aot_eager", 1)


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in MODELS if name != "window"])
def test_a_step_of_the_real_compiler_is_the_plain_step(name: str) -> None:
    check(name, "inductor", 2)  # the model, and the loss in chunks
