"""What is minimised. An objective returns a SUM over its units and says how many units a batch has; the trainer
divides once, by the global weight."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from oriole.model.deep import Deep
from oriole.model.lm import LM
from oriole.train.batch import IGNORE, Batch

__all__ = [
    "ChunkLoss", "LMObjective", "Loss", "TokenStats", "cross_entropy", "cross_entropy_and_hits", "cross_entropy_chunk",
    "further", "head_weight", "iteration_loss", "of_units", "smoothed_chunk", "supervision", "token_log_probs",
    "token_stats",
]  # fmt: skip

CHUNK = 1024
"""Rows whose logits exist at the same time; every chunk of a cross-entropy is padded to it, so that a compiled one
never recompiles."""

ROUND = 128
"""Other losses pad their last chunk to whole multiples of it: on a CPU a product of new size is compiled first, and
what is compiled stays, some megabytes for each size."""


class ChunkLoss(NamedTuple):
    """Of n rows x (n, D), head w (V, D) and targets y (n,)."""

    sum: Tensor
    """0-dim; rows with y < 0 count nothing."""
    hits: Tensor
    """(n,), True where no token is likelier than the target; of rows with y < 0 it means nothing."""
    by_x: Tensor
    """The sum's gradient (n, D)."""
    by_w: Tensor
    """(V, D), or empty where it is not asked for."""


ChunkFunction = Callable[[Tensor, Tensor, Tensor, bool], ChunkLoss]
"""(x, w, y, whether `by_w` is asked for) -> the loss of a chunk of rows."""


class Loss(NamedTuple):
    """A loss as a sum, and sums of whatever else is worth a line in the log."""

    sum: Tensor
    """0-dim, fp32, with gradient."""
    metrics: dict[str, Tensor]
    """Detached 0-dim sums over the same units."""


class LMObjective:
    """Next-token cross-entropy over the trained tokens: pretraining and SFT alike; they differ in their batches.

    Call it with a compiled model, but do not compile the call itself: how many rows have a target differs from batch
    to batch. `compile()` compiles what is worth it in here.
    """

    def __init__(self) -> None:
        self._chunk: ChunkFunction = cross_entropy_chunk

    def compile(self) -> None:
        """Compile the loss and its gradient: three passes over the logits become one."""
        self._chunk = torch.compile(cross_entropy_chunk)

    def weight(self, batch: Batch) -> Tensor:
        """Trained tokens of the batch, 0-dim int64."""
        return (batch.targets != IGNORE).sum()

    def __call__(self, model: LM, batch: Batch) -> Loss:
        out = model(batch.tokens, batch.doc, batch.pos)
        metrics = of_units(out.metrics, len(batch.rows))
        if model.config.reasoning is not None:
            made = iteration_loss(model, out.mid, batch.targets.flatten(), batch.rows, self._chunk)
            return Loss(made.sum + out.aux * len(batch.rows), metrics | made.metrics)
        loss = cross_entropy(out.h.flatten(0, 1), head_weight(model), batch.targets.flatten(), batch.rows, self._chunk)
        if model.deep is not None:
            metrics["lm_loss"] = loss.detach()
            more, parts = supervision(model.deep, out.mid, head_weight(model), batch, self._chunk)
            loss, metrics = loss + more, metrics | parts
        return Loss(loss + out.aux * len(batch.rows), metrics)


def of_units(means: dict[str, Tensor], units: int | Tensor) -> dict[str, Tensor]:
    """Means over a micro-batch as sums over its units, which is what the trainer adds up and divides."""
    return {name: value * units for name, value in means.items()}


