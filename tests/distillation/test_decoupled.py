"""Guidance and matching apart: DMD2 where they are not, the fixed point, levels; the fake score that follows."""

from dataclasses import replace

import pytest
import torch
from support.closed_forms import LearnedGaussian, numbers, random
from support.tiny_players import BATCH, CLASSES, MULTI_STEP, PATH, SHAPE, scene, small_teacher, watch
from torch import Tensor

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import Karras, share_below
from diffdistill.distillation.decoupled import Decoupled
from diffdistill.distillation.levels import DrawnLevels
from diffdistill.distillation.method import Players, Problem
from diffdistill.methods.dmd2 import DMD2
from diffdistill.settings.schema import UserError

APART = DMD2(guidance=3.0, gan_weight=0.0, steps=MULTI_STEP, decoupled=Decoupled())
AS_DMD2 = replace(APART, decoupled=Decoupled(normaliser="guided"))


def together(draw: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers, guidance at the matching's noise."""
    return draw | {"guidance t": draw["t"], "guidance eps": draw["eps"]}


@pytest.mark.parametrize("guidance", [3.0, (1.0, 5.0)])
@pytest.mark.parametrize("alpha_power", [0, 1])
def test_at_one_noise_and_by_one_normaliser_the_two_terms_are_dmd2_s_field(guidance, alpha_power) -> None:
    method = replace(AS_DMD2, guidance=guidance, alpha_power=alpha_power)
    players, draw, batch = scene(method)
    plain = replace(method, decoupled=None)
    x = random(BATCH, *SHAPE, seed=3)
    found, expected = (kind.field(players, together(draw), x) for kind in (method, plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    losses = [kind.generator_loss(players, together(draw), batch).total for kind in (method, plain)]
    gradients = [torch.autograd.grad(loss, list(players.generator.parameters())) for loss in losses]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("change", [{"normaliser": "conditional"}, {}])
def test_by_another_normaliser_or_at_another_noise_it_is_another_field(change: dict[str, str]) -> None:
    method = replace(AS_DMD2, decoupled=replace(AS_DMD2.decoupled, **change))  # type: ignore[type-var]
    players, draw, _ = scene(method)
    drawn = together(draw) if change else draw
    x = random(BATCH, *SHAPE, seed=3)
    found, plain = (kind.field(players, drawn, x) for kind in (method, replace(method, decoupled=None)))
    assert (found - plain).norm() > 1e-3 * plain.norm()


def test_between_gaussians_the_student_rests_where_the_closed_form_says() -> None:
    """m_c + (w - 1) (E k at guidance's noise / E k at the matching's) (m_c - m_u), k = sigma^2 / (v + sigma^2)."""
    variance, with_class, without, w, count = 0.64, 1.0, 0.2, 4.0, 500
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    times = {"t": Karras(ratio_max=3.0)(shares, EDM()), "guidance t": Karras(ratio_max=0.8)(shares, EDM())}
    of_guidance, of_matching = (float((t**2 / (variance + t**2)).mean()) for t in (times["guidance t"], times["t"]))
    rest = with_class + (w - 1) * of_guidance / of_matching * (with_class - without)
    teacher = Denoiser(LearnedGaussian([with_class, without], variance), EDM(), "x0")
    method = DMD2(guidance=w, gan_weight=0.0, normaliser_minimum=1e3, decoupled=Decoupled())
    draw = times | {"label": torch.zeros(count, dtype=torch.int64)}
    draw |= {"eps": random(count, 1), "guidance eps": random(count, 1, seed=1)}

    def push(theta: float) -> float:
        fake = Denoiser(LearnedGaussian([theta, 0.0], variance), EDM(), "x0")
        x = theta + variance**0.5 * random(count, 1, seed=2)
        return float(1e3 * method.field(Players(teacher=teacher, fake=fake), draw, x).mean())

    assert rest == pytest.approx(1.0 + 3.0 * of_guidance / of_matching * 0.8)
    assert rest < without + w * (with_class - without) - 0.5  # less far than the guided mean
    assert push(rest) == pytest.approx(0, abs=1e-12)
    assert push(rest + 0.1) == pytest.approx(0.1 * of_matching, rel=1e-9)


def drawn(method: DMD2, step: int = 0) -> dict[str, Tensor]:
    return method.draw(StepRandom(0, step, torch.arange(400)), Problem(SHAPE, CLASSES, PATH, teacher=small_teacher()))


def test_guidance_is_at_cleaner_noise_than_the_student_s_call_was() -> None:
    seen = set()
    for step in range(8):
        draw = drawn(APART, step)
        level = MULTI_STEP.times(PATH)[int(draw["step"])]
        assert (draw["guidance t"] <= level).all()
        assert float(draw["guidance t"].max()) > 0.9 * float(level)
        assert (draw["t"] > level).any() or int(draw["step"]) == 0
        seen.add(int(draw["step"]))
    assert len(seen) > 1


def test_where_levels_are_drawn_each_sample_has_its_own_bound() -> None:
    method = replace(APART, levels=DrawnLevels(num_steps=(3, 3)))
    draws = [draw for draw in (drawn(method, step) for step in range(6)) if int(draw["step"]) > 0]
    for draw in draws:
        bound = draw["times"][:, int(draw["step"])]
        assert (draw["guidance t"] <= bound * (1 + 1e-9)).all()
    assert draws


def test_a_student_of_one_call_has_guidance_at_any_noise_of_the_law() -> None:
    """So the bound is empty, and the two differ from DMD2 in independent noise alone."""
    method = replace(APART, steps=FewSteps(init_ratio=80.0))
    uniform = StepRandom(0, 0, torch.arange(400)).uniform("guidance t")
    torch.testing.assert_close(drawn(method)["guidance t"], Karras()(uniform, PATH), rtol=1e-9, atol=0)


def test_a_law_s_share_below_a_time_is_the_number_that_gives_that_time() -> None:
    law, times = Karras(ratio_min=0.03, ratio_max=6.0), numbers(0.1, 1.0, 5.0)
    torch.testing.assert_close(law(share_below(law, PATH, times), PATH), times, rtol=1e-9, atol=0)


def test_no_noise_below_a_call_and_guidance_of_one_are_refused() -> None:
    high = replace(APART, decoupled=Decoupled(time_law=Karras(ratio_min=3.0)))
    with pytest.raises(UserError, match=r"method\.decoupled\.time_law: karras has no ratio between"):
        scene(high)
    drawn_low = replace(APART, levels=DrawnLevels(time_law=Karras(ratio_min=0.01)))
    with pytest.raises(UserError, match=r"levels\.time_law: steps may be at a ratio of 0\.01, below which"):
        scene(replace(drawn_low, decoupled=Decoupled(time_law=Karras(ratio_min=0.03))))
    scene(replace(drawn_low, decoupled=Decoupled(time_law=Karras(ratio_min=0.03), range="whole")))
    scene(replace(drawn_low, decoupled=Decoupled(time_law=Karras(ratio_min=0.01))))
    scene(replace(high, levels=DrawnLevels(time_law=Karras(ratio_min=3.0))))  # the levels of `steps` are not asked for
    with pytest.raises(ValueError, match="decoupled: separates guidance from matching"):
        DMD2(decoupled=Decoupled())


@pytest.mark.parametrize("method", [APART, AS_DMD2], ids=["conditional", "guided"])
def test_no_network_is_called_twice_on_the_same_input(method: DMD2) -> None:
    players, draw, batch = scene(method)
    calls = watch(players)
    method.generator_loss(players, draw, batch)
    assert len(set(calls)) == len(calls)


# The fake score that follows


def test_the_fake_score_goes_a_share_of_the_way_to_the_student_after_the_student_s_update_alone() -> None:
    method = DMD2(gan_weight=0.0, fake_follows=0.25)
    players, draw, batch = scene(method)
    start = [p.detach().clone() for p in players.fake.parameters()]
    method.after_update(players, method.fake_loss(players, draw, batch).carry)
    assert all(torch.equal(a, b) for a, b in zip(start, players.fake.parameters(), strict=True))
    method.after_update(players, method.generator_loss(players, draw, batch).carry)
    for before, now, other in zip(start, players.fake.parameters(), players.generator.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * before + 0.25 * other, rtol=1e-12, atol=1e-14)
        assert now.requires_grad


def test_a_fake_score_of_another_network_cannot_follow() -> None:
    method = DMD2(gan_weight=0.0, fake_follows=0.25)
    other = small_teacher(num_classes=CLASSES + 1).float()
    problem = Problem(SHAPE, CLASSES, PATH, teacher=small_teacher().float(), initial={"fake": other, "x": other})
    with pytest.raises(UserError, match=r"method\.fake_follows: fake score and generator have different networks"):
        method.players(problem)
