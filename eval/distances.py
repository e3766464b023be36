"""Distances between sets of features, in float64: Frechet, precision and recall, density and coverage, KID.

Plain tensors in, numbers out: no network, no files. Features are [N, d]; what they are is the protocol's affair.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffdistill.eval.statistics import Summary

ROUNDING = 1e-5
"""An eigenvalue this far below zero, as a share of the largest, is rounding (features may come from float32)."""


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the squared Wasserstein-2 distance of two Gaussians.

    means: [d]; covariances: [d, d]; b is the reference.  Rounding can make the result slightly negative.
    Raises ValueError for shapes that do not fit, NaN or infinity, and for what is no covariance.
    Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500.  With S_b = L L^T the root's trace is that of
    (L^T S_a L)^(1/2): symmetric, so always real, unlike a general matrix root of the product.
    """
    mean_a, cov_a = _checked_gaussian(mean_a, cov_a, "a")
    mean_b, cov_b = _checked_gaussian(mean_b, cov_b, "b")
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"both sides need the same features: a has {len(mean_a)}, b has {len(mean_b)}")
    factor = _factor(cov_b)
    shared = _spectrum(torch.linalg.eigvalsh(factor.T @ cov_a @ factor), "a").sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared)


def frechet_from_features(a: Tensor, b: Tensor) -> float:
    """`frechet_distance` of the features' means and unbiased covariances.

    a: [N, d]; b: [M, d], the reference.  Where both have fewer samples than features, the root's trace is the nuclear
    norm of the centred A B^T over sqrt((N-1)(M-1)): exact for singular covariances, and no [d, d] matrix is formed.
    Raises ValueError as `frechet_distance`, and for fewer than 2 samples.
    """
    a, b = _checked_pair(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs 2 samples or more, not {len(a)} and {len(b)}")
    if max(len(a), len(b)) >= a.shape[1]:
        of_a, of_b = Summary.of(a), Summary.of(b)
        return frechet_distance(of_a.mean, of_a.covariance, of_b.mean, of_b.covariance)
    mean_a, mean_b = a.mean(0), b.mean(0)
    scaled_a, scaled_b = (a - mean_a) / math.sqrt(len(a) - 1), (b - mean_b) / math.sqrt(len(b) - 1)
    traces = scaled_a.square().sum() + scaled_b.square().sum()
    shared = torch.linalg.svdvals(scaled_a @ scaled_b.T).sum()
    return float((mean_a - mean_b).square().sum() + traces - 2 * shared)


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3, block_size: int = 1024) -> tuple[float, float]:
    """Precision, the share of fakes inside some real's ball; recall, the share of reals inside some fake's ball.

    real: [N, d]; fake: [M, d].  A ball is closed and reaches to the k-th nearest neighbour in its own set, the sample
    itself not counted.  Never more than [block_size, max(N, M)] distances are in memory.
    Raises ValueError for NaN, other shapes, or a set without k neighbours.  Kynkaanniemi et al. 2019, arXiv:1904.06991.
    """
    real, fake = _checked_pair(real, fake)
    real_radii, fake_radii = (_radii(samples, k, block_size) for samples in (real, fake))
    inside_real = [(gaps <= real_radii).any(1) for gaps in _distances(fake, real, block_size)]
    inside_fake = [(gaps <= fake_radii).any(1) for gaps in _distances(real, fake, block_size)]
    return _share(inside_real), _share(inside_fake)


def density_coverage(real: Tensor, fake: Tensor, *, k: int = 5, block_size: int = 1024) -> tuple[float, float]:
    """Density, the mean number of real balls around a fake, over k; coverage, the share of real balls with a fake.

    Arguments, balls and errors as `precision_recall`.  Naeem et al. 2020, arXiv:2002.09797; their code (prdc)
    takes open balls, which differs on ties only.
    """
    real, fake = _checked_pair(real, fake)
    radii = _radii(real, k, block_size)
    balls = sum(int((gaps <= radii).sum()) for gaps in _distances(fake, real, block_size))
    nearest = torch.cat([gaps.amin(1) for gaps in _distances(real, fake, block_size)])
    return balls / (k * len(fake)), _share([nearest <= radii])


