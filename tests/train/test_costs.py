"""The model behind `oriole plan … device=…` against what others have published, and its parts against small sums."""

import math
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch

from oriole.model.config import ModelConfig, preset
from oriole.model.costs import flops_per_token
from oriole.model.deepconfig import DeepConfig
from oriole.model.lm import LM
from oriole.train.accelerators import parse_cluster
from oriole.train.costs import Load, Strategy, _matrices, device_memory, launch_seconds, model_utilisation, step_cost
from oriole.train.groups import groups_of
from oriole.train.parallel import _blocks


def _nanochat(depth: int, vocab: int = 32_768) -> ModelConfig:
    """nanochat's shape with its FLOPs: 8 D² of MLP, heads of 128, an untied head."""
    dim = 64 * depth
    return ModelConfig(
        vocab_size=vocab, dim=dim, num_layers=depth, num_heads=dim // 128, num_kv_heads=dim // 128, head_dim=128,
        ffn_dim=round(8 * dim / 3), tie_embeddings=False,
    )  # fmt: skip


WINDOWED = 1792
"""Row length whose causal attention costs as much as nanochat's windows (three of 512 to one of 2,048) do uncut."""
GPT2 = ModelConfig(
    vocab_size=50_304, dim=768, num_layers=12, num_heads=12, num_kv_heads=12, head_dim=64, ffn_dim=2048,
    tie_embeddings=False,
)  # fmt: skip
LLAMA = ModelConfig(
    vocab_size=128_256, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, ffn_dim=14_336,
    tie_embeddings=False, qk_norm=False, context=8192,
)  # fmt: skip


class Published(NamedTuple):
    what: str
    device: str
    load: Load
    strategy: Strategy
    tokens_per_second: float
    within: float


MET = (
    Published("nanochat d12, bf16", "H100", Load(_nanochat(12), 32, WINDOWED, 8, "muon"), "one", 546e3, 0.1),
    Published("nanochat d26, bf16", "8xH100", Load(_nanochat(26), 16, WINDOWED, 4, "muon"), "ddp", 630e3, 0.15),
    Published("nanochat d12, bf16", "3090", Load(_nanochat(12), 8, WINDOWED, 32, "muon"), "one", 40e3, 0.1),
    Published("LLMs-from-scratch 124M", "A100", Load(GPT2, 32, 1024, 1, "adamw"), "one", 142e3, 0.2),
    Published("minimind-3", "3090", Load(preset("64m"), 32, 340, 8, "adamw"), "one", 99e3, 0.25),
    Published("torchtitan Llama-3.1-8B", "8x8xA100", Load(LLAMA, 1, 8192, 1, "adamw"), "fsdp", 64 * 2973, 0.2),
)
"""Figures that the model meets within 25 %: tokens/s of all GPUs."""
MISSED = (
    # fp8 products, which Oriole does not have.
    Published("nanochat d24, fp8", "8xH100", Load(_nanochat(24), 16, WINDOWED, 4, "muon"), "ddp", 983e3, 0.3),
    # The highest figure anyone gives for an A100: 67 % of its peak.
    Published("nanochat d20", "8xA100", Load(_nanochat(20, 65_536), 16, 2048, 2, "muon"), "ddp", 529e3, 0.4),
    # A teaching script that scales 2.95 times over four GPUs.
    Published("LLMs-from-scratch 124M", "4xA100", Load(GPT2, 32, 1024, 1, "adamw"), "ddp", 419e3, 0.6),
    # Cards held at 500 W, slower memory, and activation checkpointing of chosen operations.
    Published("torchtitan Llama-3.1-8B", "8xH100", Load(LLAMA, 2, 8192, 1, "adamw"), "fsdp", 8 * 6667, 0.5),
    # Would be 73 % of the card's peak.
    Published("nanochat d12", "4070", Load(_nanochat(12), 8, WINDOWED, 32, "muon"), "one", 55.7e3, 0.5),
)
"""Figures that it misses by more, and why (docs/plan.md says so)."""


@pytest.mark.parametrize("case", [*MET, *MISSED], ids=lambda c: f"{c.what} on {c.device}")
def test_published_figures_are_met_within_the_stated_factor(case: Published) -> None:
    cluster = parse_cluster(case.device)
    rate = case.load.tokens * cluster.gpus / step_cost(case.load, cluster, case.strategy).total
    assert rate / case.tokens_per_second == pytest.approx(1, abs=case.within)


def test_flops_of_the_stand_ins_are_those_that_nanochat_prints() -> None:
    for depth, flops in ((12, 0.760e9), (16, 1.585e9), (24, 4.775e9)):
        assert flops_per_token(_nanochat(depth), WINDOWED) == pytest.approx(flops, rel=0.02)


def test_utilisation_grows_with_the_width() -> None:
    assert model_utilisation(768) == pytest.approx(0.42, abs=0.01)
    assert model_utilisation(1536) == pytest.approx(0.47, abs=0.01)
    assert model_utilisation(128) < model_utilisation(256) < model_utilisation(8192) < 0.52


