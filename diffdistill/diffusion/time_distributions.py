"""Time distributions, each given by its quantile function: a uniform number in (0, 1) becomes a time of the path.

One form serves sampling, stratification and bins of equal probability alike.
"""

import math
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from diffdistill.diffusion.path import Path, karras_ratios
from diffdistill.diffusion.step_random import integer_of
from diffdistill.settings.limits import MAX_LEVELS
from diffdistill.settings.numbers import Number
from diffdistill.settings.schema import Positive, schema


class TimeDistribution(Protocol):
    def __call__(self, uniform: Tensor, path: Path) -> Tensor:
        """uniform: [B] in (0, 1), float64.  Returns t [B], float64, in the path's time."""
        ...


@schema
class LogNormal:
    """Noise-to-signal ratio exp(mean + std n), n ~ N(0, 1).  Karras et al. 2022, table 1."""

    name: Literal["lognormal"] = "lognormal"
    mean: Number = -1.2
    std: Positive = 1.2

    def __call__(self, uniform: Tensor, path: Path) -> Tensor:
        normal = math.sqrt(2) * torch.erfinv(2 * uniform - 1)
        return clamp_time(path.time_of_ratio(torch.exp(self.mean + self.std * normal)), path)


@schema
class Karras:
    """Ratio even in ratio^(1/rho) between two noise-to-signal ratios.  Karras et al. 2022, eq. 5.

    With ratio_min 0.002 and ratio_max 24.41 it is SiD's law (its tmax 800).
    """

    name: Literal["karras"] = "karras"
    ratio_min: Positive = 0.002
    ratio_max: Positive = 80.0
    rho: Positive = 7.0

    def __call__(self, uniform: Tensor, path: Path) -> Tensor:
        levels = karras_ratios(uniform, self.ratio_min, self.ratio_max, self.rho)
        return clamp_time(path.time_of_ratio(levels), path)


@schema
class KarrasIndex:
    """One of `num_levels` Karras levels, those numbered low .. high, low noise first.

    DMD2 on EDM (0.002 to 80, rho 7): 20 .. 980 for the generator, 0 .. 999 for the fake score.
    """

    name: Literal["karras_index"] = "karras_index"
    low: Annotated[int, Field(ge=0, le=MAX_LEVELS)] = 0
    high: Annotated[int, Field(ge=0, le=MAX_LEVELS)] = 999
    num_levels: Annotated[int, Field(ge=2, le=MAX_LEVELS)] = 1000
    ratio_min: Positive = 0.002
    ratio_max: Positive = 80.0
    rho: Positive = 7.0

    def __post_init__(self) -> None:
        if not self.low <= self.high < self.num_levels:
            raise ValueError(f"need low <= high < num_levels, not {self.low}, {self.high}, {self.num_levels}")

    def __call__(self, uniform: Tensor, path: Path) -> Tensor:
        index = self.low + integer_of(uniform, self.high - self.low + 1).double()
        levels = karras_ratios(index / (self.num_levels - 1), self.ratio_min, self.ratio_max, self.rho)
        return clamp_time(path.time_of_ratio(levels), path)


@schema
class Uniform:
    """t even over the part of the path's range from `low` to `high`, both in 0 .. 1 of the range."""

    name: Literal["uniform"] = "uniform"
    low: Annotated[float, Field(ge=0, le=1)] = 0.0
    high: Annotated[float, Field(ge=0, le=1)] = 1.0

    def __call__(self, uniform: Tensor, path: Path) -> Tensor:
        fraction = self.low + uniform * (self.high - self.low)
        return path.t_min + fraction * (path.t_max - path.t_min)


@schema
class UniformInteger:
    """One of the indices low .. high of a discrete path. DMD2 on Stable Diffusion: 20 .. 980."""

    name: Literal["uniform_integer"] = "uniform_integer"
    low: Annotated[int, Field(ge=0, le=MAX_LEVELS)] = 0
    high: Annotated[int, Field(ge=0, le=MAX_LEVELS)] = 999

    def __call__(self, uniform: Tensor, path: Path) -> Tensor:
        return clamp_time(self.low + integer_of(uniform, self.high - self.low + 1).double(), path)


@schema
class LogitNormal:
    """t = sigmoid(mean + std n) of the path's range.  Esser et al. 2024, arXiv:2403.03206, eq. 19."""

    name: Literal["logit_normal"] = "logit_normal"
    mean: Number = 0.0
    std: Positive = 1.0

    def __call__(self, uniform: Tensor, path: Path) -> Tensor:
        normal = math.sqrt(2) * torch.erfinv(2 * uniform - 1)
        fraction = torch.sigmoid(self.mean + self.std * normal)
        return path.t_min + fraction * (path.t_max - path.t_min)


AnyTimeDistribution = Annotated[
    LogNormal | Karras | KarrasIndex | Uniform | UniformInteger | LogitNormal, Field(discriminator="name")
]
"""The laws that a config may name."""


def clamp_time(t: Tensor, path: Path) -> Tensor:
    """t kept inside the path's range."""
    return t.clamp(path.t_min, path.t_max)
