"""Losses beside the released codes' own form of them, written out a second time: values and gradients to rounding.

The forms are in those codes' variables: DMD2's and SiD's sigma, f-distill's ratio of the discriminator's logits, sCM's
angle and F, MeanFlow's u with its line. Random numbers are the method's.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.closed_forms import random
from support.tiny_players import BATCH, CLASSES, PATH, SHAPE, scene
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Method, Players, Problem
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.f_distill import FDistill
from diffdistill.methods.mean_flow import MeanFlow
from diffdistill.methods.scm import SCM
from diffdistill.methods.sid import SiD
from diffdistill.networks.two_times import TwoTimesConfig
from diffdistill.networks.unet import UNetConfig

Draw = dict[str, Tensor]
SIGMA_DATA = 0.5


def agree(found: Tensor, expected: Tensor, players: Players, *learners: str) -> None:
    """Values, and gradients of everything that learns."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    parameters = [p for name in learners for p in players[name].parameters()]
    gradients = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (found, expected)]
    compared = [(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None]
    assert len(compared) > len(parameters) / 2
    assert all((a is None) == (b is None) for a, b in zip(*gradients, strict=True))
    for a, b in compared:
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def wide(value: Tensor) -> Tensor:
    return value.reshape(-1, 1, 1, 1)


def sampled(method: DMD2 | FDistill | SiD, players: Players, draw: Draw, prefix: str = "") -> Tensor:
    """G(sigma_init n, sigma_init, c)."""
    sigma, z = method.steps.init_ratio, draw[f"{prefix}z"]
    x: Tensor = players.generator(sigma * z, torch.full((len(z),), sigma).double(), Cond(label=draw[f"{prefix}label"]))
    return x


def noised(x: Tensor, draw: Draw, prefix: str = "") -> Tensor:
    return x + wide(draw[f"{prefix}t"]) * draw[f"{prefix}eps"]


def judged(players: Players, x: Tensor, draw: Draw, prefix: str, label: Tensor) -> Tensor:
    """The head's logits on the fake score's bottleneck at an image, noised."""
    features = players.fake.features(noised(x, draw, prefix), draw[f"{prefix}t"], Cond(label=label))
    logits: Tensor = players.discriminator(features)
    return logits


def gradient_of_matching(players: Players, x: Tensor, draw: Draw) -> Tensor:
    """DMD2's, edm_guidance: of the normalised difference of two predictions."""
    with torch.no_grad():
        at, cond = noised(x, draw), Cond(label=draw["label"])
        real, fake = (players[name](at, draw["t"], cond) for name in ("teacher", "fake"))
        weight_factor = (x - real).abs().mean(dim=[1, 2, 3], keepdim=True)
        grad: Tensor = ((x - real) - (x - fake)) / weight_factor
        return grad


def test_dmd2_s_generator() -> None:
    method = DMD2(gan_weight=3e-3, gan_fake_weight=1e-2)
    players, draw, batch = scene(method)
    x = sampled(method, players, draw)
    grad = gradient_of_matching(players, x, draw)
    loss_dm = 0.5 * F.mse_loss(x, (x - grad).detach(), reduction="mean")
    loss_gan = F.softplus(-judged(players, x, draw, "gan ", draw["label"])).mean()
    agree(method.generator_loss(players, draw, batch).total, loss_dm + 3e-3 * loss_gan, players, "generator")


def test_dmd2_s_fake_score_and_discriminator() -> None:
    method = DMD2(gan_weight=3e-3, gan_fake_weight=1e-2, fake_weight="edm")
    players, draw, batch = scene(method)
    x, t = sampled(method, players, draw).detach(), draw["fake t"]
    estimate = players.fake(noised(x, draw, "fake "), t, Cond(label=draw["label"]))
    loss_fake = (wide(t**-2 + 1 / SIGMA_DATA**2) * (estimate - x) ** 2).mean()
    of_fake = judged(players, x, draw, "gan fake ", draw["label"])
    of_real = judged(players, batch.images, draw, "gan real ", batch.cond.label)
    loss_gan = F.softplus(of_fake).mean() + F.softplus(-of_real).mean()
    found = method.fake_loss(players, draw, batch).total
    agree(found, loss_fake + 1e-2 * loss_gan, players, "fake", "discriminator")


def identity(method: SiD, players: Players, draw: Draw, x: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """SiD's sid_loss, per sample and summed over pixels; and its weights."""
    real = players.teacher(noised(x, draw), draw["t"], Cond(label=draw["label"]))
    with torch.no_grad():
        weight_factor = (x - real).abs().mean(dim=[1, 2, 3], keepdim=True)
    gap = real - fake
    loss = gap * (fake - x) + (1 - method.alpha) * gap**2
    return (loss / weight_factor).sum(dim=[1, 2, 3]), 1 / weight_factor


def edm_loss(players: Players, draw: Draw, x: Tensor, estimate: Tensor) -> Tensor:
    """Summed over pixels, a mean over the batch."""
    weight = (draw["fake t"] ** 2 + SIGMA_DATA**2) / (draw["fake t"] * SIGMA_DATA) ** 2
    return (wide(weight) * (estimate - x) ** 2).sum() / len(x)


def test_sid() -> None:
    method = SiD(alpha=1.2, loss_scale=100)
    players, draw, batch = scene(method)
    x = sampled(method, players, draw)
    fake = players.fake(noised(x, draw), draw["t"], Cond(label=draw["label"]))
    loss = identity(method, players, draw, x, fake)[0]
    agree(method.generator_loss(players, draw, batch).total, 100 * loss.mean(), players, "generator")
    x = sampled(method, players, draw, "fake ").detach()
    estimate = players.fake(noised(x, draw, "fake "), draw["fake t"], Cond(label=draw["fake label"]))
    agree(method.fake_loss(players, draw, batch).total, edm_loss(players, draw, x, estimate), players, "fake")


def test_sida() -> None:
    """The bottleneck's mean over channels is the discriminator; real images have the fakes' noise, time and class."""
    method = SiD(alpha=1.0, loss_scale=100, gan_weight=0.01, gan_fake_weight=1.0)
    players, draw, batch = scene(method, step=10**6)
    assert bool(draw["is_gan_on"])
    x, cond = sampled(method, players, draw), Cond(label=draw["label"])
    fake, bottleneck = players.fake.with_features(noised(x, draw), draw["t"], cond)
    loss, weight = identity(method, players, draw, x, fake)
    logits = bottleneck.mean(dim=1).clamp(-10, 10)
    bce = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    adversarial = (bce * weight).sum() / len(x) * x[0].numel()
    expected = 0.5 * 100 * loss.mean() + 0.5 * 0.01 * adversarial
    agree(method.generator_loss(players, draw, batch).total, expected, players, "generator")

    draw["fake label"] = batch.cond.label
    x, cond, t = sampled(method, players, draw, "fake ").detach(), Cond(label=batch.cond.label), draw["fake t"]
    estimate, of_fake = players.fake.with_features(noised(x, draw, "fake "), t, cond)
    of_real = players.fake.features(noised(batch.images, draw, "fake "), t, cond)
    pairs = [(of_real.mean(dim=1), 1.0), (of_fake.mean(dim=1), 0.0)]
    bce = (
        sum(F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, is_real)) for logit, is_real in pairs) / 2
    )
    discrimination = ((t**2 + SIGMA_DATA**2) / (t * SIGMA_DATA) ** 2 * bce).sum() / len(x)
    expected = edm_loss(players, draw, x, estimate) + discrimination
    agree(method.fake_loss(players, draw, batch).total, expected, players, "fake")


