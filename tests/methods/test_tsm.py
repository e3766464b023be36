"""Teacher score matching: zero at the teacher, its optimum, and the smaller student that starts from it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.closed_forms import one_gaussian, random
from support.tiny_players import CLASSES, PATH, SHAPE, small_teacher
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.methods.msd import MSD
from diffdistill.methods.tsm import TSM
from diffdistill.models.load import find_checkpoint
from diffdistill.networks.mlp import MLPConfig
from diffdistill.settings.schema import UserError
from diffdistill.training.config import RunConfig
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]


def scene(student: Denoiser, method: TSM) -> tuple[Players, dict[str, Tensor], Batch]:
    draw = method.draw(StepRandom(0, 0, torch.arange(12)), Problem(SHAPE, CLASSES, PATH))
    batch = Batch(random(12, *SHAPE), Cond(label=torch.arange(12) % CLASSES))
    return Players(teacher=small_teacher(), student=student), draw | {"eps": draw["eps"].double()}, batch


def test_the_loss_is_zero_at_the_teacher_s_own_weights():
    players, draw, batch = scene(small_teacher(), TSM())
    assert TSM().student_loss(players, draw, batch).total == 0


def test_the_loss_is_the_weighted_square_of_the_difference_of_two_gaussian_denoisers():
    # D = (s^2 x + r^2 m) / (s^2 + r^2); one noise level, one value of x_t, by hand.
    teacher, student = one_gaussian(0.7, 0.5), one_gaussian(-0.2, 0.9)
    x0, eps, r = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[1.1]], dtype=torch.float64), 1.5
    draw = {"t": torch.tensor([r], dtype=torch.float64), "eps": eps, "is_dropped": torch.tensor([False])}
    x = 0.3 + r * 1.1
    gap = (0.25 * x + r**2 * 0.7) / (0.25 + r**2) - (0.81 * x - r**2 * 0.2) / (0.81 + r**2)
    weight = 1 / r**2 + 1 / teacher.sigma_data**2
    loss = TSM().student_loss(Players(teacher=teacher, student=student), draw, Batch(x0))
    assert float(loss.total) == pytest.approx(weight * gap**2, rel=1e-12)


def test_no_gradient_reaches_the_teacher():
    student = small_teacher().requires_grad_(True)
    for parameter in student.parameters():
        parameter.data *= 1.1
    players, draw, batch = scene(student, TSM())
    players.teacher.requires_grad_(True)
    TSM().student_loss(players, draw, batch).total.backward()
    assert all(parameter.grad is None for parameter in players.teacher.parameters())
    assert any(bool(parameter.grad.any()) for parameter in student.parameters() if parameter.grad is not None)


def test_both_are_asked_about_the_same_class_or_about_none():
    asked: dict[str, Tensor] = {}
    students = {"teacher": small_teacher(), "student": small_teacher()}
    for name, denoiser in students.items():
        denoiser.net.register_forward_hook(lambda _, inputs, __, name=name: asked.update({name: inputs[2].label}))
    method = TSM(class_dropout=0.5)
    _, draw, batch = scene(students["student"], method)
    method.student_loss(Players(**students), draw, batch)
    expected = torch.where(draw["is_dropped"], CLASSES, batch.cond.label)
    assert torch.equal(asked["teacher"], expected)
    assert torch.equal(asked["student"], expected)
    assert 0 < int(draw["is_dropped"].sum()) < 12


def test_a_smaller_network_comes_nearer_to_its_teacher():
    torch.manual_seed(0)
    net = MLPConfig(width=8, blocks=1).build(SHAPE, CLASSES, 0.1).double()
    student = Denoiser(net, PATH, "edm")
    players, draw, batch = scene(student, TSM())
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = TSM().student_loss(players, draw, batch).total
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_it_needs_the_student_s_network(make_config: MakeConfig):
    with pytest.raises(UserError, match="tsm needs both: `model`"):
        Trainer(make_config("tsm", "model=null"))


@pytest.mark.parametrize("method", ["dmd2", "f_distill"])
def test_generator_and_fake_score_of_a_later_run_start_as_the_smaller_network(make_config: MakeConfig, method: str):
    config = make_config("tsm")
    Trainer(config, quiet=True).run()
    left = load_file(find_checkpoint(Path(config.run)) / "ema.safetensors")
    later = Trainer(make_config(method, f"init={config.run}", f"teacher={config.teacher}", "train.steps=2"), quiet=True)
    for player in ("generator", "fake"):
        start = later.trained[player].state_dict()
        assert all(torch.equal(value, left[f"student.{name}"]) for name, value in start.items())
    sizes = [sum(p.numel() for p in module.parameters()) for module in (later.players.generator, later.players.teacher)]
    assert sizes[0] < sizes[1]
    later.run()  # with the discriminator on the smaller network's features


def test_a_student_of_several_can_be_score_matched_on_its_classes(make_config: MakeConfig):
    single = make_config("tsm")
    method = MSD(base=single.method, num_students=2, student_index=1)
    trainer = Trainer(replace(single, method=method), quiet=True)
    assert trainer.problem.classes == (5, 6, 7, 8, 9)
    trainer.run()


def test_a_resumed_run_equals_one_that_was_not_stopped(make_config: MakeConfig):
    whole = Trainer(make_config("tsm", "train.steps=4"), quiet=True)
    whole.run()
    config = make_config("tsm", "train.steps=2")
    Trainer(config, quiet=True).run()
    parts = Trainer(replace(config, train=replace(config.train, steps=4)), resume=True, quiet=True)
    parts.run()
    weights = whole.trained["student"].state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in parts.trained["student"].state_dict().items())
