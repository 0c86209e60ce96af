"""What training costs by a written-down model (docs/plan.md): memory, seconds of a step, communication. No torch.

For this machine there is the probe; this is for GPUs that are not at hand. The constants are fitted to the published
figures in docs/plan.md, and tests/train/test_costs.py says how far each of those is met.
"""

import math
from typing import Literal, NamedTuple

from oriole.model.config import ModelConfig
from oriole.model.costs import OptimizerName, flops_per_token, num_params, training_memory
from oriole.model.deepconfig import DeepConfig
from oriole.train.accelerators import Cluster

__all__ = ["Load", "StepCost", "Strategy", "device_memory", "launch_seconds", "model_utilisation", "step_cost"]

Strategy = Literal["one", "ddp", "fsdp"]
"""one GPU; DDP: every GPU holds everything and gradients are averaged; FSDP2: each holds a part of everything."""

BEST_MFU, WIDTH = 0.52, 175
"""MFU of a compiled bf16 step at width D without communication: BEST_MFU D / (D + WIDTH)."""
RECOMPUTE = 4 / 3
"""Factor of the FLOPs that are really done when all activations are recomputed: a second forward pass."""
KERNELS_PER_LAYER, KERNELS_BESIDE, LAUNCH_S = 40, 120, 6e-6
"""Kernels that a micro-batch launches, forward and backward, and what one costs the host: no step is faster."""
LINK_EFFICIENCY = 0.7
"""Share of a link's figure that collectives reach."""
OVERLAP = 0.5
"""Share of the backward pass behind which communication can hide."""
NETWORK_GBITS = {"server": 400.0, "card": 10.0}
"""Network where none is given, Gbit/s: InfiniBand of every GPU with NVLink, else the Ethernet of a whole machine."""
CONTEXT_BYTES = 0.9e9
"""What the driver, the libraries and the communicator hold on a GPU."""
FRAGMENTATION = 1.05
"""Of what the allocator reserves over what is allocated at the peak."""


class Load(NamedTuple):
    """What one GPU does in one optimizer step."""

    shape: ModelConfig
    rows: int
    """Rows of its micro-batch."""
    length: int
    accumulate: int
    optimizer: OptimizerName
    half: bool = True
    """bf16 or fp16 products; else fp32."""
    recompute: bool = False
    """Activation checkpointing of every block."""
    deep: DeepConfig | None = None
    """What is trained beside the model."""

    @property
    def tokens(self) -> int:
        """Tokens of one GPU in one step."""
        return self.rows * self.length * self.accumulate

    @property
    def num_params(self) -> int:
        """Parameters that train."""
        return num_params(self.shape, self.deep)

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs."""
        return flops_per_token(self.shape, self.length, self.deep)


class StepCost(NamedTuple):
    """Seconds of one optimizer step."""

    compute: float
    """Forward and backward passes of all micro-batches."""
    update: float
    """The optimizer."""
    communication: float
    """What of the communication is not hidden behind the backward pass."""
    launch_bound: bool
    """Whether launching kernels, and not the arithmetic, sets the pace: the batch is too small for the GPU."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.update + self.communication


def model_utilisation(dim: int) -> float:
    """MFU that a good single-GPU loop reaches at width D, by the published figures: 0.42 at 768, 0.47 at 1,536."""
    return BEST_MFU * dim / (dim + WIDTH)


def step_cost(load: Load, cluster: Cluster, strategy: Strategy, network: float | None = None) -> StepCost:
    """Seconds of a step on every GPU of the cluster at once; `network` in Gbit/s for each GPU between machines."""
    shape, gpu = load.shape, cluster.gpu
    peak = 1e12 * (gpu.tflops if load.half else gpu.fp32)
    flops = load.rows * load.length * load.flops_per_token * (RECOMPUTE if load.recompute else 1)
    arithmetic = flops / (peak * model_utilisation(shape.dim))
    launching = launch_seconds(shape, load.deep)
    micro = max(arithmetic, launching)
    exposed = _communication(load, cluster, strategy, network, micro)
    return StepCost(load.accumulate * micro, _update(load, cluster, strategy), exposed, launching > arithmetic)


def launch_seconds(shape: ModelConfig, deep: DeepConfig | None = None) -> float:
    """What launching the kernels of a micro-batch costs the host; a latent block's as often as it is applied."""
    latent = shape.reasoning.layers * shape.reasoning.steps if shape.reasoning else 0
    applied = shape.num_layers + latent + (deep.modules if deep else 0)
    return (KERNELS_PER_LAYER * applied + KERNELS_BESIDE) * LAUNCH_S


