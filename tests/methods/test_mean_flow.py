"""MeanFlow: its identity on the exact Gaussian flow, flow matching at r = t, guidance, the loss, the second time."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from support.closed_forms import on_every_path, random
from support.tiny_players import CLASSES, small_teacher
from torch import Tensor, nn

from diffdistill.diffusion.augmentation import augment, draw_motion
from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.line import line, on_path
from diffdistill.diffusion.path import EDM, Flow, Path
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.methods.mean_flow import MeanFlow
from diffdistill.networks.analytic import gaussian_denoiser, gaussian_flow
from diffdistill.networks.two_times import TwoTimesConfig
from diffdistill.networks.unet import UNetConfig
from diffdistill.settings.schema import UserError

MEAN = random(3, seed=4) / 2
ROOT = random(3, 3, seed=5) / 2
COVARIANCE = ROOT @ ROOT.T + 0.05 * torch.eye(3, dtype=torch.float64)
SHAPE = (1, 4, 4)
LINE = Flow()


class Exact(nn.Module):
    """D = z - t (z - Psi(z)) / (t - r), with Psi the Gaussian's flow from t to r, and E[x0 | z] where r = t."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor, time: Tensor, cond: Cond, **_: object) -> Tensor:
        ratio = self.path.ratio(time)
        t, r = ratio / (1 + ratio), cond.end_time
        z = x * ((1 - t) / self.path.alpha(time))[:, None]
        apart = torch.where(t > r + 1e-9, t - r, 1.0)[:, None]
        jump = z - t[:, None] * (z - gaussian_flow(LINE, MEAN, COVARIANCE, z, t, r)) / apart
        return torch.where((t > r + 1e-9)[:, None], jump, gaussian_denoiser(LINE, MEAN, COVARIANCE)(z, t))


def exact_scene(path: Path) -> tuple[Players, dict[str, Tensor], Batch, Tensor]:
    t = torch.linspace(0.15, 0.9, 7, dtype=torch.float64)
    draw = {"t": t, "r": t * torch.linspace(0.1, 0.8, 7, dtype=torch.float64), "eps": random(7, 3, seed=1)}
    batch = Batch(MEAN + random(7, 3, seed=2) @ ROOT.T)
    players = Players(teacher=gaussian_denoiser(path, MEAN, COVARIANCE), generator=Exact(path))
    return players, draw, batch, line(batch.images, draw["eps"], t)


def scene(method: MeanFlow, *, differs: bool = True) -> tuple[Players, dict[str, Tensor], Batch]:
    """A small U-Net that is told r, over a teacher of the same kind, in float64."""
    base = UNetConfig(channels=(8, 8))
    torch.manual_seed(0)
    teacher = Denoiser(base.build(SHAPE, CLASSES, 0.1), EDM(), "edm").requires_grad_(False)
    for parameter in teacher.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    student = Denoiser(TwoTimesConfig(base=base, width=8).build(SHAPE, CLASSES, 0.1), EDM(), "edm")
    problem = Problem(SHAPE, CLASSES, EDM(), teacher=teacher, network=student)
    generator = method.players(problem)["generator"].double()
    for parameter in generator.parameters():
        parameter.data += 0.05 * differs * torch.randn(parameter.shape, dtype=torch.float64)
    draw = method.draw(StepRandom(0, 0, torch.arange(6)), problem)
    draw = {name: value.double() if value.is_floating_point() else value for name, value in draw.items()}
    players = Players(teacher=deepcopy(teacher).double(), generator=generator)
    return players, draw, Batch(random(6, *SHAPE, seed=9), Cond(label=torch.tensor([0, 1, 2, 0, 1, 2])))


@on_every_path
def test_the_exact_mean_velocity_is_its_own_target(path):
    players, draw, batch, z = exact_scene(path)
    found = MeanFlow().target(players, draw, batch, z)
    expected = MeanFlow().mean_velocity(players, z, draw["r"], draw["t"], NO_COND)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    wrong = MeanFlow().target(players, draw | {"r": 0.5 * draw["r"]}, batch, z)
    assert (wrong - expected).abs().max() > 1e-3


