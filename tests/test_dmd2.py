"""DMD2 against closed forms: its gradients, which planted faults they catch, and who is asked, how often, for what."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffdistill.denoiser import NO_COND, Cond, Denoiser, freeze
from diffdistill.draws import Draws
from diffdistill.losses import denoising_loss, gan_discriminator_loss, gan_generator_loss
from diffdistill.method import Batch, Players, Setting
from diffdistill.methods import dmd2
from diffdistill.methods.dmd2 import DMD2
from diffdistill.networks.analytic import Mixture, gaussian_denoiser, mixture_denoiser
from diffdistill.networks.mlp import MLPConfig
from diffdistill.path import EDM, Path, VPCosine
from diffdistill.sampling import FewSteps, Heun
from diffdistill.schema import UserError
from diffdistill.timesteps import LogNormal

PATH = EDM()
UNIT_STEPS = FewSteps(init_noise="unit")  # the generator is given n itself
NO_NORMALISER = 1e3  # a minimum above every distance makes nu this constant
SIX_DIGITS = 2e-6  # values that are known to six decimals
SHAPE = (1, 4, 4)
CLASSES = 3
BATCH = 6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Exact players


class Affine(nn.Module):
    """The generator offset_c + gain z. A mean over its samples is taken by `weights`, if given."""

    resolution_multiple = 1

    def __init__(self, offset: list[float], gain: float, weights: Tensor | None = None) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(offset, dtype=torch.float64))
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))
        self.weights = weights
        self.num_classes = len(offset) if len(offset) > 1 else 0
        self.knows_unconditional = False
        self.accepts = frozenset({"label"} if self.num_classes else ())

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        offset = self.offset[torch.zeros(len(x), dtype=torch.int64) if cond.label is None else cond.label]
        made = offset.reshape(-1, *[1] * (x.ndim - 1)) + self.gain * x
        if self.weights is not None:
            scale = len(x) * self.weights.reshape(-1, *[1] * (x.ndim - 1))
            made.register_hook(lambda gradient: gradient * scale)
        return made


class LearnedGaussian(nn.Module):
    """The exact denoiser of N(mean_c, variance), both of them parameters. Its last mean is that of "no class"."""

    knows_unconditional = True
    resolution_multiple = 1
    accepts = frozenset({"label"})

    def __init__(self, mean: list[float], variance: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.variance = nn.Parameter(torch.tensor(variance, dtype=torch.float64))
        self.num_classes = len(mean) - 1

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        label = torch.full((len(x),), self.num_classes) if cond.label is None else cond.label
        square = PATH.time_of_input(time_input)[:, None] ** 2
        return (self.variance * x + square * self.mean[label][:, None]) / (self.variance + square)


class Tapped(Mixture):
    """A mixture whose "features" are the noised image itself."""

    def features(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        return x


class LogRatio(nn.Module):
    """The best discriminator at one time: log p_t / q_t."""

    def __init__(self, real: Mixture, fake: Mixture, time: float) -> None:
        super().__init__()
        self.real, self.fake, self.time = real, fake, time

    def forward(self, x_t: Tensor) -> Tensor:
        t = torch.full((len(x_t),), self.time, dtype=torch.float64)
        return self.real.log_prob(x_t, t, NO_COND) - self.fake.log_prob(x_t, t, NO_COND)


def quadrature(latents: Tensor, latent_weights: Tensor) -> dict[str, Tensor]:
    """All pairs of the latents [n] with 40 Gauss-Hermite nodes of the noise: z, eps [n, 1] and their weight."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    z, eps = torch.meshgrid(latents, torch.from_numpy(nodes), indexing="ij")
    weight = torch.outer(latent_weights, torch.from_numpy(weights / weights.sum()))
    return {"z": z.reshape(-1, 1), "eps": eps.reshape(-1, 1), "weight": weight.flatten()}


def one_gaussian(mean: float, std: float, path: Path = PATH) -> Denoiser:
    covariance = torch.tensor([[std]], dtype=torch.float64) ** 2
    return gaussian_denoiser(path, torch.tensor([mean], dtype=torch.float64), covariance)


def one_step_draw(z: Tensor, eps: Tensor, sigma: float) -> dict[str, Tensor]:
    t = torch.full((len(z),), sigma, dtype=torch.float64)
    label = torch.zeros(len(z), dtype=torch.int64)
    return {"z": z, "eps": eps, "t": t, "label": label, "step": torch.tensor(0)}


NO_IMAGES = Batch(torch.empty(0))


def test_the_generator_s_gradient_is_that_of_the_reverse_kl():  # A1
    m, s, theta, tau, sigma = 0.7, 0.5, -0.4, 0.9, 1.3
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    points = quadrature(torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum()))
    net = Affine([theta], tau, points["weight"])
    players = Players(generator=Denoiser(net, PATH, "x0"), fake=one_gaussian(theta, tau), teacher=one_gaussian(m, s))
    method = DMD2(steps=UNIT_STEPS, gan_weight=0.0, normaliser_minimum=NO_NORMALISER)
    loss = method.generator_loss(players, one_step_draw(points["z"], points["eps"], sigma), NO_IMAGES)
    loss.total.backward()
    found = NO_NORMALISER / sigma**2 * torch.cat([net.offset.grad, net.gain.grad[None]])
    a, b = s**2 + sigma**2, tau**2 + sigma**2
    expected = torch.tensor([(theta - m) / a, tau / a - tau / b], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)  # the quadrature is exact for polynomials
    torch.testing.assert_close(found, torch.tensor([-0.567010, 0.103918]).double(), rtol=0, atol=SIX_DIGITS)


