"""The score fields' settings, who learns, and runs in which images are the parameters."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from support.closed_forms import (
    numbers,
    random,
)
from support.tiny_players import due, learned, scene

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import VPCosine
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.distillation.method import Players, Problem
from diffdistill.distillation.score_fields import (
    limit_pixels,
)
from diffdistill.inference.draw import sample_images
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.score_field import ScoreField
from diffdistill.models.load import load_model
from diffdistill.networks.analytic import gaussian_denoiser
from diffdistill.networks.image_table import ImageTable
from diffdistill.settings.schema import UserError
from diffdistill.training.trainer import Trainer

UNIT = FewSteps(init_noise="unit")
SDS = ScoreField(steps=UNIT, subtract="noise", weight="one")
VSD = ScoreField(steps=UNIT, subtract="fake", weight="one")
CSD = ScoreField(subtract="no_class", weight="one")
ISM = ScoreField(subtract="cleaner", noising="inverted", weight="one")


def gaussian() -> Denoiser:
    """A teacher without classes."""
    return gaussian_denoiser(VPCosine(), numbers(0.3, -0.5), torch.diag(numbers(0.25, 2.0)))


# Settings and players


def test_with_the_weight_nu_vsd_is_dmd2_and_with_lambda_zero_esd_is_vsd() -> None:
    method = ScoreField(weight="nu")
    players, draw, batch = scene(method)
    other = DMD2(gan_weight=0.0)
    for loss in ("generator_loss", "fake_loss"):
        expected = other.call(loss, players, draw, batch).total
        torch.testing.assert_close(method.call(loss, players, draw, batch).total, expected, rtol=1e-9, atol=0)
    same = replace(method, fake_guidance=1.0)
    assert torch.equal(
        same.generator_loss(players, draw, batch).total, method.generator_loss(players, draw, batch).total
    )


def test_a_fake_score_that_is_the_teacher_leaves_guidance_alone() -> None:
    players, draw, batch = scene(VSD)
    same = Players(**{**players, "fake": players.teacher})
    assert VSD.generator_loss(same, draw, batch).total == 0
    assert replace(VSD, guidance=2.0).generator_loss(same, draw, batch).total > 0


def test_each_loss_reaches_its_own_players() -> None:
    for loss, names in (("generator_loss", {"generator"}), ("fake_loss", {"fake"})):
        players, draw, batch = scene(VSD)
        due(players, *players)
        VSD.call(loss, players, draw, batch).total.backward()
        assert learned(players) == names
    assert set(scene(SDS)[0]) == {"generator", "teacher"}
    assert SDS.updates[0].every == 1


def test_weights_are_powers_of_alpha_and_sigma_and_pixels_have_a_limit() -> None:
    path, x = VPCosine(), random(3, 2)
    teacher, t = (
        gaussian(),
        numbers(0.2, 0.5, 0.7),
    )
    draw = {"t": t, "eps": random(3, 2, seed=1), "label": torch.zeros(3).long()}
    plain = SDS.field(Players(teacher=teacher), draw, x)
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    for weight, scale in (("sigma^2", sigma**2), ("sigma/alpha", sigma / alpha), ("alpha", alpha)):
        found = replace(SDS, weight=weight).field(Players(teacher=teacher), draw, x)  # type: ignore[arg-type]
        torch.testing.assert_close(found, plain * scale, rtol=1e-9, atol=0)
    images = random(2, 3, 4, 4)
    limited = limit_pixels(images, 0.05)
    assert limited.abs().amax() <= 0.05 + 1e-12
    torch.testing.assert_close(limited / limited.norm(dim=1, keepdim=True), images / images.norm(dim=1, keepdim=True))
    assert limit_pixels(images, None) is images
    torch.testing.assert_close(limit_pixels(images, 100.0), images, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"subtract": "cleaner"}, "cleaner does not go with pull teacher and noising random"),
        ({"subtract": "noise", "noising": "inverted"}, "choose from no_class, cleaner"),
        ({"subtract": "no_class", "pull": "balanced"}, "choose from noise, fake, nothing"),
        ({"subtract": "nothing"}, "nothing does not go with"),
        ({"subtract": "noise", "pull": "balanced", "guidance": 2.0}, "guidance: pull balanced"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ScoreField(**settings)


def test_fields_of_the_class_need_a_teacher_that_can_leave_it_out() -> None:
    problem = Problem((2,), 0, VPCosine(), teacher=gaussian())
    with pytest.raises(UserError, match="the teacher has no classes"):
        CSD.players(problem)
    assert set(ISM.players(problem)) == {"generator"}


# Whole runs

TABLE = (
    "method.generator=model",
    "model={network: {name: image_table}, path: {name: edm, sigma_min: 0.02, sigma_max: 20}, predicts: x0}",
)


def test_images_are_the_parameters_and_the_fake_score_is_lora_over_the_teacher(make_config: MakeConfig) -> None:
    config = make_config("score_field", *TABLE, "model.network.particles=3", "lora={fake: {rank: 2}}")
    trainer = Trainer(config, quiet=True)
    before = {name: [p.detach().clone() for p in module.parameters()] for name, module in trainer.trained.items()}
    trainer.run()
    assert set(before) == {"generator", "fake"}
    for name, module in trainer.trained.items():
        assert any(not torch.equal(p, q) for p, q in zip(module.parameters(), before[name], strict=True)), name
    model = load_model(config.run)
    assert isinstance(model.denoiser.net, ImageTable)
    made = sample_images(model, count=40, label=2)
    rows = model.denoiser.net.images[2]
    assert all(any(torch.equal(image, row) for row in rows) for image in made)


def test_a_table_of_images_predicts_nothing_else(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"model: predicts = 'edm': an image_table holds images; use x0"):
        make_config("score_field", "method.generator=model", "model={network: {name: image_table}}")


def test_lora_over_a_new_student_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="score_field trains a new network"):
        Trainer(make_config("score_field", *TABLE, "lora={default: {rank: 2}}"), quiet=True)
