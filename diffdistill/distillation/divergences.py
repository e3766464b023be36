"""f-divergences between two laws p and q, as weights on the matching of their scores by the density ratio r = p/q.

The gradient of E_q f(r) is that of reverse KL with each sample weighted by h(r) = f''(r) r^2.  Xu et al. 2025,
arXiv:2502.15681, theorem 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.step_random import StepRandom, integer_of
from diffdistill.distillation.losses import widen
from diffdistill.distillation.method import Draw, Players

Divergence = Literal["rkl", "kl", "js", "sf", "sh", "jf", "neyman", "pearson"]
"""Reverse KL, forward KL, Jensen-Shannon, softened reverse KL, squared Hellinger, Jeffreys, and two chi-squared."""

WEIGHTS: Mapping[Divergence, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (r + 1),
    "sf": lambda r: 1 / (r + 1),
    "sh": lambda r: r.sqrt() / 4,
    "jf": lambda r: r + 1,
    "neyman": lambda r: 2 / r,
    "pearson": lambda r: 2 * r**2,
}
"""h(r) of each; `tests/methods/test_f_distill.py` derives them from f."""

SLOPES: Mapping[Divergence, Callable[[Tensor], Tensor]] = {
    "rkl": torch.zeros_like,
    "kl": torch.ones_like,
    "js": lambda r: 1 / (r + 1),
    "sf": lambda r: -r / (r + 1),
    "sh": lambda r: torch.full_like(r, 0.5),
    "jf": lambda r: r / (r + 1),
    "neyman": lambda r: torch.full_like(r, -1),
    "pearson": lambda r: torch.full_like(r, 2),
}
"""d ln h / d ln r of each."""

MAX_LOGIT = 10.0


def mean_logit(logits: Tensor) -> Tensor:
    """[B] in float32 or wider, of logits [B], or of each head, [B, heads]."""
    wide = widen(logits)
    return wide.mean(1) if wide.ndim == 2 else wide


def density_ratio(logits: Tensor, low: float, high: float) -> Tensor:
    """p/q [B] as a discriminator's logits have it, kept between low and high; float32 or wider, with their graph.

    logits: [B], or of each head [B, heads], of which their mean counts.
    """
    return mean_logit(logits).clamp(-MAX_LOGIT, MAX_LOGIT).exp().clamp(low, high)


@dataclass(frozen=True)
class Ratios:
    """How a method reads p/q off its discriminator's logits: clamped, then over the mean of samples of like t.

    low, high: the clamps.  num_bins: of equal probability in t; 0: none.  memory: the share of a bin's mean that stays
    from the step before.  Named in errors as the settings ratio_min, ratio_max, ratio_bins, ratio_memory.
    """

    low: float
    high: float
    num_bins: int
    memory: float

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"ratio_min = {self.low} must be below ratio_max = {self.high}")
        if self.memory and not self.num_bins:
            raise ValueError("ratio_memory: is for the means of bins; set ratio_bins, or use 0")

    def players(self) -> dict[str, nn.Module]:
        return {"ratio_means": RatioMeans(self.num_bins)} if self.memory else {}

    def draw(self, rng: StepRandom) -> dict[str, Tensor]:
        """A law is a quantile function, so that even shares of its uniform number are bins of equal probability."""
        return {"bin": integer_of(rng.uniform("t"), self.num_bins)} if self.num_bins else {}

    def read(self, logits: Tensor) -> Tensor:
        return density_ratio(logits, self.low, self.high)

    @torch.no_grad()
    def is_free(self, logits: Tensor) -> Tensor:
        """Where no clamp holds the ratio, [B]: elsewhere it does not change with x_t."""
        return self.read(logits) == mean_logit(logits).exp()

    @torch.no_grad()
    def statistics(self, draw: Draw, logits: Tensor) -> Mapping[str, Tensor]:
        """The ratio and the bin of each sample, by whose means over the whole batch a weight is normalised."""
        return {"ratio": self.read(logits)} | ({"bin": draw["bin"]} if self.num_bins else {})

    def normalised(self, players: Players, draw: Draw, ratio: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The ratios [B] over the mean of their bin; those of the whole batch, without graph; the means to keep."""
        carry: dict[str, Tensor] = {}
        everyone = draw.get("all ratio", ratio.detach())
        if self.num_bins:
            bins = draw.get("all bin", draw["bin"])
            before = players.ratio_means.values if self.memory else everyone.new_ones(self.num_bins)
            means = carry["ratio means"] = mean_by_bin(everyone, bins, before, self.memory)
            ratio, everyone = ratio / means[draw["bin"]], everyone / means[bins]
        return ratio, everyone, carry

    def keep(self, players: Players, carried: Mapping[str, Tensor]) -> None:
        """Remember a step's means."""
        if self.memory and "ratio means" in carried:
            players.ratio_means.values.copy_(carried["ratio means"])


class RatioMeans(nn.Module):
    """The mean ratio of each bin, remembered from step to step; one at the start."""

    values: Tensor

    def __init__(self, num_bins: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.ones(num_bins))


def mean_by_bin(values: Tensor, bins: Tensor, before: Tensor, memory: float) -> Tensor:
    """memory * before + (1 - memory) * the mean of the values in each bin; an empty bin stays as before.

    values: [B]; bins: [B] int64, 0 .. K - 1; before: [K].  Returns [K].
    """
    count = torch.zeros_like(before, dtype=torch.int64).index_add_(0, bins, torch.ones_like(bins))
    total = torch.zeros_like(before).index_add_(0, bins, values)
    mixed = memory * before + (1 - memory) * total / count.clamp_min(1)
    return torch.where(count > 0, mixed, before)
