"""The DX policy: a student's estimates of x0 along a segment, which carry a sample over it without further NFE.

Chen et al. 2026 (pi-Flow), arXiv:2510.14974. Flow matching's line z = (1 - s) x0 + s eps is any path's:
z = x_t / (alpha + sigma), s = sigma / (alpha + sigma). The velocity is u(z, s) = (z - x0(tau)) / s, with x0 linear
between N places that are even in the raw time tau, s = shift tau / (1 + (shift - 1) tau). Euler's substeps of u add up
to a weighted mean of the N, so that none of them is taken by itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.guidance.policies import Guidance, Guided, begin
from diffdistill.diffusion.line import line_time
from diffdistill.diffusion.on_device import constant
from diffdistill.diffusion.path import Path, expand
from diffdistill.settings.numbers import SamplingSteps
from diffdistill.settings.schema import Positive, schema


def shifted(raw: Tensor, shift: float) -> Tensor:
    """s of raw times."""
    return shift * raw / (1 + (shift - 1) * raw)


def raw_time(level: Tensor, shift: float) -> Tensor:
    """The inverse of `shifted`."""
    return level / (shift - (shift - 1) * level)


def line_scale(path: Path, t: Tensor) -> Tensor:
    """alpha + sigma, by which x_t is z; float64."""
    return path.alpha(t) + path.sigma(t)


@dataclass(frozen=True)
class Segment:
    """A policy between two raw times.

    x0: [B, N, ...], at even raw times from `low` to `high`, which are [B], float64.  substeps: of raw time 1, of Euler.
    """

    x0: Tensor
    high: Tensor
    low: Tensor
    substeps: int = 128
    shift: float = 1.0

    def level(self, raw: Tensor) -> Tensor:
        """s of raw times."""
        return shifted(raw, self.shift)

    def raw_time(self, level: Tensor) -> Tensor:
        """The inverse of `level`."""
        return raw_time(level, self.shift)

    def carry(self, z: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """z [B, ...] at the raw times `start` [B], rolled out to `end` [B]: DDIM's step by the mean of x0."""
        mean = self.mean_x0(start, end)
        return mean + expand(self.level(end) / self.level(start), z) * (z - mean)

    def mean_x0(self, start: Tensor, end: Tensor) -> Tensor:
        """[B, ...], so that (z - mean) / s is the velocity's mean from `start`, where z and s are, to `end`.

        Of less than two substeps it is x0 at `start`, and the velocity that of the place itself.
        """
        weights = self.weights(start, end).to(self.x0.dtype)
        return torch.einsum("bn,bn...->b...", weights, self.x0)

    def weights(self, start: Tensor, end: Tensor) -> Tensor:
        """The shares of the N places in that mean, [B, N] float64.

        One substep from s_k to s_l leaves s_l / s_k of z and has 1 - s_l / s_k of x0 at s_k.
        """
        count = ((start - end) * self.substeps).round().clamp_min(1)[:, None]
        number = torch.arange(self.substeps + 1, device=start.device, dtype=torch.float64)
        passed = (number / count).clamp_max(1)
        raw = start[:, None] - (start - end)[:, None] * passed
        level = self.level(raw)
        left = torch.where(passed < 1, level[:, -1:] / level, 1.0)  # of what a substep adds, at the end
        share = torch.where(count > 1, left.diff(dim=1) / (1 - left[:, :1]), (number[:-1] == 0).double())
        places = self.x0.shape[1]
        place = ((raw[:, :-1] - self.low[:, None]) / (self.high - self.low)[:, None]).clamp(0, 1) * (places - 1)
        nearness = 1 - (place[..., None] - torch.arange(places, device=start.device)).abs()
        return torch.einsum("bk,bkn->bn", share, nearness.clamp_min(0))


@schema
class DXPolicy:
    """One policy per NFE: each of num_steps segments is rolled out with the N estimates of one network evaluation.

    substeps: of Euler over raw time 1, without NFE.  shift: of the raw time.  last_segment: the last segment's share
    of another's length.  A network that gives one estimate makes DDIM's steps.
    """

    name: Literal["dx_policy"] = "dx_policy"
    num_steps: SamplingSteps = 1
    substeps: SamplingSteps = 128
    shift: Positive = 1.0
    last_segment: Annotated[float, Field(gt=0, le=1)] = 1.0

    @property
    def num_evaluations(self) -> int:
        return self.num_steps

    def times(self, path: Path) -> Tensor:
        """The path's times [num_steps] of the NFE, noise first, float64; the first is not beyond the path's end."""
        length = 1 / (self.num_steps - 1 + self.last_segment)
        raw = 1 - length * torch.arange(self.num_steps, dtype=torch.float64)
        level = shifted(raw, self.shift)
        ends = path.ratio(torch.tensor([path.t_min, path.t_max], dtype=torch.float64))
        ratio = (level / (1 - level)).clamp(float(ends[0]), float(ends[1]))
        return path.whole(path.time_of_ratio(ratio).clamp(path.t_min, path.t_max))

    def edges(self, path: Path) -> Tensor:
        """The raw times [num_steps + 1] where segments begin, those of the NFE, and 0, where the last one ends."""
        raw = raw_time(line_time(path.ratio(self.times(path))), self.shift)
        return torch.cat([raw, raw.new_zeros(1)])

    def __call__(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: Guidance = 1.0,
        fresh_noise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        *_, image = self.roll_out(denoiser, noise, cond, guidance=guidance)
        return image

    def roll_out(
        self, denoiser: Denoiser, noise: Tensor, cond: Cond = NO_COND, *, guidance: Guidance = 1.0
    ) -> Iterator[Tensor]:
        """z [B, ...] where each segment starts, one after another, and the image.  noise: [B, ...] unit."""
        guided, path = begin(guidance, denoiser, cond), denoiser.path
        times = self.times(path).tolist()
        first = torch.full((len(noise),), times[0], dtype=torch.float64, device=noise.device)
        z = noise * expand(line_time(path.ratio(first)), noise)
        for number in range(self.num_steps):
            yield z
            segment = self.segment(denoiser, guided, z, torch.full_like(first, number, dtype=torch.int64))
            z = segment.carry(z, segment.high, segment.low).to(noise.dtype)
        yield z

    def segment(self, denoiser: Denoiser, guided: Guided, z: Tensor, number: Tensor) -> Segment:
        """The policy of one network evaluation.

        guided: the guided denoiser.  z: [B, ...] at the starts of the segments `number`, [B] int64, noise first.
        """
        path, device = denoiser.path, z.device
        times = constant(tuple(self.times(path).tolist()), device, torch.float64)
        edges = constant(tuple(self.edges(path).tolist()), device, torch.float64)
        t, places = times[number], int(getattr(denoiser.net, "places", 1))
        x = (z * expand(line_scale(path, t), z)).to(z.dtype)
        x0 = guided(x.repeat(1, places, *[1] * (x.ndim - 2)), t, None).unflatten(1, (places, -1))
        return Segment(x0, edges[number], edges[number + 1], self.substeps, self.shift)
