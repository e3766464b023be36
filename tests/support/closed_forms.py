"""Networks whose every answer is known, and nodes that turn expectations into sums."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM, Flow, Path, VPCosine, VPDiscrete, VPLinear
from diffdistill.distillation.method import Batch, Method, Players
from diffdistill.networks.analytic import Mixture, gaussian_denoiser, mixture_denoiser

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PATHS: dict[str, Path] = {
    "edm": EDM(),
    "vp_cosine": VPCosine(),
    "vp_linear": VPLinear(),
    "vp_discrete": VPDiscrete(),
    "flow": Flow(),
    "flow_shifted": Flow(shift=3.0),
}
on_every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, float64, from a generator of their own."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def numbers(*values: float) -> Tensor:
    """The values as float64, never by way of float32."""
    return torch.tensor(values, dtype=torch.float64)


def normal_nodes(count: int = 40) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite nodes of N(0, 1) and their weights, which sum to one."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def pairs(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of two sets of nodes and the weight of each pair, flat."""
    a, b = torch.meshgrid(first[0], second[0], indexing="ij")
    return a.flatten(), b.flatten(), torch.outer(first[1], second[1]).flatten()


def averaged_by(x: Tensor, weights: Tensor) -> Tensor:
    """x unchanged; a gradient of a plain mean over it becomes that of the mean by `weights`."""
    same = x.clone()
    same.register_hook(lambda gradient: gradient * weights.reshape(-1, *[1] * (x.ndim - 1)) * len(x))
    return same


def one_gaussian(mean: float, std: float, path: Path | None = None) -> Denoiser:
    """The exact denoiser of N(mean, std^2) on the line, by default on EDM's path."""
    return gaussian_denoiser(path or EDM(), numbers(mean), numbers(std)[None] ** 2)


class Affine(nn.Module):
    """The generator offset_c + gain z. A mean over its samples is taken by `weights`, if given."""

    resolution_multiple = 1

    def __init__(self, offset: list[float], gain: float, weights: Tensor | None = None) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(offset, dtype=torch.float64))
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))
        self.weights = weights
        self.num_classes = len(offset) if len(offset) > 1 else 0
        self.has_null_condition = False
        self.accepts = frozenset({"label"} if self.num_classes else ())

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        offset = self.offset[torch.zeros(len(x), dtype=torch.int64) if cond.label is None else cond.label]
        made = offset.reshape(-1, *[1] * (x.ndim - 1)) + self.gain * x
        if self.weights is not None:
            made = averaged_by(made, self.weights)
        return made


