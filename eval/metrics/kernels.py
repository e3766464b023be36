"""Kernel distances between sets of features, in float64: KID and CMMD."""

import torch
from torch import Tensor

from diffdistill.eval.metrics.checks import check_pair
from diffdistill.eval.metrics.pairs import blocks, half_of_pairs, squared_distances
from diffdistill.settings.schema import UserError


def kid(a: Tensor, b: Tensor, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the unbiased squared MMD with kernel (x.y / d + 1)^3.

    a: [N, d]; b: [M, d].  The same seed draws the same subsets.  The mean can be negative.
    Raises UserError for NaN, other shapes, or a set smaller than a subset.  Binkowski et al. 2018, arXiv:1801.01401.
    """
    check_pair(a, b)
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise UserError(f"subset_size must be 2 .. {min(len(a), len(b))}, not {subset_size}")
    if num_subsets < 1:
        raise UserError(f"num_subsets must be 1 or more, not {num_subsets}")
    rng = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(num_subsets):
        chosen_a, chosen_b = (x[torch.randperm(len(x), generator=rng)[:subset_size].to(x.device)] for x in (a, b))
        values.append(_unbiased_mmd(chosen_a.double(), chosen_b.double()))
    estimates = torch.stack(values)
    return float(estimates.mean()), float(estimates.std(correction=0))


def kid_of_parts(a: Tensor, b: Tensor, in_a: Tensor, in_b: Tensor, *, block_size: int = 2048) -> Tensor:
    """[R]: what `kid` estimates by subsets, over all pairs of R parts of both sets.

    a: [N, d]; b: [M, d]; in_a: [R, N] and in_b: [R, M], bool: the samples of each part, 2 or more.  Every kernel value
    is taken once, whatever R is, and never more than [block_size, block_size] of them are in memory.
    Raises UserError as `kid`.
    """
    check_pair(a, b)
    a, b, in_a, in_b = (x.double() for x in (a, b, in_a, in_b))
    sizes = [chosen.sum(1) for chosen in (in_a, in_b)]
    if (fewest := min(int(size.min()) for size in sizes)) < 2:
        raise UserError(f"a part must have 2 samples or more, not {fewest}")
    value = torch.zeros(len(in_a), dtype=torch.float64, device=a.device)
    for x, chosen, size in zip((a, b), (in_a, in_b), sizes, strict=True):
        of_pairs = -chosen @ _kernel_diagonal(x)
        for rows, columns in half_of_pairs(len(x), block_size):
            twice = 1 if rows == columns else 2
            of_pairs += twice * _sum_of_parts(x[rows], x[columns], chosen[:, rows], chosen[:, columns])
        value += of_pairs / (size * (size - 1))
    for rows in blocks(len(a), block_size):
        for columns in blocks(len(b), block_size):
            across = _sum_of_parts(a[rows], b[columns], in_a[:, rows], in_b[:, columns])
            value -= 2 * across / (sizes[0] * sizes[1])
    return value


def cmmd(a: Tensor, b: Tensor, *, sigma: float = 10.0, scale: float = 1000.0, block_size: int = 2048) -> float:
    """scale times the biased squared MMD with the kernel exp(-|x - y|^2 / (2 sigma^2)).

    a: [N, d]; b: [M, d].  Never more than [block_size, block_size] kernel values are in memory.
    Raises UserError for NaN and other shapes.  Jayasumana et al. 2024, arXiv:2401.09603, whose code has these defaults.
    """
    check_pair(a, b)
    if not sigma > 0:
        raise UserError(f"sigma must be above 0, not {sigma}")

    within = _mean_gaussian_within(a, sigma, block_size) + _mean_gaussian_within(b, sigma, block_size)
    total = 0.0
    for rows in blocks(len(a), block_size):
        for columns in blocks(len(b), block_size):
            total += _sum_gaussian(a[rows], b[columns], sigma)
    return scale * (within - 2 * total / (len(a) * len(b)))


def _mean_gaussian_within(x: Tensor, sigma: float, block_size: int) -> float:
    """Of all pairs, a sample with itself included: the estimator is biased."""
    total = 0.0
    for rows, columns in half_of_pairs(len(x), block_size):
        total += _sum_gaussian(x[rows], x[columns], sigma) * (1 if rows == columns else 2)
    return total / len(x) ** 2


def _sum_gaussian(a: Tensor, b: Tensor, sigma: float) -> float:
    return float(_sum(squared_distances(a, b).mul_(-1 / (2 * sigma**2)).exp_()))


def _unbiased_mmd(a: Tensor, b: Tensor) -> Tensor:
    pairs = len(a) * (len(a) - 1)
    within = _sum(_kernel(a, a).fill_diagonal_(0)) + _sum(_kernel(b, b).fill_diagonal_(0))
    return within / pairs - 2 * _sum(_kernel(a, b)) / (len(a) * len(b))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    values: Tensor = (x @ y.T / x.shape[1] + 1) ** 3
    return values


def _kernel_diagonal(x: Tensor) -> Tensor:
    values: Tensor = (x.square().sum(1) / x.shape[1] + 1) ** 3
    return values


def _sum_of_parts(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """[R]: the sum of the kernel over each part's pairs."""
    return ((in_x @ _kernel(x, y)) * in_y).sum(1)


def _sum(values: Tensor) -> Tensor:
    """Row by row: torch cuts a long sum by the number of threads, which then changes the last bits."""
    return values.sum(1).sum()
