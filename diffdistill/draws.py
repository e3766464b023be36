"""Random numbers that depend on (seed, step, global sample index, name) alone.

A counter-based generator (Philox 4x32-10, Salmon et al. 2011) in torch's integer operations: the same integers on
every device, no state to save, no loop over samples. So a resumed run, an accumulated batch and a batch split over
processes all see the numbers of one undisturbed run.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words of 32 random bits per counter.

    counter: four int64 tensors with values in [0, 2^32), broadcastable.  key: two such integers.
    Returns four int64 tensors in [0, 2^32).  Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # The product wraps at 64 bits, which keeps its low and (after the mask) high halves right.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((right >> 32) & _MASK) ^ c1 ^ k0,
            right & _MASK,
            ((left >> 32) & _MASK) ^ c3 ^ k1,
            left & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Draws:
    """The random numbers of the samples `index` in one step.

    seed, step: non-negative.  index: [B] int64, global sample numbers (over micro-batches and processes).
    Numbers asked for under two names are independent; under one name they are the same numbers.
    """

    seed: int
    step: int
    index: Tensor

    def normal(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, *shape] of N(0, 1)."""
        count = math.prod(shape)
        words = self._words(name, self.index, -(-count // 4))
        first, second = words[..., 0::2], words[..., 1::2]
        radius = (-2 * _unit(first).log()).sqrt()
        angle = (2 * math.pi) * _unit(second)
        pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)
        return pairs[:, :count].reshape(-1, *shape).to(dtype)

    def fresh_noise(self, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
        """The noise that a stochastic sampler adds after its step i: [B, *shape] by i."""
        return lambda i: self.normal(f"fresh {i}", shape)

    def uniform(self, name: str) -> Tensor:
        """[B] in (0, 1), float64."""
        return _unit(self._words(name, self.index, 1)[:, 0])

    def integers(self, name: str, high: int) -> Tensor:
        """[B] int64 in 0 .. high - 1."""
        return self._words(name, self.index, 1)[:, 0] * high >> 32

    def shared_integer(self, name: str, high: int) -> int:
        """One integer in 0 .. high - 1 for the whole batch: the same in every micro-batch and process."""
        everyone = torch.tensor([_MASK])
        return int(self._words(name + " (shared)", everyone, 1)[0, 0]) * high >> 32

    def torch_seed(self, name: str) -> int:
        """A seed for torch's own generator, for what draws inside a network (dropout)."""
        words = self._words(name, self.index[:1].cpu(), 1)[0].tolist()
        return int(words[0] << 31 | words[1] >> 1)

    def _words(self, name: str, index: Tensor, blocks: int) -> Tensor:
        """[len(index), 4 * blocks] words; samples are told apart by up to 2^64 numbers, steps by 2^32."""
        device = index.device
        block = torch.arange(blocks, device=device)[None]
        index = index[:, None]
        counter = (index & _MASK, index >> 32, block, torch.tensor(self.step & _MASK, device=device))
        key = ((self.seed ^ zlib.crc32(name.encode())) & _MASK, (self.seed >> 32) & _MASK)
        return torch.stack(philox(counter, key), -1).flatten(1)


def _unit(words: Tensor) -> Tensor:
    """32-bit words as float64 in (0, 1), never its ends."""
    return (words.double() + 0.5) * 2.0**-32
