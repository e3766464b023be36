"""Guidance on both sides of a field: a number, or a range from which each sample's scale is drawn."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny_players import BATCH, CLASSES, PATH, SHAPE, scene, small_teacher
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Draw, Players, Problem
from diffdistill.distillation.score_distillation import generate, matching_field
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.f_distill import FDistill
from diffdistill.methods.sim import SIM
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import validate

METHODS: dict[str, Any] = {
    "dmd2": DMD2(gan_weight=0.0),
    "dmd2 with a GAN": DMD2(),
    "f_distill": FDistill(divergence="rkl", gan_weight=0.0),
    "f_distill with a ratio": FDistill(),
    "sim": SIM(),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def same_scene(method: Any) -> tuple[Players, dict[str, Tensor], Batch]:
    """`scene`, with the same new head every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return scene(method)


def by_hand(players: Players, draw: Draw, x: Tensor, scale: Tensor, fake_scale: Tensor) -> Tensor:
    """DMD2's field, sample by sample and call by call."""
    fields = []
    for i in range(BATCH):
        one = slice(i, i + 1)
        x_t = players.teacher.path.diffuse(x[one], draw["eps"][one], draw["t"][one])
        guided = []
        for name, w in (("fake", fake_scale[i]), ("teacher", scale[i])):
            with_class, without = (players[name](x_t, draw["t"][one], Cond(label=label)) for label in labels(draw, one))
            guided.append(without + w * (with_class - without))
        fields.append(matching_field(x[one], *guided, minimum=1e-5))
    return torch.cat(fields)


def labels(draw: Draw, one: slice) -> tuple[Tensor, Tensor]:
    return draw["label"][one], torch.full_like(draw["label"][one], CLASSES)


@pytest.mark.parametrize("ranged", [False, True])
def test_dmd2_s_field_is_that_of_both_guided_scores(ranged: bool) -> None:
    scales = (
        {"guidance": (1.0, 4.0), "fake_guidance": (0.5, 2.0)} if ranged else {"guidance": 3.0, "fake_guidance": 1.5}
    )
    method = DMD2(gan_weight=0.0, **scales)  # type: ignore[arg-type]
    players, draw, _ = same_scene(method)
    x = generate(players, draw, method.steps).detach()
    both = (draw[n] if ranged else torch.full((BATCH,), w, dtype=torch.float64) for n, w in scales.items())  # type: ignore[arg-type]
    torch.testing.assert_close(method.field(players, draw, x), by_hand(players, draw, x, *both), rtol=1e-9, atol=1e-10)


@every_method
def test_a_range_of_one_number_is_the_number(method: Any) -> None:
    """Also that f-distill's shared pass for features and estimate is given up where the estimate is guided."""
    found = []
    for scale in (1.5, (1.5, 1.5)):
        made = replace(method, guidance=scale, fake_guidance=scale)
        players, draw, batch = same_scene(made)
        found.append(made.generator_loss(players, draw, batch).total)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=0)


@every_method
@pytest.mark.parametrize("name", ["guidance", "fake_guidance"])
def test_each_side_s_scale_reaches_the_loss_and_one_is_the_default(method: Any, name: str) -> None:
    losses = {}
    for scale in (None, 1.0, 1.5, (0.0, 3.0)):
        made = method if scale is None else replace(method, **{name: scale})
        players, draw, batch = same_scene(made)
        losses[scale] = made.generator_loss(players, draw, batch).total.item()
    assert losses[None] == losses[1.0]
    assert len(set(losses.values())) == 3


@every_method
def test_scales_of_a_range_are_each_sample_s_own_and_even(method: Any) -> None:
    made, problem = replace(method, fake_guidance=(-1.0, 3.0), guidance=(2.0, 4.0)), Problem(SHAPE, CLASSES, PATH)
    draw = made.draw(StepRandom(0, 0, torch.arange(4000)), problem)
    parts = [made.draw(StepRandom(0, 0, index), problem) for index in torch.arange(4000).split(1000)]
    for name, low, high in (("fake_guidance", -1, 3), ("guidance", 2, 4)):
        assert torch.equal(draw[name], torch.cat([part[name] for part in parts]))
        assert low < float(draw[name].min()) < float(draw[name].max()) < high
        assert abs(float(draw[name].mean()) - (low + high) / 2) < 0.1  # 4.5 standard errors of the wider
    assert not torch.equal((draw["guidance"] - 2) / 2, (draw["fake_guidance"] + 1) / 4)


@every_method
@pytest.mark.parametrize("fake_guidance", [1.0, 1.5])
def test_a_guided_fake_score_learns_the_law_without_classes_too(method: Any, fake_guidance: float) -> None:
    made = replace(method, fake_guidance=fake_guidance, fake_class_dropout=0.5)
    players, draw, batch = same_scene(made)
    key = "fake label" if isinstance(method, SIM) else "label"
    told = draw.get(f"{key} for fake loss", draw[key])
    is_dropped = told == CLASSES
    assert bool(is_dropped.any()) == (fake_guidance != 1)
    assert not bool(is_dropped.all())
    assert torch.equal(told[~is_dropped], draw[key][~is_dropped])
    seen: list[Tensor] = []
    original = players.fake.forward

    def recorded(x: Tensor, t: Tensor, cond: Cond, *rest: Any, **named: Any) -> Any:
        if named.get("want") != "features":
            seen.append(cond.label)  # type: ignore[arg-type]
        return original(x, t, cond, *rest, **named)

    players.fake.forward = recorded
    made.fake_loss(players, draw, batch)
    assert torch.equal(seen[-1], told)


@pytest.mark.parametrize("scale", [2.0, (1.0, 2.0)])
@pytest.mark.parametrize("name", ["guidance", "fake_guidance"])
def test_a_teacher_that_was_never_without_a_class_is_refused(name: str, scale: object) -> None:
    teacher = small_teacher()
    teacher.net.has_null_condition = False
    with pytest.raises(UserError, match=rf"method.{name}: 2.0 needs a model trained with class_dropout"):
        DMD2(**{name: scale}).players(Problem(SHAPE, CLASSES, PATH, teacher=teacher))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["much", [1.0], [3.0, 1.0], True])
def test_a_wrong_scale_is_one_sentence(wrong: object, make_config: Any) -> None:
    with pytest.raises(UserError, match=r"method.fake_guidance.*(a finite number, or a range|must rise)") as caught:
        make_config("sim", f"method.fake_guidance={wrong}")
    assert "1 fault" in str(caught.value)


def test_stored_pairs_have_one_scale() -> None:
    with pytest.raises(ValueError, match="regression_weight: stored pairs are of one scale"):
        DMD2(guidance=(1.0, 2.0), regression_weight=0.5)


def test_a_range_is_read_from_yaml() -> None:
    read = validate(DMD2, {"name": "dmd2", "guidance": [1, 2.5]}, origin="here")
    assert read.guidance == (1.0, 2.5)
