"""Random numbers that depend on (seed, step, global sample index, name) alone.

A counter-based generator (Philox 4x32-10, Salmon et al. 2011) in torch's integer operations: the same integers on
every device, no state to save, no loop over samples. So a resumed run, an accumulated batch and a batch split over
processes all see the numbers of one undisturbed run.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffdistill.diffusion.on_device import constant, known_on_host, on_host, remember, upload

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


Word = TypeVar("Word", Tensor, NDArray[np.int64], int)


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, int]) -> tuple[Word, Word, Word, Word]:
    """Four words of 32 random bits per counter and key.

    counter: four int64 tensors or arrays (or integers) with values in [0, 2^32), broadcastable; key: two such.
    Returns four of them in [0, 2^32).  Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps at 64 bits, which keeps its low and (after the mask) high halves right.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((right >> 32) & _MASK) ^ (c1 ^ k0),
            right & _MASK,
            ((left >> 32) & _MASK) ^ (c3 ^ k1),
            left & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def philox_blocks(index: Tensor, num_blocks: int, step: int, round_keys: Tensor) -> Tensor:
    """The words of `philox` at the counters (index low, index high, block, step), by half as many operations.

    index: [B]; round_keys: of n names, see `_round_keys`.  Returns [2, n, B, num_blocks, 2]: words 0 and 2 of each
    block, then 1 and 3.
    """
    index = index[:, None]
    product = (
        index.bitwise_and(_MASK) * _MULTIPLIERS[0],
        torch.arange(num_blocks, device=index.device) * _MULTIPLIERS[1],
    )
    c0 = (product[1] >> 32 & _MASK) ^ (index >> 32) ^ round_keys[0, 0]
    c2 = (product[0] >> 32 & _MASK) ^ (round_keys[0, 1] ^ step)
    even = torch.stack(torch.broadcast_tensors(c0, c2))
    odd = torch.stack(torch.broadcast_tensors(product[1], product[0])).unsqueeze(1)
    multipliers = constant(_MULTIPLIERS, index.device, torch.int64).view(2, 1, 1, 1)
    for keys in round_keys[1:].unbind(0):
        crossed = (even * multipliers).flip(0)
        # The words of `odd` keep bits above the 32 that count: they are only ever combined bit by bit.
        even = (crossed >> 32).bitwise_xor_(odd).bitwise_xor_(keys).bitwise_and_(_MASK)
        odd = crossed
    return torch.stack([even.movedim(0, -1), odd.movedim(0, -1)]).bitwise_and_(_MASK)


@lru_cache(maxsize=256)
def _round_keys(first: tuple[int, ...], second: int, device: torch.device) -> Tensor:
    """The keys of philox's ten rounds, [10, 2, n, 1, 1], on a device. They do not change with the step.

    first: the first half, of n names; second: the other, of all.
    """
    rounds = [
        [[(key + i * _WEYL[0]) & _MASK for key in first], [(second + i * _WEYL[1]) & _MASK] * len(first)]
        for i in range(10)
    ]
    with torch.inference_mode(False):
        return upload(torch.tensor(rounds)[..., None, None], device)


@dataclass(frozen=True)
class StepRandom:
    """The random numbers of the samples `index` in one step.

    seed, step: non-negative.  index: [B] int64, global sample numbers (over micro-batches and processes).
    Numbers asked for under two names are independent; under one name they are the same numbers.
    """

    seed: int
    step: int
    index: Tensor

    def normal(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, *shape] of N(0, 1)."""
        return self.normals((name,), shape, dtype)[name]

    def normals(
        self, names: Sequence[str], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """`normal` for several names: the same numbers, in one pass. Half precision is rounded at the end."""
        count, wide = math.prod(shape), torch.promote_types(dtype, torch.float32)
        keys = _round_keys(tuple(map(self._hash, names)), self.seed >> 32 & _MASK, self.index.device)
        first, second = _unit(philox_blocks(self.index, -(-count // 4), self.step & _MASK, keys), wide).unbind(0)
        radius, angle = (-2 * first.log()).sqrt_(), second * (2 * math.pi)
        values = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(2)[..., :count].to(dtype)
        return dict(zip(names, values.reshape(len(names), -1, *shape).unbind(0), strict=True))

    def fresh_noise(self, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
        """The noise that a stochastic sampler adds after its step i: [B, *shape] by i."""
        return lambda i: self.normal(f"fresh {i}", shape)

    def uniform(self, name: str) -> Tensor:
        """[B] in (0, 1), float64."""
        return self.uniforms((name,))[name]

    def uniforms(self, names: Sequence[str]) -> dict[str, Tensor]:
        """`uniform` for several names: the same numbers, in one pass. The host knows them, as it knows the index."""
        index = on_host(self.index).numpy()
        keys = np.array([[self._hash(name)] for name in names], dtype=np.int64)
        zero = np.zeros_like(index)
        words = philox((index & _MASK, index >> 32, zero, zero + (self.step & _MASK)), (keys, self.seed >> 32 & _MASK))
        values = torch.from_numpy((words[0] + 0.5) * 2.0**-32)
        there = upload(values, self.index.device)
        return {name: remember(there[row], values[row]) for row, name in enumerate(names)}

    def integers(self, name: str, high: int) -> Tensor:
        """[B] int64 in 0 .. high - 1."""
        return integer_of(self.uniform(name), high)

    def grouped(self, size: int) -> "StepRandom":
        """The numbers of groups in the place of samples: `size` samples after one another have the same ones."""
        index = self.index // size
        host = known_on_host(self.index)
        return replace(self, index=index if host is None else remember(index, host // size))

    def shared_integer(self, name: str, high: int) -> int:
        """One integer in 0 .. high - 1 for the whole batch: the same in every micro-batch and process."""
        return self._one(name + " (shared)", _MASK)[0] * high >> 32

    def torch_seed(self, name: str) -> int:
        """A seed for torch's own generator, for what draws inside a network (dropout)."""
        words = self._one(name, int(on_host(self.index)[0]))
        return words[0] << 31 | words[1] >> 1

    def _one(self, name: str, index: int) -> tuple[int, int, int, int]:
        return philox((index & _MASK, index >> 32, 0, self.step & _MASK), (self._hash(name), self.seed >> 32 & _MASK))

    def _hash(self, name: str) -> int:
        return (self.seed ^ zlib.crc32(name.encode())) & _MASK


def integer_of(uniform: Tensor, high: int) -> Tensor:
    """Uniform numbers in (0, 1) as integers 0 .. high - 1, int64. The host knows them where it knew the others."""
    made = (uniform * high).long().clamp_max(high - 1)
    host = known_on_host(uniform)
    return made if host is None or host is uniform else remember(made, integer_of(host, high))


def _unit(words: Tensor, dtype: torch.dtype) -> Tensor:
    """32-bit words in (0, 1], never 0; in float64 never 1 either."""
    return (words.to(dtype) + 0.5) * 2.0**-32
