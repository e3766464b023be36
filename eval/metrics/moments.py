"""Mean and covariance of features, streamed in float64 and keyed by the samples' numbers.

Blocks of numbers are summed whole and in ascending order. So neither the order in which samples arrive, nor their
batches, nor the processes that saw them change a bit of the result.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.diffusion.gaussians import check_finite
from diffdistill.settings.schema import UserError


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

    def to(self, device: torch.device | str) -> "Summary":
        """The same on a device."""
        return Summary(self.count, self.mean.to(device), self.scatter.to(device))

    @property
    def covariance(self) -> Tensor:
        """[d, d], unbiased: scatter / (count - 1).  Raises UserError for fewer than 2 samples."""
        if self.count < 2:
            raise UserError(f"a covariance needs 2 samples or more, not {self.count}")
        return self.scatter / (self.count - 1)


class Moments:
    """The `Summary` of samples that arrive in any order and in batches of any size, here or in other processes.

    num_features: d.  block_size: samples that are summed together; the last bits of the result depend on it.
    A block is held until it is full and all before it are summed. Samples that arrive about in order take the memory
    of a block or two beside the [d, d] scatter, however many they are; the worst order keeps them all.
    """

    def __init__(self, num_features: int, *, block_size: int = 256, device: torch.device | str = "cpu") -> None:
        self.block_size = block_size
        self._sum = _RunningSum(0, *_zeros(num_features, device))
        self._held: dict[int, _Block] = {}
        self._end = 0

    def update(self, features: Tensor, index: Tensor | None = None) -> None:
        """Add features [B, d] of the samples index: [B] int64, counted from 0 over all batches and processes.

        Without index they are the next ones.  Raises UserError for another shape, NaN, and a sample that came before.
        """
        d = len(self._sum.mean)
        if features.ndim != 2 or features.shape[1] != d:
            raise UserError(f"features must be [B, {d}], not {list(features.shape)}")
        if index is None:
            index = torch.arange(self._end, self._end + len(features))
        if index.shape != features.shape[:1]:
            raise UserError(f"{len(features)} features need as many numbers, not {list(index.shape)}")
        if not len(features):
            return
        check_finite(features, "the features")
        index = index.cpu()
        self._refuse_known(index)
        for number in torch.unique(index // self.block_size).tolist():
            mine = index // self.block_size == number
            self._block(number).put(features[mine.to(features.device)], index[mine] % self.block_size)
        self._end = max(self._end, int(index.max()) + 1)
        self._sum_full_blocks()

    def merge(self, other: "Moments") -> None:
        """Add the samples of `other`, which stays as it is: the bits of one stream that saw them all.

        Raises UserError for another width or block size, and for a sample that both have.
        """
        if (self.block_size, self._sum.mean.shape) != (other.block_size, other._sum.mean.shape):
            raise UserError("merged moments need the same number of features and the same block_size")
        if other._sum.count:
            index, features = self._held_samples()
            if self._sum.count or (len(index) and int(index.min()) < other._sum.count):
                raise UserError("sample 0 was added twice: count samples over all batches and processes")
            self._sum, self._held = other._sum.copy(), {}
            self.update(features, index)
        index, features = other._held_samples()
        self.update(features, index)
        self._end = max(self._end, other._end)

    def summary(self) -> Summary:
        """Of all samples so far; more may follow."""
        total = self._sum.copy()
        for number in sorted(self._held):
            total.add(self._held[number].samples())
        return Summary(total.count, total.mean, total.scatter)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as plain tensors: for a file, or for another process to `merge`."""
        index, features = self._held_samples()
        state = {"block_size": torch.tensor(self.block_size), "count": torch.tensor(self._sum.count)}
        return state | {"mean": self._sum.mean, "scatter": self._sum.scatter, "index": index, "features": features}

    @staticmethod
    def from_state_dict(state: Mapping[str, Tensor]) -> "Moments":
        """The moments whose `state_dict` this is."""
        mean = state["mean"]
        moments = Moments(len(mean), block_size=int(state["block_size"]), device=mean.device)
        moments._sum = _RunningSum(int(state["count"]), mean.clone(), state["scatter"].clone())
        moments._end = moments._sum.count
        moments.update(state["features"], state["index"])
        return moments

    def _refuse_known(self, index: Tensor) -> None:
        """Raise UserError for negative numbers, for repeated ones, and for those that are summed or held."""
        if int(index.min()) < 0:
            raise UserError(f"samples are counted from 0, not from {int(index.min())}")
        known = index < self._sum.count
        for number in set((index // self.block_size).tolist()) & self._held.keys():
            mine = index // self.block_size == number
            known[mine] = self._held[number].present[index[mine] % self.block_size]
        values, repeats = torch.unique(index, return_counts=True)
        twice = torch.cat([index[known], values[repeats > 1]])
        if len(twice):
            raise UserError(f"sample {int(twice[0])} was added twice: count samples over all batches and processes")

    def _block(self, number: int) -> "_Block":
        if number not in self._held:
            rows = self._sum.mean.new_zeros(self.block_size, len(self._sum.mean))
            self._held[number] = _Block(rows, torch.zeros(self.block_size, dtype=torch.bool))
        return self._held[number]

    def _sum_full_blocks(self) -> None:
        while (block := self._held.get(number := self._sum.count // self.block_size)) and bool(block.present.all()):
            self._sum.add(block.samples())
            del self._held[number]

    def _held_samples(self) -> tuple[Tensor, Tensor]:
        """Numbers [H] and features [H, d] of the samples that are not summed yet."""
        numbers = sorted(self._held)
        index = [number * self.block_size + self._held[number].present.nonzero()[:, 0] for number in numbers]
        nothing = self._sum.mean.new_zeros(0, len(self._sum.mean))
        features = [self._held[number].samples() for number in numbers]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *index]), torch.cat([nothing, *features])


@dataclass
class _Block:
    """rows: [block_size, d] float64; present: [block_size] on the CPU, which of them have arrived."""

    rows: Tensor
    present: Tensor

    def put(self, features: Tensor, places: Tensor) -> None:
        self.rows[places.to(self.rows.device)] = features.to(self.rows)
        self.present[places] = True

    def samples(self) -> Tensor:
        return self.rows[self.present.to(self.rows.device)]


@dataclass
class _RunningSum:
    """A `Summary` that grows in place."""

    count: int
    mean: Tensor
    scatter: Tensor

    def add(self, samples: Tensor) -> None:
        """samples: [n, d] float64.  Chan, Golub and LeVeque 1983: no cancellation of large means."""
        count = self.count + len(samples)
        mean = samples.mean(0)
        centred, gap = samples - mean, mean - self.mean
        self.scatter.addmm_(centred.T, centred).addr_(gap, gap, alpha=self.count * len(samples) / count)
        self.mean += gap * (len(samples) / count)
        self.count = count

    def copy(self) -> "_RunningSum":
        return _RunningSum(self.count, self.mean.clone(), self.scatter.clone())


def _zeros(d: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    mean = torch.zeros(d, dtype=torch.float64, device=device)
    return mean, torch.outer(mean, mean)
