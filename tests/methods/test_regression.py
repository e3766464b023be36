"""Regression on pairs: its pairs, its loss and its limits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.closed_forms import one_gaussian
from support.tiny_players import CLASSES, PATH, SHAPE, small_teacher

from diffdistill.diffusion.sampling import FewSteps, Heun
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.methods.regression import Regression
from diffdistill.models.load import find_checkpoint
from diffdistill.settings.schema import UserError
from diffdistill.storage.checkpoint import select_group
from diffdistill.training.config import RunConfig
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]
QUICK = ("method.pairs=12", "method.pair_sampler.num_steps=3", "train.steps=4")


def setting_of(teacher=None) -> Problem:
    return Problem(SHAPE, CLASSES, PATH, teacher=teacher or small_teacher().float())


def test_a_pair_is_a_noise_and_what_the_teacher_makes_of_it():
    method, teacher = Regression(pairs=300, pair_sampler=Heun(num_steps=2)), small_teacher().float()
    pairs = method.prepare(setting_of(teacher), seed=0)
    i = torch.tensor([0, 255, 256, 299])  # from both chunks
    expected = method.pair_sampler(teacher, pairs["noise"][i], teacher.class_cond(pairs["label"][i]))
    torch.testing.assert_close(pairs["image"][i], expected, rtol=0, atol=1e-6)
    assert set(pairs["label"].tolist()) == set(range(CLASSES))


def test_the_pairs_of_a_gaussian_are_its_closed_form():
    # The probability-flow ODE of N(m, s^2) in EDM's path: x = m + (x_T - m) s / sqrt(s^2 + sigma_max^2).
    teacher = one_gaussian(0.7, 0.5)
    problem = Problem((1,), 0, teacher.path, teacher=teacher)
    pairs = Regression(pairs=64, pair_sampler=Heun(num_steps=200)).prepare(problem, seed=0)
    top = float(teacher.path.sigma(torch.tensor([teacher.path.t_max], dtype=torch.float64)))
    expected = 0.7 + (pairs["noise"] * top - 0.7) * 0.5 / (0.25 + top**2) ** 0.5
    torch.testing.assert_close(pairs["image"].double(), expected.double(), atol=2e-3, rtol=2e-3)


def test_the_loss_is_the_squared_distance_of_the_drawn_pairs():
    method, teacher = Regression(pairs=20, steps=FewSteps(init_ratio=4)), small_teacher().float()
    stored = method.prepare(setting_of(teacher), seed=0)
    draw = method.draw(StepRandom(0, 0, torch.arange(6)), setting_of())
    loss = method.generator_loss(Players(generator=teacher), draw, Batch(torch.empty(0), stored=stored))
    picked = {name: value[draw["pair"]] for name, value in stored.items()}
    made = method.steps(teacher, picked["noise"], teacher.class_cond(picked["label"]))
    assert float(loss.total) == pytest.approx(float((made - picked["image"]).square().mean()), rel=1e-6)


def test_a_student_that_gives_the_stored_images_has_no_gradient():
    generator = small_teacher().float().requires_grad_(True)
    method = Regression(pairs=8)
    stored = method.prepare(setting_of(generator), seed=0)
    stored["image"] = method.steps(generator, stored["noise"], generator.class_cond(stored["label"])).detach()
    draw = {"pair": torch.arange(8)}
    loss = method.generator_loss(Players(generator=generator), draw, Batch(torch.empty(0), stored=stored)).total
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-6 for p in generator.parameters())


def test_every_pair_is_drawn():
    draw = Regression(pairs=7).draw(StepRandom(0, 0, torch.arange(200)), setting_of())
    assert set(draw["pair"].tolist()) == set(range(7))


def test_the_teacher_leaves_and_the_pairs_stay_with_the_run(make_config: MakeConfig):
    trainer = Trainer(make_config("regression", *QUICK), quiet=True)
    trainer.run()
    assert "teacher" not in trainer.players
    assert len(load_file(Path(trainer.folder) / "prepared.safetensors")["image"]) == 12 + trainer.method.held_out


def test_training_brings_the_student_nearer_to_the_pairs(make_config: MakeConfig):
    config = make_config("regression", *QUICK, "train.steps=30", "optimizers.generator.warmup_steps=0")
    trainer = Trainer(config, quiet=True)
    trainer.folder.mkdir(parents=True)
    _ = trainer.assembly

    def distance() -> float:
        batch = Batch(torch.empty(0), stored=trainer.assembly.iteration.stored)
        return float(trainer.method.generator_loss(trainer.players, {"pair": torch.arange(12)}, batch).total.detach())

    before = distance()
    for _ in range(30):
        trainer.train_step()
    assert distance() < 0.85 * before


def test_a_resumed_run_equals_one_that_was_not_stopped(make_config: MakeConfig):
    whole = Trainer(make_config("regression", *QUICK), quiet=True)
    whole.run()
    parts = make_config("regression", *QUICK, f"run={whole.folder}-parts")
    Trainer(make_config("regression", *QUICK, f"run={parts.run}", "train.steps=2"), quiet=True).run()
    resumed = Trainer(parts, resume=True, quiet=True)
    resumed.run()
    for name, value in resumed.trained["generator"].state_dict().items():
        assert torch.equal(value, whole.trained["generator"].state_dict()[name])


def test_a_later_run_s_generator_starts_as_the_student_and_its_fake_score_as_the_teacher(make_config: MakeConfig):
    """As DMD2's warm-up has it: what makes an image in one call is no score to begin with."""
    warm = Trainer(make_config("regression", *QUICK, "optimizers={default: {lr: 1e-2}}"), quiet=True)
    warm.run()
    later = Trainer(make_config("dmd2", f"init={warm.folder}"), quiet=True)
    started = {name: later.trained[name].state_dict() for name in ("generator", "fake")}
    left = load_file(find_checkpoint(warm.folder) / "ema.safetensors")
    teacher, student = later.players.teacher.state_dict(), select_group(left, "generator")
    assert all(torch.equal(value, student[name]) for name, value in started["generator"].items())
    assert all(torch.equal(value, teacher[name]) for name, value in started["fake"].items())
    assert not all(torch.equal(value, teacher[name]) for name, value in started["generator"].items())


def test_several_steps_are_refused():
    with pytest.raises(ValueError, match="pairs have one step"):
        Regression(steps=FewSteps(later_ratios=(1.0,)))


def test_guidance_needs_a_teacher_that_knows_no_class():
    teacher = small_teacher()
    teacher.net.has_null_condition = False
    with pytest.raises(UserError, match=r"method\.guidance: 2"):
        Regression(guidance=2.0).players(setting_of(teacher))


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, b"cut"])
def test_what_was_prepared_and_is_damaged_is_named(make_config: MakeConfig, content: bytes) -> None:
    config = make_config("regression", "train.steps=1")
    Trainer(config, quiet=True).run()
    (Path(config.run) / "prepared.safetensors").write_bytes(content)
    longer = make_config("regression", "train.steps=2", f"run={config.run}")
    with pytest.raises(UserError, match=r"prepared\.safetensors: cannot be read"):
        Trainer(longer, quiet=True, resume=True).run()
