"""FreeFlow: the exact map is its own target, its prediction is BOOT's condition, its correction DMD2's field."""

from dataclasses import replace

import pytest
import torch
from support.closed_forms import numbers, on_every_path, one_gaussian, random
from support.tiny_players import BATCH, CLASSES, PATH, SHAPE, due, learned, scene, small_teacher
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.line import line_time
from diffdistill.diffusion.path import EDM, Path, expand
from diffdistill.diffusion.sampling import FewSteps, OneCall
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Loss, Players, Problem
from diffdistill.methods.boot import Boot
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.free_flow import FreeFlow
from diffdistill.networks.analytic import gaussian_denoiser

MEAN, STD = 0.7, 0.5
METHOD = FreeFlow(guidance=2.0)
PREDICTION = replace(METHOD, correction_weight=0.0)
CORRECTION = replace(METHOD, prediction_weight=0.0)
NO_BATCH = Batch(torch.zeros(0))


class ExactMap(nn.Module):
    """y of f(z, d) = d m + sqrt(d^2 c^2 + (1 - d)^2) z, the flow map of the Gaussian teacher."""

    def __init__(self, path: Path, factor: float = 1.0) -> None:
        super().__init__()
        self.path, self.factor = path, factor

    def forward(self, z: Tensor, time: Tensor, cond: Cond = NO_COND) -> Tensor:
        d = 1 - line_time(self.path.ratio(time))
        reached = expand(d, z) * MEAN + expand((d**2 * STD**2 + (1 - d) ** 2).sqrt(), z) * z
        return self.factor * (reached - expand(1 - d, z) * z) / expand(d, z)


def gradients(loss: Loss, players: Players, player: str = "generator") -> list[Tensor]:
    return list(torch.autograd.grad(loss.total, list(players[player].parameters())))


# Prediction


@on_every_path
@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_the_exact_map_is_its_own_target_and_another_one_is_not(path: Path, factor: float) -> None:
    size = 12
    teacher = gaussian_denoiser(path, torch.full((1,), MEAN, dtype=torch.float64), STD**2 * torch.eye(1).double())
    ratio = torch.logspace(-1, 1, size, dtype=torch.float64)
    draw = {"z": random(size, 1), "label": torch.zeros(size, dtype=torch.int64)}
    draw["prediction t"] = path.time_of_ratio(ratio)
    student = ExactMap(path, factor)
    target = FreeFlow().target(Players(teacher=teacher, generator=student), draw)
    off = (student(draw["z"], draw["prediction t"]) - target).abs().max()
    assert off < 1e-13 if factor == 1 else off > 1e-2


def test_the_target_is_the_teacher_s_velocity_less_the_map_s_change_in_d_alone_by_finite_differences() -> None:
    """The paper's F + d dF/dd = u_T(f(z, d), 1 - d), with F = z - y, written out on EDM's path."""
    players, draw, _ = scene(METHOD)
    z, sigma, cond, h = draw["z"], draw["prediction t"], Cond(label=draw["label"]), 1e-6
    d = 1 / (1 + sigma)

    def average_velocity(d: Tensor) -> Tensor:
        return z - players.generator(z, (1 - d) / d, cond)

    own, step = average_velocity(d), (h * d * (1 - d)).reshape(-1, 1, 1, 1)
    change = (average_velocity(d + step.flatten()) - average_velocity(d - step.flatten())) / (2 * step)
    reached = z - expand(d, z) * own
    estimate = players.teacher(reached / expand(d, z), sigma, cond, guidance=2.0)
    velocity = (reached - estimate) / expand(1 - d, z)
    target = METHOD.target(players, draw)
    torch.testing.assert_close(z - target, velocity - expand(d, z) * change, rtol=1e-6, atol=1e-6)
    assert not target.requires_grad


def test_the_prediction_is_boot_s_condition_over_t() -> None:
    """BOOT's bootstrap of a short step: what is missing, by the step in ln(sigma / alpha), is t times what is here."""
    players, draw, _ = scene(PREDICTION)
    t, cond, step = draw["prediction t"], Cond(label=draw["label"]), 1e-6
    told = draw | {"eps": draw["z"], "t": t, "s": t * (1 - step), "w": torch.full_like(t, 2.0)}
    boot = Boot(guidance=(2.0, 2.0))
    missing = boot.bootstrap(players, told) - players.generator(draw["z"], told["s"], cond)
    here = PREDICTION.target(players, draw) - players.generator(draw["z"], t, cond)
    torch.testing.assert_close(missing / step, expand(line_time(t), here) * here, rtol=1e-4, atol=1e-4)


