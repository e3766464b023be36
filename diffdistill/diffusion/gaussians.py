"""Gaussians by mean and covariance: the Frechet distance of two, in float64, without a general matrix root.

Plain tensors in, numbers out.
"""

import torch
from torch import Tensor

from diffdistill.diffusion.threads import threads
from diffdistill.settings.schema import UserError

ROUNDING = 1e-5
"""An eigenvalue this far below zero, as a share of the largest, is rounding (features may come from float32)."""


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the squared Wasserstein-2 distance of two Gaussians.

    means: [d]; covariances: [d, d]; b is the reference.  Rounding can make the result slightly negative.
    Raises UserError for shapes that do not fit, NaN or infinity, and for what is no covariance.
    Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500.
    """
    mean_a, cov_a = checked_gaussian(mean_a, cov_a, "a")
    mean_b, cov_b = checked_gaussian(mean_b, cov_b, "b")
    if mean_a.shape != mean_b.shape:
        raise UserError(f"both sides need the same features: a has {len(mean_a)}, b has {len(mean_b)}")
    with threads(1):  # the last bits of LAPACK's results depend on the number of threads
        traces = cov_a.trace() + cov_b.trace()
        return float((mean_a - mean_b).square().sum() + traces - 2 * _trace_of_root(cov_a, cov_b))


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
    return torch.linalg.svdvals(factor(cov_a, "a").T @ factor(cov_b, "b")).sum()


def _lower_congruence(lower: Tensor, cov: Tensor, block_size: int = 256) -> Tensor:
    """L^T S L for a lower triangular L, its lower triangle alone: a third of the work of two products."""
    result = torch.zeros_like(cov)
    for start in range(0, len(cov), block_size):
        columns = slice(start, start + block_size)
        result[start:, columns] = lower[start:, start:].T @ (cov[start:, start:] @ lower[start:, columns])
    return result


def factor(cov: Tensor, side: str) -> Tensor:
    """[d, r] with factor factor^T = cov: Cholesky's, or the eigenvectors of rank r where cov is singular."""
    lower, failed = torch.linalg.cholesky_ex(cov)
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(cov)
    if len(values) and values[0] < -ROUNDING * values.abs().max():
        raise UserError(f"cov_{side} is no covariance: it has negative eigenvalues")
    known = values > values[-1] * len(cov) * torch.finfo(torch.float64).eps
    return vectors[:, known] * values[known].sqrt()


def checked_gaussian(mean: Tensor, cov: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """A mean and a covariance in float64."""
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise UserError(f"mean_{side} must be [d] and cov_{side} [d, d], not {list(mean.shape)}, {list(cov.shape)}")
    check_finite(mean, f"mean_{side}")
    check_finite(cov, f"cov_{side}")
    mean, cov = mean.double(), cov.double()
    if len(mean) and (cov - cov.T).abs().max() > ROUNDING * cov.abs().max():
        raise UserError(f"cov_{side} is no covariance: it is not symmetric")
    return mean, cov


def check_finite(values: Tensor, name: str) -> None:
    """Raise UserError for NaN or infinity, with the place of the first one."""
    finite = values.isfinite()
    if not bool(finite.all()):
        place = torch.nonzero(~finite)[0].tolist()
        raise UserError(f"{name}: NaN or infinite values, first at {place}")
