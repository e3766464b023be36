"""A Gaussian, and the signal of its trajectories in closed form."""

import torch
from torch import Tensor

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import Path
from diffdistill.networks.analytic import gaussian_denoiser
from support.closed_forms import numbers, random

MEAN = numbers(0.7, -0.3, 0.1)


ROOT = random(3, 3, seed=5) / 2


COVARIANCE = ROOT @ ROOT.T + 0.05 * torch.eye(3, dtype=torch.float64)


def gaussian(path: Path) -> Denoiser:
    return gaussian_denoiser(path, MEAN, COVARIANCE)


def exact_signal(path: Path, eps: Tensor, t: Tensor) -> Tensor:
    """mu + U diag((sqrt(alpha^2 l + sigma^2) - sigma) / alpha) U^T eps: the signal, if x = eps at infinite noise."""
    values, vectors = torch.linalg.eigh(COVARIANCE)
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    gains = ((alpha**2 * values + sigma**2).sqrt() - sigma) / alpha
    return MEAN + ((eps @ vectors) * gains) @ vectors.T


def draw_at(path: Path, s: Tensor, t: Tensor, seed: int = 0) -> dict[str, Tensor]:
    label = torch.zeros(len(s), dtype=torch.int64)
    return {"s": s, "t": t, "eps": random(len(s), 3, seed=seed), "label": label, "w": torch.ones(len(s))}


def inner_times(path: Path, count: int = 9) -> Tensor:
    return path.time_of_ratio(torch.logspace(-1, 0.9, count, dtype=torch.float64))
