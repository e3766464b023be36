"""Philox's words by plain integers, and the cases in which every way of making them is compared."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from diffdistill.diffusion.philox import _round_keys, philox

INDICES = torch.tensor([0, 7, 2**32 - 1, 2**40 + 3]), torch.tensor([5])
NAMES = (0, 0xFFFFFFFF, 12345), (99,)
CASES = [*itertools.product(INDICES, (1, 6), (0, 1, 2**32 - 5), NAMES, (0, 0xFFFFFFFF))]


def reference(index: Tensor, num_blocks: int, step: int, first: tuple[int, ...], second: int) -> Tensor:
    """By plain integers, one counter after another."""
    counters = itertools.product(first, index.tolist(), range(num_blocks))
    words = [philox((i & 0xFFFFFFFF, i >> 32, block, step), (name, second)) for name, i, block in counters]
    shape = len(first), len(index), num_blocks, 2
    return torch.stack([torch.tensor(words)[:, half::2].reshape(shape) for half in (0, 1)])


Way = Callable[[Tensor, int, int, tuple[int, ...], int], Tensor]


def by(blocks: Callable[[Tensor, int, int, Tensor], Tensor]) -> Way:
    return lambda index, n, step, first, second: blocks(index, n, step, _round_keys(first, second, index.device))


def check(way: Way) -> None:
    for index, num_blocks, step, first, second in CASES:
        found = way(index, num_blocks, step, first, second)
        assert found.dtype == torch.int64
        assert torch.equal(found.cpu(), reference(index.cpu(), num_blocks, step, first, second))
