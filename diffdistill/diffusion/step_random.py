"""Random numbers that depend on (seed, step, global sample index, name) alone.

A counter-based generator (Philox 4x32-10, Salmon et al. 2011) in torch's integer operations: the same integers on
every device, no state to save, no loop over samples. So a resumed run, an accumulated batch and a batch split over
processes all see the numbers of one undisturbed run.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


Word = TypeVar("Word", Tensor, int)


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, int]) -> tuple[Word, Word, Word, Word]:
    """Four words of 32 random bits per counter and key.

    counter: four int64 tensors (or integers) with values in [0, 2^32), broadcastable; key: two such.
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
        words = self._words(names, self.index, -(-count // 4))
        radius = (-2 * _unit(words[..., 0::2], wide).log()).sqrt_()
        angle = _unit(words[..., 1::2], wide) * (2 * math.pi)
        values = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(2)[..., :count].to(dtype)
        return dict(zip(names, values.reshape(len(names), -1, *shape).unbind(0), strict=True))

    def fresh_noise(self, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
        """The noise that a stochastic sampler adds after its step i: [B, *shape] by i."""
        return lambda i: self.normal(f"fresh {i}", shape)

    def uniform(self, name: str) -> Tensor:
        """[B] in (0, 1), float64."""
        return self.uniforms((name,))[name]

    def uniforms(self, names: Sequence[str]) -> dict[str, Tensor]:
        """`uniform` for several names: the same numbers, in one pass."""
        values = _unit(self._words(names, self.index, 1)[..., 0], torch.float64)
        return dict(zip(names, values.unbind(0), strict=True))

    def integers(self, name: str, high: int) -> Tensor:
        """[B] int64 in 0 .. high - 1."""
        return integer_of(self.uniform(name), high)

    def grouped(self, size: int) -> "StepRandom":
        """The numbers of groups in the place of samples: `size` samples after one another have the same ones."""
        return replace(self, index=self.index // size)

    def shared_integer(self, name: str, high: int) -> int:
        """One integer in 0 .. high - 1 for the whole batch: the same in every micro-batch and process."""
        return self._one(name + " (shared)", _MASK)[0] * high >> 32

    def torch_seed(self, name: str) -> int:
        """A seed for torch's own generator, for what draws inside a network (dropout)."""
        words = self._one(name, int(self.index[0]))
        return words[0] << 31 | words[1] >> 1

    def _one(self, name: str, index: int) -> tuple[int, int, int, int]:
        return philox((index & _MASK, index >> 32, 0, self.step & _MASK), (self._hash(name), self.seed >> 32 & _MASK))

    def _hash(self, name: str) -> int:
        return (self.seed ^ zlib.crc32(name.encode())) & _MASK

    def _words(self, names: Sequence[str], index: Tensor, blocks: int) -> Tensor:
        """[len(names), len(index), 4 * blocks]: up to 2^64 samples, 2^32 steps, and names told apart by the key."""
        device = index.device
        index = index[:, None]
        block = torch.arange(blocks, device=device)
        counter = (index & _MASK, index >> 32, block, torch.tensor(self.step & _MASK, device=device))
        key = torch.tensor([self._hash(name) for name in names], device=device)[:, None, None]
        words = philox(counter, (key, (self.seed >> 32) & _MASK))
        return torch.stack(torch.broadcast_tensors(*words), -1).flatten(2)


def integer_of(uniform: Tensor, high: int) -> Tensor:
    """Uniform numbers in (0, 1) as integers 0 .. high - 1, int64."""
    return (uniform * high).long().clamp_max(high - 1)


def _unit(words: Tensor, dtype: torch.dtype) -> Tensor:
    """32-bit words in (0, 1], never 0; in float64 never 1 either."""
    return (words.to(dtype) + 0.5) * 2.0**-32
