"""Time distributions, each given by its quantile function: a uniform number in (0, 1) becomes a time of the path.

One form serves sampling, stratification and bins of equal probability alike. What of a law lies beyond the path's range
is cut off, by quantile: the rest keeps its shape, and no draw piles up at an end.
"""

import math
from functools import lru_cache
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from diffdistill.diffusion.path import EDM, Path, VPDiscrete, karras_ratios
from diffdistill.diffusion.step_random import integer_of
from diffdistill.settings.limits import MAX_LEVELS
from diffdistill.settings.numbers import Number
from diffdistill.settings.schema import Positive, UserError, schema

ROUNDING = 1e-9
"""Relative: a level that misses an end of the path by less lies on it."""


class TimeDistribution(Protocol):
    def __call__(self, uniform: Tensor, path: Path) -> Tensor:
        """uniform: [B] in (0, 1), float64.  Returns t [B], float64, in the path's time."""
        ...


@schema
class LogNormal:
    """Noise-to-signal ratio exp(mean + std n), n ~ N(0, 1), within the path's range.  Karras et al. 2022, table 1."""

    name: Literal["lognormal"] = "lognormal"
    mean: Number = -1.2
    std: Positive = 1.2

    def __call__(self, uniform: Tensor, path: Path) -> Tensor:
        ends = ratio_range(path)
        low, high = (self._share_below(ratio) for ratio in ends)
        if high - low < ROUNDING:
            raise UserError(f"time_law: lognormal around {math.exp(self.mean):g} has no ratio in the path's range")
        normal = math.sqrt(2) * torch.erfinv(2 * (low + uniform * (high - low)) - 1)
        t = clamp_time(path.time_of_ratio(torch.exp(self.mean + self.std * normal).clamp(*ends)), path)
        # A share next to 1 keeps few digits: at the ends themselves these are not asked.
        return torch.where(uniform <= 0, path.t_min, torch.where(uniform >= 1, path.t_max, t))

    def _share_below(self, ratio: float) -> float:
        return 0.5 * math.erfc((self.mean - math.log(ratio)) / (self.std * math.sqrt(2)))


@schema
class Karras:
    """Ratio even in ratio^(1/rho) between two noise-to-signal ratios, or the path's ends where these are nearer.

    Karras et al. 2022, eq. 5. With ratio_min 0.002 and ratio_max 24.41 it is SiD's distribution (its tmax 800).
    """

    name: Literal["karras"] = "karras"
    ratio_min: Positive = 0.002
    ratio_max: Positive = 80.0
    rho: Positive = 7.0

    def __call__(self, uniform: Tensor, path: Path) -> Tensor:
        least, greatest = ratio_range(path)
        low, high = max(self.ratio_min, least), min(self.ratio_max, greatest)
        if low > high:
            raise UserError(
                f"time_law: karras from {self.ratio_min:g} to {self.ratio_max:g} is not in the path's range"
            )
        return clamp_time(path.time_of_ratio(karras_ratios(uniform, low, high, self.rho)), path)


@schema
class KarrasIndex:
    """One of `num_levels` Karras levels, those numbered low .. high that the path has, low noise first.

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
        first, count = self._indices(path)
        index = first + integer_of(uniform, count).double()
        levels = karras_ratios(index / (self.num_levels - 1), self.ratio_min, self.ratio_max, self.rho)
        return clamp_time(path.time_of_ratio(levels), path)

    def _indices(self, path: Path) -> tuple[int, int]:
        """The first of low .. high whose level is in the path's range, and how many are."""
        index = torch.arange(self.low, self.high + 1, dtype=torch.float64)
        levels = karras_ratios(index / (self.num_levels - 1), self.ratio_min, self.ratio_max, self.rho)
        low, high = ratio_range(path)
        inside = ((levels >= low * (1 - ROUNDING)) & (levels <= high * (1 + ROUNDING))).nonzero()[:, 0]
        if not len(inside):
            raise UserError(f"time_law: none of karras_index {self.low} to {self.high} is in the path's range")
        return self.low + int(inside[0]), len(inside)


@schema
class Uniform:
    """t uniform over the part of the path's range from `low` to `high`, both in 0 .. 1 of the range."""

    name: Literal["uniform"] = "uniform"
    low: Annotated[float, Field(ge=0, le=1)] = 0.0
    high: Annotated[float, Field(ge=0, le=1)] = 1.0

    def __call__(self, uniform: Tensor, path: Path) -> Tensor:
        fraction = self.low + uniform * (self.high - self.low)
        return path.t_min + fraction * (path.t_max - path.t_min)