H: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda r: r,
    "js": lambda r: 1 - 1 / (1 + r),
    "sh": lambda r: r**0.5,
    "jf": lambda r: 1 + r,
}
"""FastGen's h, each but for a constant, which the mean takes out."""


@pytest.mark.parametrize("bins", [0, 3])
@pytest.mark.parametrize("divergence", H)
def test_f_distill(divergence: str, bins: int) -> None:
    method = FDistill(divergence=divergence, gan_weight=0.1, ratio_bins=bins, ratio_min=0.1, ratio_max=20)  # type: ignore[arg-type]
    players, draw, batch = scene(method)
    x = sampled(method, players, draw)
    logits = judged(players, x, draw, "", draw["label"])
    ratio = logits.detach().clamp(-10, 10).exp().clamp(0.1, 20).flatten()
    if bins:
        for i in range(bins):
            inside = draw["bin"] == i
            ratio = torch.where(inside, ratio / ratio[inside].mean(), ratio)
    h = H[divergence](ratio)
    grad = wide(h / h.mean()) * gradient_of_matching(players, x, draw)
    expected = 0.5 * F.mse_loss(x, (x - grad).detach()) + 0.1 * F.softplus(-logits).mean()
    agree(method.generator_loss(players, draw, batch).total, expected, players, "generator")


