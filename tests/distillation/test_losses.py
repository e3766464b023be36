"""Shared losses: gradients against closed forms on quadrature nodes, and numbers that are not finite."""

import math

import pytest
import torch
from support.closed_forms import MixtureFixture, averaged_by, normal_nodes, one_gaussian, pairs, random
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM, VPCosine, expand
from diffdistill.distillation.losses import (
    denoising_loss,
    denoising_weight,
    field_loss,
    gan_discriminator_loss,
    gan_generator_loss,
    sample_normaliser,
    zero_nonfinite,
)
from diffdistill.networks.discriminator import Head

PATH = EDM()
SIX_DIGITS = 2e-6  # values that are known to six decimals


class GaussianFixture:
    """A Gaussian teacher and an affine generator theta + tau z, with the generator's exact denoiser."""

    m, s, theta, tau, sigma = 0.7, 0.5, -0.4, 0.9, 1.3

    def __init__(self) -> None:
        z, eps, self.weights = pairs(normal_nodes(), normal_nodes())
        self.z, self.eps = z[:, None], eps[:, None]
        self.t = torch.full_like(z, self.sigma)
        self.teacher = one_gaussian(self.m, self.s)
        self.fake = one_gaussian(self.theta, self.tau)

    def gradient(self, field_of_noised) -> Tensor:
        """The gradient by (theta, tau) when field_of_noised(x_t) is pushed through the generator."""
        theta, tau = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (self.theta, self.tau))
        x = averaged_by(theta + tau * self.z, self.weights)
        with torch.no_grad():
            field = field_of_noised(PATH.diffuse(x, self.eps, self.t))
        return torch.stack(torch.autograd.grad(field_loss(x, field), (theta, tau)))

    def score(self, denoiser: Denoiser, x_t: Tensor) -> Tensor:
        return denoiser.convert(denoiser(x_t, self.t), "score", x_t, self.t)


def test_the_field_loss_sends_each_pixel_its_field_over_the_number_of_pixels():  # D1
    x, field = random(4, 3, 2, 2).requires_grad_(), random(4, 3, 2, 2, seed=1)
    (gradient,) = torch.autograd.grad(field_loss(x, field), x)
    torch.testing.assert_close(gradient, field / x.numel(), rtol=1e-12, atol=1e-15)  # x - (x - v) rounds once


def test_the_field_loss_has_half_the_mean_square_of_the_field_as_its_value():  # D2
    x, field = random(4, 3, 2, 2), random(4, 3, 2, 2, seed=1)
    assert field_loss(x, field).item() == pytest.approx(0.5 * (field**2).mean().item(), rel=1e-12)