def kid(a: Tensor, b: Tensor, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the unbiased squared MMD with kernel (x.y / d + 1)^3.

    a: [N, d]; b: [M, d].  The same seed draws the same subsets.  The mean can be negative.
    Raises ValueError for NaN, other shapes, or a set smaller than a subset.  Binkowski et al. 2018, arXiv:1801.01401.
    """
    a, b = _checked_pair(a, b)
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(f"subset_size must be 2 .. {min(len(a), len(b))}, not {subset_size}")
    rng = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(num_subsets):
        chosen_a, chosen_b = (x[torch.randperm(len(x), generator=rng)[:subset_size].to(x.device)] for x in (a, b))
        values.append(_unbiased_mmd(chosen_a, chosen_b))
    estimates = torch.stack(values)
    return float(estimates.mean()), float(estimates.std(correction=0))


def _unbiased_mmd(a: Tensor, b: Tensor) -> Tensor:
    def gram(x: Tensor, y: Tensor) -> Tensor:
        values: Tensor = (x @ y.T / x.shape[1] + 1) ** 3
        return values

    pairs = len(a) * (len(a) - 1)
    within = gram(a, a).fill_diagonal_(0).sum() + gram(b, b).fill_diagonal_(0).sum()
    return within / pairs - 2 * gram(a, b).mean()


def _factor(cov: Tensor) -> Tensor:
    """[d, r] with factor factor^T = cov: Cholesky's, or the eigenvectors of rank r where cov is singular."""
    lower, failed = torch.linalg.cholesky_ex(cov)
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(cov)
    values = _spectrum(values, "b")
    known = values > values[-1] * len(cov) * torch.finfo(torch.float64).eps
    return vectors[:, known] * values[known].sqrt()


def _spectrum(values: Tensor, side: str) -> Tensor:
    """Ascending eigenvalues without rounding below zero.  Raises ValueError where it is more than rounding."""
    if len(values) and values[0] < -ROUNDING * values.abs().max():
        raise ValueError(f"cov_{side} is no covariance: it has negative eigenvalues")
    return values.clamp_min(0)


def _distances(queries: Tensor, centres: Tensor, block_size: int) -> Iterator[Tensor]:
    """Blocks [B, len(centres)] of Euclidean distances, by differences: equal samples are at exactly 0."""
    for block in torch.split(queries, block_size):
        yield torch.cdist(block, centres, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(samples: Tensor, k: int, block_size: int) -> Tensor:
    """[N]: the distance from each sample to its k-th nearest other one."""
    if not 1 <= k < len(samples):
        raise ValueError(f"k must be 1 .. {len(samples) - 1} for {len(samples)} samples, not {k}")
    return torch.cat([gaps.kthvalue(k + 1).values for gaps in _distances(samples, samples, block_size)])


def _share(flags: list[Tensor]) -> float:
    return float(torch.cat(flags).double().mean())


def _checked_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of features in float64."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be [N, d] and [M, d], not {list(a.shape)} and {list(b.shape)}")
    return _finite(a, "the first features"), _finite(b, "the second features")


def _checked_gaussian(mean: Tensor, cov: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """A mean and a covariance in float64."""
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(f"mean_{side} must be [d] and cov_{side} [d, d], not {list(mean.shape)}, {list(cov.shape)}")
    mean, cov = _finite(mean, f"mean_{side}"), _finite(cov, f"cov_{side}")
    if not torch.allclose(cov, cov.T, rtol=0, atol=ROUNDING * float(cov.abs().max())):
        raise ValueError(f"cov_{side} is no covariance: it is not symmetric")
    return mean, cov


def _finite(values: Tensor, name: str) -> Tensor:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name}: NaN or infinite values")
    return values.double()