def test_scm() -> None:
    """Algorithm 1: F, its derivative along the trajectory, the normalised tangent, the adaptive weight."""
    method = SCM(warmup=100)
    players, draw, batch = scene(method, step=60)
    ramp = float(draw["ramp"])
    assert ramp == pytest.approx(0.6)
    tau = torch.atan(draw["t"] / SIGMA_DATA)
    cos, sin = wide(tau.cos()), wide(tau.sin())
    x = cos * batch.images + sin * SIGMA_DATA * draw["eps"]

    def output(name: str, x: Tensor, tau: Tensor) -> Tensor:
        """F of the player: D = cos x - sin sigma_data F."""
        estimate = players[name](x / wide(tau.cos()), SIGMA_DATA * tau.tan(), batch.cond)
        return (wide(tau.cos()) * x - estimate) / (wide(tau.sin()) * SIGMA_DATA)

    velocity = SIGMA_DATA * output("teacher", x, tau).detach()
    ones = torch.ones_like(tau)
    own, change = torch.func.jvp(lambda x, tau: output("generator", x, tau), (x, tau), (velocity, ones))
    own, change = own.detach(), change.detach()
    tangent = -(cos**2) * (SIGMA_DATA * own - velocity) - ramp * cos * sin * (x + SIGMA_DATA * change)
    tangent = tangent / (tangent.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) + 0.1)
    error = (output("generator", x, tau) - own - tangent).square().flatten(1).mean(1)
    weight = players.weight(tau)
    expected = (weight.exp() * error - weight).mean()
    agree(method.generator_loss(players, draw, batch).total, expected, players, "generator", "weight")


def test_mean_flow() -> None:
    """u_tgt = v - (t - r) du/dt by one jvp with tangents (v, 0, 1), and the adaptive loss with p = 0.75, c = 1e-3."""
    method = MeanFlow(velocity="data", power=0.75, constant=1e-3, share_equal=0.25)
    players, draw, batch = mean_flow_scene(method)
    r, t = draw["r"], draw["t"]
    z = (1 - wide(t)) * batch.images + wide(t) * draw["eps"]

    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        cond = Cond(label=batch.cond.label, end_time=r)
        estimate = players.generator(z / (1 - wide(t)), t / (1 - t), cond)
        return (z - estimate) / wide(t)

    v = draw["eps"] - batch.images
    _, dudt = torch.func.jvp(u, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    target = (v - wide(t - r) * dudt).detach()
    loss = (u(z, r, t) - target).square().sum(dim=(1, 2, 3))
    expected = (loss / (loss.detach() + 1e-3) ** 0.75).mean()
    agree(method.generator_loss(players, draw, batch).total, expected, players, "generator")


def mean_flow_scene(method: Method) -> tuple[Players, Draw, Batch]:
    """A student that is told r as well, of random weights."""
    torch.manual_seed(0)
    base = UNetConfig(channels=(8, 8))
    teacher = Denoiser(base.build(SHAPE, CLASSES, 0.1), PATH, "edm").requires_grad_(False)
    student = Denoiser(TwoTimesConfig(base=base, width=8).build(SHAPE, CLASSES, 0.1), PATH, "edm")
    problem = Problem(SHAPE, CLASSES, PATH, teacher=teacher, network=student)
    generator = method.players(problem)["generator"].double()
    for parameter in generator.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    draw = method.draw(StepRandom(0, 0, torch.arange(BATCH)), problem)
    draw = {name: value.double() if value.is_floating_point() else value for name, value in draw.items()}
    images, label = random(BATCH, *SHAPE, seed=9), torch.arange(BATCH) % CLASSES
    return Players(generator=generator), draw, Batch(images, Cond(label=label))
