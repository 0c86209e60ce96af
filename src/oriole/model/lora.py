"""LoRA: a frozen matrix and beside it two narrow ones that train, y = W x + (alpha / r) B A x (Hu et al. 2021, eq. 3).

q, k, v and gate, up are one matrix in memory but have an adapter each, as on disk. B starts at zero, so that an adapted
model begins as the model that it adapts, to the bit.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oriole.errors import ModelError
from oriole.model.config import LoraConfig
from oriole.model.layers import Block, SwiGLU
from oriole.model.lm import LM

__all__ = ["Adapter", "LoraLinear", "adapters", "attach", "disabled", "is_adapted", "merge"]


class Adapter(nn.Module):
    """A (r, in) and B (out, r) of one Hugging Face matrix; A is U(-1/sqrt(in), 1/sqrt(in)), B zero, as in PEFT."""

    def __init__(self, columns: int, rows: int, rank: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        bound = 1 / math.sqrt(columns)
        # Drawn on the host, so that every device begins alike.
        drawn = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(drawn.to(device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=device))


class LoraLinear(nn.Linear):
    """A linear layer whose `weight` is frozen, with an adapter for each of its parts that is a target.

    `parts` names the rows of the matrices that are fused in `weight`, in order.
    """

    def __init__(self, base: nn.Linear, parts: Mapping[str, int], config: LoraConfig, seed: torch.Generator) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.parts = dict(parts)
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.active = True
        device = base.weight.device
        wanted = {name: rows for name, rows in parts.items() if name in config.targets}
        self.adapters = nn.ModuleDict(
            {name: Adapter(base.in_features, rows, config.rank, seed, device) for name, rows in wanted.items()}
        )
        self.train(base.training)

    def narrow(self) -> tuple[Tensor, Tensor]:
        """A's of all adapters below one another (R, in), and their B's, scaled, on a diagonal (out, R)."""
        down: list[Tensor] = []
        up: list[Tensor] = []
        for name, rows in self.parts.items():
            if name in self.adapters:
                adapter = self.adapters[name]
                assert isinstance(adapter, Adapter)
                down.append(adapter.a)
                up.append(adapter.b)
            else:
                up.append(self.weight.new_zeros(rows, 0))
        diagonal: Tensor = torch.block_diag(*up)  # type: ignore[no-untyped-call]
        return torch.cat(down), diagonal * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out). Dropout is on the adapters' input, one mask for all of them."""
        y: Tensor = F.linear(x, self.weight)
        if not self.active:
            return y
        down, up = self.narrow()
        return y + F.linear(F.linear(F.dropout(x, self.dropout, self.training), down), up)


def attach(model: LM, config: LoraConfig, seed: int = 0) -> None:
    """Put adapters beside the model's matrices and freeze all else but what is new, in place: reward and value heads,
    and what `LM.supervise` has added.

    `ModelError` when the model has adapters already, or experts where the MLP's are wanted.
    """
    if is_adapted(model):
        raise ModelError("the model has LoRA adapters already; merge them before it gets new ones")
    refused = sorted({"gate_proj", "up_proj", "down_proj"} & set(config.targets))
    if refused and any(layer.experts for layer in model.config.layers):
        raise ModelError(
            f"lora.targets has {', '.join(refused)}, which are experts in this model (pattern="
            f"{model.config.pattern}) and get no adapters; adapt attention alone, "
            "lora.targets=['q_proj','k_proj','v_proj','o_proj']"
        )
    c, generator = model.config, torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    model.scalar_heads.requires_grad_(True)
    if model.deep is not None:
        model.deep.requires_grad_(True)

    def adapted(base: nn.Linear, parts: Mapping[str, int]) -> nn.Linear:
        return LoraLinear(base, parts, config, generator) if parts.keys() & set(config.targets) else base

    for block in _blocks(model):
        attention, mlp = block.attention, block.mlp
        attention.qkv = adapted(attention.qkv, {"q_proj": c.query_dim, "k_proj": c.kv_dim, "v_proj": c.kv_dim})
        attention.out = adapted(attention.out, {"o_proj": c.dim})
        if isinstance(mlp, SwiGLU):
            mlp.gate_up = adapted(mlp.gate_up, {"gate_proj": c.ffn_dim, "up_proj": c.ffn_dim})
            mlp.down = adapted(mlp.down, {"down_proj": c.dim})


def is_adapted(model: LM) -> bool:
    """Whether the model has adapters."""
    return any(isinstance(module, LoraLinear) for module in model.modules())


def adapters(model: LM) -> dict[str, Adapter]:
    """The model's adapters by the Hugging Face name of their matrix, "model.layers.0.self_attn.q_proj"."""
    found = {}
    for i, block in enumerate(_blocks(model)):
        for where, linear in _linears(block):
            if isinstance(linear, LoraLinear):
                for name, adapter in linear.adapters.items():
                    assert isinstance(adapter, Adapter)
                    found[f"model.layers.{i}.{where}.{name}"] = adapter
    return found


@torch.no_grad()
def merge(model: LM) -> None:
    """Add the adapters into the matrices, in place: a plain model again, of which everything trains."""
    for block in _blocks(model):
        block.attention.qkv, block.attention.out = _plain(block.attention.qkv), _plain(block.attention.out)
        block.mlp.gate_up, block.mlp.down = _plain(block.mlp.gate_up), _plain(block.mlp.down)
    model.requires_grad_(True)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one that was adapted: a reference model that takes no memory of its own."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def _plain(linear: nn.Linear) -> nn.Linear:
    if not isinstance(linear, LoraLinear):
        return linear
    down, up = linear.narrow()
    plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    plain.weight = linear.weight
    # In fp32, whatever the weights are kept in: the product is rounded once.
    plain.weight.copy_(linear.weight.float() + up.float() @ down.float())
    return plain


def _blocks(model: LM) -> Iterator[Block]:
    for block in model.blocks:
        assert isinstance(block, Block)
        yield block


def _linears(block: Block) -> Sequence[tuple[str, nn.Linear]]:
    """The linear layers of a block, each with the Hugging Face name of the module that its parts are in."""
    return (
        ("self_attn", block.attention.qkv),
        ("self_attn", block.attention.out),
        ("mlp", block.mlp.gate_up),
        ("mlp", block.mlp.down),
    )