def test_the_prediction_s_gradient_is_that_of_the_call_at_its_time_alone() -> None:
    players, draw, _ = scene(PREDICTION)
    fixed = PREDICTION.target(players, draw).clone()
    found = PREDICTION.generator_loss(players, draw, NO_BATCH)
    own = players.generator(draw["z"], draw["prediction t"], Cond(label=draw["label"]))
    expected = (own - fixed).square().mean()
    torch.testing.assert_close(found.total, expected)
    wanted = torch.autograd.grad(expected, players.generator.parameters())
    for a, b in zip(gradients(found, players), wanted, strict=True):
        torch.testing.assert_close(a, b)


class Masked(nn.Module):
    """A map of one weight behind dropout, which keeps its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.weight, self.masks = PATH, nn.Parameter(torch.ones(())), list[Tensor]()

    def forward(self, z: Tensor, time: Tensor, cond: Cond) -> Tensor:
        self.masks.append(nn.functional.dropout(torch.ones(BATCH, *SHAPE), 0.5, self.training))
        return self.weight * z * self.masks[-1]


def test_y_and_its_derivative_have_the_same_dropout() -> None:
    generator, (_, draw, _) = Masked().train(), scene(PREDICTION)
    PREDICTION.generator_loss(Players(teacher=small_teacher(), generator=generator), draw, NO_BATCH)
    first, second = generator.masks
    assert torch.equal(first, second)
    assert 0 < int((first == 0).sum()) < first.numel()


# Correction


def test_without_prediction_and_by_nu_it_is_dmd2_without_a_gan_bit_for_bit() -> None:
    method = replace(CORRECTION, normaliser="nu")
    steps = FewSteps(init_ratio=PATH.sigma_min, init_noise="unit")
    other = DMD2(steps=steps, guidance=2.0, gan_weight=0.0, fake_updates=method.fake_updates)
    assert method.updates == other.updates
    players, draw, batch = scene(method)
    theirs = other.draw(StepRandom(0, 0, torch.arange(BATCH)), Problem(SHAPE, CLASSES, PATH))
    assert all(torch.equal(value.to(draw[name].dtype), draw[name]) for name, value in theirs.items() if name != "step")
    draw["step"] = theirs["step"]
    losses = [kind.generator_loss(players, draw, batch) for kind in (method, other)]
    assert torch.equal(losses[0].total, losses[1].total)
    assert all(map(torch.equal, *(gradients(loss, players) for loss in losses)))
    fakes = [kind.fake_loss(players, draw | dict(losses[0].carry), batch) for kind in (method, other)]
    assert torch.equal(fakes[0].total, fakes[1].total)
    assert all(map(torch.equal, *(gradients(loss, players, "fake") for loss in fakes)))
    assert torch.equal(method.fake_loss(players, draw, batch).total, fakes[0].total), "made anew, the images are these"


@pytest.mark.parametrize("sigma", [0.1, 1.0, 5.0])
def test_the_correction_between_gaussians_is_the_difference_of_velocities(sigma: float) -> None:
    """dL/dF = u_N - u_T with u = (I - E[x0 | I]) / r of I = (1 - r) x + r n, written out; x = z - F."""
    x, n, r = random(9, 1), random(9, 1, seed=1), sigma / (1 + sigma)
    mixed = (1 - r) * x + r * n

    def velocity(mean: float, std: float) -> Tensor:
        a, b = (1 - r) * std**2, (1 - r) ** 2 * std**2 + r**2
        return (mixed - mean - a / b * (mixed - (1 - r) * mean)) / r

    players = Players(teacher=one_gaussian(MEAN, STD), fake=one_gaussian(-0.2, 0.9))
    draw = {"eps": n, "t": torch.full((9,), sigma, dtype=torch.float64), "label": torch.zeros(9, dtype=torch.int64)}
    found = FreeFlow().field(players, draw, x)
    torch.testing.assert_close(found, velocity(MEAN, STD) - velocity(-0.2, 0.9), rtol=1e-10, atol=1e-10)


def test_the_correction_s_gradient_is_f_s_by_the_difference_of_velocities() -> None:
    players, draw, _ = scene(CORRECTION)
    t, cond = draw["t"], Cond(label=draw["label"])
    image = OneCall()(players.generator, draw["z"], cond)
    with torch.no_grad():
        x_t = image + expand(t, image) * draw["eps"]
        difference = players.teacher(x_t, t, cond, guidance=2.0) - players.fake(x_t, t, cond)
    expected = ((draw["z"] - image) * difference / expand(line_time(t), image)).mean()  # F^T (u_N - u_T)
    found = CORRECTION.generator_loss(players, draw, NO_BATCH)
    wanted = torch.autograd.grad(expected, players.generator.parameters())
    for a, b in zip(gradients(found, players), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_map_is_not_corrected_by_a_fake_score_that_is_its_unguided_teacher() -> None:
    method = replace(CORRECTION, guidance=1.0)
    players, draw, _ = scene(method)
    players.fake.load_state_dict(players.teacher.state_dict())
    assert method.generator_loss(players, draw, NO_BATCH).logs["correction"] == 0


def test_images_whose_field_is_not_finite_push_nothing() -> None:
    players, draw, _ = scene(CORRECTION)
    draw["eps"][0] = torch.inf
    found = CORRECTION.field(players, draw, torch.zeros(BATCH, *SHAPE).double())
    assert bool((found[0] == 0).all())
    assert bool(found.isfinite().all())


# Both


def test_both_parts_add_up_by_their_weights() -> None:
    method = replace(METHOD, prediction_weight=0.7, correction_weight=0.2)
    players, draw, _ = scene(method)
    loss = method.generator_loss(players, draw, NO_BATCH)
    torch.testing.assert_close(loss.total.detach(), 0.7 * loss.logs["prediction"] + 0.2 * loss.logs["correction"])


def test_each_loss_reaches_its_player_alone() -> None:
    players, draw, _ = scene(METHOD)
    due(players, "generator")
    loss = METHOD.generator_loss(players, draw, NO_BATCH)
    loss.total.backward()
    assert learned(players) == {"generator"}
    for parameter in players.generator.parameters():
        parameter.grad = None
    due(players, "generator", "fake")
    METHOD.fake_loss(players, draw | dict(loss.carry), NO_BATCH).total.backward()
    assert learned(players) == {"fake"}


def test_what_has_no_weight_has_no_player_and_no_numbers() -> None:
    players, draw, _ = scene(PREDICTION)
    assert set(players) == {"teacher", "generator"}
    assert draw.keys() == {"z", "label", "prediction t"}
    assert [update.every for update in replace(PREDICTION, fake_updates=5).updates] == [1], "no fake score to wait for"
    assert [update.every for update in replace(METHOD, fake_updates=5).updates] == [5, 1]
    assert not METHOD.needs_images
    with pytest.raises(ValueError, match="correction_weight: with prediction_weight = 0 nothing is left to learn"):
        replace(PREDICTION, prediction_weight=0.0)


def test_the_fake_score_starts_as_the_teacher_beside_an_earlier_map_or_as_an_earlier_one() -> None:
    players, _, _ = scene(METHOD)
    before = Problem(SHAPE, CLASSES, PATH, teacher=small_teacher(), initial={"generator": players.generator})
    made = METHOD.players(before)
    for name, other in (("generator", players.generator), ("fake", before.teacher)):
        own, its = made[name].state_dict(), other.state_dict()
        assert own.keys() == its.keys()
        assert all(torch.equal(value, its[key]) for key, value in own.items())
    both = replace(before, initial={"generator": players.generator, "fake": players.fake})
    again = METHOD.players(both)["fake"].state_dict()
    assert all(torch.equal(value, again[key]) for key, value in players.fake.state_dict().items())


def test_times_of_the_map_are_its_law_s_or_all_of_the_path_s() -> None:
    rng = StepRandom(0, 0, torch.arange(4000))
    path = EDM(sigma_min=0.05, sigma_max=20.0)
    drawn = PREDICTION.draw(rng, Problem((1,), 0, path))["prediction t"]
    assert drawn.min() < 0.051
    assert drawn.max() > 19.9
    law = METHOD.fake_time_law
    told = replace(PREDICTION, prediction_time_law=law).draw(rng, Problem((1,), 0, path))["prediction t"]
    assert torch.equal(told, law(rng.uniform("prediction t"), path))


def test_the_derivative_has_digits_at_both_ends_of_the_path() -> None:
    """At d = 0 and d = 1 to within the path's ends: nothing there is 0 / 0."""
    players, draw, _ = scene(METHOD)
    draw["prediction t"] = numbers(PATH.sigma_min, PATH.sigma_max).repeat(BATCH // 2)
    assert bool(METHOD.target(players, draw).isfinite().all())
