"""Images of several aspects: a fixed list of sizes of about equal area, and the source and order of images that each
have the nearest one's. A batch is of one size.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from diffdistill.data.order import DataOrder
from diffdistill.data.shards import table_key
from diffdistill.data.source import ImageSource
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.settings.numbers import Resolution
from diffdistill.settings.schema import UserError, schema

Size = tuple[int, int]
"""Height and width."""

BLOCK = 256  # steps, in which each bucket has its share of the batches


@schema
class BucketsConfig:
    """Images roughly keep their aspect ratio: each takes the nearest of a list of sizes of about the resolution's area.

    step: their sides are multiples of it.  most_aspect: the largest ratio of the longer side to the shorter.
    """

    step: Resolution = 64
    most_aspect: Annotated[float, Field(gt=1, le=8)] = 2.0


def bucket_sizes(size: Size, config: BucketsConfig) -> tuple[Size, ...]:
    """The sizes by their aspect, the widest first, `size` itself among them."""
    area, step, found = size[0] * size[1], config.step, {size}
    for short in range(step, math.isqrt(area) + 1, step):
        long = round(area / short / step) * step
        if long <= config.most_aspect * short:
            found |= {(short, long), (long, short)}
    return tuple(sorted(found, key=lambda one: (one[0] / one[1], one)))


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> int:
    """The number of the size whose aspect differs by the least factor; of two the first."""
    aspect = math.log(size[0] / size[1])
    return min(range(len(sizes)), key=lambda number: abs(aspect - math.log(sizes[number][0] / sizes[number][1])))


class BucketedImages:
    """Sources of images of one size each, whose numbers follow one another."""

    def __init__(
        self, parts: Sequence[ImageSource], image_shape: tuple[int, ...], *, notes: tuple[str, ...] = ()
    ) -> None:
        """parts: none of them empty, with labels alike.  image_shape: what the run is said to be for, [C, H, W]."""
        self.parts, self.image_shape, self.notes = tuple(parts), image_shape, notes
        self._bounds = torch.tensor([0, *(len(part) for part in self.parts)]).cumsum(0)
        self.key = table_key("buckets", [part.key for part in self.parts])
        self.num_classes = self.parts[0].num_classes

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """[C, H, W] of each part."""
        return tuple(part.image_shape for part in self.parts)

    @property
    def labels(self) -> Tensor | None:
        labels = [part.labels for part in self.parts]
        return None if labels[0] is None else torch.cat([one for one in labels if one is not None])

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def rows(self, index: Tensor) -> Tensor:
        """As any source's. Raises ValueError unless all are of one bucket."""
        which = (torch.searchsorted(self._bounds, index, right=True) - 1).unique().tolist()
        if len(which) > 1:
            raise ValueError(f"images of the buckets {which} are of different sizes; ask for those of one")
        number = which[0] if which else 0
        return self.parts[number].rows(index - self._bounds[number])

    def expect(self, index: Tensor) -> None:
        """Nothing: a run's order asks the parts."""

    def to(self, device: torch.device) -> "BucketedImages":
        return BucketedImages([part.to(device) for part in self.parts], self.image_shape, notes=self.notes)


class BucketOrder:
    """Which bucket a step's batch is of, and which of its images. Nothing to save, as in `DataOrder`.

    In each block of 256 steps a bucket has its share of all images, but for a fraction of a batch, at random places:
    the steps' permuted numbers, shifted by one random fraction, fall into the buckets' shares of a block. A bucket's
    images come in its own epochs, one permutation after the other.
    """

    def __init__(self, source: BucketedImages, seed: int, *, batch: int, classes: Sequence[int] = ()) -> None:
        """batch: images of a step.  classes: images of these alone; empty for all.  Raises UserError if there is
        none."""
        self.seed, self.batch, self.orders = seed, batch, list[DataOrder]()
        for number, part in enumerate(source.parts):
            wanted = torch.tensor(classes, dtype=torch.int64)
            if not classes or part.labels is None or bool(torch.isin(part.labels.cpu(), wanted).any()):
                self.orders.append(DataOrder(part, seed, classes=classes, stream=f"data order {number}"))
        if not self.orders:
            raise UserError(f"data: no image of the classes {list(classes)}")
        counts = torch.tensor([len(order.members) for order in self.orders], dtype=torch.float64)
        self._shares = (counts / counts.sum()).cumsum(0)
        self._before = [torch.zeros(len(self.orders), dtype=torch.int64)]  # batches of each before block 0, 1, ...

    @property
    def sample(self) -> tuple[ImageSource, Tensor]:
        """The fullest bucket and its members."""
        return max((order.sample for order in self.orders), key=lambda one: len(one[1]))

    @property
    def largest(self) -> DataOrder:
        """Of the bucket whose images have most numbers; the first of several."""
        return max(self.orders, key=lambda order: math.prod(order.source.image_shape))

    def take(self, first: int, count: int, *, next_first: int) -> tuple[Tensor, Tensor | None]:
        """As `DataOrder.take`; the samples from `first` on, and from `next_first` on, are of one step each."""
        (order, place), (later, next_place) = self.place_of(first), self.place_of(next_first)
        rows = order.rows(place, count)
        images = order.source.rows(rows)
        later.source.expect(later.rows(next_place, count))
        return images, order.labels(rows)

    def place_of(self, first: int) -> tuple[DataOrder, int]:
        """A sample's bucket, and its number among the samples of that bucket."""
        (block, at), within = divmod(first // self.batch, BLOCK), first % self.batch
        while len(self._before) <= block:
            drawn = self._block(len(self._before) - 1)
            self._before.append(self._before[-1] + torch.bincount(drawn, minlength=len(self.orders)))
        drawn = self._block(block)
        number = int(drawn[at])
        batches = int(self._before[block][number]) + int((drawn[:at] == number).sum())
        return self.orders[number], batches * self.batch + within

    def _block(self, block: int) -> Tensor:
        """The buckets of its steps, [256]."""
        seed = StepRandom(self.seed, block, torch.zeros(1, dtype=torch.int64)).torch_seed("buckets")
        generator = torch.Generator().manual_seed(seed)
        shift = torch.rand(1, generator=generator, dtype=torch.float64)
        places = (torch.randperm(BLOCK, generator=generator) + shift) / BLOCK
        return torch.searchsorted(self._shares, places, right=True).clamp(max=len(self.orders) - 1)


def order_of(source: ImageSource, seed: int, *, batch: int, classes: Sequence[int] = ()) -> DataOrder | BucketOrder:
    """Which image is seen when."""
    if isinstance(source, BucketedImages):
        return BucketOrder(source, seed, batch=batch, classes=classes)
    return DataOrder(source, seed, classes=classes)