def _update(load: Load, cluster: Cluster, strategy: Strategy) -> float:
    """AdamW reads and writes 28 bytes a parameter; Muon adds 5 (4 m² n + 2 m³) FLOPs for an m x n matrix, m <= n."""
    shape, gpu = load.shape, cluster.gpu
    share = cluster.gpus if strategy == "fsdp" else 1
    seconds = 28 * load.num_params / share / (gpu.bandwidth * 1e9)
    if load.optimizer in ("muon", "normuon"):
        seconds += sum(5 * (4 * m * m * n + 2 * m**3) * count for m, n, count in _matrices(shape, load.deep)) / (
            gpu.tflops * 1e12 * model_utilisation(shape.dim)
        )
    return seconds


def _matrices(shape: ModelConfig, deep: DeepConfig | None) -> list[tuple[int, int, int]]:
    """(smaller side, larger side, how many) of the matrices that Muon moves (train.groups), fused ones by their parts:
    those of the blocks, of a latent block, and of what is trained beside the model."""
    d, r = shape.dim, shape.reasoning
    blocks = list(shape.layers)
    joins = 0
    if deep is not None:  # a further token has a block like the last one, without experts, and a matrix before it
        blocks += [shape.layers[-1]._replace(experts=False)] * deep.modules
        joins = deep.modules
    attentions, dense = len(blocks), sum(not block.experts for block in blocks)
    if r is not None:
        attentions, dense = attentions + r.layers * (2 if r.cross else 1), dense + r.layers
    mixtures = sum(block.experts for block in blocks)
    by_head = sum((block.gate == "head") + (block.temperature == "query") for block in blocks)
    by_channel = sum(block.gate == "channel" for block in blocks)
    q, kv = shape.query_dim, shape.kv_dim
    kinds = [
        (d, q, 2 * attentions + by_channel),
        (d, kv, 2 * attentions),
        (d, shape.ffn_dim, 3 * dense),
        (d, shape.num_heads, by_head),
        (d, 2 * d, joins),
    ]
    if mixtures:
        kinds.append((d, shape.expert_dim, 3 * shape.moe.experts * mixtures))
        kinds.append((d, shape.moe.shared_ffn_dim, 3 * mixtures if shape.moe.shared_ffn_dim else 0))
    return [(min(a, b), max(a, b), count) for a, b, count in kinds if count]


def _communication(load: Load, cluster: Cluster, strategy: Strategy, network: float | None, micro: float) -> float:
    """Seconds of communication in a step that the passes cannot hide.

    A ring over n GPUs moves (n - 1) / n of a tensor for an all-gather or a reduce-scatter, and twice that for an
    all-reduce. DDP: an all-reduce of the fp32 gradients behind the last backward pass (two thirds of a micro-batch).
    FSDP2: every micro-batch gathers the fp32 weights twice, and the last one scatters the gradients.
    """
    n = cluster.gpus
    if strategy == "one" or n == 1:
        return 0.0
    per_second = _link(cluster, network) * LINK_EFFICIENCY
    once = (n - 1) / n * 4 * load.num_params / per_second
    if strategy == "ddp":
        return max(0.0, 2 * once - OVERLAP * 2 / 3 * micro)
    gathering = load.accumulate * max(0.0, 2 * once - OVERLAP * micro)
    return gathering + max(0.0, once - OVERLAP * 2 / 3 * micro)


def _link(cluster: Cluster, network: float | None) -> float:
    """Bytes/s of the slowest link of a GPU: inside the machine, or between machines where there are several."""
    inside = cluster.gpu.link * 1e9
    if cluster.nodes == 1:
        return inside
    if network is None:
        server = cluster.gpu.link > 64
        network = NETWORK_GBITS["server"] if server else NETWORK_GBITS["card"] / cluster.per_node
    return min(inside, network * 1e9 / 8)


def device_memory(load: Load, cluster: Cluster, strategy: Strategy) -> dict[str, int]:
    """Bytes on one GPU by part; their sum is the peak.

    FSDP2 divides weights and optimizer by the number of GPUs, and gradients too unless they are summed over several
    micro-batches; the two largest units (a block, or all that is in none: train.parallel) are whole for a moment.
    """
    shape = load.shape
    width = 2 if load.half else 4
    parts = training_memory(
        shape, load.rows, load.length, width, load.deep, optimizer=load.optimizer, recompute=load.recompute
    )
    if strategy == "fsdp":
        blocks = [shape.block_params(layer) for layer in shape.layers]
        sharded = ("weights", "optimizer", "update", *(("gradients",) if load.accumulate == 1 else ()))
        parts |= {name: math.ceil(parts[name] / cluster.gpus) for name in sharded}
        parts["gathered"] = 2 * 4 * max(*blocks, load.num_params - sum(blocks))
    used = sum(parts.values())
    return parts | {"fragmentation": math.ceil((FRAGMENTATION - 1) * used), "context": int(CONTEXT_BYTES)}
