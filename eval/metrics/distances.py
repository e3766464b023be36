"""The Frechet distance of two sets of features, in float64.

Plain tensors in, numbers out: no network, no files. Features are [N, d]; what they are is the protocol's affair.
"""

import math
import warnings

import torch
from torch import Tensor

from diffdistill.diffusion.gaussians import checked_gaussian, factor, frechet_distance
from diffdistill.diffusion.threads import threads
from diffdistill.eval.metrics.checks import check_features, check_pair
from diffdistill.eval.metrics.moments import Summary
from diffdistill.settings.schema import UserError


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
    with threads(1):  # as in `frechet_distance`
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
    mean_b, cov_b = checked_gaussian(b.mean, b.covariance, "b")
    if a.shape[1] != len(mean_b):
        raise UserError(f"both sides need the same features: a has {a.shape[1]}, b has {len(mean_b)}")
    for count in (len(a), b.count):
        _warn_of_few(count, len(mean_b))
    with threads(1):  # as in `frechet_distance`
        mean_a = a.mean(0, dtype=torch.float64)
        scaled_a = (a - mean_a) / math.sqrt(len(a) - 1)
        shared = torch.linalg.svdvals(scaled_a @ factor(cov_b, "b")).sum()
        return float((mean_a - mean_b).square().sum() + scaled_a.square().sum() + cov_b.trace() - 2 * shared)


def _frechet_of_few(a: Tensor, b: Tensor) -> float:
    mean_a, mean_b = a.mean(0), b.mean(0)
    scaled_a, scaled_b = (a - mean_a) / math.sqrt(len(a) - 1), (b - mean_b) / math.sqrt(len(b) - 1)
    traces = scaled_a.square().sum() + scaled_b.square().sum()
    shared = torch.linalg.svdvals(scaled_a @ scaled_b.T).sum()
    return float((mean_a - mean_b).square().sum() + traces - 2 * shared)


def _warn_of_few(count: int, num_features: int) -> None:
    if count < num_features:
        text = f"{count} samples of {num_features} features: the covariance is singular and the distance too large"
        warnings.warn(text, stacklevel=3)
