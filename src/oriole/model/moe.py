"""A mixture of experts in the place of an MLP: each token goes through the k of E small ones that a router chooses.

As Qwen3-MoE: softmax over all experts in fp32, the k likeliest, their weights divided by their sum. No token is ever
dropped, and a token's result does not depend on those beside it. The pairs of token and expert are sorted by expert, so
that each of the three products is one grouped product over segments of a buffer, whose size depends on the number of
tokens alone: the device is never asked how they were spread, and a compiled step is one graph.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oriole.model.attention import Backend
from oriole.model.config import ModelConfig

__all__ = ["MoE", "Routing", "figures", "mixture"]

TILE = 32
"""Segments are rounded up to it: GPU kernels want them in whole 16 bytes, and on a CPU every new length would have its
product compiled anew, which takes as long as computing it (docs/log.md)."""

DEAD = 0.1
"""An expert with less than this share of the mean load counts as dead."""


class Routing(NamedTuple):
    """How one layer's tokens were spread; padding does not count."""

    balance: Tensor
    """What of the loss keeps the experts alike, per unit, 0-dim."""
    load: Tensor
    """Share of the tokens that went through each expert (E,); the sum is k."""
    entropy: Tensor
    """Mean entropy of the router's distribution in nats, 0-dim; ln E where it does not care."""


class MoE(nn.Module):
    """sum over the chosen experts e of w_e down_e(silu(gate_e(x)) * up_e(x)), and `shared(x)` where there is one.

    The weights of all experts lie below one another in one matrix, as do gate and up of each. A shared expert (Dai et
    al. 2024, DeepSeekMoE, eq. 4) is added as it is; the sigmoid gate that Qwen2-MoE puts on it is not used here.
    """

    def __init__(self, config: ModelConfig, shared: nn.Module | None) -> None:
        super().__init__()
        moe = config.moe
        self.experts, self.active, self.balance_weight = moe.experts, moe.active, moe.balance_weight
        self.router = nn.Linear(config.dim, moe.experts, bias=False)
        self.gate_up = nn.Linear(config.dim, moe.experts * 2 * config.expert_dim, bias=False)
        self.down = nn.Linear(config.expert_dim, moe.experts * config.dim, bias=False)
        self.shared = shared
        self.bias = nn.Parameter(torch.zeros(moe.experts)) if moe.balance == "bias" else None
        """Added to the probabilities for the choice alone (E,)."""

    def forward(self, x: Tensor, real: Tensor | None, backend: Backend) -> tuple[Tensor, Routing]:
        """x (B, T, D) -> (B, T, D), and how tokens were spread. `real` (B, T) is False at padding; None: there is none.

        With the backend "eager" the fp32 reference that the grouped products must match.
        """
        flat = x.flatten(0, 1)
        probs, choice, weights = self.route(flat)
        gate_up = self.gate_up.weight.view(self.experts, -1, x.shape[2])
        down = self.down.weight.view(self.experts, x.shape[2], -1)
        y = mixture(flat, gate_up, down, choice, weights, eager=backend == "eager")
        if self.shared is not None:
            y = y + self.shared(flat)
        return y.view_as(x), self._routing(probs, choice, real)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For x (N, D): the router's probabilities (N, E) in fp32, the experts chosen (N, k), their weights (N, k)."""
        with torch.autocast(x.device.type, enabled=False):
            probs = F.linear(x.float(), self.router.weight.float()).softmax(-1)
        scores = probs.detach() if self.bias is None else probs.detach() + self.bias.detach()
        choice = scores.topk(self.active).indices
        weights = probs.gather(-1, choice)
        return probs, choice, weights / weights.sum(-1, keepdim=True)

    def _routing(self, probs: Tensor, choice: Tensor, real: Tensor | None) -> Routing:
        counts = torch.ones_like(probs[:, :1]) if real is None else real.reshape(-1, 1).to(probs.dtype)
        total = counts.sum().clamp(min=1)
        load = (torch.zeros_like(probs).scatter(-1, choice, 1.0) * counts).sum(0) / total
        entropy = (torch.special.entr(probs.detach()).sum(-1, keepdim=True) * counts).sum() / total
        if self.bias is None:
            balance = balance_loss(load, (probs * counts).sum(0) / total) * self.balance_weight
        else:
            balance = imbalance_as_gradient(self.bias, load - self.active / self.experts)
        return Routing(balance, load, entropy)


def balance_loss(load: Tensor, probs: Tensor) -> Tensor:
    """E sum_e f_e P_e for the experts' loads f (E,) and mean probabilities P (E,): k where both are even.

    Fedus et al. 2021, eq. 4 to 6, for k experts a token; `load_balancing_loss_func` of transformers on one layer.
    """
    return len(load) * (load * probs).sum()


def imbalance_as_gradient(bias: Tensor, excess: Tensor) -> Tensor:
    """Zero, but its gradient by `bias` (E,) is `excess` (E,): each expert's load above the mean.

    Bias-based balancing (Wang et al. 2024, algorithm 1) moves a bias once a step against the sign of the excess in all
    of the step's tokens. As a gradient the excess is summed over micro-batches and processes, forgotten with a step
    that is skipped or done again, and counted once where activations are computed again; the optimizer does the rest.
    """
    product = (bias * excess).sum()
    return product - product.detach()


