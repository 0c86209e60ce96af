"""Which optimizer moves which parameter: every one that trains belongs to exactly one group, a frozen one to none."""

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
    """The rest: embeddings, a head tied to one, norms, biases; with Muon also heads. Never decayed."""


def groups_of(model: nn.Module, *, muon: bool) -> Groups:
    """The groups of a model's parameters, with or without Muon."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    training = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [name for name, p in training.items() if p.dim() >= 2 and id(p) not in embeddings]
    inner = [name for name in matrices if training[name].dim() == 2 and not _is_head(name)] if muon else []
    decayed = [] if muon else matrices
    taken = {*inner, *decayed}
    groups = Groups(tuple(inner), tuple(decayed), tuple(name for name in training if name not in taken))
    claimed = [id(training[name]) for names in (groups.muon, groups.decayed, groups.plain) for name in names]
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(claimed) == len(set(claimed)) and set(claimed) == wanted, "every parameter belongs to exactly one group"
    return groups


def _is_head(name: str) -> bool:
    return any(word.endswith(("head", "heads")) for word in name.split("."))
