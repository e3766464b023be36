"""The derivations of "What decides quality", against the library's own losses."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.closed_forms import averaged_by, normal_nodes, numbers, one_gaussian, pairs
from torch import Tensor

from diffdistill.diffusion.cond import NO_COND
from diffdistill.diffusion.path import EDM
from diffdistill.distillation.losses import field_loss, gan_discriminator_loss, gan_generator_loss
from diffdistill.networks.analytic import Mixture

SCRIPTS = Path(__file__).parents[2] / "scripts"
PATH = EDM(sigma_min=0.01, sigma_max=80.0)
SIGMAS, TAUS = numbers(0.1, 0.7, 3.0), numbers(0.2, 1.0, 5.0)


@pytest.fixture(scope="module")
def theory() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("quality_theory")
    sys.path.remove(str(SCRIPTS))


def slope_of_dmd2(theory: ModuleType, variance: float, teacher: float, data: float, weight: float) -> float:
    """Of the library's losses by the gain of x = a z, with exact scores and the best discriminator, by quadrature."""
    z, eps, weights = pairs(normal_nodes(), normal_nodes())
    a = numbers(variance).sqrt()[0].requires_grad_()
    judge, real, law = (one_gaussian(0.0, v**0.5, PATH) for v in (teacher, data, variance))
    losses = []
    for sigma, nu in zip(SIGMAS, theory.normaliser(teacher, SIGMAS), strict=True):
        x, t = averaged_by(a * z[:, None], weights), sigma.expand(len(z))
        x_t = PATH.diffuse(x.detach(), eps[:, None], t)
        losses.append(field_loss(x, (law(x_t, t) - judge(x_t, t)) / nu) / len(SIGMAS))
    for tau in TAUS:
        x, t = averaged_by(a * z[:, None], weights), tau.expand(len(z))
        x_t = PATH.diffuse(x, eps[:, None], t)
        losses.append(weight * gan_generator_loss(log_ratio(real.net, law.net, x_t, t)) / len(TAUS))
    [slope] = torch.autograd.grad(torch.stack(losses).sum(), a)
    return float(slope)


def log_ratio(real: torch.nn.Module, law: torch.nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
    assert isinstance(real, Mixture)
    assert isinstance(law, Mixture)
    return real.log_prob(x_t, t, NO_COND) - law.log_prob(x_t, t, NO_COND)


@pytest.mark.parametrize("weight", [0.0, 0.2, 5.0])
def test_at_the_compromise_the_gradient_of_dmd2_vanishes(theory, weight):
    teacher, data = 1.0, 1.02
    found = theory.compromise(teacher, data, SIGMAS, TAUS, weight=weight, pixels=1)
    assert teacher <= found <= data
    ends = [slope_of_dmd2(theory, v, teacher, data, weight) for v in (teacher, data)]
    assert abs(slope_of_dmd2(theory, found, teacher, data, weight)) < 0.03 * max(map(abs, ends))


def test_on_the_ring_a_gan_draws_the_student_from_its_teacher_to_the_data(theory):
    ring = importlib.import_module("quality_ring")
    alone, pulled = (ring.student(weight, "teacher", steps=60) for weight in (0.0, 1.0))
    assert alone.teacher == pytest.approx(1.007, abs=0.05), "fitted in few steps"
    assert alone.data == pytest.approx(1.206, abs=0.003)
    assert pulled.end > alone.end + 0.03


def test_the_compromise_is_the_teacher_without_a_gan_and_nearly_the_data_with_a_heavy_one(theory):
    of = [theory.compromise(1.0, 1.1, SIGMAS, TAUS, weight=weight, pixels=64) for weight in (0.0, 0.003, 0.2, 1e6)]
    assert of[0] == pytest.approx(1.0)
    assert of == sorted(of)
    assert of[-1] == pytest.approx(1.1, abs=1e-4)
    assert theory.compromise(1.1, 1.1, SIGMAS, TAUS, weight=0.2, pixels=64) == pytest.approx(1.1)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.0])
