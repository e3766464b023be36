"""The outputs of a network's blocks that a call is asked for: a discriminator reads one or several.

The list "fastgen" is of the blocks that FastGen's discriminators read (github.com/NVlabs/FastGen, its configs at commit
34f30e8). Published: every encoder resolution's last block of EDM's CIFAR-10 U-Nets; the bottleneck of ADM, SD 1.5 and
SDXL; blocks 30 and 45 of Qwen-Image's 60 and of FLUX.1's 57, which those configs name in a comment and leave off for
the middle one. Ours: the same two shares, a half and three quarters, of every other transformer; our U-Net as EDM's.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from diffdistill.diffusion.denoiser import Features, Taps

MIDDLE = "middle"
FASTGEN = "fastgen"


def fastgen_transformer(count: int, published: int = 60) -> tuple[int, ...]:
    """FastGen's list for a transformer of `count` blocks: the numbers that stand where 30 and 45 do in `published`."""
    return tuple(dict.fromkeys(number * count // published for number in (30, 45)))


def fastgen_encoder(is_down: Sequence[bool]) -> tuple[int, ...]:
    """FastGen's list for a U-Net: the last encoder block of each resolution.  is_down: which of them halve it."""
    return tuple(i for i in range(len(is_down)) if i + 1 == len(is_down) or is_down[i + 1])


def block_numbers(
    taps: Taps, names: Sequence[str], middle: int, fastgen: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """The taps as numbers in the order of calls.

    names: of the blocks, in that order; middle: the number of the one that is tapped by default; fastgen: the numbers
    of that list, None: those of a transformer.  Raises ValueError on a tap that is no block, and on none.
    """
    if taps == FASTGEN:
        return fastgen or fastgen_transformer(len(names))
    if not taps:
        raise ValueError("taps: name at least one block")
    return tuple(_number(tap, names, middle) for tap in taps)


def _number(tap: int | str, names: Sequence[str], middle: int) -> int:
    if tap == MIDDLE:
        return middle
    if isinstance(tap, int) and -len(names) <= tap < len(names):
        return tap % len(names)
    if tap not in names:
        choices = f"{MIDDLE}, 0 to {len(names) - 1}, or by name {', '.join(names)}"
        raise ValueError(f"taps: {tap!r} is not a block of this network; choose from {choices}")
    return names.index(tap)


class Tapped:
    """Keeps the outputs of the tapped blocks of one pass.  numbers: of these blocks, in the order named."""

    def __init__(
        self, taps: Taps | None, names: Sequence[str], middle: int, fastgen: tuple[int, ...] | None = None
    ) -> None:
        """Arguments as `block_numbers`; taps None: the middle alone, whatever the names."""
        self._is_single = taps is None
        self.numbers = (middle,) if taps is None else block_numbers(taps, names, middle, fastgen)
        self._kept: dict[int, Any] = {}

    @property
    def count(self) -> int:
        """How many blocks run until the last tap is there."""
        return max(self.numbers) + 1

    def seen(self, number: int, output: Any) -> Any:
        """The output of block `number` as it is, kept if it is tapped."""
        if number in self.numbers:
            self._kept[number] = output
        return output

    def features(self, as_map: Callable[[Any], Tensor] = lambda output: output) -> Features:
        """The bottleneck, or the taps in the order named, each made a map [B, C, h, w] by `as_map`."""
        maps = tuple(as_map(self._kept[number]) for number in self.numbers)
        return maps[0] if self._is_single else maps
