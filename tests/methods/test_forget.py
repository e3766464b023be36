"""SFD: the base without classes to forget, labels by role, the forgetting term's fixed point, refusals, the ring."""

from typing import Any

import pytest
import torch
from support.closed_forms import GaussianFixture, generator_gradient, one_gaussian
from support.ring import INIT_RATIO, NUM_CLASSES, NUM_MODES, TIME_LAW, ring_means, ring_problem, trained_generator
from support.tiny_players import CLASSES, PATH, SHAPE, scene, small_teacher
from torch import Tensor

from diffdistill.data.source import TensorImages
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import METHODS, WRAPPERS, Problem
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.f_distill import FDistill
from diffdistill.methods.forget import Forget
from diffdistill.methods.sid import SiD
from diffdistill.methods.sim import SIM
from diffdistill.methods.uni_instruct import UniInstruct
from diffdistill.settings.schema import UserError

BASES: dict[str, Any] = {
    "sid": SiD(),
    "dmd2": DMD2(gan_weight=0.0),
    "f_distill": FDistill(divergence="rkl", gan_weight=0.0),
    "uni_instruct": UniInstruct(divergence="rkl", gan_weight=0.0),
}
TELLING = ("cdm", "dmd2", "f_distill", "score_field", "sid", "sim", "tdm", "uni_instruct")
"""Ours that tell the teacher another class than the student."""

every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


def drawn(method: Forget, count: int = 4000) -> dict[str, Tensor]:
    problem = Problem(SHAPE, 5, PATH, classes=method.classes(Problem(SHAPE, 5, PATH), images(5)))
    return method.draw(StepRandom(0, 0, torch.arange(count)), problem)


def images(num_classes: int) -> TensorImages:
    return TensorImages(torch.zeros(num_classes, *SHAPE), torch.arange(num_classes))


@every_base
def test_with_nothing_to_forget_it_is_the_base_bit_for_bit(base: Any) -> None:
    players, draw, batch = scene(base)
    wrapped = Forget(base=base)
    _, other, _ = scene(wrapped)
    assert draw.keys() == other.keys()
    assert all(torch.equal(draw[name], other[name]) for name in draw)
    for update in base.updates:
        found, wanted = (m.call(update.loss, players, draw, batch).total for m in (wrapped, base))
        assert torch.equal(found, wanted)


@every_base
def test_a_share_of_every_label_is_forgotten_and_the_teacher_alone_is_told_another(base: Any) -> None:
    draw = drawn(Forget(base=base, forgotten=(1, 3), share=0.25))
    labels = [name for name in draw if name.endswith("label")]
    assert labels
    for name in labels:
        is_forgotten = (draw[name] == 1) | (draw[name] == 3)
        assert abs(float(is_forgotten.double().mean()) - 0.25) < 0.03  # 4.4 standard errors
        told = draw[f"{name} for teacher"]
        assert set(told.tolist()) == {0, 2, 4}
        assert torch.equal(told[~is_forgotten], draw[name][~is_forgotten])
        assert set(draw[name][is_forgotten].tolist()) == {1, 3}
    fixed = drawn(Forget(base=base, forgotten=(1,), becomes=4, share=0.5))
    for name in labels:
        assert set(fixed[f"{name} for teacher"][fixed[name] == 1].tolist()) == {4}


def test_what_the_fake_score_s_loss_drops_stays_dropped_and_the_rest_has_its_own_class() -> None:
    draw = drawn(
        Forget(base=DMD2(gan_weight=0.0, fake_guidance=1.5, fake_class_dropout=0.3), forgotten=(1,), share=0.5)
    )
    told = draw["label for fake loss"]
    is_dropped = told == 5
    assert 0.25 < float(is_dropped.double().mean()) < 0.35
    assert torch.equal(told[~is_dropped], draw["label"][~is_dropped])


@every_base
def test_the_teacher_s_answer_for_the_other_class_is_what_moves_a_forgotten_sample(base: Any) -> None:
    """The base's loss by hand: its own samples and fake score of class 1, the teacher asked for class 2."""
    players, draw, batch = scene(base)
    ones, twos = torch.ones_like(draw["label"]), torch.full_like(draw["label"], 2)
    draw |= {"label": ones}
    found = (
        Forget(base=base, forgotten=(1,))
        .call("generator_loss", players, draw | {"label for teacher": twos}, batch)
        .total
    )
    original = players.teacher.forward
    players.teacher.forward = lambda x, t, cond, **named: original(x, t, Cond(label=twos), **named)
    wanted = base.call("generator_loss", players, draw, batch).total
    assert torch.equal(found, wanted)
    players.teacher.forward = original
    assert not torch.equal(found, base.call("generator_loss", players, draw, batch).total)