class LearnedGaussian(nn.Module):
    """The exact denoiser of N(mean_c, variance) on EDM's path, with parameters; the last mean is that of "no class"."""

    has_null_condition = True
    resolution_multiple = 1
    accepts = frozenset({"label"})

    def __init__(self, mean: list[float], variance: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.variance = nn.Parameter(torch.tensor(variance, dtype=torch.float64))
        self.num_classes = len(mean) - 1

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        label = torch.full((len(x),), self.num_classes) if cond.label is None else cond.label
        square = EDM().time_of_input(time_input)[:, None] ** 2
        return (self.variance * x + square * self.mean[label][:, None]) / (self.variance + square)


class GaussianFixture:
    """A Gaussian teacher N(m, s^2), the generator theta + tau z and its exact fake score, at one sigma on EDM's path.

    Nodes over (z, eps) make expectations exact for polynomials.  A, B: variances of the teacher's and the generator's
    law at sigma.
    """

    def __init__(
        self, theta: float = -0.4, tau: float = 0.9, sigma: float = 1.3, *, m: float = 0.7, s: float = 0.5
    ) -> None:
        self.theta, self.tau, self.sigma, self.m, self.s = theta, tau, sigma, m, s
        self.A, self.B = s**2 + sigma**2, tau**2 + sigma**2
        z, eps, self.weights = pairs(normal_nodes(), normal_nodes())
        self.z, self.eps, self.t = z[:, None], eps[:, None], torch.full_like(z, sigma)

    def gradient(self, method: Method) -> Tensor:
        """The gradient of a method's generator loss by (theta, tau), the fake score held fixed."""
        fake, teacher = one_gaussian(self.theta, self.tau), one_gaussian(self.m, self.s)
        return generator_gradient(method, self, self.theta, self.tau, fake=fake, teacher=teacher)


class MixtureFixture:
    """A two-component teacher and the generator t + u y, y from another mixture; every law exact."""

    shift, scale, variance = 0.2, 1.1, 0.8
    teacher_law = ((0.3, 0.7), (-1.5, 1.0), (0.3, 0.2))
    latent_law = ((0.6, 0.4), (-0.5, 0.8), (0.25, 0.15))
    expected_softened = (-0.040398, -0.075387)

    def __init__(self) -> None:
        nodes, weights = normal_nodes()
        shares, means, variances = self.latent_law
        latent = torch.cat([m + math.sqrt(v) * nodes for m, v in zip(means, variances, strict=True)])
        latent_weights = torch.cat([share * weights for share in shares])
        y, eps, self.weights = pairs((latent, latent_weights), (nodes, weights))
        self.y = self.z = y[:, None]
        self.eps = eps[:, None]
        self.t = torch.full_like(y, math.sqrt(self.variance))
        self.teacher = mixture_on_the_line(*self.teacher_law)
        self.fake = self.law(self.shift, self.scale)

    def generated_law(self, shift: float, scale: float):
        shares, means, variances = self.latent_law
        return shares, tuple(shift + scale * m for m in means), tuple(scale**2 * v for v in variances)

    def law(self, shift: float, scale: float) -> Denoiser:
        """The exact denoiser of the generator's law at (shift, scale)."""
        return mixture_on_the_line(*self.generated_law(shift, scale))

    def log_density(self, denoiser: Denoiser, points: Tensor) -> Tensor:
        """log density of the law of x_t at points [B, 1]."""
        t = torch.full((len(points),), math.sqrt(self.variance), dtype=torch.float64)
        return denoiser.net.log_prob(points, t, NO_COND)

    def log_ratio(self, points: Tensor) -> Tensor:
        """log p_t / q_t at points [B, 1], the discriminator's optimum."""
        return self.log_density(self.teacher, points) - self.log_density(self.fake, points)

    def gradient(self, loss_of_noised) -> Tensor:
        """The gradient by (shift, scale) of a loss of x (with graph) and its noised form."""
        shift, scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (self.shift, self.scale))
        x = averaged_by(shift + scale * self.y, self.weights)
        loss = loss_of_noised(x, EDM().diffuse(x, self.eps, self.t))
        return torch.stack(torch.autograd.grad(loss, (shift, scale)))

    def method_gradient(self, method: Method, **players: nn.Module) -> Tensor:
        """The gradient of a method's generator loss by (shift, scale), the fake score held fixed."""
        given = {"fake": self.fake, "teacher": self.teacher, **players}
        return generator_gradient(method, self, self.shift, self.scale, **given)

    def finite_difference(self, divergence: Callable[[float, float], float], step: float = 1e-4) -> Tensor:
        """The gradient of a function of (shift, scale), by central differences."""
        a, b = self.shift, self.scale
        by_shift = divergence(a + step, b) - divergence(a - step, b)
        by_scale = divergence(a, b + step) - divergence(a, b - step)
        return numbers(by_shift, by_scale) / (2 * step)

    def expectation(self, function: Callable[[Tensor, Tensor], Tensor], shift: float, scale: float) -> float:
        """E over x_t of the generator's law at (shift, scale) of function(log r, x_t), r = p_t / q_t, on a grid."""
        grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)[:, None]
        log_q = self.log_density(self.law(shift, scale), grid)
        log_r = self.log_density(self.teacher, grid) - log_q
        return float((log_q.exp() * function(log_r, grid).flatten()).sum() * (24 / 20000))

    def score(self, denoiser: Denoiser, points: Tensor) -> Tensor:
        """The score of the law of x_t at points [B, 1]."""
        t = torch.full((len(points),), math.sqrt(self.variance), dtype=torch.float64)
        return denoiser.convert(denoiser(points, t), "score", points, t)

    def softened_divergence(self, shift: float, scale: float) -> float:
        """E_q[(r + 1) log((r + 1) / 2r)], r = p_t / q_t."""

        def integrand(log_r: Tensor, _: Tensor) -> Tensor:
            return (log_r.exp() + 1) * (torch.log1p(log_r.exp()) - math.log(2) - log_r)

        return self.expectation(integrand, shift, scale)


class Tapped(Mixture):
    """A mixture whose "features" are the noised image itself."""

    def features(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        return x


class LogRatio(nn.Module):
    """The fixture's best discriminator."""

    def __init__(self, fixture: MixtureFixture) -> None:
        super().__init__()
        self.fixture = fixture

    def forward(self, x_t: Tensor) -> Tensor:
        return self.fixture.log_ratio(x_t)


def generator_gradient(
    method: Method, nodes: Any, offset: float, gain: float, *, fake: nn.Module, teacher: nn.Module, **others: nn.Module
) -> Tensor:
    """The gradient of a method's generator loss by the offset and gain of the generator offset + gain z.

    nodes: z, eps, t and the weights of the samples.  The method's `steps` must feed the noise itself.
    """
    net = Affine([offset], gain, nodes.weights)
    players = Players(generator=Denoiser(net, EDM(), "x0"), fake=fake, teacher=teacher, **others)
    draw = {"z": nodes.z, "eps": nodes.eps, "t": nodes.t, "step": torch.tensor(0)}
    draw |= {"label": torch.zeros(len(nodes.z), dtype=torch.int64), "is_gan_on": torch.tensor(False)}
    method.call("generator_loss", players, draw, Batch(torch.empty(0))).total.backward()
    assert net.gain.grad is not None
    assert net.offset.grad is not None
    return torch.cat([net.offset.grad, net.gain.grad[None]])


def mixture_on_the_line(shares, means, variances) -> Denoiser:
    """The exact denoiser of a mixture of Gaussians on the line, on EDM's path."""
    return mixture_denoiser(EDM(), *components(shares, means, variances))


def components(shares, means, variances) -> tuple[Tensor, Tensor, Tensor]:
    """A law on the line as `Mixture` takes it."""
    return numbers(*shares), numbers(*means)[:, None], numbers(*variances)
