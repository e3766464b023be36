"""All pairs of two sets of features, a block at a time: squared distances by matrix products in float64."""

from collections.abc import Iterator

import torch
from torch import Tensor


def squared_distances(a: Tensor, b: Tensor, *, slack: float = 0.0) -> Tensor:
    """[A, B] of |a - b|^2 - slack (|a|^2 + |b|^2).

    a: [A, d]; b: [B, d].  Without slack the rounding is below `rounding(d)` (|a|^2 + |b|^2), to either side of zero
    where samples are equal; so take the features' mean off first.
    """
    a, b = a.double(), b.double()
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    return (a @ b.T).mul_(-2).add_(norms, alpha=1 - slack)


def rounding(num_features: int) -> float:
    """What `squared_distances` may be off by, as a share of |a|^2 + |b|^2: of a sum of d products, Higham 2002, 3.1."""
    return num_features * torch.finfo(torch.float64).eps


def blocks(count: int, block_size: int) -> list[slice]:
    """0 .. count - 1 in pieces."""
    return [slice(start, min(start + block_size, count)) for start in range(0, count, block_size)]


def half_of_pairs(count: int, block_size: int) -> Iterator[tuple[slice, slice]]:
    """Every pair of blocks of one set once, a block with itself among them."""
    pieces = blocks(count, block_size)
    for i, rows in enumerate(pieces):
        for columns in pieces[i:]:
            yield rows, columns
