"""Why two losses of one student have two optima, and what a GAN does to the fake score: small exact experiments.

The derivations stand in docs/what-decides-quality.md. Students on the line are a z, z ~ N(0, 1), so N(0, a^2); slopes
are derivatives by a. Noise levels are ratios sigma of a path on which x_t = x + sigma eps.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.time_distributions import Karras
from diffdistill.distillation.losses import denoising_loss, denoising_weight
from diffdistill.distillation.method import Batch, Players
from diffdistill.distillation.score_distillation import Features, critics_loss
from diffdistill.networks.analytic import Mixture, mixture_denoiser
from diffdistill.networks.discriminator import make_head
from diffdistill.networks.mlp import MLPConfig

PATH = EDM(sigma_min=0.01, sigma_max=80.0)


def levels(least: float, greatest: float, *, rho: float = 5.0, count: int = 200) -> Tensor:
    """Noise levels at even quantiles of a Karras law, [count] float64."""
    law = Karras(ratio_min=least, ratio_max=greatest, rho=rho)
    return law((torch.arange(count, dtype=torch.float64) + 0.5) / count, PATH)


def normaliser(variance: float, sigma: Tensor) -> Tensor:
    """nu of many pixels N(0, variance): the mean of |x - D(x_t)|, whose variance is that of x given x_t."""
    return (2 / torch.pi * variance * sigma**2 / (variance + sigma**2)).sqrt()


def compromise(teacher: float, data: float, matching: Tensor, gan: Tensor, *, weight: float, pixels: int) -> float:
    """The variance of a Gaussian student at which DMD2's two slopes cancel, to first order in data - teacher.

    v = (A teacher + B data) / (A + B) with A = E_sigma[sigma^2 / (nu (v + sigma^2)(teacher + sigma^2))] and
    B = weight pixels / 2 E_tau[1 / ((v + tau^2)(data + tau^2))].  matching, gan: the levels sigma and tau.
    """
    v, nu = teacher, normaliser(teacher, matching)
    for _ in range(100):
        a = float((matching**2 / nu / ((v + matching**2) * (teacher + matching**2))).mean())
        b = weight * pixels / 2 * float((1 / ((v + gan**2) * (data + gan**2))).mean())
        v = (a * teacher + b * data) / (a + b)
    return v


class TwoModes(NamedTuple):
    """The law of a teacher and its data, half N(-mean, variance) and half N(mean, variance): no Gaussian is it."""

    mean: float = 1.0
    variance: float = 0.09

    def matching_slope(self, v: float, sigma: Tensor) -> float:
        """Of the reverse KL of N(0, v), times sigma^2 as in D_fake - D_teacher; the mean over the levels."""
        x, density, score_q, score_p, _ = self._grid(v, sigma)
        slopes = v**0.5 / (v + sigma**2) * (density * x * (score_q - score_p)).sum(1)
        return float((sigma**2 * slopes).mean())

    def gan_slope(self, v: float, tau: Tensor) -> float:
        """Of softplus(-l) at the best discriminator, l = log(p / q), read at these levels; their mean."""
        x, density, score_q, score_p, log_ratio = self._grid(v, tau)
        pull = torch.sigmoid(-log_ratio) * (score_q - score_p)
        return float((v**0.5 / (v + tau**2) * (density * x * pull).sum(1)).mean())

    def _grid(self, v: float, sigma: Tensor, count: int = 1601) -> tuple[Tensor, ...]:
        """Points x of N(0, v) noised, their weights, both scores and log(p / q): each [levels, count]."""
        total_q, total_p = v + sigma[:, None] ** 2, self.variance + sigma[:, None] ** 2
        unit = torch.linspace(-8, 8, count, dtype=torch.float64)
        x = total_q.sqrt() * unit
        log_q = -(unit**2) / 2 - 0.5 * total_q.log()  # the constant of both densities cancels
        sides = torch.stack([-((x - side) ** 2) / (2 * total_p) for side in (-self.mean, self.mean)])
        log_p = torch.logsumexp(sides, 0) - 0.5 * total_p.log() - math.log(2)
        density = torch.softmax(-(unit**2) / 2, 0).expand_as(x)
        score_p = (self.mean * torch.tanh(self.mean * x / total_p) - x) / total_p
        return x, density, -x / total_q, score_p, log_p - log_q


def root(slope: Callable[[float], float], low: float = 1e-3, high: float = 10.0) -> float:
    """Where a slope that begins below zero crosses it, by bisection."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2


def optimum(law: TwoModes, matching: Tensor | None, gan: Tensor | None, *, weight: float = 1.0) -> float:
    """The variance at which the matching's slope and weight times the GAN's cancel; either may be absent."""

    def slope(v: float) -> float:
        of_matching = 0.0 if matching is None else law.matching_slope(v, matching)
        return of_matching + (0.0 if gan is None else weight * law.gan_slope(v, gan))

    return root(slope)