def test_the_matching_s_optimum_is_that_of_the_reverse_kl_at_its_level(theory, sigma):
    law = theory.TwoModes()
    found = theory.root(lambda v: law.matching_slope(v, numbers(sigma)))
    assert kl(law, found, sigma) < min(kl(law, found * factor, sigma) for factor in (0.99, 1.01))


def kl(law, v: float, sigma: float) -> float:
    """KL(q || p) of N(0, v) and the law, both noised, by a sum over a grid."""
    x = torch.linspace(-40, 40, 80001, dtype=torch.float64)
    q = torch.distributions.Normal(numbers(0.0), numbers(v + sigma**2).sqrt()).log_prob(x)
    spread = numbers(law.variance + sigma**2).sqrt()
    sides = [torch.distributions.Normal(numbers(side), spread).log_prob(x) for side in (-law.mean, law.mean)]
    p = torch.logsumexp(torch.stack(sides), 0) - torch.log(numbers(2.0))
    return float((q.exp() * (q - p)).sum() * (x[1] - x[0]))


def test_where_no_student_is_the_teacher_matching_and_gan_have_other_optima_and_their_sum_a_third(theory):
    law, matching, gan = theory.TwoModes(), SIGMAS, TAUS
    of_matching = theory.optimum(law, matching, None)
    of_gan = theory.optimum(law, None, gan)
    of_both = theory.optimum(law, matching, gan, weight=0.2)
    assert min(of_matching, of_gan) + 0.01 < of_both < max(of_matching, of_gan) - 0.01


def test_where_the_student_can_be_its_teacher_range_and_weight_change_nothing(theory):
    law = theory.TwoModes(mean=0.0, variance=0.5)
    for gan, weight in ((None, 0.0), (TAUS, 0.2)):
        assert theory.optimum(law, SIGMAS, gan, weight=weight) == pytest.approx(0.5, abs=1e-6)


def test_the_critic_s_dynamics_are_those_of_the_library_s_gan_losses(theory):
    matching, variance, weight, rates = 0.3, 0.8, 0.2, (6e-4, 1e-3)
    nodes, weights = normal_nodes()

    def step(state: Tensor) -> Tensor:
        mean, slope = state
        real, made = variance**0.5 * nodes, mean + variance**0.5 * nodes
        of_critic = gan_discriminator_loss(
            averaged_by(slope * real, weights), averaged_by(slope * made.detach(), weights)
        )
        of_generator = weight * gan_generator_loss(averaged_by(slope.detach() * made, weights))
        [down] = torch.autograd.grad(of_generator, mean, retain_graph=True)
        [along] = torch.autograd.grad(of_critic, slope)
        return torch.stack([-rates[0] * (down + matching * mean.detach()), -rates[1] * along])

    width = 1e-4
    columns = []
    for direction in torch.eye(2, dtype=torch.float64):
        ends = [step((sign * width * direction).requires_grad_()) for sign in (1, -1)]
        columns.append((ends[0] - ends[1]) / (2 * width))
    known = sorted(torch.linalg.eigvals(torch.stack(columns, 1)).tolist(), key=lambda value: value.imag)
    found = sorted(theory.critics_dynamics(matching, variance, weight, rates), key=lambda value: value.imag)
    assert found == pytest.approx(known, rel=1e-5)


def test_a_slow_generator_does_not_circle_and_one_as_fast_as_its_critic_does(theory):
    fast, slow = (theory.critics_dynamics(0.1, 0.5, 0.5, (rate, 1.0)) for rate in (1.0, 0.01))
    assert abs(fast[0].imag) > 0.1
    assert slow[0].imag == slow[1].imag == 0
    assert max(value.real for value in (*fast, *slow)) < 0


def test_a_gan_through_the_fake_score_s_encoder_leaves_its_estimate_alone(theory):
    """On the ring at the packaged weight: whatever the GAN does to a student, it is not by way of this."""
    start, alone, beside = (
        theory.fake_score_error(weight, steps=steps) for weight, steps in ((None, 2), (None, 50), (0.1, 50))
    )
    assert alone < 0.6 * start
    assert beside == pytest.approx(alone, rel=0.05)