def supervision(
    deep: Deep, mid: Sequence[Tensor], weight: Tensor, batch: Batch, chunk: ChunkFunction | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted losses of `mid`, states (B, T, D) that `deep` has made, as a 0-dim sum; and each by its name.

    `weight` (V, D) is the model's head. A further token is trained where it is trained as a next one, too, and belongs
    to the same document; its loss is a sum over those positions, which are fewer than the batch's trained tokens.
    """
    table, losses = deep.table, []
    for state, ahead in zip(mid, [0] * len(table.depths) + list(range(1, table.tokens_ahead)), strict=True):
        targets, rows = further(batch, ahead)
        losses.append(cross_entropy(state.flatten(0, 1), weight, targets.flatten(), rows, chunk))
    depths, tokens = losses[: len(table.depths)], losses[len(table.depths) :]
    terms = [table.weight / len(depths) * loss for loss in depths]
    terms += [table.ahead_weight / len(tokens) * loss for loss in tokens]
    named = zip(deep.names(), losses, strict=True)
    return torch.stack(terms).sum(), {f"{name}_loss": loss.detach() for name, loss in named}


def further(batch: Batch, k: int) -> tuple[Tensor, Tensor]:
    """Targets (B, T) of the token k after the next one, IGNORE beyond the document's end, and rows (N,) that hold all
    positions with such a target, each once; 0: the batch's own. A GPU is not asked how many there are."""
    if k == 0:
        return batch.targets, batch.rows
    same = F.pad(batch.doc[:, k:], (0, k), value=-2) == batch.doc
    targets = torch.where(same, batch.targets.roll(-k, 1), IGNORE)
    return targets, (batch.rows - k) % batch.targets.numel()  # those before the first become the last, and have none


def iteration_loss(
    model: LM, every: Sequence[Tensor], targets: Tensor, rows: Tensor, chunk: ChunkFunction | None = None
) -> Loss:
    """The loss of a model with a latent block, from its states after every iteration, (B, T, D) each.

    Every iteration is to answer as well as it can, so the loss is the mean of their cross-entropies (deep supervision
    over the steps). PonderNet (Banino et al. 2021) weights them by the probability to halt there and holds that to a
    geometric prior; but such a probability says when to stop, not how likely one is right, it is the prior that decides
    how many steps are made, and an iteration that is halted at seldom is hardly trained, so that the number of steps
    could not be chosen afterwards. Here halting follows from a probability that can be checked: the confidence head
    learns by log loss whether the likeliest token of its own state is the right one.
    """
    weight = head_weight(model)
    doubt = torch.zeros((), device=weight.device)
    losses = []
    for h in every:
        states = h.flatten(0, 1)
        loss, hits = cross_entropy_and_hits(states, weight, targets, rows, chunk)
        losses.append(loss)
        sure = model.head("confidence", states)[rows].float()
        doubt = doubt + F.binary_cross_entropy_with_logits(sure, hits.float(), reduction="sum")
    cross = torch.stack(losses).mean()
    assert model.config.reasoning is not None
    total = cross + model.config.reasoning.confidence_weight * doubt / len(every)
    metrics = {"first_loss": losses[0], "last_loss": losses[-1], "confidence_loss": doubt / len(every)}
    return Loss(total, {name: value.detach() for name, value in metrics.items()})


def head_weight(model: LM) -> Tensor:
    """The matrix (V, D) that makes logits of hidden states."""
    return model.embedding.weight if model.lm_head is None else model.lm_head.weight


def cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None = None, chunk: ChunkFunction | None = None
) -> Tensor:
    """Sum of -log softmax(h W^T)[target] over h (N, D), W (V, D), targets (N,); 0-dim fp32 (fp64 for fp64 inputs).

    With `rows` (n,) int64, each at most once, only over those rows: the others cost nothing. The logits never exist for
    more than CHUNK rows: their gradient is formed in the forward pass, where they are at hand, and only scaled in the
    backward pass (the idea of Liger-Kernel's fused linear cross-entropy, Hsu et al. 2024).
    """
    return cross_entropy_and_hits(h, weight, targets, rows, chunk)[0]


def cross_entropy_and_hits(
    h: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None = None, chunk: ChunkFunction | None = None
) -> tuple[Tensor, Tensor]:
    """`cross_entropy`, and for each of `rows` whether no token is more likely than its target: bool (n,)."""
    made: tuple[Tensor, Tensor] = _FusedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        h, weight, targets, rows, chunk or cross_entropy_chunk
    )
    return made


