"""One model on several devices: copied to each (DDP), or cut into pieces of which each holds its own (FSDP2).

Both add up the processes' gradients once a step, in the last of its backward passes, and give their mean; the loop's
`share = loss.sum * world / total` makes that the gradient of the whole step's loss.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from oriole.model.lm import LM
from oriole.model.seq2seq import Seq2Seq
from oriole.train import dist

if TYPE_CHECKING:  # imported below where several processes need them: they cost a second of every start
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

__all__ = ["Kind", "Parallel", "as_rows_of", "local", "span", "whole"]

T = TypeVar("T")

Kind = Literal["auto", "ddp", "fsdp"]


class Parallel:
    """What the loop puts around a model's forward and backward passes; with one process nothing.

    `fsdp` turns the model's parameters into `DTensor`s in place, cut by rows: build the optimizer afterwards. The
    weights are gathered as they are, in fp32, so that a step rounds as it does on one device.
    """

    def __init__(self, model: nn.Module, kind: Kind, device: torch.device) -> None:
        self.model = model
        self._ddp: DistributedDataParallel | None = None
        self._pieces: list[FSDPModule] = []  # the whole model, then its parts
        self._compiled: dict[nn.Module, Callable[..., Any]] = {}
        if dist.world() == 1:
            self.name = "one process"
        elif kind == "fsdp":
            self._shard(model, device)
            self.name = f"{dist.world()} processes, FSDP2"
        else:
            self._ddp = DistributedDataParallel(_Calls(model), gradient_as_bucket_view=True)
            self.name = f"{dist.world()} processes, DDP"

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of the weights."""
        return bool(self._pieces)

    def _shard(self, model: nn.Module, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        for tensor in (*model.parameters(), *model.buffers()):  # DDP does this by itself
            torch.distributed.broadcast(tensor.data, 0)
        mesh = init_device_mesh(device.type, (dist.world(),))
        for block in _blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self._pieces = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def call(self, work: Callable[[], T]) -> T:
        """The result of `work`, which calls the model once, so that its backward pass reaches the other processes."""
        result: T = work() if self._ddp is None else self._ddp(work)
        return result

    @contextlib.contextmanager
    def micro(self, last: bool) -> Iterator[None]:
        """Around the forward and backward of a micro-batch: gradients are exchanged in the last of a step only."""
        if self._ddp is not None:
            with contextlib.nullcontext() if last else self._ddp.no_sync():
                yield
            return
        if self._pieces:
            self._pieces[0].set_requires_gradient_sync(last)
        yield

    def compile(self) -> Callable[..., Any]:
        """What training is to call instead of the model. Evaluation keeps calling the plain one: its shapes would be
        compiled one by one.

        Of a model that is cut, each block is compiled by itself, between the gathering of its weights and their
        release.
        """
        if not self._pieces:
            return torch.compile(self.model, dynamic=False)
        blocks = [piece for piece in self._pieces[1:] if isinstance(piece, nn.Module)]
        self._compiled = {block: torch.compile(block.forward, dynamic=False) for block in blocks}
        self._use_compiled(True)
        return self.model

    def _use_compiled(self, yes: bool) -> None:
        for block, forward in self._compiled.items():
            if yes:
                block.forward = forward
            else:
                del block.forward  # and the class's shows again

    def reset(self) -> None:
        """Forget a forward or backward pass that has raised, and what `compile` has made."""
        if self._pieces:
            self._use_compiled(False)
            self._compiled = {}
            self._pieces[0].reset_iter_state()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, the parameters are whole, plain tensors in every process: to evaluate, to generate, to save.

        All processes must enter. What is changed inside is lost.
        """
        self._use_compiled(False)
        for piece in self._pieces:
            piece.set_reshard_after_forward(False, recurse=False)
            piece.unshard()
        try:
            yield
        finally:
            self._use_compiled(True)
            for piece in self._pieces:
                piece.reshard()
                piece.set_reshard_after_forward(piece is not self._pieces[0], recurse=False)  # as fully_shard has it


def _blocks(model: nn.Module) -> Iterable[nn.Module]:
    """What is gathered and released piece by piece."""
    match model:
        case LM():
            return model.blocks
        case Seq2Seq():
            return (*model.encoder, *model.decoder)
        case _:
            return model.children()


class _Calls(nn.Module):
    """The module that DDP wraps: it owns the model's parameters and calls whatever uses them, the loss included."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # DDP's own name. Tables that never change need no broadcast before every forward pass; what the argument for
        # that is called depends on the version of torch.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def _is_cut(tensor: Tensor) -> TypeGuard["DTensor"]:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its rows, gathered from the processes that hold them; a plain tensor as it is."""
    return tensor.full_tensor() if _is_cut(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The rows that this process holds, sharing their memory; a plain tensor as it is."""
    return tensor.to_local() if _is_cut(tensor) else tensor


def span(tensor: Tensor) -> tuple[int, int]:
    """The first of the rows that this process holds, and the one after the last."""
    rows = tensor.shape[0]
    if not _is_cut(tensor):
        return 0, rows
    each = -(-rows // dist.world())  # as torch.chunk: the last processes may have fewer, or none
    return min(rows, dist.rank() * each), min(rows, (dist.rank() + 1) * each)


def as_rows_of(rows: Tensor, tensor: Tensor) -> Tensor:
    """`rows`, this process's, as a tensor that is cut as `tensor` is; alone, as they are."""
    if not _is_cut(tensor):
        return rows
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(
        rows, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return made