@on_every_path
def test_the_teacher_s_velocity_is_the_mean_of_eps_minus_x0(path):
    """E[eps | z] - E[x0 | z] from z = (1 - t) x0 + t eps."""
    players, draw, batch, z = exact_scene(path)
    t, x0 = draw["t"][:, None], gaussian_denoiser(LINE, MEAN, COVARIANCE)(z, draw["t"])
    found = MeanFlow().velocity_at(players, draw, batch, z)
    torch.testing.assert_close(found, (z - (1 - t) * x0) / t - x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("velocity", ["teacher", "data"])
def test_where_r_is_t_the_target_is_the_velocity_as_in_flow_matching(velocity):
    method = MeanFlow(velocity=velocity, share_equal=1.0)
    players, draw, batch = scene(method)
    assert torch.equal(draw["r"], draw["t"])
    z = line(batch.images, draw["eps"], draw["t"])
    found = method.target(players, draw, batch, z)
    assert torch.equal(found, method.velocity_at(players, draw, batch, z))
    if velocity == "data":
        assert torch.equal(found, draw["eps"] - batch.images)


def test_the_target_is_v_less_t_minus_r_times_the_change_along_the_line_by_finite_differences():
    method = MeanFlow(share_equal=0.0)
    players, draw, batch = scene(method)
    t, r, step = draw["t"], draw["r"], 1e-6
    z = line(batch.images, draw["eps"], t)
    velocity = method.velocity_at(players, draw, batch, z)
    ahead, behind = (
        method.mean_velocity(players, z + h * velocity, r, t + h, batch.cond).detach() for h in (step, -step)
    )
    change = (ahead - behind) / (2 * step)
    expected = velocity - (t - r).reshape(-1, 1, 1, 1) * change
    torch.testing.assert_close(method.target(players, draw, batch, z), expected, rtol=1e-6, atol=1e-6)


def test_the_loss_divides_each_sample_s_square_by_itself_and_c_without_a_gradient():
    method = MeanFlow(power=0.7, constant=0.3)
    players, draw, batch = scene(method)
    z = line(batch.images, draw["eps"], draw["t"])
    target = method.target(players, draw, batch, z).detach()
    gap = method.mean_velocity(players, z, draw["r"], draw["t"], batch.cond) - target
    square = gap.square().flatten(1).sum(1)
    expected = ((square.detach() + 0.3) ** -0.7 * square).mean()
    gradients = torch.autograd.grad(expected, list(players.generator.parameters()))
    loss = method.generator_loss(players, draw, batch)
    torch.testing.assert_close(loss.total, expected)
    loss.total.backward()
    for parameter, gradient in zip(players.generator.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_omega_and_kappa_mix_the_velocity_with_the_student_s_own_on_the_interval_alone():
    """omega v + (1 - omega - kappa) u(z, t, t | nothing) + kappa u(z, t, t | c)."""
    method = MeanFlow(velocity="data", guidance=2.0, kappa=0.4, guidance_interval=(0.2, 0.6), class_dropout=0.3)
    players, draw, batch = scene(method)
    draw["t"] = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    draw["is_dropped"] = torch.tensor([False, False, True, False, False, False])
    z = line(batch.images, draw["eps"], draw["t"])
    t, plain = draw["t"], draw["eps"] - batch.images
    free, own = (
        method.mean_velocity(players, z, t, t, cond)
        for cond in (players.generator.unconditional(batch.cond), batch.cond)
    )
    mixed = 2 * plain - 1.4 * free + 0.4 * own
    found = method.velocity_at(players, draw, batch, z)
    is_mixed = torch.tensor([False, True, False, True, False, False])  # 0.26, 0.42 (dropped) and 0.58 are inside
    assert torch.equal(found[~is_mixed], plain[~is_mixed])
    torch.testing.assert_close(found[is_mixed], mixed[is_mixed])


def test_the_teacher_is_guided_on_the_interval_alone():
    method = MeanFlow(guidance=3.0, guidance_interval=(0.3, 0.7))
    players, draw, batch = scene(method)
    draw["t"] = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    z = line(batch.images, draw["eps"], draw["t"])
    x, time = on_path(players.teacher, z, draw["t"])
    for scale, inside in ((3.0, True), (1.0, False)):
        chosen = ((draw["t"] >= 0.3) & (draw["t"] <= 0.7)) == inside
        estimate = players.teacher(x, time, batch.cond, guidance=scale)
        expected = (z - estimate) / draw["t"].reshape(-1, 1, 1, 1)
        torch.testing.assert_close(method.velocity_at(players, draw, batch, z)[chosen], expected[chosen])


def test_what_loses_its_class_is_trained_without_it():
    method = MeanFlow(velocity="data", guidance=2.0, class_dropout=1.0)
    players, draw, batch = scene(method)
    other = replace(batch, cond=Cond(label=(batch.cond.label + 1) % CLASSES))
    losses = [method.generator_loss(players, draw, which).total for which in (batch, other)]
    assert losses[0] == losses[1]


def test_the_student_starts_as_its_teacher_wherever_it_is_to_go():
    method = MeanFlow(share_equal=0.0)
    players, draw, batch = scene(method, differs=False)
    z = line(batch.images, draw["eps"], draw["t"])
    found = method.mean_velocity(players, z, draw["r"], draw["t"], batch.cond)
    torch.testing.assert_close(found, method.velocity_at(players, draw, batch, z))


def test_a_trained_student_is_told_r_and_samples_to_0_by_any_sampler():
    players, draw, batch = scene(MeanFlow())
    student, t = players.generator, draw["t"]
    near, far = (student(batch.images, t, replace(batch.cond, end_time=r)) for r in (0.9 * t, 0 * t))
    assert not torch.allclose(near, far)
    assert torch.equal(student(batch.images, t, batch.cond), far)
    sampler = FewSteps(init_ratio=20.0)
    noise = draw["eps"]
    made = sampler(student, noise, batch.cond)
    start = torch.full((6,), 20.0, dtype=torch.float64)
    torch.testing.assert_close(made, student(20 * noise, start, replace(batch.cond, end_time=0 * t)))


def test_the_loss_reaches_the_generator_alone():
    players, draw, batch = scene(MeanFlow())
    players.teacher.requires_grad_(True)
    MeanFlow().generator_loss(players, draw, batch).total.backward()
    assert all(p.grad is None for p in players.teacher.parameters())
    assert any(p.grad is not None for p in players.generator.parameters())


def test_three_quarters_have_r_at_t_and_the_others_below():
    problem = Problem((1, 1, 1), 0, EDM())
    draw = MeanFlow().draw(StepRandom(0, 0, torch.arange(20_000)), problem)
    equal = draw["r"] == draw["t"]
    assert equal.double().mean() == pytest.approx(0.75, abs=0.01)
    assert bool((draw["r"][~equal] < draw["t"][~equal]).all())
    assert 0 < float(draw["r"].min()) < float(draw["t"].max()) < 1


def test_guidance_without_a_meaning_is_refused():
    teacher = small_teacher(0)
    problem = Problem(SHAPE, 0, EDM(), teacher=teacher, network=teacher)
    with pytest.raises(UserError, match=r"method\.guidance: 2\.0 .*class_dropout > 0"):
        MeanFlow(guidance=2.0).players(problem)


# Dropout and augmentation


class Masked(nn.Module):
    """A denoiser of one weight behind dropout, which keeps its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.weight, self.masks = EDM(), nn.Parameter(torch.ones(())), list[Tensor]()

    def forward(self, x: Tensor, time: Tensor, cond: Cond, **_: object) -> Tensor:
        self.masks.append(nn.functional.dropout(torch.ones(6, *SHAPE), 0.5, self.training))
        return self.weight * x * self.masks[-1]

    def unconditional(self, cond: Cond) -> Cond:
        return cond

    def drop_condition(self, cond: Cond, is_dropped: Tensor) -> Cond:
        return cond


def test_u_and_its_derivative_have_the_same_dropout_and_own_estimates_have_none() -> None:
    method, generator = MeanFlow(velocity="data", guidance=2.0), Masked().train()
    t = torch.linspace(0.2, 0.9, 6, dtype=torch.float64)
    draw = {"t": t, "r": t / 2, "eps": random(6, *SHAPE).float(), "is_dropped": torch.zeros(6).bool()}
    batch = Batch(random(6, *SHAPE, seed=1).float(), Cond(label=torch.zeros(6).long()))
    method.generator_loss(Players(generator=generator), draw, batch)
    of_u, free, own, of_change = generator.masks
    assert 0 < int((of_u == 0).sum()) < of_u.numel()
    assert torch.equal(of_u, of_change)
    assert torch.equal(free, torch.ones_like(free))
    assert torch.equal(own, torch.ones_like(own))
    assert generator.training


def test_the_next_loss_has_other_masks() -> None:
    method, generator = MeanFlow(velocity="data"), Masked().train()
    t = torch.linspace(0.2, 0.9, 6, dtype=torch.float64)
    draw = {"t": t, "r": t / 2, "eps": random(6, *SHAPE).float()}
    for _ in range(2):
        method.generator_loss(Players(generator=generator), draw, Batch(random(6, *SHAPE, seed=1).float()))
    assert not torch.equal(generator.masks[0], generator.masks[2])


def test_moved_images_are_what_the_line_ends_at_and_the_student_is_told_how() -> None:
    method = MeanFlow(velocity="data", augment=0.9)
    rng = StepRandom(0, 0, torch.arange(6))
    problem = Problem(SHAPE, CLASSES, EDM(), teacher=small_teacher())
    draw = method.draw(rng, problem)
    assert torch.equal(draw["motion"], draw_motion(rng, 0.9))
    seen: list[tuple[Tensor, Cond]] = []
    generator = Masked().eval()
    generator.register_forward_pre_hook(lambda _, given: seen.append((given[0], given[2])))
    images = random(6, *SHAPE, seed=1).float()
    method.generator_loss(Players(generator=generator), draw, Batch(images))
    moved, labels = augment(images, draw["motion"])
    assert torch.equal(seen[0][1].augmentation, labels)
    expected, _ = on_path(generator, line(moved, draw["eps"], draw["t"]), draw["t"])
    assert torch.equal(seen[0][0], expected)


def test_augmentation_is_refused_where_the_teacher_is_not_told_of_it() -> None:
    with pytest.raises(UserError, match=r"method.augment = 0.12: this network takes no augmentation labels"):
        scene(MeanFlow(velocity="data", augment=0.12))
