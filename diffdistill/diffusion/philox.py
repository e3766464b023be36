"""Philox 4x32-10, a counter-based generator of random integers: the same on every device and by every way below.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffdistill.diffusion.on_device import constant, upload
from diffdistill.settings.terminal import say

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Word = TypeVar("Word", Tensor, NDArray[np.int64], int)
Blocks = Callable[[Tensor, int, int, Tensor], Tensor]


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word | int]) -> tuple[Word, Word, Word, Word]:
    """Four words of 32 random bits per counter and key.

    counter: four int64 tensors or arrays (or integers) with values in [0, 2^32), broadcastable; key: two such.
    Returns four of them in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps at 64 bits, which keeps its low and (after the mask) high halves right. c1 and c3 keep bits
        # above the 32 that count to the end: they are only ever combined bit by bit.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((right >> 32) ^ c1 ^ k0) & MASK, right, ((left >> 32) ^ c3 ^ k1) & MASK, left
        k0, k1 = (k0 + _WEYL[0]) & MASK, (k1 + _WEYL[1]) & MASK
    return c0, c1 & MASK, c2, c3 & MASK


def block_words(
    index: Tensor, num_blocks: int, step: int, key: tuple[tuple[int, ...], int], *, compiles: bool = False
) -> Tensor:
    """The words of `philox` at the counters (index low, index high, block, step), on the index's device.

    index: [B] int64; key: its first half for each of n names, and the second, of all; compiles: whether a GPU makes
    them by one kernel of torch's compiler.  Returns [2, n, B, num_blocks, 2] int64: words 0 and 2 of each block, then
    1 and 3.
    """
    if index.device.type == "cpu":  # numpy takes half the time of torch's own calls, and a compiler's minute never pays
        first = np.array(key[0], dtype=np.int64)[:, None, None]
        return torch.from_numpy(_laid_out(np.stack, index.numpy(), np.arange(num_blocks), step, (first, key[1])))
    blocks = fused_blocks(index.device) if compiles else philox_blocks
    return blocks(index, num_blocks, step, _round_keys(*key, index.device))


def philox_blocks(index: Tensor, num_blocks: int, step: int, round_keys: Tensor) -> Tensor:
    """`block_words` by half as many of torch's operations as `philox` has.

    index: [B]; round_keys: of n names, see `_round_keys`.
    """
    index = index[:, None]
    product = (
        index.bitwise_and(MASK) * _MULTIPLIERS[0],
        torch.arange(num_blocks, device=index.device) * _MULTIPLIERS[1],
    )
    c0 = (product[1] >> 32 & MASK) ^ (index >> 32) ^ round_keys[0, 0]
    c2 = (product[0] >> 32 & MASK) ^ (round_keys[0, 1] ^ step)
    even = torch.stack(torch.broadcast_tensors(c0, c2))
    odd = torch.stack(torch.broadcast_tensors(product[1], product[0])).unsqueeze(1)
    multipliers = constant(_MULTIPLIERS, index.device, torch.int64).view(2, 1, 1, 1)
    for keys in round_keys[1:].unbind(0):
        crossed = (even * multipliers).flip(0)
        even = (crossed >> 32).bitwise_xor_(odd).bitwise_xor_(keys).bitwise_and_(MASK)
        odd = crossed
    return torch.stack([even.movedim(0, -1), odd.movedim(0, -1)]).bitwise_and_(MASK)


@lru_cache(maxsize=8)
def fused_blocks(device: torch.device, backend: str = "inductor") -> Blocks:
    """`philox_blocks` as one kernel of torch's compiler; itself, and a word about it, where that cannot compile, or
    compiles to other integers.

    One kernel serves every batch, shape and step; an axis of one entry has its own.
    """
    from torch._dynamo.exc import TorchDynamoException

    compiled = torch.compile(_blocks_at_once, dynamic=True, backend=backend)

    @torch.no_grad()
    def fused(index: Tensor, num_blocks: int, step: int, round_keys: Tensor) -> Tensor:
        if index.numel() * num_blocks * round_keys.shape[2] == 1:
            return philox_blocks(
                index, num_blocks, step, round_keys
            )  # inductor's C++ has other integers for one counter
        # The step as a tensor: it changes at each call, and 0 and 1 as integers would be compiled for themselves.
        made: Tensor = compiled(index, num_blocks, torch.full((), step, device=index.device), round_keys[0])
        return made

    # Sizes that all differ: the compiler takes equal ones for one. Keys and counters whose products pass 63 bits.
    trial = torch.arange(5, device=device) + 2**40 - 3, 7, MASK - 4, _round_keys((0, MASK, 2), MASK, device)
    try:
        cause = "" if torch.equal(fused(*trial), philox_blocks(*trial)) else "the compiled kernel has others"
    except TorchDynamoException as error:
        cause = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0] or type(error).__name__
    if cause:
        say(f"speed.compile: random numbers are drawn without it, the same ones, more slowly: {cause}")
        return philox_blocks
    return fused


def _blocks_at_once(index: Tensor, num_blocks: int, step: Tensor, keys: Tensor) -> Tensor:
    blocks = torch.arange(num_blocks, device=index.device)
    return _laid_out(torch.stack, index, blocks, step, (keys[0], keys[1]))


def _laid_out(stack: Callable[..., Any], index: Any, blocks: Any, step: Any, key: tuple[Any, Any]) -> Any:
    """`philox` of arrays or tensors, in the order of `block_words`."""
    index = index[:, None]
    words = philox((index & MASK, index >> 32, blocks, step), key)
    return stack([stack(words[::2], -1), stack(words[1::2], -1)])


@lru_cache(maxsize=256)
def _round_keys(first: tuple[int, ...], second: int, device: torch.device) -> Tensor:
    """The keys of philox's ten rounds, [10, 2, n, 1, 1], on a device. They do not change with the step.

    first: the first half, of n names; second: the other, of all.
    """
    rounds = [
        [[(key + i * _WEYL[0]) & MASK for key in first], [(second + i * _WEYL[1]) & MASK] * len(first)]
        for i in range(10)
    ]
    with torch.inference_mode(False):
        return upload(torch.tensor(rounds)[..., None, None], device)
