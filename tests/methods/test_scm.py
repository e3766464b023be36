"""sCM: the tangent against the exact Gaussian flow and the paper's own form, its bounds, the learned weight."""

import math
from dataclasses import replace

import pytest
import torch
from support.closed_forms import on_every_path, random
from support.tiny_players import BATCH, scene
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM, Path, expand
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.distillation.trigflow import angle, consistency
from diffdistill.methods.scm import SCM
from diffdistill.networks.analytic import gaussian_denoiser
from diffdistill.settings.schema import UserError

MEAN = random(3, seed=4) / 2
ROOT = random(3, 3, seed=5) / 2
COVARIANCE = ROOT @ ROOT.T + 0.05 * torch.eye(3, dtype=torch.float64)


class Exact(nn.Module):
    """f of the Gaussian at gain 1: where its flow ends, sqrt(l / (alpha^2 l + sigma^2)) of each mode."""

    sigma_data = 0.5

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Cond = NO_COND) -> Tensor:
        values, vectors = torch.linalg.eigh(COVARIANCE)
        alpha, sigma = self.path.alpha(t)[:, None], self.path.sigma(t)[:, None]
        gain = self.gain ** (sigma / (alpha + sigma))  # 1 where no noise is left, whatever it is
        mode_gains = (values / (alpha**2 * values + sigma**2)).sqrt()
        return MEAN + gain * ((x - alpha * MEAN) @ vectors * mode_gains) @ vectors.T


class Plain(SCM):
    """sCM with its tangent as it is."""

    def bounded(self, tangent: Tensor) -> Tensor:
        return tangent


def exact_scene(path: Path, student: nn.Module, ramp: float = 1.0) -> tuple[Players, dict[str, Tensor], Batch, Tensor]:
    t = path.time_of_ratio(torch.logspace(-1, 1, 7, dtype=torch.float64) + 0.003)
    draw = {"t": t, "eps": random(7, 3, seed=1), "ramp": torch.tensor(ramp)}
    batch = Batch(MEAN + random(7, 3, seed=2) @ ROOT.T)
    players = Players(teacher=gaussian_denoiser(path, MEAN, COVARIANCE), generator=student)
    return players, draw, batch, path.diffuse(batch.images, draw["eps"], t)


@on_every_path
def test_the_tangent_of_the_exact_consistency_function_is_zero(path):
    found = Plain().tangent_of(*exact_scene(path, Exact(path)))
    assert found.abs().max() < 1e-10


@on_every_path
def test_at_full_ramp_the_tangent_is_the_change_of_f_along_the_teacher_s_trajectory(path):
    players, draw, batch, x_t = exact_scene(path, gaussian_denoiser(path, -MEAN, 2 * COVARIANCE))
    players.generator.sigma_data = 0.5
    tau = angle(players.generator, draw["t"])
    cos, sin = tau.cos()[:, None], tau.sin()[:, None]
    x = x_t * cos / path.alpha(draw["t"])[:, None]
    velocity = (cos * x - players.teacher(x_t, draw["t"])) / sin
    step = 1e-5
    ahead, behind = (consistency(players.generator, x + h * velocity, tau + h, NO_COND) for h in (step, -step))
    found = Plain().tangent_of(players, draw, batch, x_t)
    torch.testing.assert_close(found, cos * (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


@on_every_path
@pytest.mark.parametrize("ramp", [0.0, 0.3, 1.0])
def test_the_tangent_is_the_paper_s_own_form_of_it(path, ramp):
    """g = -cos^2 (sigma_d F - x') - r cos sin (x + sigma_d F'), F' by forward mode through F itself."""
    players, draw, batch, x_t = exact_scene(path, gaussian_denoiser(path, -MEAN, 2 * COVARIANCE), ramp)
    student, sigma_d = players.generator, 0.5
    student.sigma_data = sigma_d
    tau = angle(student, draw["t"])
    cos, sin = tau.cos()[:, None], tau.sin()[:, None]
    x = x_t * cos / path.alpha(draw["t"])[:, None]
    velocity = (cos * x - players.teacher(x_t, draw["t"])) / sin

    def network(x: Tensor, tau: Tensor) -> Tensor:
        return (tau.cos()[:, None] * x - consistency(student, x, tau, NO_COND)) / (sigma_d * tau.sin()[:, None])

    output, change = torch.func.jvp(network, (x, tau), (velocity, torch.ones_like(tau)))
    expected = -(cos**2) * (sigma_d * output - velocity) - ramp * cos * sin * (x + sigma_d * change)
    found = Plain().tangent_of(players, draw, batch, x_t)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_before_the_warm_up_the_loss_makes_the_student_denoise_as_its_teacher_does():
    path = EDM()
    players, draw, batch, x_t = exact_scene(path, Exact(path), ramp=0.0)
    tau = angle(players.generator, draw["t"])
    estimate = players.generator(x_t, draw["t"])
    gap = estimate.detach() - players.teacher(x_t, draw["t"])
    weight = tau.cos() ** 2 / (0.5 * tau.sin() ** 2)
    wanted = (2 * expand(weight, gap) * gap * estimate).mean()
    [expected] = torch.autograd.grad(wanted, [players.generator.gain])
    Plain(adaptive_weight=False).generator_loss(players, draw, batch).total.backward()
    torch.testing.assert_close(players.generator.gain.grad, expected)


def test_the_exact_student_is_at_rest_and_another_one_is_not():
    path = EDM()
    players, draw, batch, _ = exact_scene(path, Exact(path))
    Plain(adaptive_weight=False).generator_loss(players, draw, batch).total.backward()
    assert players.generator.gain.grad.abs() < 1e-10
    players.generator.gain.data += 0.1
    Plain(adaptive_weight=False).generator_loss(players, draw, batch).total.backward()
    assert players.generator.gain.grad > 0.01  # descent takes the gain back


def test_consistency_training_is_distillation_from_a_teacher_that_knows_the_image():
    path = EDM()
    players, draw, batch, x_t = exact_scene(path, gaussian_denoiser(path, -MEAN, 2 * COVARIANCE), 0.7)
    players.generator.sigma_data = 0.5

    class Knows(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Cond, guidance: float) -> Tensor:
            return batch.images

    trained = Plain(velocity="data").tangent_of(players, draw, batch, x_t)
    told = Plain().tangent_of(Players(teacher=Knows(), generator=players.generator), draw, batch, x_t)
    assert torch.equal(trained, told)


def test_the_normalised_tangent_has_norm_n_over_n_plus_c_and_the_cut_one_stays_within_one():
    tangent = 3 * random(4, 2, 5)
    norm = tangent.flatten(1).norm(dim=1)
    found = SCM(tangent_constant=0.2).bounded(tangent)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), norm / (norm + 0.2))
    assert torch.equal(SCM(tangent="clip").bounded(tangent), tangent.clamp(-1, 1))


