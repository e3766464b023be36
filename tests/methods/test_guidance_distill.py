"""The w-conditioned student of Meng et al.: its fixed point, its loss by hand, who is trained, and a ring to learn."""

from dataclasses import replace

import pytest
import torch
from conftest import MakeConfig
from support.closed_forms import numbers, random
from support.ring import NUM_CLASSES, PATH, ring_teacher
from support.two_gaussians import MEANS, VARIANCES, TwoGaussians
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import LogNormal
from diffdistill.distillation.losses import denoising_weight
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.inference.draw import sample_images
from diffdistill.methods.guidance_distill import GuidanceDistill
from diffdistill.models.load import load_model
from diffdistill.networks.analytic import Mixture
from diffdistill.networks.guided import GuidedConfig
from diffdistill.networks.mlp import MLPConfig
from diffdistill.settings.schema import UserError
from diffdistill.training.trainer import Trainer

SHAPE, CLASSES, BATCH = (1, 4, 4), 3, 8
METHOD = GuidanceDistill(width=8)
BASE = MLPConfig(width=16, blocks=2)


def scene(method: GuidanceDistill = METHOD) -> tuple[Players, dict[str, Tensor], Batch]:
    torch.manual_seed(0)
    net = BASE.build(SHAPE, CLASSES, 0.1)
    for parameter in net.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    teacher = freeze(Denoiser(net, EDM(), "edm"))
    student = Denoiser(GuidedConfig(base=BASE, width=8).build(SHAPE, CLASSES, 0.1), EDM(), "edm")
    problem = Problem(SHAPE, CLASSES, EDM(), teacher=teacher, network=student)
    players = Players(teacher=teacher, **method.players(problem))
    draw = method.draw(StepRandom(0, 0, torch.arange(BATCH)), problem)
    return players, draw, Batch(random(BATCH, *SHAPE).float(), Cond(label=torch.arange(BATCH) % CLASSES))


def test_at_scale_1_the_new_student_is_the_teacher_and_its_loss_is_zero():
    loss = METHOD.student_loss(*scene(replace(METHOD, guidance=(1.0, 1.0))))
    assert float(loss.total.detach()) < 1e-12  # the teacher's two halves are one batch, which rounds differently


@pytest.mark.parametrize("weight", ["truncated_snr", "eps", "x0"])
def test_the_loss_is_the_weighted_mean_square_of_what_guidance_adds(weight):
    """The new student is the conditional teacher, so it lacks (w - 1) (D_c - D_u)."""
    method = replace(METHOD, weight=weight)
    players, draw, batch = scene(method)
    t, null = draw["t"], torch.full((BATCH,), CLASSES)
    x_t = batch.images + t[:, None, None, None].float() * draw["eps"]
    apart = players.teacher(x_t, t, batch.cond) - players.teacher(x_t, t, Cond(label=null))
    missing = (draw["w"] - 1)[:, None, None, None] * apart
    scale = {"truncated_snr": (1 / t**2).clamp_min(1), "eps": 1 / t**2, "x0": torch.ones_like(t)}[weight]
    expected = (scale[:, None, None, None] * missing.double() ** 2).mean()
    found = method.student_loss(players, draw, batch).total
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-4)


class GuidedGaussian(Denoiser):
    """The exact denoiser of N(mu_w, VARIANCES), w being told, and `off` too much of it."""

    def __init__(self, off: float) -> None:
        super().__init__(TwoGaussians(EDM()).net, EDM(), "x0")
        self.off = off

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, **_: object) -> Tensor:  # type: ignore[override]
        assert cond.guidance_input is not None
        mean = MEANS[0] + (cond.guidance_input + self.off)[:, None] * (MEANS[1] - MEANS[0])
        return mean + VARIANCES / (VARIANCES + t[:, None] ** 2) * (x_t - mean)


@pytest.mark.parametrize("weight", ["truncated_snr", "eps", "x0"])
def test_between_gaussians_the_exact_guided_student_has_no_loss_at_any_scale(weight):
    method, teacher = replace(METHOD, weight=weight), TwoGaussians(EDM())
    draw = method.draw(StepRandom(0, 0, torch.arange(64)), Problem((3,), 2, EDM(), teacher=teacher))
    draw = {name: value.double() for name, value in draw.items()}
    batch = Batch(random(64, 3), Cond(label=torch.ones(64, dtype=torch.int64)))
    exact, off = (
        method.student_loss(Players(teacher=teacher, student=GuidedGaussian(by)), draw, batch).total for by in (0, 0.01)
    )
    assert exact < 1e-24
    assert off > 1e-6


def test_truncated_snr_is_the_signal_to_noise_ratio_but_at_least_1():
    found = denoising_weight("truncated_snr", EDM(), numbers(0.1, 0.5, 1.0, 3.0, 80.0), 0.5)
    torch.testing.assert_close(found, numbers(100, 4, 1, 1, 1))