def test_a_tiny_batch_is_bound_by_launching() -> None:
    h100 = parse_cluster("H100")
    few, many = (step_cost(Load(preset("demo"), rows, 128, 1, "adamw"), h100, "one") for rows in (4, 4096))
    assert few.launch_bound and not many.launch_bound
    assert step_cost(Load(preset("demo"), 8, 128, 1, "adamw"), h100, "one").compute == few.compute


def test_communication_grows_with_the_network_slower_and_hides_behind_long_passes() -> None:
    load = Load(preset("1b"), 4, 2048, 4, "adamw")
    inside, across = parse_cluster("8xH100"), parse_cluster("2x8xH100")
    assert step_cost(load, inside, "ddp").communication < step_cost(load, across, "ddp").communication
    assert step_cost(load, across, "ddp", 10).communication > 5 * step_cost(load, across, "ddp", 100).communication
    long = load._replace(rows=64)
    assert step_cost(long, inside, "ddp").communication == 0
    # A ring over n GPUs: 2 (n - 1) / n of the gradients, 4 bytes a parameter, at 70 % of 10 Gbit/s.
    exact = 2 * 15 / 16 * 4 * load.shape.num_params() / (0.7 * 10e9 / 8)
    micro = step_cost(load, across, "one").compute / 4
    assert step_cost(load, across, "ddp", 10).communication == pytest.approx(exact - micro / 3)
    assert step_cost(load, parse_cluster("H100"), "ddp").communication == 0


def test_fsdp_divides_what_ddp_repeats() -> None:
    load = Load(preset("1b"), 4, 2048, 1, "adamw")
    cluster = parse_cluster("8xH100")
    ddp, fsdp = (device_memory(load, cluster, s) for s in ("ddp", "fsdp"))
    for part in ("weights", "gradients", "optimizer"):
        assert fsdp[part] == math.ceil(ddp[part] / 8)
    assert fsdp["activations"] == ddp["activations"] and sum(fsdp.values()) < sum(ddp.values())
    # Gradients that are summed over micro-batches stay whole until the last.
    assert device_memory(load._replace(accumulate=2), cluster, "fsdp")["gradients"] == ddp["gradients"]


def test_recomputed_activations_cost_a_third_more_arithmetic_and_less_memory() -> None:
    plain = Load(preset("110m"), 32, 1024, 1, "adamw")
    again = plain._replace(recompute=True)
    h100 = parse_cluster("H100")
    assert step_cost(again, h100, "one").compute == pytest.approx(4 / 3 * step_cost(plain, h100, "one").compute)
    assert device_memory(again, h100, "one")["activations"] < 0.25 * device_memory(plain, h100, "one")["activations"]


DEEP = DeepConfig(depths=(1,), tokens_ahead=3)


def odd(pattern: str, **more: Any) -> ModelConfig:
    """A shape none of whose widths are alike."""
    table = {"vocab_size": 64, "dim": 32, "num_layers": 3, "num_heads": 6, "num_kv_heads": 3, "head_dim": 8}
    return ModelConfig.model_validate(table | {"ffn_dim": 80, "context": 64, "pattern": pattern} | more)


SHAPES: dict[str, tuple[ModelConfig, DeepConfig | None]] = {
    "plain": (odd("G"), None),
    "options": (odd("GgtLcrGsz"), None),
    "experts": (odd("GeGGcte", moe={"experts": 3, "ffn_dim": 16, "shared_ffn_dim": 24, "balance": "bias"}), DEEP),
    "deep": (odd("GGtGg", tie_embeddings=False), DEEP),
    "latent": (odd("Gg", reasoning={"layers": 2, "steps": 3, "cross": True, "step_embedding": True}), None),
}


@pytest.mark.parametrize("name", SHAPES)
def test_muon_is_reckoned_with_the_matrices_that_it_moves_and_fsdp_with_the_units_that_it_cuts(name: str) -> None:
    shape, deep = SHAPES[name]
    with torch.device("meta"):
        model = LM(shape)
    if deep is not None:
        model = LM(shape)
        model.supervise(deep, 0)
    found: Counter[tuple[int, int]] = Counter()
    fused = model.fused_rows()
    for parameter in groups_of(model, muon=True, signed=model.sign_steps()).muon:
        rows, columns = model.get_parameter(parameter).shape
        found.update((min(part, columns), max(part, columns)) for part in fused.get(parameter, (rows,)))
    reckoned: Counter[tuple[int, int]] = Counter()
    for smaller, larger, count in _matrices(shape, deep):
        reckoned[smaller, larger] += count
    assert reckoned == found

    blocks = [sum(p.numel() for p in block.parameters()) for block in _blocks(model)]
    rest = sum(p.numel() for p in model.parameters()) - sum(blocks)
    load = Load(shape, 1, 8, 1, "muon", deep=deep)
    assert load.num_params == sum(blocks) + rest
    assert device_memory(load, parse_cluster("8xH100"), "fsdp")["gathered"] == 2 * 4 * max(*blocks, rest)


def test_a_block_that_is_applied_again_is_launched_again() -> None:
    latent, _ = SHAPES["latent"]
    nine = latent.model_copy(update={"num_layers": 3 + 2 * 3, "reasoning": None})
    assert launch_seconds(latent) == launch_seconds(nine)
    assert launch_seconds(odd("G"), DEEP) == launch_seconds(odd("G", num_layers=5))
