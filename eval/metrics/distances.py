"""The Frechet distance of two sets of features, in float64, without a general matrix root.

Plain tensors in, numbers out: no network, no files. Features are [N, d]; what they are is the protocol's affair.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from diffdistill.eval.metrics.checks import check_features, check_finite, check_pair
from diffdistill.eval.metrics.moments import Summary
from diffdistill.settings.schema import UserError

ROUNDING = 1e-5
"""An eigenvalue this far below zero, as a share of the largest, is rounding (features may come from float32)."""


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the squared Wasserstein-2 distance of two Gaussians.

    means: [d]; covariances: [d, d]; b is the reference.  Rounding can make the result slightly negative.
    Raises UserError for shapes that do not fit, NaN or infinity, and for what is no covariance.
    Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500.
    """
    mean_a, cov_a = _checked_gaussian(mean_a, cov_a, "a")
    mean_b, cov_b = _checked_gaussian(mean_b, cov_b, "b")
    if mean_a.shape != mean_b.shape:
        raise UserError(f"both sides need the same features: a has {len(mean_a)}, b has {len(mean_b)}")
    with _one_thread():
        traces = cov_a.trace() + cov_b.trace()
        return float((mean_a - mean_b).square().sum() + traces - 2 * _trace_of_root(cov_a, cov_b))


def frechet_from_summaries(a: Summary, b: Summary) -> float:
    """`frechet_distance` of two summaries; b is the reference.

    Warns where there are fewer samples than features: the distance of so few is far above that of their laws.
    """
    for count in (a.count, b.count):
        _warn_of_few(count, len(a.mean))
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def frechet_from_features(a: Tensor, b: Tensor) -> float:
    """`frechet_from_summaries` of a: [N, d] and b: [M, d], the reference.

    Where both have fewer samples than features, the root's trace is the nuclear norm of the centred A B^T over
    sqrt((N-1)(M-1)): exact for singular covariances, and no [d, d] matrix is formed.
    Warns as there.  Raises UserError as `frechet_distance`, and for fewer than 2 samples.
    """
    check_pair(a, b, min_samples=2)
    for count in (len(a), len(b)):
        _warn_of_few(count, a.shape[1])
    with _one_thread():
        if max(len(a), len(b)) < a.shape[1]:
            return _frechet_of_few(a.double(), b.double())
        of_a, of_b = Summary.of(a), Summary.of(b)
        return frechet_distance(of_a.mean, of_a.covariance, of_b.mean, of_b.covariance)


def frechet_from_few(a: Tensor, b: Summary) -> float:
    """The same of few samples a: [N, d] and of a reference b of which the features are not there.

    The root's trace is the nuclear norm of the centred A over sqrt(N-1) times a factor of b's covariance: the singular
    covariance of a is never formed.  Warns and raises as `frechet_from_features`.
    """
    check_features(a, "the features", min_samples=2)
    mean_b, cov_b = _checked_gaussian(b.mean, b.covariance, "b")
    if a.shape[1] != len(mean_b):
        raise UserError(f"both sides need the same features: a has {a.shape[1]}, b has {len(mean_b)}")
    for count in (len(a), b.count):
        _warn_of_few(count, len(mean_b))
    with _one_thread():
        mean_a = a.mean(0, dtype=torch.float64)
        scaled_a = (a - mean_a) / math.sqrt(len(a) - 1)
        shared = torch.linalg.svdvals(scaled_a @ _factor(cov_b, "b")).sum()
        return float((mean_a - mean_b).square().sum() + scaled_a.square().sum() + cov_b.trace() - 2 * shared)


def _frechet_of_few(a: Tensor, b: Tensor) -> float:
    mean_a, mean_b = a.mean(0), b.mean(0)
    scaled_a, scaled_b = (a - mean_a) / math.sqrt(len(a) - 1), (b - mean_b) / math.sqrt(len(b) - 1)
    traces = scaled_a.square().sum() + scaled_b.square().sum()
    shared = torch.linalg.svdvals(scaled_a @ scaled_b.T).sum()
    return float((mean_a - mean_b).square().sum() + traces - 2 * shared)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The last bits of LAPACK's results depend on the number of threads; those of a distance should not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _trace_of_root(cov_a: Tensor, cov_b: Tensor) -> Tensor:
    """tr (S_a S_b)^(1/2).

    With S_b = L L^T it is the trace of (L^T S_a L)^(1/2): symmetric, so always real, unlike a root of the product.
    Rounding in eigenvalues that are zero would be summed as its root, so singular covariances take another way: with
    S_a = F F^T as well, it is the sum of the singular values of F^T L.
    """
    in_both = cov_a.any(0) & cov_b.any(0)  # a constant feature shares nothing, and would make the rest singular
    if not in_both.all():
        cov_a, cov_b = (cov[in_both][:, in_both] for cov in (cov_a, cov_b))
    lower, failed = torch.linalg.cholesky_ex(cov_b)
    if not failed:
        # L is graded, large to small. From the lower triangle LAPACK keeps small eigenvalues to their own digits.
        values = torch.linalg.eigvalsh(_lower_congruence(lower, cov_a), UPLO="L")
        if not len(values) or values[0] > 0:
            return values.sqrt().sum()
    return torch.linalg.svdvals(_factor(cov_a, "a").T @ _factor(cov_b, "b")).sum()


def _lower_congruence(lower: Tensor, cov: Tensor, block_size: int = 256) -> Tensor:
    """L^T S L for a lower triangular L, its lower triangle alone: a third of the work of two products."""
    result = torch.zeros_like(cov)
    for start in range(0, len(cov), block_size):
        columns = slice(start, start + block_size)
        result[start:, columns] = lower[start:, start:].T @ (cov[start:, start:] @ lower[start:, columns])
    return result


def _factor(cov: Tensor, side: str) -> Tensor:
    """[d, r] with factor factor^T = cov: Cholesky's, or the eigenvectors of rank r where cov is singular."""
    lower, failed = torch.linalg.cholesky_ex(cov)
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(cov)
    if len(values) and values[0] < -ROUNDING * values.abs().max():
        raise UserError(f"cov_{side} is no covariance: it has negative eigenvalues")
    known = values > values[-1] * len(cov) * torch.finfo(torch.float64).eps
    return vectors[:, known] * values[known].sqrt()


def _warn_of_few(count: int, num_features: int) -> None:
    if count < num_features:
        text = f"{count} samples of {num_features} features: the covariance is singular and the distance too large"
        warnings.warn(text, stacklevel=3)


def _checked_gaussian(mean: Tensor, cov: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """A mean and a covariance in float64."""
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise UserError(f"mean_{side} must be [d] and cov_{side} [d, d], not {list(mean.shape)}, {list(cov.shape)}")
    check_finite(mean, f"mean_{side}")
    check_finite(cov, f"cov_{side}")
    mean, cov = mean.double(), cov.double()
    if len(mean) and (cov - cov.T).abs().max() > ROUNDING * cov.abs().max():
        raise UserError(f"cov_{side} is no covariance: it is not symmetric")
    return mean, cov
