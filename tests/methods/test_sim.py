"""SIM: the theorem against finite differences, its relation to SiD, stop-gradients, and problems it can solve."""

from dataclasses import replace

import pytest
import torch
from support.closed_forms import GaussianFixture, MixtureFixture, numbers, random
from support.ring import INIT_RATIO, TIME_LAW, RingResult, train_ring
from support.tiny_players import due, learned, scene
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.distillation.score_distillation import score_identity
from diffdistill.methods.sid import SiD
from diffdistill.methods.sim import SIM, Distance, implicit_matching

UNIT = FewSteps(init_noise="unit")
PLAIN = SIM(steps=UNIT)
NODES = 3e-5  # 40 nodes on a mixture, of a function with a root
C = 0.5


def distance_of_scores(name: Distance, y: Tensor) -> Tensor:
    return {"l2": y**2, "pseudo_huber": (y**2 + C**2).sqrt() - C, "l4": y**4}[name]


@pytest.mark.parametrize(
    ("distance", "power", "expected"),
    [
        ("l2", 2, (0.013097, -0.467808)),
        ("pseudo_huber", 1, (-0.056126, -0.283759)),
        ("l4", 4, (0.292972, -0.553790)),
    ],
)
def test_the_gradient_is_that_of_the_score_divergence_whose_law_is_held_fixed(  # B1
    distance: Distance, power: int, expected: tuple[float, float]
) -> None:
    at = MixtureFixture()

    def divergence(shift: float, scale: float) -> float:
        generated = at.law(shift, scale)

        def integrand(_: Tensor, x: Tensor) -> Tensor:
            return distance_of_scores(distance, at.score(generated, x) - at.score(at.teacher, x))

        return at.expectation(integrand, at.shift, at.scale)

    # A score is a denoiser over the variance; so is c, and the loss has that power of it.
    method = replace(PLAIN, distance=distance, huber_c=C * at.variance)
    found = at.method_gradient(method) / at.variance**power
    torch.testing.assert_close(found, at.finite_difference(divergence), rtol=0, atol=NODES)
    torch.testing.assert_close(found, numbers(*expected), rtol=0, atol=NODES)


def test_with_the_squared_distance_it_is_twice_sid_at_alpha_one() -> None:  # A4
    at = GaussianFixture()
    found = at.gradient(replace(PLAIN, distance="l2"))
    sid = at.gradient(SiD(steps=UNIT, alpha=1.0, weight="one", loss_scale=1.0))
    torch.testing.assert_close(found, 2 * sid, rtol=1e-12, atol=0)
    torch.testing.assert_close(found / at.sigma**4, numbers(-0.453608, 0.166268), rtol=0, atol=NODES)


def test_a_very_large_c_gives_sid_s_numerator_and_a_very_small_one_the_unit_field() -> None:
    x, teacher, fake = (random(4, 3, seed=seed) for seed in range(3))
    sid = score_identity(x, teacher, fake, fake, alpha=1.0)
    huge = 1e8 * implicit_matching(x, teacher, fake, "pseudo_huber", c=1e8)
    torch.testing.assert_close(huge, sid, rtol=1e-10, atol=0)
    direction = (teacher - fake) / (teacher - fake).norm(dim=1, keepdim=True)
    tiny = implicit_matching(x, teacher, fake, "pseudo_huber", c=1e-9)
    torch.testing.assert_close(tiny, (direction * (fake - x)).sum(1), rtol=1e-10, atol=1e-12)


def test_pseudo_huber_s_denominator_is_in_the_graph() -> None:
    x, teacher = random(4, 3), random(4, 3, seed=1)
    fake = random(4, 3, seed=2).requires_grad_()
    y = fake - teacher
    root = (y.square().sum(1, keepdim=True) + C**2).sqrt()
    expected = -((y / root) * (fake - x)).sum(1)
    detached = -((y / root.detach()) * (fake - x)).sum(1)
    found = implicit_matching(x, teacher, fake, "pseudo_huber", c=C)
    by_fake, by_hand, without = (
        torch.autograd.grad(value.sum(), fake, retain_graph=True)[0] for value in (found, expected, detached)
    )
    torch.testing.assert_close(by_fake, by_hand, rtol=1e-12, atol=1e-12)
    assert (by_fake - without).norm() > 0.1 * by_fake.norm()