def cross_entropy_chunk(x: Tensor, w: Tensor, y: Tensor, by_weight: bool = True, smoothing: float = 0.0) -> ChunkLoss:
    """-log softmax(x W^T)[y], summed over rows x (n, D) with targets y (n,), for W (V, D).

    With label smoothing s (Szegedy et al. 2016, section 7) the loss of a row is log Z - (1 - s) logit[y] -
    s mean(logits). Written in place: without a compiler every new result of that size costs as much as its arithmetic.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    counts, at = (y >= 0)[:, None].to(exact), y.clamp(min=0)[:, None]
    logits = (x @ w.T).to(exact)  # (n, V)
    of_target, peak = logits.gather(-1, at), logits.amax(-1, keepdim=True)
    likely = (1 - smoothing) * of_target
    if smoothing:
        likely = likely + smoothing * logits.mean(-1, keepdim=True)
    powers = logits.sub_(peak).exp_()
    total = powers.sum(-1, keepdim=True)
    loss = ((peak + total.log() - likely) * counts).sum()
    share = counts / total  # softmax of a row that counts is its powers times this
    wanted = smoothing / w.shape[0]
    at_target = (of_target - peak).exp() * share - (1 - smoothing + wanted) * counts
    grad = powers.mul_(share)
    if smoothing:
        grad.sub_(wanted * counts)
    grad = grad.to(x.dtype).scatter_(-1, at, at_target.to(x.dtype))  # softmax - one_hot
    hits = (of_target >= peak).squeeze(-1)
    return ChunkLoss(loss, hits, grad @ w, grad.T @ x if by_weight else w.new_empty(0))


def smoothed_chunk(smoothing: float) -> ChunkFunction:
    """`cross_entropy_chunk` with label smoothing."""

    def chunk(x: Tensor, w: Tensor, y: Tensor, by_weight: bool = True) -> ChunkLoss:
        return cross_entropy_chunk(x, w, y, by_weight, smoothing)

    return chunk


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, chunk: ChunkFunction
    ) -> tuple[Tensor, Tensor]:
        kind = h.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        w = weight.detach().to(low)
        total = torch.zeros((), dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
        count = len(targets) if rows is None else len(rows)
        hits = torch.empty(count, dtype=torch.bool, device=h.device)
        grad_h = torch.zeros_like(h)
        # A head that is frozen, as with LoRA, saves a third of its arithmetic and a matrix of its size.
        grad_w = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        with torch.autocast(kind, enabled=False):
            for start in range(0, count, CHUNK):
                end = min(start + CHUNK, count)
                at = slice(start, end) if rows is None else rows[start:end]
                missing = CHUNK - (end - start)
                x, y = h.detach()[at].to(low), targets[at]
                if missing:
                    x, y = F.pad(x, (0, 0, 0, missing)), F.pad(y, (0, missing), value=IGNORE)
                made = chunk(x, w, y, grad_w is not None)
                total += made.sum
                hits[start:end] = made.hits[: end - start]
                grad_h[at] = made.by_x[: end - start].to(h.dtype)
                if grad_w is not None:
                    grad_w += made.by_w
        ctx.save_for_backward(grad_h, grad_w)
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor, Tensor | None, None, None, None]:
        grad_h, grad_w = ctx.saved_tensors
        by_weight = None if grad_w is None else grad_w * upstream.to(grad_w.dtype)
        return grad_h * upstream.to(grad_h.dtype), by_weight, None, None, None


class TokenStats(NamedTuple):
    """What is known of N predicted tokens, each (N,)."""

    log_probs: Tensor
    """log softmax(h W^T)[target], in fp32 (fp64 for fp64 inputs), with gradient."""
    entropy: Tensor
    """Of that distribution, in nats, with gradient."""
    hits: Tensor
    """1 where no other token is more likely than the target, else 0."""


def token_log_probs(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(h W^T)[target] and the entropy of that distribution, each (N,), for h (N, D), W (V, D), targets (N,).

    In fp32 (fp64 for fp64 inputs), with gradients of both, for losses in which every token has a weight of its own
    (DPO, PPO, GRPO, distillation). The logits exist for CHUNK rows at a time; the backward pass computes them again.
    """
    log_probs, entropy, _ = token_stats(h, weight, targets)
    return log_probs, entropy


