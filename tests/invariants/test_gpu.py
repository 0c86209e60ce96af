"""What a GPU computes is what the fp32 reference on the CPU computes: every option, cached, compiled.

Run by `make test` where torch sees a GPU; `make bench-gpu` has the figures.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_processes import packed_pairs
from toy_training import Counting, Records, StopsInCall, digest, model, trainer

from oriole.errors import Interrupted
from oriole.infer.engine import Engine
from oriole.infer.sample import Sampling
from oriole.model.attention import Backend, attend, mask_for
from oriole.model.config import ModelConfig
from oriole.model.deepconfig import DeepConfig
from oriole.model.lm import LM
from oriole.model.reasoning import Pondering
from oriole.model.seq2seq import Seq2Seq
from oriole.model.seq2seqconfig import SEQ2SEQ_PRESETS
from oriole.train.batch import IGNORE, Batch, Packer
from oriole.train.objectives import LMObjective, Loss
from oriole.train.optim import OptimConfig
from oriole.train.seq2seq import Seq2SeqObjective

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.filterwarnings("default"),  # the compiler and the drivers have warnings of their own
    pytest.mark.timeout(600),
]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "L": {"pattern": "L"},
    "LLLG": {"pattern": "LLLG"},
    "gates": {"pattern": "GgGcGtGs"},
    "residuals": {"pattern": "GrGz"},
    "experts": {"pattern": "GGe", "moe": {"experts": 4, "active": 2}},
    "shared": {"pattern": "Ge", "moe": {"experts": 4, "active": 1, "shared_ffn_dim": 32, "balance": "bias"}},
    "latent": {"reasoning": {"steps": 3}},
    "yarn": {"rope_scaling": "yarn", "rope_factor": 2.0},
    "untied": {"tie_embeddings": False},
}
VOCAB = 128


def lm(changes: dict[str, Any]) -> LM:
    """A model whose every weight matters, on the CPU."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB, "dim": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
        "ffn_dim": 96, "context": 512, "window": 50,
    }  # fmt: skip
    made = LM(ModelConfig.model_validate(shape | changes), backend="eager")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def batch() -> Batch:
    """Two rows of 384 tokens, three blocks of FlexAttention's: documents of 90, none of which fills a block, and one
    document that does, with padding behind it."""
    t = 384
    generator = torch.Generator().manual_seed(1)
    place = torch.arange(t)
    doc = torch.stack([place // 90, torch.where(place < 330, 0, -1)]).int()
    pos = torch.stack([place % 90, torch.where(place < 330, place, 0)])
    tokens, targets = torch.randint(0, VOCAB, (2, 2, t), generator=generator)
    return Batch(tokens, torch.where((doc >= 0) & (place % 3 > 0), targets, IGNORE), doc, pos)


def stepped(
    net: Any, call: Any, objective: Any, one: Batch, low: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step, on the CPU."""
    net.zero_grad()
    device = next(net.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=low):
        loss: Loss = objective(call, one.to(device))
    loss.sum.backward()
    return loss.sum.item(), {n: p.grad.cpu() for n, p in net.named_parameters() if p.grad is not None}


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Distance of all gradients over the length of the wanted ones."""
    assert found.keys() == wanted.keys()
    one, other = (torch.cat([g[n].flatten() for n in sorted(wanted)]) for g in (found, wanted))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", [*OPTIONS, "supervised"])
def test_a_step_is_that_of_the_reference_plain_compiled_and_in_bf16(name: str) -> None:
    reference = lm(OPTIONS.get(name, {"pattern": "Gg"}))
    if name == "supervised":
        reference.supervise(DeepConfig(depths=(1, 3), tokens_ahead=2), 0)
    wanted, gradients = stepped(reference, reference, LMObjective(), batch())
    net = copy.deepcopy(reference).cuda()
    net.backend = None
    value, found = stepped(net, net, LMObjective(), batch())
    assert value == pytest.approx(wanted, rel=1e-5) and apart(found, gradients) < 1e-4
    near = (
        0.4 if any(layer.experts for layer in reference.config.layers) else 0.1
    )  # rounding makes tokens choose other experts
    low, found = stepped(net, net, LMObjective(), batch(), low=True)
    assert low == pytest.approx(wanted, rel=2e-2) and apart(found, gradients) < near

    torch.compiler.reset()
    call = torch.compile(net, fullgraph=True, dynamic=False)
    value, found = stepped(net, call, LMObjective(), batch())
    assert value == pytest.approx(wanted, rel=1e-5) and apart(found, gradients) < 1e-4
    low, found = stepped(net, call, LMObjective(), batch(), low=True)
    assert low == pytest.approx(wanted, rel=2e-2) and apart(found, gradients) < near


@pytest.mark.parametrize("preset", ["demo", "classic"])
def test_an_encoder_decoder_is_that_of_the_reference(preset: str) -> None:
    small = {"vocab_size": 64, "dim": 64, "num_heads": 4, "ffn_dim": 48, "encoder_layers": 1, "decoder_layers": 1}
    torch.manual_seed(0)
    reference = Seq2Seq(SEQ2SEQ_PRESETS[preset].model_copy(update=small | {"context": 64, "dropout": 0.0}))
    one = next(packed_pairs())
    wanted, gradients = stepped(reference, reference, Seq2SeqObjective(0.1), one)
    net = copy.deepcopy(reference).cuda()
    torch.compiler.reset()
    for call in (net, torch.compile(net, fullgraph=True, dynamic=False)):
        value, found = stepped(net, call, Seq2SeqObjective(0.1), one)
        assert value == pytest.approx(wanted, rel=1e-5) and apart(found, gradients) < 1e-4


@pytest.mark.parametrize("name", OPTIONS)
def test_the_engine_goes_on_as_the_uncached_model_on_the_cpu(name: str) -> None:
    """Prompts on both sides of the window, each alone and all at once."""
    reference = lm(OPTIONS[name]).eval()
    prompts = [torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 40, 130)]
    sampling = Sampling(max_new_tokens=24, temperature=0.0, stop_ids=())
    latent = reference.config.reasoning
    pondering = Pondering(latent.steps) if latent else None  # as often as in training: a threshold would be a cliff
    wanted = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(sampling.max_new_tokens):
                ids.append(int(reference.head("logits", reference(torch.tensor([ids])).h[0, -1]).argmax()))
        wanted.append(ids[len(prompt) :])
    net = copy.deepcopy(reference).cuda()
    net.backend = None
    together = Engine(net, max_batch=3, pondering=pondering).run([(prompt, sampling) for prompt in prompts])
    alone = [Engine(net, max_batch=1, pondering=pondering).run([(prompt, sampling)])[0] for prompt in prompts]
    assert together == alone == wanted
    net.bfloat16()
    answers = Engine(net, max_batch=3).run([(prompt, sampling) for prompt in prompts])
    assert [len(answer) for answer in answers] == [24, 24, 24]


def losses(folder: Path, **settings: Any) -> list[float]:
    metrics = Records()
    made = trainer(folder, dropout=0.0, steps=8, log_every=1, more={"metrics": metrics}, **settings)
    made.fit()
    return [record["loss"] for record in metrics.of("step")]


def test_a_run_follows_the_trajectory_of_the_cpu(tmp_path: Path) -> None:
    wanted = losses(tmp_path / "cpu")
    assert losses(tmp_path / "gpu", device="cuda") == pytest.approx(wanted, rel=1e-4)
    assert losses(tmp_path / "low", device="cuda", dtype="bf16") == pytest.approx(wanted, rel=3e-2)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path: Path, kind: str) -> None:
    def made(folder: str, **more: Any) -> Any:
        arguments = {"optim": OptimConfig(lr=1e-2, kind=kind), "data": Packer(Counting(), 4, 32), **more}  # type: ignore[arg-type]
        return trainer(tmp_path / folder, lm=model(0.1), device="cuda", dtype="bf16", more=arguments)

    unbroken = made("a")
    unbroken.fit()
    with pytest.raises(Interrupted, match="after step 6 of 12"):
        made("b", objective=StopsInCall(6)).fit()
    torch.manual_seed(99)
    second = made("b")
    second.fit()
    assert digest(second.model.cpu()) == digest(unbroken.model.cpu())


@pytest.mark.parametrize("compiled", [True, False])
def test_a_window_needs_no_square_of_queries_and_keys(compiled: bool) -> None:
    """Forward and backward at lengths whose square would be 0.3 and 1 GB even as booleans: four times the square, but
    twice the memory."""
    peaks = []
    for t in (16_384, 32_768):
        doc = (torch.arange(t, device="cuda") // 5000).int()[None]
        q, k, v = (torch.randn(1, n, t, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2))
        backend: Backend = "flex" if compiled else "sdpa"
        torch.compiler.reset()
        call = torch.compile(attend, dynamic=False) if compiled else attend
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(q, k, v, mask_for(doc, backend, 512), backend=backend).float().square().sum().backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.3 * peaks[0] and peaks[1] < 0.75 * 2**30


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """No TF32, and nothing left in the card's memory by the test before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("t", [100, 128, 333, 384])
@pytest.mark.parametrize("window", [None, 77])
def test_documents_and_windows_in_any_shape_are_those_of_the_reference(t: int, window: int | None) -> None:
    torch.compiler.reset()
    place = torch.arange(t)
    doc = torch.stack([place // 40, torch.where(place < t - 30, 3, -1)]).int()
    real = (doc >= 0)[:, None, :, None]
    generator = torch.Generator().manual_seed(t)
    inputs = [torch.randn(2, n, t, 16, generator=generator).requires_grad_() for n in (4, 2, 2)]
    wanted = attend(*inputs, mask_for(doc, "eager", window), backend="eager") * real
    gradients = torch.autograd.grad(wanted.square().sum(), inputs)
    backends: tuple[Backend, ...] = ("sdpa", "flex")
    for backend in backends:
        call = torch.compile(attend, dynamic=False) if backend == "flex" else attend
        moved = [x.detach().cuda().requires_grad_() for x in inputs]
        found = call(*moved, mask_for(doc.cuda(), backend, window), backend=backend) * real.cuda()
        torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=1e-4)
        for mine, its in zip(torch.autograd.grad(found.square().sum(), moved), gradients, strict=True):
            torch.testing.assert_close(mine.cpu(), its, atol=1e-4, rtol=1e-3)