def test_the_gan_s_share_at_the_best_discriminator_is_the_gradient_of_the_softened_reverse_kl():  # E2
    shift, scale, sigma = 0.2, 1.1, math.sqrt(0.8)
    latent_means, latent_variances, shares = (-0.5, 0.8), (0.25, 0.15), (0.6, 0.4)
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(40))
    latents = torch.cat([m + math.sqrt(v) * nodes for m, v in zip(latent_means, latent_variances, strict=True)])
    points = quadrature(latents, torch.cat([share * weights / weights.sum() for share in shares]))
    real = Tapped(PATH, numbers(0.3, 0.7), numbers(-1.5, 1.0)[:, None], numbers(0.3, 0.2))
    generated_means = shift + scale * numbers(*latent_means)[:, None]
    fake = Tapped(PATH, numbers(*shares), generated_means, scale**2 * numbers(*latent_variances))
    net = Affine([shift], scale, points["weight"])
    # Teacher and fake agree, so that only the GAN pushes.
    players = Players(
        generator=Denoiser(net, PATH, "x0"),
        fake=Denoiser(fake, PATH, "x0"),
        teacher=Denoiser(fake, PATH, "x0"),
        discriminator=LogRatio(real, fake, sigma),
    )
    draw = one_step_draw(points["z"], points["eps"], sigma)
    draw |= {"gan t": draw["t"], "gan eps": draw["eps"]}
    DMD2(steps=UNIT_STEPS, gan_weight=1.0).generator_loss(players, draw, NO_IMAGES).total.backward()
    found = torch.cat([net.offset.grad, net.gain.grad[None]])
    torch.testing.assert_close(found, numbers(-0.040398, -0.075387), rtol=0, atol=SIX_DIGITS)


# A reference in numpy for a conditional, guided, normalised step, and the faults that it must catch


@dataclass
class Reference:
    """One step on known numbers, whose gradients are written out here a second time."""

    teacher_mean = (0.7, -0.9, 0.2)  # the last is "no class"
    teacher_variance = 0.25
    fake_mean = (-0.4, 0.5, 0.1)
    fake_variance = 0.81
    offset = (-0.3, 0.6)
    gain = 0.9
    guidance = 3.0

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.z, self.eps, self.fake_eps = rng.standard_normal((3, 8, 3))
        self.t, self.fake_t = rng.uniform(0.3, 3, (2, 8))
        self.label = np.array([0, 1, 1, 0, 1, 0, 0, 1])

    def players(self) -> Players:
        teacher = freeze(Denoiser(LearnedGaussian(list(self.teacher_mean), self.teacher_variance), PATH, "x0"))
        fake = Denoiser(LearnedGaussian(list(self.fake_mean), self.fake_variance), PATH, "x0")
        return Players(generator=Denoiser(Affine(list(self.offset), self.gain), PATH, "x0"), fake=fake, teacher=teacher)

    def draw(self) -> dict[str, Tensor]:
        named = {"z": self.z, "eps": self.eps, "t": self.t, "fake eps": self.fake_eps, "fake t": self.fake_t}
        drawn = {name: torch.from_numpy(value) for name, value in named.items()}
        return drawn | {"label": torch.from_numpy(self.label), "step": torch.tensor(0)}

    @staticmethod
    def denoise(x_t: np.ndarray, t: np.ndarray, mean: np.ndarray, variance: float) -> np.ndarray:
        square = t[:, None] ** 2
        return (variance * x_t + square * mean[:, None]) / (variance + square)

    def samples(self) -> np.ndarray:
        return np.array(self.offset)[self.label][:, None] + self.gain * self.z

    def generator_gradient(self) -> np.ndarray:
        """By both offsets and the gain: of 0.5 mean (x - sg[x - v])^2, v = (D_fake - D_teacher^w) / nu."""
        x = self.samples()
        x_t = x + self.t[:, None] * self.eps
        teacher_mean = np.array(self.teacher_mean)
        guided_mean = teacher_mean[2] + self.guidance * (teacher_mean[self.label] - teacher_mean[2])
        real = self.denoise(x_t, self.t, guided_mean, self.teacher_variance)
        fake = self.denoise(x_t, self.t, np.array(self.fake_mean)[self.label], self.fake_variance)
        push = (fake - real) / np.abs(x - real).mean(1, keepdims=True) / x.size
        return np.array([push[self.label == 0].sum(), push[self.label == 1].sum(), (push * self.z).sum()])

    def fake_gradient(self) -> np.ndarray:
        """By the means of both classes and the variance: of mean (1/t^2 + 4) (D_fake(x + t eps) - x)^2."""
        x = self.samples()
        square = self.fake_t[:, None] ** 2
        x_t = x + self.fake_t[:, None] * self.fake_eps
        mean = np.array(self.fake_mean)[self.label]
        error = self.denoise(x_t, self.fake_t, mean, self.fake_variance) - x
        push = 2 * (1 / square + 4) * error / x.size
        by_mean = push * square / (self.fake_variance + square)
        by_variance = push * square * (x_t - mean[:, None]) / (self.fake_variance + square) ** 2
        return np.array([by_mean[self.label == 0].sum(), by_mean[self.label == 1].sum(), by_variance.sum()])


