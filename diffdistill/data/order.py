"""Which image is seen when: each epoch is a permutation that depends on (seed, epoch) alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffdistill.data.source import ImageSource
from diffdistill.diffusion.on_device import upload
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.settings.schema import UserError

KEPT_EPOCHS = 4  # permutations held at a time: this step's, and the next one's when an epoch ends between them


class DataOrder:
    """The images of a source by global sample number. Nothing to save: a resumed run sees what it would have seen."""

    def __init__(
        self, source: ImageSource, seed: int, *, classes: Sequence[int] = (), stream: str = "data order"
    ) -> None:
        """classes: images of these alone; empty for all.  stream: names the permutations' random numbers.

        Raises UserError if there is none.
        """
        self.source, self.seed, self.stream = source, seed, stream
        self.members = torch.arange(len(source))
        self._labels = None if source.labels is None else source.labels.cpu()
        self._device = torch.device("cpu") if source.labels is None else source.labels.device
        if classes and self._labels is not None:
            self.members = torch.isin(self._labels, torch.tensor(classes)).nonzero()[:, 0]
            if not len(self.members):
                raise UserError(f"data: no image of the classes {list(classes)}")
        self._permutations: dict[int, Tensor] = {}

    @property
    def sample(self) -> tuple[ImageSource, Tensor]:
        """Images of one shape that stand for all, and their numbers."""
        return self.source, self.members

    @property
    def largest(self) -> "DataOrder":
        """Of the images of the size that needs most memory: of all, which are alike here."""
        return self

    def take(self, first: int, count: int, *, next_first: int) -> tuple[Tensor, Tensor | None]:
        """Images [count, C, H, W] and labels [count] of the samples from `first` on.

        next_first: where the step after this one begins; its images are read in the background.
        """
        rows = self.rows(first, count)
        images = self.source.rows(rows)
        self.source.expect(self.rows(next_first, count))
        return images, self.labels(rows)

    def labels(self, rows: Tensor) -> Tensor | None:
        """Those of the images with these numbers, on their device; the host knows them."""
        return None if self._labels is None else upload(self._labels[rows], self._device)

    def rows(self, first: int, count: int) -> Tensor:
        """The numbers of the images that the samples `first` to `first + count - 1` are: [count] int64, CPU."""
        index = torch.arange(first, first + count)
        epochs, places = index // len(self.members), index % len(self.members)
        rows = torch.empty_like(index)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            rows[here] = self._permutation(epoch)[places[here]]
        return rows

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            seed = StepRandom(self.seed, epoch, torch.zeros(1, dtype=torch.int64)).torch_seed(self.stream)
            order = self.members[torch.randperm(len(self.members), generator=torch.Generator().manual_seed(seed))]
            kept = list(self._permutations.items())[1 - KEPT_EPOCHS :]
            self._permutations = dict([*kept, (epoch, order)])
        return self._permutations[epoch]
