"""Features and covariances for the tests of distances."""

import math

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Of N(0, 1), float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(d: int, seed: int = 0) -> Tensor:
    """The cosine transform with random signs and a random order: dense, and no factorisation to wait for."""
    rng = torch.Generator().manual_seed(seed)
    order, signs = torch.randperm(d, generator=rng), torch.randint(2, (d, 1), generator=rng) * 2.0 - 1
    angles = torch.outer(torch.arange(d) + 0.5, order.double()) * (math.pi / d)
    return signs * angles.cos() * torch.where(order == 0, 1 / d, 2 / d).double().sqrt()


def covariance(d: int, condition: float = 10.0, seed: int = 0) -> Tensor:
    """Eigenvalues 1 .. 1/condition in a random basis."""
    basis = orthogonal(d, seed)
    cov = basis * torch.logspace(0, -math.log10(condition), d, dtype=torch.float64) @ basis.T
    return (cov + cov.T) / 2


def linear_pair(d: int, condition: float) -> tuple[Tensor, Tensor, float]:
    """S_a = M S_b M, S_b, and their distance at equal means: then (S_a S_b)^(1/2) has the trace of M S_b."""
    cov_b, move = covariance(d, condition), covariance(d, seed=1)
    cov_a = move @ cov_b @ move
    return (cov_a + cov_a.T) / 2, cov_b, float(cov_a.trace() + cov_b.trace() - 2 * (move @ cov_b).trace())
