"""Segments of a grid of times: what consistency distillation along pieces of a trajectory needs.

Grid index 0 is time 0, which is clean (on a discrete path its first index), index N the noisiest time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffdistill.diffusion.on_device import constant, upload
from diffdistill.diffusion.path import Path
from diffdistill.diffusion.sampling import DDIM
from diffdistill.diffusion.step_random import StepRandom, integer_of
from diffdistill.settings.limits import MAX_CHOSEN
from diffdistill.settings.numbers import Levels
from diffdistill.settings.schema import NonNegative, PositiveInt, schema

Ends = Literal["random", "fixed"]
"""Where a jump ends: at any index of the segment below its start, or at the segment's clean end."""


@schema
class Stage:
    """Distillation with a number of segments.

    num_steps: iterations; the last stage lasts to the end of the run.  grid_steps: N, the solver's steps over the
    whole trajectory, evenly chosen from the sampler's grid; null: all.
    """

    segments: Levels
    num_steps: PositiveInt = 1000
    grid_steps: Levels | None = None
    mse_weight: NonNegative = 1.0
    adversarial_weight: NonNegative = 0.0
    score_weight: NonNegative = 0.0

    def check(self, grid: DDIM) -> None:
        """Raises ValueError if the segments or the solver's steps do not fit the grid."""
        num_steps = self.grid_steps or grid.num_steps
        if grid.num_steps % num_steps:
            raise ValueError(f"grid_steps = {num_steps} must divide the grid's {grid.num_steps} steps")
        if self.segments > num_steps:
            raise ValueError(f"{self.segments} segments need a grid of at least as many steps, not {num_steps}")

    def times(self, path: Path, grid: DDIM) -> Tensor:
        """The times [N + 1] of indices 0 .. N, rising, float64: time 0, then those of DDIM's evaluations."""
        times = grid.times(path).flip(0)
        stride = grid.num_steps // (self.grid_steps or grid.num_steps)
        return torch.cat([times.new_zeros(1), times])[::stride]


Stages = Annotated[tuple[Stage, ...], Field(min_length=1, max_length=MAX_CHOSEN)]


def stage_starts(stages: Sequence[Stage]) -> tuple[int, ...]:
    """The iteration at which each stage begins."""
    return (0, *accumulate(stage.num_steps for stage in stages[:-1]))


def stage_at(step: int, stages: Sequence[Stage]) -> int:
    """Which stage iteration `step` is in, from 0."""
    return sum(step >= start for start in stage_starts(stages)) - 1


def segment_edges(num_steps: int, num_segments: int) -> Tensor:
    """The index where each segment begins and, last, where the trajectory ends: floor(i N / k), [k + 1] int64."""
    return torch.arange(num_segments + 1) * num_steps // num_segments


@dataclass(frozen=True)
class Segment:
    """The segment of each sample, from its clean end to its noisy one: indices [B]."""

    low: Tensor
    high: Tensor


def segment_of(index: Tensor, num_steps: int, num_segments: int) -> Segment:
    """The segment that is entered on the way down from `index` [B] in 1 .. num_steps.

    An edge belongs to the segment below it: low < index <= high.  With the paper's floor(n k / N) N / k an edge would
    be its own lower end, and nothing would be left to jump over (Ren et al. 2024, arXiv:2404.13686, eq. 11).
    """
    edges = constant(tuple(segment_edges(num_steps, num_segments).tolist()), index.device, torch.int64)
    above = torch.searchsorted(edges, index.contiguous())  # edges[above - 1] < index <= edges[above]
    return Segment(edges[above - 1], edges[above])


@lru_cache(maxsize=64)
def _times_on(stage: Stage, path: Path, grid: DDIM, device: torch.device) -> Tensor:
    """A stage's times on a device, found and copied there once."""
    with torch.inference_mode(False):
        return upload(stage.times(path, grid), device)


def draw_jump(rng: StepRandom, path: Path, stage: Stage, grid: DDIM, ends: Ends) -> dict[str, Tensor]:
    """The times of one jump for each sample, [B] float64.

    start: any but time 0.  next: one grid step below.  end: of the jump, within the segment, at most `next`.
    judged: where a discriminator looks at what has arrived, between `end` and the segment's noisy end.
    """
    times = _times_on(stage, path, grid, rng.index.device)
    num_steps = len(times) - 1
    uniforms = rng.uniforms(["start", "end", "judged"])
    start = 1 + integer_of(uniforms["start"], num_steps)
    segment = segment_of(start, num_steps, stage.segments)
    end = pick(uniforms["end"], segment.low, start) if ends == "random" else segment.low
    judged = pick(uniforms["judged"], end, segment.high)
    drawn = {name: times[index] for name, index in {"start": start, "next": start - 1, "end": end}.items()}
    return drawn | {"judged": times[judged].clamp_min(path.t_min)}


def pick(uniform: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Uniform numbers [B] in (0, 1) as one of the indices low .. high - 1 each, [B]."""
    return low + (uniform * (high - low)).long()
