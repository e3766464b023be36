"""DMD2's gradients against closed forms, and the planted faults that these catch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.closed_forms import (
    Affine,
    GaussianFixture,
    LearnedGaussian,
    LogRatio,
    MixtureFixture,
    Tapped,
    components,
    numbers,
)
from torch import Tensor

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.distillation import score_distillation as shared
from diffdistill.distillation.losses import denoising_loss
from diffdistill.distillation.method import Batch, Players
from diffdistill.methods import dmd2
from diffdistill.methods.dmd2 import DMD2

PATH = EDM()
UNIT_STEPS = FewSteps(init_noise="unit")  # the generator is given n itself
NO_NORMALISER = 1e3  # a minimum above every distance makes nu this constant
SIX_DIGITS = 2e-6  # values that are known to six decimals
NO_IMAGES = Batch(torch.empty(0))


def one_step_draw(z: Tensor, eps: Tensor, sigma: float) -> dict[str, Tensor]:
    t = torch.full((len(z),), sigma, dtype=torch.float64)
    label = torch.zeros(len(z), dtype=torch.int64)
    return {"z": z, "eps": eps, "t": t, "label": label, "step": torch.tensor(0)}


def test_the_generator_s_gradient_is_that_of_the_reverse_kl():  # A1
    at = GaussianFixture()
    method = DMD2(steps=UNIT_STEPS, gan_weight=0.0, normaliser_minimum=NO_NORMALISER)
    found = NO_NORMALISER / at.sigma**2 * at.gradient(method)
    expected = numbers((at.theta - at.m) / at.A, at.tau / at.A - at.tau / at.B)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)  # the quadrature is exact for polynomials
    torch.testing.assert_close(found, numbers(-0.567010, 0.103918), rtol=0, atol=SIX_DIGITS)


def test_the_gan_s_share_at_the_best_discriminator_is_the_gradient_of_the_softened_reverse_kl():  # E2
    fixture = MixtureFixture()
    sigma = math.sqrt(fixture.variance)
    net = Affine([fixture.shift], fixture.scale, fixture.weights)
    fake = Tapped(PATH, *components(*fixture.generated_law(fixture.shift, fixture.scale)))
    # Teacher and fake agree, so that only the GAN pushes.
    players = Players(
        generator=Denoiser(net, PATH, "x0"),
        fake=Denoiser(fake, PATH, "x0"),
        teacher=Denoiser(fake, PATH, "x0"),
        discriminator=LogRatio(fixture),
    )
    draw = one_step_draw(fixture.y, fixture.eps, sigma)
    draw |= {"gan t": draw["t"], "gan eps": draw["eps"]}
    DMD2(steps=UNIT_STEPS, gan_weight=1.0).generator_loss(players, draw, NO_IMAGES).total.backward()
    found = torch.cat([net.offset.grad, net.gain.grad[None]])
    torch.testing.assert_close(found, numbers(*fixture.expected_softened), rtol=0, atol=SIX_DIGITS)


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
    patch.setattr(dmd2, "guided_field", shared.guided_field.__wrapped__)  # type: ignore[attr-defined]
    patch.setattr(dmd2, "field_loss", lambda x, field: 0.5 * (x - (x.detach() - field)).square().mean())


def normaliser_dropped(patch: Patch) -> None:
    patch.setattr(shared, "sample_normaliser", lambda x, estimate, minimum: torch.ones_like(x[:, :1]))


def normaliser_by_the_estimate_alone(patch: Patch) -> None:
    original = shared.sample_normaliser
    patch.setattr(shared, "sample_normaliser", lambda x, estimate, minimum: original(estimate, x * 0, minimum))


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
    patch.setattr(shared, "denoising_loss", lambda *arguments, weight: denoising_loss(*arguments, weight="x0"))


def noise_as_the_fake_s_target(patch: Patch) -> None:
    def loss(fake: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond, *, weight: str) -> Tensor:
        estimate = fake(PATH.diffuse(x0, eps, t), t, cond)
        return ((1 / t**2 + 4)[:, None] * (estimate - eps) ** 2).mean()

    patch.setattr(shared, "denoising_loss", loss)


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