def gradients(players, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(players.generator.parameters()))
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("distance", ["l2", "pseudo_huber", "l4"])
def test_value_and_gradient_of_a_step_are_those_by_hand(distance: Distance) -> None:
    """On images, each sample with one norm over all of its numbers; the teacher alone is guided, in nu as well."""
    method = SIM(distance=distance, huber_c=C, weight="nu", guidance=3.0)
    players, draw, batch = scene(method)
    t, label = draw["t"], Cond(label=draw["label"])
    x = players.generator(2.5 * draw["z"], torch.full_like(t, 2.5), label)
    x_t = x + t.reshape(-1, 1, 1, 1) * draw["eps"]
    without = players.teacher(x_t, t, players.teacher.unconditional(label))
    teacher, fake = without + 3 * (players.teacher(x_t, t, label) - without), players.fake(x_t, t, label)
    values = []
    for one, real, own in zip(x, teacher, fake, strict=True):
        y = own - real
        slope = {"l2": 2 * y, "pseudo_huber": y / (y.norm() ** 2 + C**2).sqrt(), "l4": 4 * y**3}[distance]
        values.append(-(slope * (own - one)).sum() / (one - real).abs().mean().detach())
    expected = torch.stack(values).mean()
    found = method.generator_loss(players, draw, batch).total
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(players, found), gradients(players, expected), rtol=1e-9, atol=1e-12)


def test_the_fake_score_learns_by_edm_s_weight_on_samples_of_its_own() -> None:
    players, draw, batch = scene(SIM(guidance=3.0))
    t, label = draw["fake t"], Cond(label=draw["fake label"])
    x = players.generator(2.5 * draw["fake z"], torch.full_like(t, 2.5), label).detach()
    error = players.fake(x + t.reshape(-1, 1, 1, 1) * draw["fake eps"], t, label) - x
    expected = ((1 / t**2 + 4).reshape(-1, 1, 1, 1) * error**2).mean()
    torch.testing.assert_close(SIM(guidance=3.0).fake_loss(players, draw, batch).total, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("who", ["teacher", "fake"])
def test_the_gradient_passes_through_both_score_networks(who: str) -> None:
    players, draw, batch = scene(SIM())
    whole = gradients(players, SIM().generator_loss(players, draw, batch).total)
    original = players[who].forward
    players[who].forward = lambda x_t, *rest, **named: original(x_t.detach(), *rest, **named)
    loss = SIM().generator_loss(players, draw, batch).total
    assert (gradients(players, loss) - whole).norm() > 0.05 * whole.norm()


@pytest.mark.parametrize("distance", ["l2", "pseudo_huber", "l4"])
def test_a_generator_that_is_the_teacher_is_not_moved(distance: Distance) -> None:
    at = GaussianFixture(theta=0.7, tau=0.5)
    assert at.gradient(replace(PLAIN, distance=distance)).abs().max() < 1e-12


def test_each_loss_reaches_its_player_alone() -> None:
    for loss, player in (("generator_loss", "generator"), ("fake_loss", "fake")):
        players, draw, batch = scene(SIM())
        due(players, *(("generator", "fake") if loss == "fake_loss" else ("generator",)))
        getattr(SIM(), loss)(players, draw, batch).total.backward()
        assert learned(players) == {player}


def test_the_fake_score_steps_first_on_samples_of_its_own() -> None:
    assert [u.loss for u in SIM().updates] == ["fake_loss", "generator_loss"]
    _, draw, _ = scene(SIM())
    assert not torch.equal(draw["z"], draw["fake z"])


def test_no_real_image_is_asked_for() -> None:
    assert not SIM().needs_images


def ring_method(distance: Distance) -> SIM:
    steps = FewSteps(init_ratio=INIT_RATIO)
    return SIM(distance=distance, steps=steps, fake_updates=3, time_law=TIME_LAW, fake_time_law=TIME_LAW)


def learned_ring(seed: int) -> RingResult:
    """At a rate and a length with which it clears the bars on every processor: at 2e-3 and 400 steps one of two did."""
    return train_ring(ring_method("pseudo_huber"), seed=seed, num_steps=500, lr=4e-3)


def test_sim_learns_every_mode_of_the_ring_in_its_class() -> None:
    result = learned_ring(0)
    assert result.passes, result


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 2])
def test_sim_learns_the_ring_from_other_seeds(seed: int) -> None:
    result = learned_ring(seed)
    assert result.passes, result