def test_the_loss_is_e_to_the_weight_of_the_tangent_s_mean_square_less_the_weight():
    method = SCM(warmup=0)
    players, draw, batch = scene(method)
    x_t = players.generator.path.diffuse(batch.images, draw["eps"], draw["t"])
    error = method.tangent_of(players, draw, batch, x_t).square().flatten(1).mean(1)
    weight = players.weight(angle(players.generator, draw["t"]))
    assert weight.abs().max() > 0.01
    found = method.generator_loss(players, draw, batch).total
    torch.testing.assert_close(found, (weight.exp() * error - weight).mean())


def test_the_loss_reaches_generator_and_weight_alone():
    players, draw, batch = scene(SCM())
    for module in players.values():
        module.requires_grad_(True)
    SCM().generator_loss(players, draw, batch).total.backward()
    learned = {name for name, module in players.items() if any(p.grad is not None for p in module.parameters())}
    assert learned == {"generator", "weight"}


def test_only_the_estimate_has_a_gradient_not_the_tangent():
    method = SCM(adaptive_weight=False, warmup=0)
    players, draw, batch = scene(method)
    student: Denoiser = players.generator
    x_t = student.path.diffuse(batch.images, draw["eps"], draw["t"])
    tangent = method.tangent_of(players, draw, batch, x_t)
    sine = student.sigma_data * angle(student, draw["t"]).sin()
    output = -student(x_t, draw["t"], batch.cond) / expand(sine, x_t)
    expected = torch.autograd.grad((-2 * tangent * output).flatten(1).mean(1).mean(), list(student.parameters()))
    method.generator_loss(players, draw, batch).total.backward()
    for parameter, gradient in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_teacher_is_guided_and_the_student_s_class_reaches_both():
    method = Plain(guidance=3.0, warmup=0)
    players, draw, batch = scene(method)
    x_t = players.generator.path.diffuse(batch.images, draw["eps"], draw["t"])
    found = method.tangent_of(players, draw, batch, x_t)
    assert not torch.allclose(found, replace(method, guidance=1.0).tangent_of(players, draw, batch, x_t))
    other = replace(batch, cond=Cond(label=(batch.cond.label + 1) % 3))
    assert not torch.allclose(found, method.tangent_of(players, draw, other, x_t))


@pytest.mark.parametrize(("step", "ramp"), [(0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)])
def test_the_ramp_rises_over_the_warm_up(step, ramp):
    problem = Problem((1, 2, 2), 0, EDM())
    assert SCM(warmup=10).draw(StepRandom(0, step, torch.arange(BATCH)), problem)["ramp"] == ramp


def test_guidance_without_a_meaning_is_refused():
    with pytest.raises(UserError, match=r"method\.guidance: 2\.0 needs velocity: teacher, which it guides; use 1"):
        scene(SCM(guidance=2.0, velocity="data"))


class Masked(nn.Module):
    """A denoiser of one weight behind dropout, which keeps its masks."""

    sigma_data = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.path, self.weight, self.masks = EDM(), nn.Parameter(torch.ones(())), list[Tensor]()

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        self.masks.append(nn.functional.dropout(torch.ones(5, 3), 0.5, self.training))
        return self.weight * x * self.masks[-1]


def test_the_output_and_its_derivative_have_the_same_dropout() -> None:
    student = Masked().train()
    draw = {"t": torch.linspace(0.1, 5, 5, dtype=torch.float64), "eps": torch.ones(5, 3), "ramp": torch.tensor(1.0)}
    SCM(velocity="data", adaptive_weight=False).generator_loss(
        Players(generator=student), draw, Batch(torch.ones(5, 3))
    )
    of_change, of_output = student.masks
    assert 0 < int((of_output == 0).sum()) < of_output.numel()
    assert torch.equal(of_change, of_output)


def test_the_default_law_is_the_paper_s_of_the_ratio() -> None:
    """Section 5.1 there: sigma_data tan(tau) is log-normal with -1.0 and 1.4, and sigma_data tan(tau) is the ratio."""
    t = SCM().time_law(torch.tensor([0.5], dtype=torch.float64), EDM())
    assert float(EDM().ratio(t)) == pytest.approx(math.exp(-1.0), rel=1e-4)
    tau = torch.atan(t / 0.5)
    assert float(0.5 * tau.tan()) == pytest.approx(math.exp(-1.0), rel=1e-4)
