"""Which optimizer moves which parameter: every one that trains belongs to exactly one group, a frozen one to none."""

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

__all__ = ["Groups", "groups_of"]


@dataclass(frozen=True)
class Groups:
    """Names of parameters. Shared ones are named once."""

    muon: tuple[str, ...]
    """Matrices between embedding and head, for Muon; empty without it."""
    decayed: tuple[str, ...]
    """Matrices that are not embeddings, decayed; empty with Muon."""
    plain: tuple[str, ...]
    """The rest: embeddings, a head tied to one, norms, biases; with Muon also heads and routers. Never decayed."""
    signed: tuple[str, ...]
    """What moves by a fixed length against the sign of its gradient, and has no share in the gradient's norm: the
    biases that balance experts."""


def groups_of(model: nn.Module, *, muon: bool, signed: Collection[str] = ()) -> Groups:
    """The groups of a model's parameters, with or without Muon; `signed` names those that are neither's."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    by_sign = tuple(name for name in named if name in signed)
    training = {name: p for name, p in named.items() if name not in signed}
    matrices = [name for name, p in training.items() if p.dim() >= 2 and id(p) not in embeddings]
    inner = [name for name in matrices if training[name].dim() == 2 and not _is_head(name)] if muon else []
    decayed = [] if muon else matrices
    taken = {*inner, *decayed}
    groups = Groups(tuple(inner), tuple(decayed), tuple(name for name in training if name not in taken), by_sign)
    claimed = [id(named[name]) for names in (groups.muon, groups.decayed, groups.plain, by_sign) for name in names]
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(claimed) == len(set(claimed)) and set(claimed) == wanted, "every parameter belongs to exactly one group"
    return groups


def _is_head(name: str) -> bool:
    # A router's rows compete for a token like a head's; made orthogonal, all experts would pull alike.
    return any(word.rpartition("_")[2] in ("head", "heads", "router") for word in name.split("."))
