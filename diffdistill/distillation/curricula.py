"""How far apart the two noise levels of a consistency pair are, and how they near one another as training goes on."""

import math
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffdistill.diffusion.on_device import upload
from diffdistill.diffusion.path import Path
from diffdistill.diffusion.time_distributions import ratio_range
from diffdistill.settings.limits import MAX_LEVELS
from diffdistill.settings.schema import NonNegative, Positive, schema

Intervals = Annotated[int, Field(ge=1, le=MAX_LEVELS)]

LEAST_ABOVE = 1.01
"""The least ratio that ECT trains, over that of the path's end: at the end itself no level is below."""

GREATEST_SHARE = 1 - 1e-6
"""Of the lower level in ECT's upper one, which must not round to it."""


@schema
class Doubling:
    """Neighbours on a Karras grid, which doubles at even times of the run.

    first, last: intervals of the grid at the start and at the end.  rho: of the grid.
    A level from the time distribution becomes the noisier end of its interval: with a log-normal distribution these
    are the differences of erf in the paper.  Song & Dhariwal 2023, arXiv:2310.14189, section 3.4 and 3.5.
    """

    name: Literal["doubling"] = "doubling"
    first: Intervals = 10
    last: Intervals = 1280
    rho: Positive = 7.0

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise ValueError(f"first = {self.first}: must be at most last = {self.last}")

    def intervals(self, step: int, num_steps: int) -> int:
        """N(k) - 1 at iteration `step` of `num_steps`: min(s_0 2^floor(k / K'), s_1)."""
        stages = math.ceil(math.log2(self.last / self.first)) + 1
        length = max(1, num_steps // stages)
        return min(self.first * 2 ** min(step // length, stages), self.last)

    def pair(self, t: Tensor, path: Path, step: int, num_steps: int) -> tuple[Tensor, Tensor]:
        """t [B] of a law as the levels (t, r), r the lower one.  The lowest of all is the path's end."""
        grid = _grid(path, self.intervals(step, num_steps), self.rho, t.device)
        upper = torch.searchsorted(grid, t.contiguous()).clamp(1, len(grid) - 1)
        return grid[upper], grid[upper - 1]


@lru_cache(maxsize=64)
def _grid(path: Path, intervals: int, rho: float, device: torch.device) -> Tensor:
    """Karras times on a device, rising, [intervals + 1], found and copied there once."""
    grid = path.karras_times(intervals + 1, rho).flip(0)
    grid[0], grid[-1] = path.t_min, path.t_max  # but for rounding they are
    with torch.inference_mode(False):
        return upload(grid, device)


@schema
class Nearing:
    """The lower level is a share of the upper one's ratio, which grows to 1 in stages; at first it is free of noise.

    r = t max(0, 1 - q^-(stage + 1) (1 + k sigmoid(-b t))), t and r ratios.  q, k, b: constants of the formula.
    stages: their number; they have equal length.  Geng et al. 2024, arXiv:2406.14548, section 3.
    """

    name: Literal["nearing"] = "nearing"
    q: Annotated[float, Field(gt=1, le=1000)] = 2.0
    k: NonNegative = 8.0
    b: NonNegative = 1.0
    stages: Annotated[int, Field(ge=1, le=30)] = 8

    def share(self, ratio: Tensor, stage: int) -> Tensor:
        """r / t at a stage from 0 on, for ratios [B], below 1."""
        return (1 - self.q ** -(stage + 1) * (1 + self.k * torch.sigmoid(-self.b * ratio))).clamp(0, GREATEST_SHARE)

    def pair(self, t: Tensor, path: Path, step: int, num_steps: int) -> tuple[Tensor, Tensor]:
        """t [B] of a law as the levels (t, r), r the lower one.  Where r would be below the path's end it is that.

        A t at the path's end, which has no level below it, is raised by a hundredth of its ratio.
        """
        lowest = ratio_range(path)[0]
        t = t.maximum(path.time_of_ratio(torch.full_like(t, LEAST_ABOVE * lowest)))
        ratio = path.ratio(t)
        stage = min(self.stages * step // max(num_steps, 1), self.stages - 1)
        lower = ratio * self.share(ratio, stage)
        r = path.time_of_ratio(lower.clamp_min(lowest)).clamp_min(path.t_min)
        return t, torch.where(lower <= lowest, path.t_min, r)


Curriculum = Annotated[Doubling | Nearing, Field(discriminator="name")]
"""The curricula that a config may name."""
