"""Segments of a grid of times: what consistency distillation along pieces of a trajectory needs.

Grid index 0 is time 0, which is clean (on a discrete path its first index), index N the noisiest time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from diffdistill.path import Path
from diffdistill.sampling import DDIM


def grid_times(path: Path, grid: DDIM) -> Tensor:
    """The times [N + 1] of indices 0 .. N, rising, float64: time 0, then those that DDIM calls a network at."""
    times = grid.times(path).flip(0)
    return torch.cat([times.new_zeros(1), times])


def segment_edges(num_steps: int, num_segments: int) -> Tensor:
    """The index where each segment begins and, last, where the trajectory ends: floor(i N / k), [k + 1] int64.

    Raises ValueError unless 1 <= num_segments <= num_steps.
    """
    if not 1 <= num_segments <= num_steps:
        raise ValueError(f"a grid of {num_steps} steps has 1 to {num_steps} segments, not {num_segments}")
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
    edges = segment_edges(num_steps, num_segments).to(index.device)
    above = torch.searchsorted(edges, index.contiguous())  # edges[above - 1] < index <= edges[above]
    return Segment(edges[above - 1], edges[above])


def pick(uniform: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Uniform numbers [B] in (0, 1) as one of the indices low .. high - 1 [B] each."""
    return low + (uniform * (high - low)).long().clamp_max(high - low - 1)


def stage_starts(lengths: Sequence[int]) -> tuple[int, ...]:
    """The iteration at which each stage begins, from how long each lasts; the last one's length does not matter."""
    return (0, *accumulate(lengths[:-1]))


def stage_at(step: int, lengths: Sequence[int]) -> int:
    """Which stage iteration `step` is in, from 0; the last stage does not end."""
    return sum(step >= start for start in stage_starts(lengths)) - 1