@schema
class UniformInteger:
    """One of the indices low .. high that a discrete path has. DMD2 on Stable Diffusion: 20 .. 980."""

    name: Literal["uniform_integer"] = "uniform_integer"
    low: Annotated[int, Field(ge=0, le=MAX_LEVELS)] = 0
    high: Annotated[int, Field(ge=0, le=MAX_LEVELS)] = 999

    def __call__(self, uniform: Tensor, path: Path) -> Tensor:
        asked = f"time_law: uniform_integer {self.low} to {self.high}"
        if not isinstance(path, VPDiscrete):
            raise UserError(f"{asked} is for discrete paths, not for {_named(path)}")
        if self.low > self.high:
            raise UserError(f"{asked}: low is above high")
        first, last = math.ceil(path.t_min), math.floor(path.t_max)
        low, high = max(self.low, first), min(self.high, last)
        if low > high:
            raise UserError(f"{asked}: {_named(path)} has the indices {first} to {last}, none of these")
        return low + integer_of(uniform, high - low + 1).double()


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


@schema
class UShaped:
    """More density at both ends of a flow than in its middle: cosh(a (s - 1/2)), s = ratio / (1 + ratio) its time.

    a: how much; 0 is nearly even.  Lee et al. 2024, arXiv:2405.20320, section 4.1: 4.
    """

    name: Literal["u_shaped"] = "u_shaped"
    a: Annotated[float, Field(gt=0, le=100)] = 4.0

    def __call__(self, uniform: Tensor, path: Path) -> Tensor:
        low, high = (self._share_below(ratio / (1 + ratio)) for ratio in ratio_range(path))
        share = low + uniform * (high - low)
        s = 0.5 + torch.asinh((2 * share - 1) * math.sinh(self.a / 2)) / self.a
        return clamp_time(path.time_of_ratio(s / (1 - s)), path)

    def _share_below(self, s: float) -> float:
        return 0.5 * (1 + math.sinh(self.a * (s - 0.5)) / math.sinh(self.a / 2))


AnyTimeDistribution = Annotated[
    LogNormal | Karras | KarrasIndex | Uniform | UniformInteger | LogitNormal | UShaped, Field(discriminator="name")
]
"""The laws that a config may name."""


@lru_cache(maxsize=4096)
def shares_between(
    law: AnyTimeDistribution, path: Path, low: float, high: float, setting: str = "time_law"
) -> tuple[float, float]:
    """The uniform numbers at which a law's times are `low` and `high`, by bisection; 0 and 1 where it lies inside.

    Raises UserError where the law, of this setting, has no time between them.
    """
    goals = torch.tensor([low, high], dtype=torch.float64)
    first, last = share_below(law, path, goals).tolist()
    if last - first < ROUNDING:
        ends = path.ratio(goals).tolist()
        raise UserError(f"{setting}: {law.name} has no ratio between {ends[0]:.3g} and {ends[1]:.3g}")
    return first, last


def share_below(law: TimeDistribution, path: Path, t: Tensor) -> Tensor:
    """The uniform numbers at which a law's times are t [B], by bisection; 0 and 1 where it lies inside."""
    below, above = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        middle = (below + above) / 2
        is_below = law(middle, path) < t
        below, above = torch.where(is_below, middle, below), torch.where(is_below, above, middle)
    return (below + above) / 2


def log_ratio_slope(law: TimeDistribution, uniform: Tensor, path: Path) -> Tensor:
    """d ln(sigma/alpha) / du of a law at its uniform numbers, [B] float64: one over its density in ln(sigma/alpha).

    By differences over a hundredth of the law, as a discrete one has steps.
    """
    low, high = (uniform - 0.005).clamp_min(0), (uniform + 0.005).clamp_max(1)
    first, last = (path.ratio(law(share, path)).log() for share in (low, high))
    return (last - first) / (high - low)


def even_times(path: Path) -> TimeDistribution:
    """A law over a path's whole range, both ends included, for methods that walk along it.

    Even in time, but on `edm`, where time is the noise level itself and only one in eighty would be below the images'
    own, even in ratio^(1/7).
    """
    low, high = ratio_range(path)
    return Karras(ratio_min=low, ratio_max=high) if isinstance(path, EDM) else Uniform()


def even_position(path: Path, t: Tensor) -> Tensor:
    """Where t lies between the path's ends, in 0 .. 1, float64: the inverse of `even_times`.  t: [B]."""
    if not isinstance(path, EDM):
        return (t.double() - path.t_min) / (path.t_max - path.t_min)
    rho = Karras().rho
    low, high = (ratio ** (1 / rho) for ratio in ratio_range(path))
    return (path.ratio(t) ** (1 / rho) - low) / (high - low)


def ratio_range(path: Path) -> tuple[float, float]:
    """The noise-to-signal ratios of a path's ends."""
    low, high = path.ratio(torch.tensor([path.t_min, path.t_max], dtype=torch.float64)).tolist()
    return low, high


def clamp_time(t: Tensor, path: Path) -> Tensor:
    """t, which rounding may have put outside the path's range, inside it."""
    return t.clamp(path.t_min, path.t_max)


def _named(path: Path) -> str:
    return str(getattr(path, "name", type(path).__name__))