def generator_error() -> float:
    """How far the generator's gradient is from the reference, relative to its largest entry."""
    reference = Reference()
    players = reference.players()
    players.fake.requires_grad_(False)
    method = DMD2(steps=UNIT_STEPS, gan_weight=0.0, guidance=reference.guidance)
    method.generator_loss(players, reference.draw(), NO_IMAGES).total.backward()
    net = players.generator.net
    return relative_error(torch.cat([net.offset.grad, net.gain.grad[None]]), reference.generator_gradient())


def fake_error() -> float:
    """How far the fake score's gradient is from the reference, relative to its largest entry."""
    reference = Reference()
    players = reference.players()
    method = DMD2(steps=UNIT_STEPS, gan_weight=0.0, guidance=reference.guidance)
    method.fake_loss(players, reference.draw(), NO_IMAGES).total.backward()
    net = players.fake.net
    return relative_error(torch.cat([net.mean.grad[:2], net.variance.grad[None]]), reference.fake_gradient())


def relative_error(found: Tensor, expected: np.ndarray) -> float:
    return float(np.abs(found.numpy() - expected).max() / np.abs(expected).max())


Patch = pytest.MonkeyPatch
FIELD, DENOISE, DIFFUSE = DMD2.field, Denoiser.forward, EDM.diffuse


def wrong_sign(patch: Patch) -> None:
    patch.setattr(DMD2, "field", lambda *arguments: -FIELD(*arguments))


def gradient_through_the_field(patch: Patch) -> None:
    patch.setattr(DMD2, "field", FIELD.__wrapped__)  # what is inside of no_grad
    patch.setattr(dmd2, "field_loss", lambda x, field: 0.5 * (x - (x.detach() - field)).square().mean())


def normaliser_dropped(patch: Patch) -> None:
    patch.setattr(dmd2, "sample_normaliser", lambda x, estimate, minimum: torch.ones_like(x[:, :1]))


def normaliser_by_the_estimate_alone(patch: Patch) -> None:
    original = dmd2.sample_normaliser
    patch.setattr(dmd2, "sample_normaliser", lambda x, estimate, minimum: original(estimate, x * 0, minimum))


def no_noise_added(patch: Patch) -> None:
    patch.setattr(EDM, "diffuse", lambda self, x0, eps, t: DIFFUSE(self, x0, 0 * eps, t))


def scores_at_twice_sigma(patch: Patch) -> None:
    patch.setattr(Denoiser, "forward", lambda self, x, t, *rest, **named: DENOISE(self, x, 2 * t, *rest, **named))


def class_dropped_by(patch: Patch, role: str) -> None:
    def forward(self: Denoiser, x: Tensor, t: Tensor, cond: Cond = NO_COND, **named):
        is_teacher = isinstance(self.net, LearnedGaussian) and not self.net.mean.requires_grad
        is_fake = isinstance(self.net, LearnedGaussian) and self.net.variance.item() == Reference.fake_variance
        if {"teacher": is_teacher and not is_fake, "fake": is_fake}[role]:
            cond = Cond(label=torch.full_like(cond.label, self.net.num_classes))
        return DENOISE(self, x, t, cond, **named)

    patch.setattr(Denoiser, "forward", forward)


def teacher_without_the_class(patch: Patch) -> None:
    class_dropped_by(patch, "teacher")


def fake_without_the_class(patch: Patch) -> None:
    class_dropped_by(patch, "fake")


def unguided_teacher(patch: Patch) -> None:
    patch.setattr(Denoiser, "forward", lambda self, x, t, cond=NO_COND, **named: DENOISE(self, x, t, cond))


def unweighted_fake_loss(patch: Patch) -> None:
    patch.setattr(dmd2, "denoising_loss", lambda *arguments, weight: denoising_loss(*arguments, weight="x0"))


def noise_as_the_fake_s_target(patch: Patch) -> None:
    def loss(fake: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond, *, weight: str) -> Tensor:
        estimate = fake(PATH.diffuse(x0, eps, t), t, cond)
        return ((1 / t**2 + 4)[:, None] * (estimate - eps) ** 2).mean()

    patch.setattr(dmd2, "denoising_loss", loss)


def test_the_generator_s_gradient_is_the_reference():
    assert generator_error() < 1e-12  # float64, some twenty operations


def test_the_fake_score_s_gradient_is_the_reference():
    assert fake_error() < 1e-12  # float64, some twenty operations


