"""Mean and covariance of features, streamed in float64.

Samples are summed in blocks fixed by their order, so that the batches in which they arrive change no bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """count samples of [d]: their mean [d] and scatter [d, d], the sum of (x - mean)(x - mean)^T.  float64."""

    count: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(features: Tensor) -> "Summary":
        """features: [N, d], N at least 1."""
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        return Summary(len(features), mean, centred.T @ centred)

    @property
    def covariance(self) -> Tensor:
        """[d, d], unbiased: scatter / (count - 1).  Raises ValueError for fewer than 2 samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 samples or more, not {self.count}")
        return self.scatter / (self.count - 1)

    def join(self, other: "Summary") -> "Summary":
        """Of both sets of samples.  Chan, Golub and LeVeque 1983: no cancellation of large means."""
        count = self.count + other.count
        if not count:
            return self
        gap = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(gap, gap) * (self.count * other.count / count)
        return Summary(count, self.mean + gap * (other.count / count), scatter)


class Moments:
    """A `Summary` of samples that arrive in batches of any size, in order.

    num_features: d.  block_size: samples that are summed together; the last bits of the result depend on it.
    """

    def __init__(self, num_features: int, *, block_size: int = 256, device: torch.device | str = "cpu") -> None:
        zeros = torch.zeros(num_features, dtype=torch.float64, device=device)
        self._whole_blocks = Summary(0, zeros, torch.outer(zeros, zeros))
        self._block = zeros.repeat(block_size, 1)
        self._filled = 0

    def update(self, features: Tensor) -> None:
        """Add features [B, d].  Raises ValueError for another shape."""
        if features.shape[1:] != self._block.shape[1:]:
            raise ValueError(f"features must be [B, {self._block.shape[1]}], not {list(features.shape)}")
        while len(features):
            taken, features = features.tensor_split([len(self._block) - self._filled])
            self._block[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            if self._filled == len(self._block):
                self._close_block()

    def merge(self, other: "Moments") -> None:
        """Add the samples of `other`: one stream's result, up to rounding."""
        self._close_block()
        self._whole_blocks = self._whole_blocks.join(other.summary())

    def summary(self) -> Summary:
        """Of all samples so far; more may follow."""
        if not self._filled:
            return self._whole_blocks
        return self._whole_blocks.join(Summary.of(self._block[: self._filled]))

    def _close_block(self) -> None:
        self._whole_blocks = self.summary()
        self._filled = 0
