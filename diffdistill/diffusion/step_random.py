"""Random numbers that depend on (seed, step, global sample index, name) alone.

A counter-based generator (philox.py): the same integers on every device, no state to save, no loop over samples. So a
resumed run, an accumulated batch and a batch split over processes all see the numbers of one undisturbed run.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffdistill.diffusion.on_device import known_on_host, on_host, remember, upload
from diffdistill.diffusion.philox import MASK, block_words, philox


@dataclass(frozen=True)
class StepRandom:
    """The random numbers of the samples `index` in one step.

    seed, step: non-negative.  index: [B] int64, global sample numbers (over micro-batches and processes).
    compiles: whether a GPU draws them by one kernel of torch's compiler, the same numbers.
    Numbers asked for under two names are independent; under one name they are the same numbers.
    """

    seed: int
    step: int
    index: Tensor
    compiles: bool = False

    def normal(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, *shape] of N(0, 1)."""
        return self.normals((name,), shape, dtype)[name]

    def normals(
        self, names: Sequence[str], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """`normal` for several names: the same numbers, in one pass. Half precision is rounded at the end."""
        count, wide = math.prod(shape), torch.promote_types(dtype, torch.float32)
        keys = tuple(map(self._hash, names)), self.seed >> 32 & MASK
        words = block_words(self.index, -(-count // 4), self.step & MASK, keys, compiles=self.compiles)
        first, second = _unit(words, wide).unbind(0)
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
        words = philox((index & MASK, index >> 32, zero, zero + (self.step & MASK)), (keys, self.seed >> 32 & MASK))
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
        return self._one(name + " (shared)", MASK)[0] * high >> 32

    def torch_seed(self, name: str) -> int:
        """A seed for torch's own generator, for what draws inside a network (dropout)."""
        words = self._one(name, int(on_host(self.index)[0]))
        return words[0] << 31 | words[1] >> 1

    def _one(self, name: str, index: int) -> tuple[int, int, int, int]:
        return philox((index & MASK, index >> 32, 0, self.step & MASK), (self._hash(name), self.seed >> 32 & MASK))

    def _hash(self, name: str) -> int:
        return (self.seed ^ zlib.crc32(name.encode())) & MASK


def integer_of(uniform: Tensor, high: int) -> Tensor:
    """Uniform numbers in (0, 1) as integers 0 .. high - 1, int64. The host knows them where it knew the others."""
    made = (uniform * high).long().clamp_max(high - 1)
    host = known_on_host(uniform)
    return made if host is None or host is uniform else remember(made, integer_of(host, high))


def _unit(words: Tensor, dtype: torch.dtype) -> Tensor:
    """32-bit words in (0, 1], never 0; in float64 never 1 either."""
    return (words.to(dtype) + 0.5) * 2.0**-32