def token_stats(h: Tensor, weight: Tensor, targets: Tensor) -> TokenStats:
    """`token_log_probs`, and whether the target was the most likely token."""
    return TokenStats(*_TokenLogProbs.apply(h, weight, targets))  # type: ignore[no-untyped-call]


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kind, n = h.device.type, len(targets)
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        x, w = F.pad(h.detach().to(low), (0, 0, 0, -n % ROUND)), weight.detach().to(low)
        y = F.pad(targets, (0, -n % ROUND))
        log_z = h.new_empty(len(y), dtype=torch.promote_types(h.dtype, torch.float32))
        log_probs, entropy, hits = torch.empty_like(log_z), torch.empty_like(log_z), torch.empty_like(log_z)
        buffers = _Buffers.of(min(CHUNK, len(y)), w, log_z.dtype)
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(y), CHUNK):
                at = slice(start, start + CHUNK)
                logits = buffers.logits(x[at], w)
                of_target = logits.gather(-1, y[at, None]).squeeze(-1)
                peak = logits.amax(-1)
                powers = torch.sub(logits, peak[:, None], out=buffers.second[: len(logits)]).exp_()
                total = powers.sum(-1)
                log_z[at] = peak + total.log()
                log_probs[at] = of_target - log_z[at]
                entropy[at] = log_z[at] - powers.mul_(logits).sum(-1) / total
                hits[at] = (of_target >= peak).to(hits.dtype)
        ctx.save_for_backward(x, w, y, log_z, entropy)
        ctx.dtypes = h.dtype, weight.dtype
        ctx.n = n
        hits = hits[:n]
        ctx.mark_non_differentiable(hits)
        ctx.set_materialize_grads(False)  # a loss that leaves the entropy alone does not pay for its gradient
        return log_probs[:n], entropy[:n], hits

    @staticmethod
    def backward(
        ctx: Any, by_log_prob: Tensor | None, by_entropy: Tensor | None, _: None
    ) -> tuple[Tensor, Tensor | None, None]:
        x, w, y, log_z, entropy = ctx.saved_tensors
        grad_h = torch.empty(x.shape, dtype=ctx.dtypes[0], device=x.device)
        grad_w = torch.zeros(w.shape, dtype=ctx.dtypes[1], device=x.device) if ctx.needs_input_grad[1] else None
        missing = len(y) - ctx.n
        by_log_prob = torch.zeros_like(log_z) if by_log_prob is None else F.pad(by_log_prob, (0, missing))
        by_entropy = None if by_entropy is None else F.pad(by_entropy, (0, missing))
        buffers = _Buffers.of(min(CHUNK, len(y)), w, log_z.dtype)
        for start in range(0, len(y), CHUNK):
            at = slice(start, start + CHUNK)
            log_p = buffers.logits(x[at], w).sub_(log_z[at, None])
            # d log p[y] / d logits = one_hot - p;  d H / d logits = -p (log p + H).
            if by_entropy is None:
                grad = log_p.exp_().mul_(-by_log_prob[at, None])
            else:
                p = torch.exp(log_p, out=buffers.second[: len(log_p)])
                grad = log_p.add_(entropy[at, None]).mul_(by_entropy[at, None]).add_(by_log_prob[at, None])
                grad.mul_(p).neg_()
            grad.scatter_add_(-1, y[at, None], by_log_prob[at, None])
            grad = buffers.product[: len(grad)].copy_(grad)
            grad_h[at] = (grad @ w).to(grad_h.dtype)
            if grad_w is not None:
                grad_w += grad.T @ x[at]
        return grad_h[: ctx.n], grad_w, None


class _Buffers(NamedTuple):
    """Room for what is made of a chunk's logits, (rows, V) each, for one chunk after the other: on a CPU new memory
    for every result takes as long as the arithmetic."""

    product: Tensor
    """In the arithmetic's precision."""
    first: Tensor
    """Exact."""
    second: Tensor
    """Exact."""

    @classmethod
    def of(cls, rows: int, w: Tensor, exact: torch.dtype) -> "_Buffers":
        """For so many rows at a time and the head w (V, D)."""
        return cls(*(w.new_empty(rows, len(w), dtype=dtype) for dtype in (w.dtype, exact, exact)))

    def logits(self, x: Tensor, w: Tensor) -> Tensor:
        """x W^T (n, V) of x (n, D), in `first`."""
        n = len(x)
        return self.first[:n].copy_(torch.mm(x, w.T, out=self.product[:n]))
