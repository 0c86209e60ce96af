"""One process or many: the few questions the loop asks, answered alike whether torch.distributed is running or not."""

import torch.distributed as torch_dist
from torch import Tensor

__all__ = ["rank", "sum", "world"]


def _running() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()


def world() -> int:
    """Number of processes that train together."""
    return torch_dist.get_world_size() if _running() else 1


def rank() -> int:
    """This process's number, 0 … world() - 1."""
    return torch_dist.get_rank() if _running() else 0


def sum(tensor: Tensor) -> Tensor:
    """The tensor summed over all processes; with one process the tensor itself. The argument is not changed."""
    if not _running():
        return tensor
    total = tensor.detach().clone()
    torch_dist.all_reduce(total)
    return total