def by_name(function: Callable[..., object]) -> str:
    return function.__name__.replace("_", " ")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (wrong_sign, generator_error),
        (gradient_through_the_field, generator_error),
        (normaliser_dropped, generator_error),
        (normaliser_by_the_estimate_alone, generator_error),
        (no_noise_added, generator_error),
        (scores_at_twice_sigma, generator_error),
        (teacher_without_the_class, generator_error),
        (fake_without_the_class, generator_error),
        (unguided_teacher, generator_error),
        (no_noise_added, fake_error),
        (scores_at_twice_sigma, fake_error),
        (fake_without_the_class, fake_error),
        (unweighted_fake_loss, fake_error),
        (noise_as_the_fake_s_target, fake_error),
    ],
    ids=by_name,
)
def test_a_planted_fault_moves_the_gradient_off_the_reference(fault, error, monkeypatch):
    fault(monkeypatch)
    assert error() > 0.01  # ten orders above the right code


# Properties of the field


def field_of(method: DMD2, teacher: Denoiser, fake: Denoiser, *, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    draw = {"eps": eps, "t": t, "label": torch.zeros(len(x), dtype=torch.int64)}
    return method.field(Players(teacher=teacher, fake=fake), draw, x)


@pytest.mark.parametrize("network", ["gaussian", "mlp"])
def test_a_fake_that_is_the_unguided_teacher_pushes_nothing(network):
    teacher = one_gaussian(0.7, 0.5) if network == "gaussian" else small_teacher()
    shape = (1,) if network == "gaussian" else SHAPE
    x, eps, t = random(5, *shape), random(5, *shape, seed=1), torch.linspace(0.1, 5, 5, dtype=torch.float64)
    assert not field_of(DMD2(), teacher, deepcopy(teacher), x=x, eps=eps, t=t).any()


def test_scaling_images_and_denoisers_together_leaves_the_field_unchanged():
    x, eps, t = random(5, 1), random(5, 1, seed=1), torch.linspace(0.3, 3, 5, dtype=torch.float64)
    plain = field_of(DMD2(), one_gaussian(0.7, 0.5), one_gaussian(-0.4, 0.9), x=x, eps=eps, t=t)
    k = 7.0
    scaled = field_of(
        DMD2(), one_gaussian(0.7 * k, 0.5 * k), one_gaussian(-0.4 * k, 0.9 * k), x=k * x, eps=eps, t=k * t
    )
    torch.testing.assert_close(scaled, plain, rtol=1e-10, atol=0)


def test_alpha_power_one_multiplies_the_field_by_alpha():
    path = VPCosine()
    teacher, fake = one_gaussian(0.7, 0.5, path), one_gaussian(-0.4, 0.9, path)
    x, eps, t = random(5, 1), random(5, 1, seed=1), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    plain, paper = (field_of(DMD2(alpha_power=power), teacher, fake, x=x, eps=eps, t=t) for power in (0, 1))
    torch.testing.assert_close(paper, path.alpha(t)[:, None] * plain, rtol=1e-12, atol=0)


class Constant(nn.Module):
    """A network that says the same of every input."""

    accepts = frozenset[str]()
    num_classes = 0
    knows_unconditional = False
    resolution_multiple = 1

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        return self.value


def test_an_image_that_the_teacher_leaves_alone_has_a_finite_field():
    x, t = random(3, 4), torch.ones(3, dtype=torch.float64)
    teacher, fake = (Denoiser(Constant(value), PATH, "x0") for value in (x, x + 0.5))
    field = field_of(DMD2(normaliser_minimum=1e-2), teacher, fake, x=x, eps=random(3, 4, seed=1), t=t)
    torch.testing.assert_close(field, torch.full_like(x, 50), rtol=1e-12, atol=0)


@pytest.mark.parametrize("who", ["teacher", "fake"])
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_a_broken_estimate_of_one_sample_pushes_nothing_and_leaves_the_others_alone(who, fault):
    x, t = random(3, 4), torch.ones(3, dtype=torch.float64)
    estimates = {"teacher": random(3, 4, seed=1), "fake": random(3, 4, seed=2)}

    def pushed() -> Tensor:
        players = {name: Denoiser(Constant(value), PATH, "x0") for name, value in estimates.items()}
        return field_of(DMD2(), **players, x=x, eps=random(3, 4, seed=3), t=t)

    expected = pushed()
    expected[1] = 0
    estimates[who][1, 2] = fault
    assert torch.equal(pushed(), expected)


# Small trainable players


def small_teacher(num_classes: int = CLASSES) -> Denoiser:
    """An MLP of random weights in float64, so that every input matters."""
    net = MLPConfig(width=16, blocks=2).build(SHAPE, num_classes, 0.1)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return freeze(Denoiser(net.double(), PATH, "edm"))


def scene(method: DMD2, step: int = 0, seed: int = 0) -> tuple[Players, dict[str, Tensor], Batch]:
    """Players, one step's numbers and real images, all float64; the players differ from one another."""
    teacher = small_teacher()
    setting = Setting(SHAPE, CLASSES, PATH, teacher=deepcopy(teacher).float())  # heads are built in float32
    made = {name: module.double() for name, module in method.players(setting).items()}
    generator = torch.Generator().manual_seed(1)
    for module in made.values():
        for parameter in module.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    players = Players(teacher=teacher, **made)
    rng = Draws(seed, step, torch.arange(BATCH))
    draw = {
        name: value.double() if value.is_floating_point() else value
        for name, value in method.draw(rng, setting).items()
    }
    stored = method.prepare(setting, seed=0)
    stored = {name: value.double() if value.is_floating_point() else value for name, value in stored.items()}
    return players, draw, Batch(random(BATCH, *SHAPE, seed=9), Cond(label=torch.tensor([0, 1, 2, 0, 1, 2])), stored)


def due(players: Players, *names: str) -> None:
    """Let exactly these players learn, as the trainer does before an update."""
    for name, module in players.items():
        module.requires_grad_(name in names)


def learned(players: Players) -> set[str]:
    """The players that have any gradient but zero."""
    return {
        name
        for name, module in players.items()
        if any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
    }


EVERYTHING = DMD2(guidance=2.0, regression_weight=0.25, regression_pairs=5, gan_weight=1.0, gan_fake_weight=1.0)
MULTI_STEP = FewSteps(init_ratio=20.0, later_ratios=(5.0, 1.0))


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_the_generator_s_loss_reaches_the_generator_alone(features):
    players, draw, batch = scene(replace(EVERYTHING, gan_features=features))
    due(players, "generator")
    EVERYTHING.generator_loss(players, draw, batch).total.backward()
    assert learned(players) == {"generator"}
    assert all(p.grad is None for name in players if name != "generator" for p in players[name].parameters())


@pytest.mark.parametrize("carried", [True, False], ids=["with the generator's sample", "with a sample of its own"])
def test_the_fake_score_s_loss_reaches_the_fake_score_and_the_discriminator_alone(carried):
    players, draw, batch = scene(EVERYTHING)
    carry = EVERYTHING.generator_loss(players, draw, batch).carry if carried else {}
    due(players, "generator", "fake", "discriminator")  # nothing but the losses themselves holds gradients back
    EVERYTHING.fake_loss(players, draw | carry, batch).total.backward()
    assert learned(players) == {"fake", "discriminator"}
    assert all(p.grad is None for p in players.generator.parameters())


def test_without_a_gan_the_generator_s_loss_reaches_the_generator_alone_even_if_all_may_learn():
    method = DMD2(gan_weight=0.0)
    players, draw, batch = scene(method)
    due(players, *players)
    method.generator_loss(players, draw, batch).total.backward()
    assert learned(players) == {"generator"}


def test_with_features_of_the_teacher_the_fake_score_s_loss_trains_it_by_denoising_alone():
    method = replace(EVERYTHING, gan_features="teacher")
    players, draw, batch = scene(method)
    due(players, "fake", "discriminator")
    method.fake_loss(players, draw, batch).total.backward()
    found = [p.grad.clone() for p in players.fake.parameters()]
    players.fake.zero_grad()
    replace(method, gan_weight=0.0).fake_loss(players, draw, batch).total.backward()
    for gradient, parameter in zip(found, players.fake.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_gan_features_are_those_of_the_named_network(features):
    method = replace(EVERYTHING, gan_features=features, regression_weight=0.0)
    players, draw, batch = scene(method)
    taps = dict.fromkeys(("fake", "teacher"), 0)
    for name in taps:
        original = players[name].net.features

        def counted(*arguments, name=name, original=original):
            taps[name] += 1
            return original(*arguments)

        players[name].net.features = counted
    method.generator_loss(players, draw, batch)
    assert taps == {"fake": 0, "teacher": 0} | {features: 1}
    method.fake_loss(players, draw, batch)
    assert taps == {"fake": 0, "teacher": 0} | {features: 3}


def test_without_a_gan_the_fake_score_s_loss_is_the_denoising_loss_of_the_samples():
    method = DMD2(gan_weight=0.0)
    players, draw, batch = scene(method)
    t = method.steps.times(PATH).expand(BATCH)
    cond = Cond(label=draw["label"])
    x = players.generator(draw["z"] * t[0], t, cond)
    expected = denoising_loss(players.fake, x, draw["fake eps"], draw["fake t"], cond, weight="edm")
    assert torch.equal(method.fake_loss(players, draw, batch).total, expected)


def test_the_losses_are_the_sum_of_their_weighted_parts():
    players, draw, batch = scene(EVERYTHING)
    generator = EVERYTHING.generator_loss(players, draw, batch)
    fake = EVERYTHING.fake_loss(players, draw, batch)
    method = replace(EVERYTHING, gan_weight=0.7, gan_fake_weight=0.3, regression_weight=2.0)
    parts = generator.logs["matching"] + 0.7 * generator.logs["gan"] + 2 * generator.logs["regression"]
    found = method.generator_loss(players, draw, batch).total
    torch.testing.assert_close(found.detach(), parts, rtol=1e-12, atol=0)
    parts = fake.logs["denoising"] + 0.3 * fake.logs["gan"]
    torch.testing.assert_close(method.fake_loss(players, draw, batch).total.detach(), parts, rtol=1e-12, atol=0)


def test_the_gan_sees_noised_samples_with_their_classes_and_noised_images_with_theirs():
    method = replace(EVERYTHING, regression_weight=0.0)
    players, draw, batch = scene(method)
    x = method.generator_loss(players, draw, batch).carry["x"]

    def logits(images: Tensor, call: str, cond: Cond) -> Tensor:
        noised = PATH.diffuse(images, draw[f"{call} eps"], draw[f"{call} t"])
        return players.discriminator(players.fake(noised, draw[f"{call} t"], cond, want="features"))

    made = Cond(label=draw["label"])
    expected = gan_generator_loss(logits(x, "gan", made))
    torch.testing.assert_close(method.generator_loss(players, draw, batch).logs["gan"], expected.detach())
    expected = gan_discriminator_loss(logits(batch.images, "gan real", batch.cond), logits(x, "gan fake", made))
    torch.testing.assert_close(method.fake_loss(players, draw, batch).logs["gan"], expected.detach())


def test_a_part_of_weight_zero_has_no_network_and_draws_nothing():
    method = DMD2(gan_weight=0.0)
    players, draw, _ = scene(method)
    assert "discriminator" not in players
    assert not method.needs_images
    assert not [name for name in draw if "gan" in name or "pair" in name]


# Who steps, and who is asked


def test_there_are_exactly_so_many_fake_updates_to_one_generator_update():
    updates = DMD2(fake_updates=5).updates
    steps = {update.loss: sum(i % update.every == 0 for i in range(60)) for update in updates}
    assert steps == {"generator_loss": 12, "fake_loss": 60}
    assert [update.loss for update in updates] == ["generator_loss", "fake_loss"]  # on a shared iteration


@pytest.mark.parametrize(
    ("gan_weight", "critics"), [(0.0, ("fake",)), (1e-3, ("fake", "discriminator"))], ids=["no gan", "gan"]
)
def test_the_discriminator_steps_with_the_fake_score(gan_weight, critics):
    generator, fake = DMD2(gan_weight=gan_weight).updates
    assert generator.players == ("generator",)
    assert fake.players == critics


def watch(players: Players) -> list[tuple[str, bytes]]:
    """Every later call of a network inside a player, as (player, its inputs)."""
    calls: list[tuple[str, bytes]] = []
    open_calls: list[str] = []  # a network's forward may be made of its other entries

    def watched(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(x: Tensor, *rest) -> object:
            if not open_calls:
                parts = [x, *rest[:1], *rest[1].parts().values()] if rest else [x]
                calls.append((name, b"".join(part.detach().numpy().tobytes() for part in parts)))
            open_calls.append(name)
            try:
                return original(x, *rest)
            finally:
                open_calls.pop()

        return call

    for name, module in players.items():
        net = module.net if isinstance(module, Denoiser) else module
        for entry in ("forward", "features", "forward_with_features"):
            if hasattr(net, entry):
                setattr(net, entry, watched(name, getattr(net, entry)))
    return calls


def test_a_step_of_both_updates_makes_the_generator_s_sample_once():
    method = replace(EVERYTHING, regression_weight=0.0)
    players, draw, batch = scene(method)
    calls = watch(players)
    carry = method.generator_loss(players, draw, batch).carry
    method.fake_loss(players, draw | carry, batch)
    assert [name for name, _ in calls].count("generator") == 1


def test_the_carried_sample_is_what_the_fake_score_s_loss_would_have_made_itself():
    players, draw, batch = scene(EVERYTHING)
    carry = EVERYTHING.generator_loss(players, draw, batch).carry
    assert not carry["x"].requires_grad
    with_carry, without = (EVERYTHING.fake_loss(players, d, batch).total for d in (draw | carry, draw))
    assert torch.equal(with_carry, without)


@pytest.mark.parametrize("steps", [FewSteps(), MULTI_STEP], ids=["one step", "three steps"])
@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_no_network_is_called_twice_on_the_same_input(steps, features):
    method = replace(EVERYTHING, steps=steps, gan_features=features)
    players, draw, batch = scene(method)
    draw["step"] = torch.tensor(steps.num_evaluations - 1)
    calls = watch(players)
    carry = method.generator_loss(players, draw, batch).carry
    method.fake_loss(players, draw | carry, batch)
    assert len(calls) >= 10
    assert len(set(calls)) == len(calls)


def test_the_guided_teacher_is_called_once_with_both_conditions():
    method = DMD2(gan_weight=0.0, guidance=2.0)
    players, draw, batch = scene(method)
    sizes: list[int] = []
    players.teacher.net.register_forward_hook(lambda _, arguments, __: sizes.append(len(arguments[0])))
    method.generator_loss(players, draw, batch)
    assert sizes == [2 * BATCH]


def test_guidance_is_refused_with_a_teacher_that_always_saw_its_class():
    teacher = small_teacher()
    teacher.net.knows_unconditional = False
    with pytest.raises(UserError, match=r"method.guidance: 2.0 needs a teacher trained with class_dropout > 0"):
        DMD2(guidance=2.0, gan_weight=0.0).players(Setting(SHAPE, CLASSES, PATH, teacher=teacher))


def test_a_gan_is_refused_with_a_teacher_that_has_no_features():
    with pytest.raises(UserError, match="gan: an analytic denoiser has no features"):
        DMD2().players(Setting((1,), 0, PATH, teacher=one_gaussian(0.7, 0.5)))


def test_generator_and_fake_score_start_as_the_teacher_and_own_their_weights():
    teacher = small_teacher()
    made = DMD2(gan_weight=0.0).players(Setting(SHAPE, CLASSES, PATH, teacher=teacher))
    for module in made.values():
        for parameter, source in zip(module.parameters(), teacher.parameters(), strict=True):
            assert torch.equal(parameter, source)
            assert parameter.data_ptr() != source.data_ptr()
            assert parameter.requires_grad
            assert not source.requires_grad


# Several steps


def inputs_of_generator(method: DMD2, step: int) -> tuple[list[tuple[Tensor, Tensor]], Players, dict[str, Tensor]]:
    """What the generator is given, call by call, when `step` was drawn."""
    players, draw, batch = scene(method)
    draw["step"] = torch.tensor(step)
    calls: list[tuple[Tensor, Tensor]] = []
    original = players.generator.forward

    def recorded(x: Tensor, t: Tensor, *rest, **named):
        calls.append((x, t))
        return original(x, t, *rest, **named)

    players.generator.forward = recorded
    method.generator_loss(players, draw, batch)
    return calls, players, draw


@pytest.mark.parametrize("init_noise", ["sigma", "unit"])
def test_the_first_step_s_input_is_pure_noise(init_noise):
    steps = replace(MULTI_STEP, init_noise=init_noise)
    calls, _, draw = inputs_of_generator(DMD2(steps=steps, gan_weight=0.0), 0)
    ((x, t),) = calls
    scale = 20 if init_noise == "sigma" else 1
    torch.testing.assert_close(x, scale * draw["z"], rtol=1e-12, atol=0)
    assert t.tolist() == [20.0] * BATCH


@pytest.mark.parametrize("step", [1, 2])
def test_a_later_step_s_input_is_the_generator_s_own_image_noised_afresh(step):
    calls, players, draw = inputs_of_generator(DMD2(steps=MULTI_STEP, gan_weight=0.0), step)
    assert len(calls) == step + 1
    assert [t[0].item() for _, t in calls] == [20.0, 5.0, 1.0][: step + 1]
    before, now = calls[-2:]
    own = players.generator(*before, Cond(label=draw["label"]))
    expected = own + now[1].reshape(-1, 1, 1, 1) * draw[f"fresh {step - 1}"]
    torch.testing.assert_close(now[0], expected.detach(), rtol=1e-12, atol=1e-12)


def test_only_the_drawn_step_has_a_gradient():
    calls, _, _ = inputs_of_generator(DMD2(steps=MULTI_STEP, gan_weight=0.0), 2)
    assert not any(x.requires_grad for x, _ in calls)


def test_training_on_the_last_step_makes_the_image_of_sampling():
    method = DMD2(steps=MULTI_STEP, gan_weight=0.0)
    players, draw, batch = scene(method)
    draw["step"] = torch.tensor(2)
    trained_on = method.generator_loss(players, draw, batch).carry["x"]
    sampled = method.sampler(Setting(SHAPE, CLASSES, PATH))(
        players.generator, draw["z"], Cond(label=draw["label"]), fresh_noise=lambda i: draw[f"fresh {i}"]
    )
    torch.testing.assert_close(trained_on, sampled.detach(), rtol=0, atol=0)


def test_all_parts_of_a_batch_share_the_step_and_all_steps_occur():
    method, setting = DMD2(steps=MULTI_STEP, gan_weight=0.0), Setting(SHAPE, CLASSES, PATH)
    seen = []
    for step in range(30):
        parts = [method.draw(Draws(0, step, index), setting)["step"] for index in torch.arange(BATCH).split(2)]
        assert len({part.item() for part in parts}) == 1
        seen.append(parts[0].item())
    assert set(seen) == {0, 1, 2}  # of 30 fair draws one value is missing once in 60,000


def test_backward_simulation_with_one_step_is_the_one_step_method():
    several = DMD2(steps=FewSteps(init_ratio=20.0, later_ratios=()), gan_weight=0.0)
    players, draw, batch = scene(several)
    assert draw["step"].item() == 0
    found = several.generator_loss(players, draw, batch).carry["x"]
    t = torch.full((BATCH,), 20.0, dtype=torch.float64)
    direct = players.generator(20 * draw["z"], t, Cond(label=draw["label"]))
    torch.testing.assert_close(found, direct.detach(), rtol=0, atol=0)


def test_a_sample_s_numbers_do_not_depend_on_its_batch():
    setting = Setting(SHAPE, CLASSES, PATH)
    method = replace(EVERYTHING, steps=MULTI_STEP)
    whole = method.draw(Draws(0, 4, torch.arange(BATCH)), setting)
    parts = [method.draw(Draws(0, 4, index), setting) for index in torch.arange(BATCH).split(2)]
    for name, value in whole.items():
        joined = parts[0][name] if value.ndim == 0 else torch.cat([part[name] for part in parts])
        assert torch.equal(value, joined), name


def test_the_numbers_of_a_step_are_all_different():
    draw = EVERYTHING.draw(Draws(0, 0, torch.arange(BATCH)), Setting(SHAPE, CLASSES, PATH))
    drawn = [value.double().numpy().tobytes() for value in draw.values() if value.is_floating_point()]
    assert len(set(drawn)) == len(drawn)


def test_the_losses_of_two_halves_average_to_that_of_the_whole():
    method = replace(EVERYTHING, steps=MULTI_STEP)
    players, draw, batch = scene(method)
    halves = [slice(0, BATCH // 2), slice(BATCH // 2, BATCH)]
    for name in ("generator_loss", "fake_loss"):
        whole = getattr(method, name)(players, draw, batch).total
        parts = [
            getattr(method, name)(
                players,
                {key: value if value.ndim == 0 else value[half] for key, value in draw.items()},
                Batch(batch.images[half], batch.cond[half], batch.stored),
            ).total
            for half in halves
        ]
        torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-12, atol=0)


# Regression


def test_the_regression_s_pairs_are_the_teacher_s_samples_of_their_noise():
    method = DMD2(gan_weight=0.0, guidance=2.0, regression_weight=0.25, regression_pairs=300)
    classes = torch.arange(CLASSES)
    teacher = mixture_denoiser(PATH, torch.ones(CLASSES), random(CLASSES, 16), 0.1 + classes.double(), classes)
    stored = method.prepare(Setting(SHAPE, CLASSES, PATH, teacher=teacher), seed=3)
    assert {name: len(value) for name, value in stored.items()} == {"noise": 300, "image": 300, "label": 300}
    with torch.no_grad():
        expected = Heun()(teacher, stored["noise"], Cond(label=stored["label"]), guidance=2.0)
    # float64, but other batch sizes sum in another order, 35 evaluations long.
    torch.testing.assert_close(stored["image"], expected, rtol=1e-10, atol=1e-10)


def test_the_regression_is_zero_for_a_generator_that_makes_the_teacher_s_samples():
    class Sampling(Denoiser):
        def forward(self, x: Tensor, t: Tensor, cond: Cond = NO_COND, **_):
            return Heun()(small_teacher(), x / t[0], cond, guidance=2.0)

    players, draw, batch = scene(EVERYTHING)
    perfect = Players(**{**players, "generator": Sampling(players.generator.net, PATH, "edm")})
    logs = EVERYTHING.generator_loss(perfect, draw, batch).logs
    assert logs["regression"].item() < 1e-8  # the pairs were made in float32
    assert EVERYTHING.generator_loss(players, draw, batch).logs["regression"].item() > 1e-4


def test_without_regression_nothing_is_prepared():
    assert DMD2().prepare(Setting(SHAPE, CLASSES, PATH, teacher=small_teacher()), seed=0) == {}


# The whole method on a problem that it can solve exactly


def test_alternating_updates_carry_the_generator_to_the_teacher():
    method = DMD2(steps=UNIT_STEPS, gan_weight=0.0, fake_updates=2, generator_time_law=LogNormal(mean=-0.5, std=0.7))
    m, s, size = 0.7, 0.5, 64  # in few dimensions the normaliser would correlate with the field
    identity = torch.eye(size, dtype=torch.float64)
    teacher = mixture_denoiser(PATH, torch.ones(1), torch.full((1, size), m), s**2 * identity[None])
    generator = Denoiser(Affine([-0.4], 0.9), PATH, "x0")
    fake = Denoiser(LearnedGaussian([0.0, 0.0], 1.0), PATH, "x0")
    fake.net.accepts, fake.net.num_classes = frozenset(), 0
    players = Players(teacher=teacher, generator=generator, fake=fake)
    optimisers = {
        "generator_loss": torch.optim.Adam(generator.parameters(), 0.02, betas=(0.0, 0.999)),
        "fake_loss": torch.optim.Adam(fake.parameters(), 0.05, betas=(0.0, 0.999)),
    }
    setting = Setting((size,), 0, PATH, teacher=teacher)
    for step in range(400):
        decay = 1 - step / 400
        draw = method.draw(Draws(0, step, torch.arange(32)), setting)
        for update in method.updates:
            if step % update.every == 0:
                optimiser = optimisers[update.loss]
                optimiser.param_groups[0]["lr"] = decay * (0.02 if update.loss == "generator_loss" else 0.05)
                optimiser.zero_grad()
                loss = getattr(method, update.loss)(players, draw, NO_IMAGES)
                loss.total.backward()
                optimiser.step()
                draw = draw | loss.carry
    found = (generator.net.offset.item(), abs(generator.net.gain.item()))
    assert found == pytest.approx((m, s), abs=0.03)  # 2,048 noisy numbers a step