@pytest.mark.parametrize("name", TELLING)
def test_no_network_that_stands_for_the_teacher_sees_a_forgotten_class(name: str) -> None:
    kind = METHODS.find(name)
    base = BASES.get(name) or kind()
    method, problem = Forget(base=base, forgotten=(1,), share=0.5), Problem(SHAPE, CLASSES, PATH, classes=(0, 2))
    players, _, batch = scene(method)
    draw = method.draw(StepRandom(0, 0, torch.arange(64)), problem)
    draw = {name: value.double() if value.is_floating_point() else value for name, value in draw.items()}
    assert set(draw["label"].tolist()) == {0, 1, 2}
    seen = set[int]()
    forward = players.teacher.net.forward

    def watched(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.label is not None
        seen.update(cond.label.tolist())
        answer: Tensor = forward(x, t, cond)
        return answer

    players.teacher.net.forward = watched
    for update in method.updates:
        draw |= method.call(update.loss, players, draw, batch).carry
    assert seen == {0, 2}


@pytest.mark.parametrize("name", sorted(set(METHODS.own) - set(WRAPPERS) - set(TELLING)))
def test_a_base_whose_teacher_is_told_no_class_of_its_own_is_refused(name: str) -> None:
    problem = Problem(SHAPE, CLASSES, PATH, teacher=small_teacher().float())
    said = (
        f"method.base.name = '{name}': .* choose from cdm, dmd2, f_distill, score_field, sid, sim, tdm, uni_instruct$"
    )
    with pytest.raises(UserError, match=said):
        Forget(base=METHODS.find(name)(), forgotten=(1,)).players(problem)


def test_samples_that_share_a_condition_are_forgotten_together() -> None:
    draw = drawn(Forget(base=SIM(samples_per_condition=4), forgotten=(1, 3), share=0.5), count=64)
    for name in (name for name in draw if "label" in name):
        groups = draw[name].reshape(16, 4)
        assert torch.equal(groups, groups[:, :1].expand(16, 4))
    assert 0 < float((draw["label"] % 2).double().mean()) < 1  # some are forgotten, some not


def test_the_forgetting_term_vanishes_at_the_other_class_s_law_and_points_to_it_before() -> None:  # D1
    """One dimension: the forgotten class is N(0.7, 0.5^2), the other N(-0.6, 0.4^2)."""
    other = (-0.6, 0.4)
    for base in (
        SiD(alpha=1.2, steps=FewSteps(init_noise="unit")),
        DMD2(steps=FewSteps(init_noise="unit"), gan_weight=0.0),
    ):
        gradients = []
        for theta, tau in (other, (0.7, 0.5)):
            at = GaussianFixture(theta, tau)
            fake, teacher = one_gaussian(theta, tau), one_gaussian(*other)
            gradients.append(generator_gradient(base, at, theta, tau, fake=fake, teacher=teacher))
        assert gradients[0].abs().max() < 1e-9
    assert float(gradients[1][0]) > 0  # down it the mean goes from 0.7 to -0.6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"forgotten": (3,)}, r"method.forgotten = \[3\]: the teacher has 3 classes"),
        ({"forgotten": (0, 1, 2)}, r"method.forgotten = \[0, 1, 2\]: the teacher has 3 classes"),
        ({"forgotten": (1,), "becomes": 1}, "method.becomes = 1: must be a class that is kept, or null for any"),
        ({"forgotten": (1,), "becomes": 7}, "method.becomes = 7: must be a class that is kept, or null for any"),
        (
            {"forgotten": (1,), "base": DMD2()},
            "forget wraps a method without real images; set its gan_weight to 0",
        ),
        (
            {"forgotten": (1,), "base": DMD2(gan_weight=0.0, regression_weight=0.25)},
            "method.base.regression_weight = 0.25: .* use 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Forget(**({"base": BASES["dmd2"]} | settings)).players(Problem(SHAPE, CLASSES, PATH, teacher=small_teacher()))


@pytest.mark.full
def test_the_ring_s_forgotten_class_becomes_another_and_the_others_stay() -> None:
    steps = FewSteps(init_ratio=INIT_RATIO)
    base = DMD2(steps=steps, fake_updates=3, gan_weight=0.0, generator_time_law=TIME_LAW, fake_time_law=TIME_LAW)
    method = Forget(base=base, forgotten=(1,), becomes=3, share=0.25)
    generator = trained_generator(method, problem=ring_problem(method), num_steps=400)
    label = torch.arange(2000) % NUM_CLASSES
    z = StepRandom(3, 0, torch.arange(2000)).normal("z", (2,)) * INIT_RATIO
    t = torch.full((2000,), INIT_RATIO, dtype=torch.float64)
    with torch.no_grad():
        nearest = torch.cdist(generator(z, t, Cond(label=label)).double(), ring_means()).argmin(1)
    made = nearest * NUM_CLASSES // NUM_MODES
    wanted = torch.where(label == 1, 3, label)
    assert float((made == wanted).double().mean()) > 0.97
    assert float((made == 1).double().mean()) < 0.01