def figures(layers: list[Routing]) -> dict[str, Tensor]:
    """What a log shows of the layers with experts, 0-dim.

    `expert_load`: load of the busiest expert over the mean, in the layer where that is highest. `dead_experts`: share
    of the experts with less than a tenth of the mean. `router_entropy`: mean of the layers, in nats.
    """
    load = torch.stack([layer.load for layer in layers]).detach()
    relative = load / load.mean(-1, keepdim=True).clamp(min=1e-9)
    return {
        "expert_load": relative.amax(),
        "dead_experts": (relative < DEAD).float().mean(),
        "router_entropy": torch.stack([layer.entropy for layer in layers]).mean(),
    }


# --- the experts -----------------------------------------------------------------------------------------------------


def mixture(x: Tensor, gate_up: Tensor, down: Tensor, choice: Tensor, weights: Tensor, *, eager: bool) -> Tensor:
    """(N, D) for x (N, D), gate_up (E, 2 F, D), down (E, D, F), and each token's experts and weights (N, k)."""
    return (_eager if eager else _grouped)(x, gate_up, down, choice, weights)


def _eager(x: Tensor, gate_up: Tensor, down: Tensor, choice: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token, weighted by zero where it was not chosen; in fp32."""
    with torch.autocast(x.device.type, enabled=False):
        of_expert = weights.new_zeros(len(x), len(gate_up)).scatter(-1, choice, weights)
        gate, up = torch.einsum("nd,efd->nef", x.float(), gate_up.float()).chunk(2, dim=-1)
        return torch.einsum("nef,edf,ne->nd", F.silu(gate) * up, down.float(), of_expert).to(x.dtype)


def _grouped(x: Tensor, gate_up: Tensor, down: Tensor, choice: Tensor, weights: Tensor) -> Tensor:
    """Each expert on its own segment of a buffer of all pairs of token and expert."""
    kind, (n, k), dim = x.device.type, choice.shape, x.shape[1]
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    place, ends, rows = _segments(choice, len(gate_up))
    # By copies in both directions, never by addition into rows: the sums over k are in one order on every device.
    pairs = x.to(low)[:, None].expand(n, k, dim).reshape(n * k, dim)
    slots = torch.zeros(rows, dim, dtype=low, device=x.device).index_copy(0, place, pairs)
    gate, up = _linear(slots, gate_up.to(low), ends).chunk(2, dim=-1)
    out = _linear(F.silu(gate) * up, down.to(low), ends)
    return (out.index_select(0, place).view(n, k, dim) * weights.to(low)[..., None]).sum(1)


def _segments(choice: Tensor, experts: int) -> tuple[Tensor, Tensor, int]:
    """Row of each pair (N k,) in a buffer sorted by expert, where each expert's segment ends (E,), and the rows in all.

    Segments are whole tiles, at least one; but a few tokens, as in decoding, lie close together, so that only the
    weights of experts that have any are read. What is beyond the last end belongs to nobody.
    """
    flat = choice.flatten()
    few = not torch.is_grad_enabled() and len(flat) < TILE * experts
    order = flat.argsort(stable=True)
    ordered = flat[order]
    bounds = torch.searchsorted(ordered, torch.arange(experts + 1, device=flat.device))
    counts = bounds.diff()
    room = counts if few else (counts.clamp(min=1) + (TILE - 1)) // TILE * TILE
    ends = room.cumsum(0)
    slots = torch.arange(len(flat), device=flat.device) + (ends - room - bounds[:-1])[ordered]
    place = torch.empty_like(order).index_copy(0, order, slots)
    return place, ends.to(torch.int32), len(flat) + (0 if few else TILE * experts)


def _linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """(M, N) for x (M, K) and weight (E, N, K): rows up to ends[0] by the first matrix, and so on."""
    out: Tensor = _GroupedLinear.apply(x, weight, ends)  # type: ignore[no-untyped-call]
    return out


class _GroupedLinear(torch.autograd.Function):
    """Written out so that the gradient of the weights comes in their own layout and is not copied once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        out: Tensor = grouped_mm(x, weight.mT, ends)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        by_weight = grouped_outer(grad, x, ends) if ctx.needs_input_grad[1] else None
        return grouped_mm(grad, weight, ends), by_weight, None


# Operators of our own around torch's, whose shape inference, which a compiler asks, accepts bf16 alone (torch 2.13).


@torch.library.custom_op("oriole::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """(M, N): each segment of x (M, K) times its matrix of w (E, K, N). Rows beyond the last end are left unset."""
    return F.grouped_mm(x, w, offs=ends)


@grouped_mm.register_fake
def _(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[2])


@torch.library.custom_op("oriole::grouped_outer", mutates_args=())
def grouped_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """(E, N, K): the transposed segment of a (M, N) times that of b (M, K)."""
    return F.grouped_mm(a.mT, b, offs=ends)


@grouped_outer.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(ends.shape[0], a.shape[1], b.shape[1])
