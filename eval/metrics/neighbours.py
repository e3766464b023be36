"""Precision and recall, density and coverage: who lies in whose ball.

A ball stands around each sample of a set and reaches to the k-th nearest other sample of the same set. It is closed:
a sample within rounding of its surface is inside, so repeated samples lie in one another's balls, of radius 0 too.
Distances are taken a block at a time, and each set's own only once for both directions.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.eval.metrics.checks import check_pair
from diffdistill.eval.metrics.pairs import blocks, half_of_pairs, rounding, squared_distances
from diffdistill.settings.schema import UserError


class Prdc(NamedTuple):
    """precision, recall, coverage: 0 .. 1; density: 0 or more, 1 for two sets of one law."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3, block_size: int = 2048) -> tuple[float, float]:
    """Precision, the share of fakes inside some real's ball; recall, the share of reals inside some fake's ball.

    real: [N, d]; fake: [M, d].  Never more than [block_size, block_size] distances are in memory.
    Raises UserError for NaN, other shapes, or a set without k neighbours.  Kynkaanniemi et al. 2019, arXiv:1904.06991.
    """
    return prdc(real, fake, nearest_k=k, density_k=k, block_size=block_size)[:2]


def density_coverage(real: Tensor, fake: Tensor, *, k: int = 5, block_size: int = 2048) -> tuple[float, float]:
    """Density, the mean number of real balls around a fake, over k; coverage, the share of real balls with a fake.

    Arguments and errors as `precision_recall`.  Naeem et al. 2020, arXiv:2002.09797; their code (prdc) takes open
    balls, which differs on ties only.
    """
    real, fake = _centred(real, fake)
    radii = _nearest(real, k, block_size)[:, -1]
    covered, num_inside = torch.zeros_like(radii, dtype=torch.bool), 0
    for _, columns, gaps in _gaps(fake, real, block_size):
        inside = gaps <= radii[columns]
        num_inside += int(inside.sum())
        covered[columns] |= inside.any(0)
    return num_inside / (k * len(fake)), _share(covered)


def prdc(real: Tensor, fake: Tensor, *, nearest_k: int = 3, density_k: int = 5, block_size: int = 2048) -> Prdc:
    """`precision_recall` with nearest_k and `density_coverage` with density_k, for little more than the first alone."""
    real, fake = _centred(real, fake)
    nearest = _nearest(real, max(nearest_k, density_k), block_size)
    real_radii, density_radii = nearest[:, nearest_k - 1], nearest[:, density_k - 1]
    fake_radii = _nearest(fake, nearest_k, block_size)[:, -1]
    precise = torch.zeros_like(fake_radii, dtype=torch.bool)
    recalled, covered = torch.zeros_like(real_radii, dtype=torch.bool), torch.zeros_like(real_radii, dtype=torch.bool)
    num_inside = 0
    for rows, columns, gaps in _gaps(fake, real, block_size):
        precise[rows] |= (gaps <= real_radii[columns]).any(1)
        recalled[columns] |= (gaps <= fake_radii[rows, None]).any(0)
        inside = gaps <= density_radii[columns]
        num_inside += int(inside.sum())
        covered[columns] |= inside.any(0)
    return Prdc(_share(precise), _share(recalled), num_inside / (density_k * len(fake)), _share(covered))


def _centred(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Both less the reals' mean, in float64: distances by matrix products lose the digits that the norms take."""
    check_pair(real, fake)
    mean = real.mean(0, dtype=torch.float64)
    return real - mean, fake - mean


def _nearest(samples: Tensor, k: int, block_size: int) -> Tensor:
    """[N, k]: squared distances from each sample to its nearest other ones, ascending."""
    if not 1 <= k < len(samples):
        raise UserError(f"k must be 1 .. {len(samples) - 1} for {len(samples)} samples, not {k}")
    nearest = samples.new_full((len(samples), k), torch.inf)
    for rows, columns in half_of_pairs(len(samples), block_size):
        gaps = squared_distances(samples[rows], samples[columns])
        if rows == columns:
            gaps.fill_diagonal_(torch.inf)
        else:
            nearest[columns] = _smallest(nearest[columns], gaps.T)
        nearest[rows] = _smallest(nearest[rows], gaps)
    return nearest


def _smallest(nearest: Tensor, more: Tensor) -> Tensor:
    """[B, k]: the k smallest of each row of both, ascending."""
    return torch.cat([nearest, more], 1).topk(nearest.shape[1], largest=False).values


def _gaps(queries: Tensor, centres: Tensor, block_size: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of squared distances, less what the rounding in them and in a radius may be."""
    slack = 2 * rounding(queries.shape[1])
    for rows in blocks(len(queries), block_size):
        for columns in blocks(len(centres), block_size):
            yield rows, columns, squared_distances(queries[rows], centres[columns], slack=slack)


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())
