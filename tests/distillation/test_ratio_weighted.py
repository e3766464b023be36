"""What f-distill and Uni-Instruct share: a discriminator that is there where a ratio or a GAN is asked for, and who
learns from which loss."""

from typing import Any, Literal

import pytest
import torch
from support.tiny_players import BATCH, CLASSES, PATH, SHAPE, due, learned, scene, watch

from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Problem
from diffdistill.distillation.ratio_weighted import RatioWeighted
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.f_distill import FDistill
from diffdistill.methods.sid import SiD
from diffdistill.methods.uni_instruct import UniInstruct
from diffdistill.settings.schema import UserError

both = pytest.mark.parametrize("kind", [FDistill, UniInstruct])
either_s_features = pytest.mark.parametrize("features", ["fake", "teacher"])
Features = Literal["fake", "teacher"]


@both
@either_s_features
@pytest.mark.parametrize("gan_weight", [0.0, 0.3])
def test_the_generator_s_loss_reaches_the_generator_alone(
    kind: type[Any], features: Features, gan_weight: float
) -> None:
    method = kind(divergence="js", gan_weight=gan_weight, gan_features=features)
    players, draw, batch = scene(method)
    due(players, "generator")
    method.generator_loss(players, draw, batch).total.backward()
    assert learned(players) == {"generator"}


@both
def test_the_critics_loss_reaches_the_critics_alone(kind: type[Any]) -> None:
    method = kind(divergence="js", gan_fake_weight=1.0)
    players, draw, batch = scene(method)
    due(players, "generator", "fake", "discriminator")
    method.fake_loss(players, draw, batch).total.backward()
    assert learned(players) == {"fake", "discriminator"}


@both
def test_a_ratio_without_a_gan_still_has_a_discriminator_that_is_trained(kind: type[Any]) -> None:
    method: RatioWeighted = kind(divergence="kl", gan_weight=0.0)
    assert method.needs_images
    assert method.updates[1].players == ("fake", "discriminator")
    players, draw, batch = scene(method)
    assert "gan" not in method.generator_loss(players, draw, batch).logs  # type: ignore[attr-defined]
    assert method.fake_loss(players, draw, batch).logs["gan"] > 0


@both
def test_without_a_ratio_there_is_no_discriminator_and_no_real_image(kind: type[Any]) -> None:
    method: RatioWeighted = kind(divergence="rkl", gan_weight=0.0, gan_fake_weight=0.0)
    assert not method.needs_images
    assert [update.players for update in method.updates] == [("generator",), ("fake",)]
    assert all(update.statistics is None for update in method.updates)
    problem = Problem(SHAPE, CLASSES, PATH, teacher=scene(method)[0].teacher)
    assert not {"gan real t", "gan fake t"} & method.draw(StepRandom(0, 0, torch.arange(BATCH)), problem).keys()


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        (FDistill, {"divergence": "js", "gan_weight": 0.0}, "divergence js reads its ratio"),
        (UniInstruct, {"divergence": "kl"}, "divergence kl reads its ratio"),
        (UniInstruct, {"divergence": "rkl", "gan_weight": 0.1}, "gan_weight is above 0"),
        (DMD2, {"gan_weight": 0.1}, "gan_weight is above 0"),
        (SiD, {"gan_weight": 0.1}, "gan_weight is above 0"),
    ],
)
def test_a_discriminator_that_nothing_trains_is_refused(kind: type[Any], settings: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=f"gan_fake_weight: 0 leaves the discriminator untrained, and {why}"):
        kind(**settings, gan_fake_weight=0.0)


@both
@either_s_features
def test_no_network_is_called_twice_on_the_same_input(kind: type[Any], features: Features) -> None:
    method = kind(divergence="js", gan_features=features, guidance=2.0)
    players, draw, batch = scene(method)
    calls = watch(players)
    carry = method.generator_loss(players, draw, batch).carry
    method.fake_loss(players, draw | dict(carry), batch)
    assert len(set(calls)) == len(calls)


@both
def test_a_student_that_is_the_teacher_is_not_moved_by_the_matching(kind: type[Any]) -> None:
    method = kind(divergence="js", gan_weight=0.0)
    players, draw, batch = scene(method)
    players.fake.load_state_dict(players.teacher.state_dict())
    assert method.generator_loss(players, draw, batch).total == 0