def test_gradients_reach_every_weight_of_the_student_and_none_of_the_teacher():
    players, draw, batch = scene()
    for parameter in players.student.net.project.parameters():
        parameter.data += 0.1  # as new it hides the encoding behind it
    players.teacher.requires_grad_(True)
    METHOD.student_loss(players, draw, batch).total.backward()
    assert all(p.grad is not None for p in players.student.parameters())
    assert all(p.grad is None for p in players.teacher.parameters())


def test_scales_cover_the_range_and_the_student_is_told_them():
    players, _, batch = scene()
    problem = Problem(SHAPE, CLASSES, EDM(), teacher=players.teacher)
    scales = METHOD.draw(StepRandom(0, 0, torch.arange(2000)), problem)["w"]
    assert 1 <= float(scales.min()) < 1.01
    assert 4.99 < float(scales.max()) <= 5
    told: list[Tensor] = []
    players.student.net.register_forward_hook(lambda _, arguments, __: told.append(arguments[2].guidance_input))
    draw = METHOD.draw(StepRandom(0, 0, torch.arange(BATCH)), problem)
    METHOD.student_loss(players, draw, batch)
    assert torch.equal(told[0], draw["w"])


def test_a_teacher_that_knows_no_unconditional_is_refused():
    teacher = Denoiser(BASE.build(SHAPE, CLASSES, 0.0), EDM(), "edm")
    with pytest.raises(UserError, match="class_dropout > 0"):
        METHOD.players(Problem(SHAPE, CLASSES, EDM(), teacher=teacher, network=teacher))


def test_a_range_of_scales_that_falls_is_refused():
    with pytest.raises(ValueError, match="guidance: must be increasing"):
        GuidanceDistill(guidance=(3.0, 1.0))


def ring_batch(step: int, count: int) -> tuple[StepRandom, Batch]:
    rng, mixture = StepRandom(3, step, torch.arange(step * count, (step + 1) * count)), ring_teacher().net
    assert isinstance(mixture, Mixture)
    cond = Cond(label=rng.integers("real label", NUM_CLASSES))
    return rng, Batch(mixture.sample(rng.uniform("real"), rng.normal("real normal", (2,)), cond).float(), cond)


def test_on_the_ring_the_student_reaches_the_exact_guided_denoiser_at_every_scale():
    """Its error against the exact D_w, over what guidance adds at that scale; the conditional denoiser scores 1."""
    teacher, method = ring_teacher(), GuidanceDistill(time_law=LogNormal(mean=-0.5, std=1.0), weight="x0")
    torch.manual_seed(0)
    config = GuidedConfig(base=MLPConfig(width=96, blocks=2), width=32)
    student = Denoiser(config.build((2,), NUM_CLASSES, 0.1), PATH, "edm")
    players, problem = Players(teacher=teacher, student=student), Problem((2,), NUM_CLASSES, PATH, teacher=teacher)
    optimizer = torch.optim.Adam(student.parameters(), lr=1.0)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, 2 - step / 200)
        rng, batch = ring_batch(step, 256)
        optimizer.zero_grad()
        method.student_loss(players, method.draw(rng, problem), batch).total.backward()
        optimizer.step()
    rng, batch = ring_batch(10_000, 4000)
    t = method.time_law(rng.uniform("t"), PATH)
    x_t = PATH.diffuse(batch.images, rng.normal("eps", (2,)), t)
    for scale, bar in ((1.5, 0.35), (2.5, 0.15), (4.0, 0.1)):  # what it adds at 1.5 is small
        with torch.no_grad():
            exact, plain = (teacher(x_t, t, batch.cond, guidance=w).float() for w in (scale, 1.0))
            found = student(x_t, t, batch.cond, guidance=scale)
        assert (found - exact).norm() < bar * (plain - exact).norm()


# Runs


def test_a_trained_run_samples_by_its_scale(make_config: MakeConfig):
    config = make_config("guidance_distill", "optimizers.default.lr=0.01")
    Trainer(config, quiet=True).run()
    student = load_model(config.run)
    images = [sample_images(student, count=4, guidance=w) for w in (1.0, 3.0)]
    assert not torch.equal(*images)


def test_a_resumed_run_equals_one_that_was_not_stopped(make_config: MakeConfig):
    whole = make_config("guidance_distill", "train.steps=4")
    parts = replace(whole, run=f"{whole.run}-parts", train=replace(whole.train, steps=2))
    first = Trainer(whole, quiet=True)
    first.run()
    Trainer(parts, quiet=True).run()
    resumed = Trainer(replace(parts, train=whole.train), resume=True, quiet=True)
    resumed.run()
    expected = first.trained["student"].state_dict()
    for name, value in resumed.trained["student"].state_dict().items():
        assert torch.equal(value, expected[name])