def critics_dynamics(
    matching: float, variance: float, weight: float, rates: tuple[float, float]
) -> tuple[complex, complex]:
    """The eigenvalues of a generator's mean beside a critic l = psi x, both following their gradients at these rates.

    matching: the slope of the matching by the mean.  variance: of what the critic reads.  weight: lambda_g.
    With an imaginary part the two circle one another: the generator is early, the critic late.
    """
    generator, critic = rates
    rows = [[-generator * matching, generator * weight / 2], [-critic / 2, -critic * variance / 2]]
    first, second = torch.linalg.eigvals(torch.tensor(rows, dtype=torch.float64)).tolist()
    return first, second


# The ring: eight modes on a circle, two a class.
MODES, CLASSES, BATCH, DIM = 8, 4, 256, 2
TIME_LAW = Karras(ratio_min=0.05, ratio_max=3.0, rho=200.0)
RATE = 2e-3


def ring(radius: float, std: float) -> Denoiser:
    """The exact denoiser of a ring."""
    angle = torch.arange(MODES, dtype=torch.float64) * (2 * torch.pi / MODES)
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    variances = torch.full((MODES,), std**2, dtype=torch.float64)
    return mixture_denoiser(PATH, torch.ones(MODES), means, variances, torch.arange(MODES) * CLASSES // MODES)


class Drawn:
    """Samples, times and noise from one stream."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, law: Denoiser, count: int = BATCH) -> Batch:
        assert isinstance(law.net, Mixture)
        cond = Cond(label=torch.randint(CLASSES, (count,), generator=self.generator))
        return Batch(law.net.sample(self._uniform(count), self.eps(count).double(), cond).float(), cond)

    def t(self, count: int = BATCH) -> Tensor:
        return TIME_LAW(self._uniform(count), PATH)

    def eps(self, count: int = BATCH) -> Tensor:
        return torch.randn(count, DIM, generator=self.generator)

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, dtype=torch.float64)


def fake_score_error(
    gan_weight: float | None, *, seed: int = 0, features: Features = "fake", steps: int = 600
) -> float:
    """The fake score's mean EDM-weighted squared error to the exact one of a generator that stands still.

    It starts at the teacher's score and learns the generator's law, a ring a little too small and too wide, beside the
    GAN's share of this weight (None: none).
    """
    torch.manual_seed(seed)
    real, generated, drawn = ring(1.0, 0.12), ring(0.9, 0.2), Drawn(seed)
    teacher, fake = network(), network()
    fit(teacher, real, drawn, steps=steps // 2)
    fake.load_state_dict(teacher.state_dict())
    head = make_head(fake, (DIM,))
    players = Players(teacher=teacher.requires_grad_(False), fake=fake, discriminator=head)
    optimizer = torch.optim.Adam([*fake.parameters(), *head.parameters()], lr=RATE, betas=(0.0, 0.999))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, 2 * (1 - step / steps))
        batch, made = drawn.batch(real), drawn.batch(generated)
        assert made.cond.label is not None
        draw = {"label": made.cond.label}
        for call in ("fake", "gan real", "gan fake"):
            draw |= {f"{call} t": drawn.t(), f"{call} eps": drawn.eps()}
        optimizer.zero_grad()
        loss = critics_loss(players, draw, batch, made.images, weight="edm", gan_weight=gan_weight, features=features)
        loss.total.backward()
        optimizer.step()
    return _error(fake, generated)


@torch.no_grad()
def _error(fake: Denoiser, exact: Denoiser, count: int = 8192) -> float:
    drawn = Drawn(99)
    batch, t = drawn.batch(exact, count), drawn.t(count)
    x_t = PATH.diffuse(batch.images, drawn.eps(count), t)
    gap = (fake(x_t, t, batch.cond) - exact(x_t, t, batch.cond)).square().mean(1)
    return float((denoising_weight("edm", PATH, t, fake.sigma_data) * gap).mean())


def network() -> Denoiser:
    """A small one of points."""
    return Denoiser(MLPConfig(width=64, blocks=2).build((DIM,), CLASSES, 0.1), PATH, "edm", sigma_data=0.7)


def fit(score: Denoiser, law: Denoiser, drawn: Drawn, *, steps: int) -> None:
    """Train a network by denoising samples of a law."""
    optimizer = torch.optim.Adam(score.parameters(), lr=RATE)
    for _ in range(steps):
        batch = drawn.batch(law)
        optimizer.zero_grad()
        denoising_loss(score, batch.images, drawn.eps(), drawn.t(), batch.cond, weight="edm").backward()
        optimizer.step()
