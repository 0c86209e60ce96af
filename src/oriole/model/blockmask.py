"""FlexAttention's block mask of documents and a window, made without the square of queries and keys."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

__all__ = ["block_mask"]

SIZE = 128
"""Queries and keys of a block; what FlexAttention's kernels are tuned for."""


def block_mask(doc: Tensor, window: int | None = None) -> BlockMask:
    """The mask of documents doc (B, T), of causality and of a window, block by block.

    Which blocks are empty, which full and which must look at every element follows from the smallest and the largest
    document of each block, (T / 128)^2 comparisons. Where documents do not lie in order that may call an empty block
    mixed, which costs time and changes nothing.
    """
    t = doc.shape[1]

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (doc[row, query] == doc[row, key])
        return seen if window is None else seen & (query - key < window)

    blocks = document_blocks(doc, window)
    return BlockMask((t, t), *blocks, BLOCK_SIZE=(SIZE, SIZE), mask_mod=allowed)  # type: ignore[misc]


@torch.library.custom_op("oriole::document_blocks", mutates_args=())
def document_blocks(doc: Tensor, window: int | None) -> list[Tensor]:
    """What a `BlockMask` of doc (B, T) holds, int32: how many blocks of keys each block of queries meets in part
    (B, 1, n) and which (B, 1, n, n), the same of those that it meets whole, and both again from the keys' side.

    An operator of its own: left to the compiler, in one graph with the kernel, queries that see whole blocks came out
    wrong where rows differ and T is a multiple of 128 (torch 2.11 on an H100; docs/log.md). Made outside, all is right.
    """
    count = -(-doc.shape[1] // SIZE)
    # What fills the last block belongs to no document, so that the block is never full. Padding is put last, where it
    # lies, so that a block that ends in it spans few documents.
    last = torch.iinfo(torch.int32).max
    ordered = torch.where(doc < 0, last - 1, doc.int())
    filled = torch.nn.functional.pad(ordered, (0, count * SIZE - doc.shape[1]), value=last)
    low, high = filled.view(-1, count, SIZE).aminmax(dim=2)  # (B, blocks)
    first = torch.arange(count, device=doc.device) * SIZE
    query, key = first[:, None], first[None, :]

    # A query less a key: what lies between the two, from the nearest to the farthest pair of the blocks.
    near, far = query - key - SIZE + 1, query - key + SIZE - 1
    some = (far >= 0) & (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])
    full = (near >= 0) & (low == high)[:, :, None] & (low == high)[:, None, :] & (low[:, :, None] == low[:, None, :])
    if window is not None:
        some, full = some & (near < window), full & (far < window)
    partial = some & ~full
    return [x for blocks in (partial, full, partial.mT, full.mT) for x in _ordered(blocks)]


@document_blocks.register_fake
def _(doc: Tensor, window: int | None) -> list[Tensor]:
    b, n = doc.shape[0], -(-doc.shape[1] // SIZE)
    return [doc.new_empty(shape, dtype=torch.int32) for _ in range(4) for shape in ((b, 1, n), (b, 1, n, n))]


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q, K) booleans -> how many of each row are true (B, 1, Q), and their columns first (B, 1, Q, K)."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    counts = blocks.sum(-1, dtype=torch.int32)
    return counts.contiguous()[:, None], columns.int().contiguous()[:, None]
