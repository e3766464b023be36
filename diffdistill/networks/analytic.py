"""Denoisers known in closed form: Gaussians and mixtures of them, class-conditional, on any path.

They are for tests, of this project's methods and of yours: with an exact teacher every gradient has a right value.
"""

import math

import torch
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, Features, Network, Taps
from diffdistill.diffusion.path import Path, expand


class Mixture(Network):
    """E[x_0 | x_t] of a mixture of Gaussians. It predicts x0, in float64.

    weights: [K] positive; means: [K, D]; covariances: [K, D, D], or [K] for isotropic variances.
    classes: [K] int64, the class of each component, or None for no labels. "No class" is the whole mixture.
    Data is [B, *shape] with D numbers a sample.
    """

    log_weights: Tensor
    means: Tensor
    values: Tensor
    vectors: Tensor
    classes: Tensor | None

    def __init__(
        self, path: Path, weights: Tensor, means: Tensor, covariances: Tensor, classes: Tensor | None = None
    ) -> None:
        super().__init__()
        if covariances.ndim == 1:
            covariances = covariances[:, None, None] * torch.eye(means.shape[1], dtype=torch.float64)
        values, vectors = torch.linalg.eigh(covariances.double())
        self.path = path
        self.register_buffer("log_weights", (weights.double() / weights.sum()).log())
        self.register_buffer("means", means.double())
        self.register_buffer("values", values.clamp_min(0))
        self.register_buffer("vectors", vectors)
        self.register_buffer("classes", classes)
        self.accepts = frozenset({"label"} if classes is not None else ())
        self.num_classes = int(classes.max()) + 1 if classes is not None else 0
        self.has_null_condition = classes is not None
        self.resolution_multiple = 1

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, ...]; time_input: [B].  Returns E[x_0 | x_t], float64, in x's shape."""
        t = self.path.time_of_input(time_input)
        projected, total = self._projected(x, t)
        alpha = self.path.alpha(t)[:, None, None]
        gain = alpha * self.values / total
        estimates = self.means + torch.einsum("kde,bke->bkd", self.vectors, gain * projected)
        share = torch.softmax(self._log_joint(projected, total, cond), 1)
        return (share[..., None] * estimates).sum(1).reshape(x.shape)

    def log_prob(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """log density of the diffused law at x_t, [B] float64.  x: [B, ...]; t: [B] in the path's time."""
        projected, total = self._projected(x, t)
        return torch.logsumexp(self._log_joint(projected, total, cond), 1)

    def sample(self, uniform: Tensor, normal: Tensor, cond: Cond) -> Tensor:
        """Data from the mixture, [B, D] float64.  uniform: [B] in (0, 1); normal: [B, D]."""
        shares = torch.softmax(self._prior(len(uniform), cond), 1).cumsum(1)
        which = (uniform[:, None] > shares).sum(1).clamp_max(len(self.means) - 1)
        spread = self.values[which].sqrt() * normal.double()
        return self.means[which] + torch.einsum("bde,be->bd", self.vectors[which], spread)

    def features(self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None) -> Features:
        """There are none. Raises ValueError."""
        raise ValueError("an analytic denoiser has no features: use a network, or a method without GAN")

    def forward_with_features(
        self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None
    ) -> tuple[Tensor, Features]:
        """There are none. Raises ValueError."""
        return self.forward(x, time_input, cond), self.features(x, time_input, cond)

    def _projected(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x - alpha mu in each component's eigenbasis, and the variances there: both [B, K, D]."""
        alpha, sigma = self.path.alpha(t)[:, None, None], self.path.sigma(t)[:, None, None]
        centred = x.double().flatten(1)[:, None] - alpha * self.means
        return torch.einsum("kde,bkd->bke", self.vectors, centred), alpha**2 * self.values + sigma**2

    def _log_joint(self, projected: Tensor, total: Tensor, cond: Cond) -> Tensor:
        """log of weight times density, [B, K]."""
        density = -0.5 * (projected**2 / total + total.log() + math.log(2 * math.pi)).sum(-1)
        return self._prior(len(projected), cond) + density

    def _prior(self, batch: int, cond: Cond) -> Tensor:
        prior: Tensor = self.log_weights.expand(batch, -1)
        if cond.label is None or self.classes is None:
            return prior
        other = (cond.label[:, None] != self.classes) & (cond.label[:, None] != self.num_classes)
        kept = prior.masked_fill(other, -math.inf)
        return kept - torch.logsumexp(kept, 1, keepdim=True)


def mixture_denoiser(
    path: Path, weights: Tensor, means: Tensor, covariances: Tensor, classes: Tensor | None = None
) -> Denoiser:
    """The exact denoiser of a mixture; arguments as `Mixture`."""
    return Denoiser(Mixture(path, weights, means, covariances, classes), path, "x0")


def gaussian_denoiser(path: Path, mean: Tensor, covariance: Tensor) -> Denoiser:
    """The exact denoiser of N(mean [D], covariance [D, D])."""
    return mixture_denoiser(path, torch.ones(1), mean[None], covariance[None])


def gaussian_flow(path: Path, mean: Tensor, covariance: Tensor, x: Tensor, t_from: Tensor, t_to: Tensor) -> Tensor:
    """Where the exact probability-flow ODE of N(mean, covariance) carries x from t_from to t_to.

    x: [B, D]; times: [B].  Returns [B, D] float64.  Each eigenmode is scaled by its ratio of standard deviations.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    (a_from, s_from), (a_to, s_to) = ((path.alpha(t)[:, None], path.sigma(t)[:, None]) for t in (t_from, t_to))
    ratio = ((a_to**2 * values + s_to**2) / (a_from**2 * values + s_from**2)).sqrt()
    moved = ((x.double() - a_from * mean) @ vectors * ratio) @ vectors.T
    return expand(path.alpha(t_to), moved) * mean + moved