def test_the_field_loss_takes_no_gradient_of_the_field():
    x, field = random(4, 3).requires_grad_(), random(4, 3, seed=1).requires_grad_()
    field_loss(x, field * x).backward()
    assert field.grad is None
    torch.testing.assert_close(x.grad, (field * x).detach() / x.numel(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("image_type", [torch.bfloat16, torch.float32])
def test_a_wider_field_may_be_pushed_through_narrower_images(image_type):
    x = random(4, 3).to(image_type).requires_grad_()
    field_loss(x, random(4, 3, seed=1)).backward()
    assert x.grad is not None
    assert x.grad.dtype == image_type


def test_the_score_difference_pushes_the_generator_down_the_reverse_kl():  # A1
    fixture = GaussianFixture()
    found = fixture.gradient(lambda x_t: fixture.score(fixture.fake, x_t) - fixture.score(fixture.teacher, x_t))
    a, b = fixture.s**2 + fixture.sigma**2, fixture.tau**2 + fixture.sigma**2
    by_mean, by_spread = (fixture.theta - fixture.m) / a, fixture.tau / a - fixture.tau / b
    expected = torch.tensor([by_mean, by_spread], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(found, torch.tensor([-0.567010, 0.103918]).double(), rtol=0, atol=SIX_DIGITS)


def test_the_denoiser_difference_is_sigma_squared_times_the_score_difference():
    fixture = GaussianFixture()
    scores = fixture.gradient(lambda x_t: fixture.score(fixture.fake, x_t) - fixture.score(fixture.teacher, x_t))
    estimates = fixture.gradient(lambda x_t: fixture.fake(x_t, fixture.t) - fixture.teacher(x_t, fixture.t))
    torch.testing.assert_close(estimates, fixture.sigma**2 * scores, rtol=1e-12, atol=0)


def test_a_generator_that_is_the_teacher_is_not_pushed():
    fixture = GaussianFixture()
    found = fixture.gradient(lambda x_t: fixture.score(fixture.teacher, x_t) - fixture.score(fixture.teacher, x_t))
    assert torch.equal(found, torch.zeros(2, dtype=torch.float64))


def test_the_discriminator_loss_is_stationary_at_the_log_density_ratio():  # E1
    fixture = MixtureFixture()
    points = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    real, fake = (fixture.log_density(denoiser, points).exp() for denoiser in (fixture.teacher, fixture.fake))

    def slope(logits: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        loss = gan_discriminator_loss(averaged_by(logits, real), averaged_by(logits, fake))
        return torch.autograd.grad(loss, logits)[0]

    best = fixture.log_ratio(points)
    torch.testing.assert_close(slope(best), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-15)
    assert slope(best + 0.1).min() > 1e-4
    assert slope(best - 0.1).max() < -1e-4


def test_the_gan_at_its_best_discriminator_pushes_down_the_softened_reverse_kl():  # E2
    fixture, step = MixtureFixture(), 1e-4
    found = fixture.gradient(lambda x, x_t: gan_generator_loss(fixture.log_ratio(x_t)))
    torch.testing.assert_close(found, torch.tensor(fixture.expected_softened).double(), rtol=0, atol=SIX_DIGITS)
    around = [(step, 0), (-step, 0), (0, step), (0, -step)]
    right, left, wide, narrow = (fixture.softened_divergence(fixture.shift + a, fixture.scale + b) for a, b in around)
    expected = torch.tensor([right - left, wide - narrow], dtype=torch.float64) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)  # differences of order step^2, 40 nodes


def test_the_softened_field_gives_the_gradient_of_the_gan_at_its_best_discriminator():
    fixture = MixtureFixture()

    def softened(x: Tensor, x_t: Tensor) -> Tensor:
        with torch.no_grad():
            difference = fixture.fake(x_t, fixture.t) - fixture.teacher(x_t, fixture.t)
            weight = 1 / (1 + fixture.log_ratio(x_t).exp()) / fixture.variance
            field = expand(weight, x_t) * difference
        return field_loss(x, field)

    by_gan = fixture.gradient(lambda x, x_t: gan_generator_loss(fixture.log_ratio(x_t)))
    torch.testing.assert_close(fixture.gradient(softened), by_gan, rtol=1e-10, atol=0)


def test_gan_losses_keep_float64():
    logits = random(5)
    assert gan_generator_loss(logits).dtype == torch.float64
    assert gan_discriminator_loss(logits, logits).dtype == torch.float64


def test_gan_losses_of_bfloat16_logits_are_reduced_in_float32():
    logits = random(5).bfloat16()
    assert gan_generator_loss(logits).dtype == torch.float32
    assert gan_discriminator_loss(logits, logits).dtype == torch.float32


def test_a_discriminator_head_runs_in_float64():
    head = Head(8, 8).double()
    assert head(random(2, 8, 8, 8)).dtype == torch.float64


@pytest.mark.parametrize(("channels", "side"), [(16, 1), (32, 4), (64, 4), (64, 8), (512, 1), (768, 8)])
def test_a_discriminator_head_tells_samples_apart_whatever_the_width_of_its_features(channels, side):
    torch.manual_seed(0)  # torch initialises from the global generator
    head = Head(channels, side).double()
    assert head(random(16, channels, side, side)).std() > 0.1


@pytest.mark.parametrize(("channels", "side", "groups"), [(768, 8, 32), (1280, 32, 32)])
def test_a_discriminator_head_has_the_paper_s_32_groups_at_the_paper_s_widths(channels, side, groups):
    with torch.device("meta"):
        norms = [layer for layer in Head(channels, side).layers if isinstance(layer, nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [groups] * len(norms)


def test_the_normaliser_is_each_sample_s_mean_distance():
    x, estimate = random(4, 3, 2, 2), random(4, 3, 2, 2, seed=1)
    expected = torch.stack([(a - b).abs().mean() for a, b in zip(x, estimate, strict=True)])
    found = sample_normaliser(x, estimate)
    assert found.shape == (4, 1, 1, 1)
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-12, atol=0)


def test_the_normaliser_has_no_gradient():
    x, estimate = random(4, 3).requires_grad_(), random(4, 3, seed=1).requires_grad_()
    assert not sample_normaliser(x, estimate).requires_grad


@pytest.mark.parametrize(
    ("x", "estimate"),
    [(random(4, 3, 16, 16), random(4, 3, 16, 16, seed=1)), (torch.ones(4, 8), torch.full((4, 8), -0.00387))],
    ids=["random", "one distance that bfloat16 cannot hold"],
)
def test_the_normaliser_of_bfloat16_images_is_that_of_float64_within_a_thousandth(x, estimate):
    x, estimate = x.bfloat16(), estimate.bfloat16()
    expected = (x.double() - estimate.double()).abs().flatten(1).mean(1)
    torch.testing.assert_close(sample_normaliser(x, estimate).flatten().double(), expected, rtol=1e-3, atol=0)


def test_the_normaliser_of_float16_images_may_be_wider_than_float16():
    x = torch.tensor([[4e4, -4e4], [1.0, 0.5]], dtype=torch.float16)
    assert sample_normaliser(x, -x).tolist() == [[8e4], [1.5]]


def test_a_normaliser_of_nothing_is_the_minimum():
    x = random(4, 3)
    assert torch.equal(sample_normaliser(x, x, 0.25), torch.full((4, 1), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_a_sample_with_one_number_that_is_not_finite_pushes_nothing_and_the_others_push_on(fault):
    field = random(4, 3, 2)
    broken = field.clone()
    broken[1, 2, 0] = fault
    expected = field.clone()
    expected[1] = 0
    assert torch.equal(zero_nonfinite(broken), expected)


@pytest.mark.parametrize("path", [EDM(), VPCosine()], ids=["edm", "vp_cosine"])
@pytest.mark.parametrize("weight", ["edm", "x0", "eps", "v", "snr5"])
def test_the_denoising_loss_is_the_mean_weighted_square_error(path, weight):
    denoiser = one_gaussian(0.7, 0.5, path)
    x0, eps, t = random(6, 1), random(6, 1, seed=1), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    error = denoiser(path.diffuse(x0, eps, t), t) - x0
    expected = (denoising_weight(weight, path, t, denoiser.sigma_data)[:, None] * error**2).mean()
    torch.testing.assert_close(
        denoising_loss(denoiser, x0, eps, t, NO_COND, weight=weight), expected, rtol=1e-12, atol=0
    )


def test_the_denoising_loss_takes_no_gradient_of_the_data():
    net = nn.Linear(1, 1).double()
    denoiser = one_gaussian(0.7, 0.5)
    x0 = net(random(6, 1))
    t = torch.ones(6, dtype=torch.float64)
    assert not denoising_loss(denoiser, x0, random(6, 1, seed=1), t, NO_COND, weight="edm").requires_grad


def test_the_denoising_loss_is_smallest_at_the_exact_denoiser():
    z, eps, weights = pairs(normal_nodes(), normal_nodes())
    x0, t = 0.7 + 0.5 * z[:, None], torch.full_like(z, 1.3)
    exact = one_gaussian(0.7, 0.5)

    class Shifted(nn.Module):
        accepts = exact.net.accepts

        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x, time_input, cond):
            return averaged_by(exact.net(x, time_input, cond) + self.by, weights)

    net = Shifted()
    denoising_loss(Denoiser(net, PATH, "x0"), x0, eps[:, None], t, NO_COND, weight="edm").backward()
    assert abs(net.by.grad.item()) < 1e-12
