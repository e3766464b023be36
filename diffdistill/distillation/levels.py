"""Noise levels of a student's steps, drawn in every iteration."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffdistill.diffusion.path import Path
from diffdistill.diffusion.sampling import StepSampler, times_on
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, Karras
from diffdistill.settings.schema import PositiveInt, field, schema


@schema
class DrawnLevels:
    """A dynamic schedule: number and noise levels of the student's steps, drawn in every iteration.

    num_steps: the least and the greatest number of steps; one number per batch, uniformly drawn.  time_law: of the
    levels after the first, which is the sampler's. They are drawn per sample, in decreasing order: "sorted", or
    "capped", where each is drawn in turn and is at most the one before (rCM, arXiv:2510.08431).
    CDM, arXiv:2605.06376.
    """

    num_steps: Annotated[tuple[PositiveInt, PositiveInt], Field(min_length=2)] = (1, 4)
    time_law: AnyTimeDistribution = field(default_factory=Karras)
    order: Literal["sorted", "capped"] = "sorted"

    def __post_init__(self) -> None:
        if self.num_steps[0] > self.num_steps[1]:
            raise ValueError(f"num_steps: must be increasing: {list(self.num_steps)}")

    def draw(self, rng: StepRandom, path: Path, steps: StepSampler) -> Tensor:
        """Times [B, steps], noise first, float64; whole numbers on a discrete path."""
        low, high = self.num_steps
        count = low + rng.shared_integer("calls", high - low + 1)
        first = times_on(steps, path, rng.index.device)[:1].expand(len(rng.index), 1)
        if count == 1:
            return first
        later = [
            self.time_law(uniform, path) for uniform in rng.uniforms([f"level {i}" for i in range(1, count)]).values()
        ]
        drawn = torch.stack(later, 1)
        times = drawn.cummin(1).values if self.order == "capped" else drawn.sort(1, descending=True).values
        return torch.cat([first, path.whole(times).minimum(first)], 1)
