"""SiD: its gradients against closed forms, where alpha 1.2 points the wrong way, weights, several steps."""

from dataclasses import replace

import pytest
import torch
from support.closed_forms import GaussianFixture, MixtureFixture, numbers, on_every_path, one_gaussian, random
from support.ring import INIT_RATIO, TIME_LAW, train_ring
from support.tiny_players import BATCH, CLASSES, MULTI_STEP, PATH, SHAPE, due, learned, scene, watch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import Flow, Path
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.distillation.score_distillation import TIME_POWERS, sample_weight, score_identity
from diffdistill.methods.sid import SiD
from diffdistill.settings.schema import UserError

PLAIN = SiD(steps=FewSteps(init_noise="unit"), weight="one", loss_scale=1.0)
SIX_DIGITS = 2e-6  # values that are known to six decimals


# The gradient, with an exact fake score


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.0, (-1.021749, 0.305978)),
        (0.5, (-0.834762, 0.271709)),
        (1.0, (-0.647775, 0.237439)),
        (1.2, (-0.572981, 0.223731)),
    ],
)
def test_the_gradient_between_gaussians_is_the_closed_form(alpha: float, expected: tuple[float, float]) -> None:  # A2
    at = GaussianFixture()
    gap = 1 / at.A - 1 / at.B
    by_mean = at.sigma**4 * (at.theta - at.m) / at.A * (1 / at.B + 2 * (1 - alpha) * gap)
    by_width = 2 * at.sigma**4 * at.tau * gap * (1 / at.B + (1 - alpha) * gap)
    found = at.gradient(replace(PLAIN, alpha=alpha))
    torch.testing.assert_close(found, numbers(by_mean, by_width), rtol=1e-9, atol=0)
    torch.testing.assert_close(found, numbers(*expected), rtol=0, atol=SIX_DIGITS)


def test_at_alpha_one_half_it_is_that_of_the_fisher_divergence_between_gaussians() -> None:  # A3
    at = GaussianFixture()
    by_mean = at.sigma**4 * (at.theta - at.m) / at.A**2
    by_width = at.sigma**4 * at.tau * (1 / at.A**2 - 1 / at.B**2)
    found = at.gradient(replace(PLAIN, alpha=0.5))
    torch.testing.assert_close(found, numbers(by_mean, by_width), rtol=1e-9, atol=0)


def test_at_alpha_one_half_it_is_that_of_the_fisher_divergence_between_mixtures() -> None:  # B2
    at = MixtureFixture()

    def fisher(shift: float, scale: float) -> float:
        generated = at.law(shift, scale)
        return at.expectation(lambda _, x: (at.score(generated, x) - at.score(at.teacher, x)) ** 2, shift, scale)

    found = at.method_gradient(replace(PLAIN, alpha=0.5))
    expected = at.variance**2 / 2 * at.finite_difference(fisher)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # 40 nodes on a mixture
    torch.testing.assert_close(found, numbers(-0.046340, -0.127917), rtol=0, atol=1e-5)


def is_right(alpha: float, ratio: float, *, s: float, sigma: float) -> tuple[bool, bool]:
    """Whether descent moves mean and width to the teacher's, from a law of B / A = ratio whose mean is too low."""
    tau = (ratio * (s**2 + sigma**2) - sigma**2) ** 0.5
    by_mean, by_width = GaussianFixture(-0.4, tau, sigma, s=s).gradient(replace(PLAIN, alpha=alpha)).tolist()
    return by_mean < 0, (by_width > 0) == (tau > s)


@pytest.mark.parametrize(
    ("ratio", "mean", "width"),
    [(1.5, True, True), (3.4, True, True), (3.6, False, True), (5.9, False, True), (6.1, False, False)],
)
def test_alpha_1_2_moves_a_wide_generator_away_from_the_teacher(ratio: float, mean: bool, width: bool) -> None:
    assert is_right(1.2, ratio, s=0.5, sigma=0.5) == (mean, width)


@pytest.mark.parametrize(("ratio", "mean"), [(0.45, False), (0.55, True), (6.1, True)])
def test_alpha_0_moves_the_mean_of_a_narrow_generator_away(ratio: float, mean: bool) -> None:
    assert is_right(0.0, ratio, s=3.0, sigma=0.5) == (mean, True)


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 1.5, 3.6, 6.1, 20.0])
def test_between_one_half_and_one_descent_moves_to_the_teacher_from_any_width(alpha: float, ratio: float) -> None:
    assert is_right(alpha, ratio, s=3.0, sigma=0.5) == (True, True)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_a_generator_that_is_the_teacher_is_not_moved(alpha: float) -> None:
    at = GaussianFixture(theta=0.7, tau=0.5)
    for weight in ("one", "nu"):
        assert at.gradient(replace(PLAIN, alpha=alpha, weight=weight)).abs().max() < 1e-12


def test_the_two_forms_of_the_identity_agree() -> None:
    x, teacher, fake = (random(4, 3, seed=seed) for seed in range(3))
    gap = teacher - fake
    expected = (gap * (teacher - x)).sum(1) - 1.2 * (gap**2).sum(1)
    torch.testing.assert_close(score_identity(x, teacher, fake, fake, alpha=1.2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_its_value_is_one_minus_alpha_times_the_mean_square_of_the_gap(alpha: float) -> None:
    """So at alpha 1 it is zero, though its gradient is not."""
    at = GaussianFixture()
    x = at.theta + at.tau * at.z
    x_t = x + at.sigma * at.eps
    teacher, fake = one_gaussian(at.m, at.s)(x_t, at.t), one_gaussian(at.theta, at.tau)(x_t, at.t)
    by_mean, by_width = at.sigma**2 * (at.m - at.theta) / at.A, at.s**2 / at.A - at.tau**2 / at.B
    expected = (1 - alpha) * (by_mean**2 + by_width**2 * at.B)
    found = (at.weights * score_identity(x, teacher, fake, fake, alpha=alpha)).sum()
    assert found.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


# The whole loss, written out a second time


def by_hand(method: SiD, players: Players, draw: dict[str, Tensor]) -> Tensor:
    """The generator's loss without guidance, in the form of the other equation."""
    t, label = draw["t"], Cond(label=draw["label"])
    sigma = method.steps.init_ratio
    x = players.generator(sigma * draw["z"], torch.full_like(t, sigma), label)
    x_t = x + t.reshape(-1, 1, 1, 1) * draw["eps"]
    teacher, fake = players.teacher(x_t, t, label), players.fake(x_t, t, label)
    gap = (teacher - fake).flatten(1)
    nu = (x - teacher).detach().flatten(1).abs().mean(1)
    values = (gap * (teacher - x).flatten(1)).sum(1) - method.alpha * (gap**2).sum(1)
    return method.loss_scale * (values / nu).mean()


def gradients(players: Players, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(players.generator.parameters()))
    return torch.cat([gradient.flatten() for gradient in found])


def test_value_and_gradient_of_a_step_are_those_by_hand() -> None:
    method = SiD()
    players, draw, batch = scene(method)
    expected = by_hand(method, players, draw)
    found = method.generator_loss(players, draw, batch).total
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(players, found), gradients(players, expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("who", ["teacher", "fake"])
def test_the_gradient_passes_through_both_score_networks(who: str) -> None:
    method = SiD()
    players, draw, batch = scene(method)
    whole = gradients(players, method.generator_loss(players, draw, batch).total)
    original = players[who].forward
    players[who].forward = lambda x_t, *rest, **named: original(x_t.detach(), *rest, **named)
    loss = method.generator_loss(players, draw, batch).total
    assert (gradients(players, loss) - whole).norm() > 0.05 * whole.norm()


def test_no_gradient_is_taken_of_the_normaliser(monkeypatch: pytest.MonkeyPatch) -> None:
    method = SiD()
    players, draw, batch = scene(method)
    whole = gradients(players, method.generator_loss(players, draw, batch).total)

    def attached(x: Tensor, estimate: Tensor, minimum: float) -> Tensor:
        return (x - estimate).abs().mean((1, 2, 3), keepdim=True).clamp_min(minimum)

    monkeypatch.setattr("diffdistill.distillation.score_distillation.sample_normaliser", attached)
    loss = method.generator_loss(players, draw, batch).total
    assert (gradients(players, loss) - whole).norm() > 0.05 * whole.norm()


def test_the_generator_s_loss_reaches_the_generator_alone() -> None:
    method = SiD(gan_weight=0.01)
    players, draw, batch = scene(method)
    due(players, "generator")
    method.generator_loss(players, draw, batch).total.backward()
    assert learned(players) == {"generator"}


def test_the_fake_score_s_loss_reaches_the_fake_score_alone() -> None:
    method = SiD(gan_weight=0.01)
    players, draw, batch = scene(method)
    due(players, "generator", "fake")
    method.fake_loss(players, draw, batch).total.backward()
    assert learned(players) == {"fake"}


def test_scaling_images_and_denoisers_together_scales_the_loss() -> None:
    def loss(k: float) -> Tensor:
        teacher, fake, generator = (one_gaussian(k * m, k * s) for m, s in ((0.7, 0.5), (-0.4, 0.9), (0.1, 1.0)))
        players = Players(teacher=teacher, fake=fake, generator=generator)
        t = torch.linspace(0.3, 3, 5, dtype=torch.float64)
        draw = {"z": random(5, 1), "eps": random(5, 1, seed=1), "t": k * t, "label": torch.zeros(5).long()}
        method = SiD(steps=FewSteps(init_ratio=2 * k))
        return method.generator_loss(players, draw | {"step": torch.tensor(0)}, Batch(torch.empty(0))).total

    torch.testing.assert_close(loss(7.0), 7 * loss(1.0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_a_sample_with_a_broken_estimate_pushes_nothing_and_the_others_as_before(fault: float) -> None:
    method = SiD()
    players, draw, batch = scene(method)
    original = players.fake.forward

    def only(kept: slice) -> Tensor:
        part = {name: value if value.ndim == 0 else value[kept] for name, value in draw.items()}
        return gradients(players, method.generator_loss(players, part, batch).total)

    expected = only(slice(1, BATCH)) * (BATCH - 1) / BATCH

    def broken(x_t: Tensor, *rest, **named) -> Tensor:
        estimate = original(x_t, *rest, **named)
        return estimate + torch.tensor([fault] + (BATCH - 1) * [0.0]).double().reshape(-1, 1, 1, 1)

    players.fake.forward = broken
    loss = method.generator_loss(players, draw, batch).total
    assert loss.isfinite()
    torch.testing.assert_close(gradients(players, loss), expected, rtol=1e-10, atol=1e-12)


# Weights


@on_every_path
def test_weights_of_time_are_those_of_their_names(path: Path) -> None:
    t = path.time_of_ratio(numbers(0.1, 1.0, 4.0))
    alpha, sigma, x = path.alpha(t), path.sigma(t), random(3, 4)
    expected = {
        "one": torch.ones(3).double(),
        "alpha": alpha,
        "alpha^2": alpha**2,
        "alpha/sigma": alpha / sigma,
        "snr": alpha**2 / sigma**2,
        "1/sigma": 1 / sigma,
        "1/sigma^2": 1 / sigma**2,
    }
    assert expected.keys() == TIME_POWERS.keys()
    for name, value in expected.items():
        found = sample_weight(name, path, x, t, x, minimum=1.0)
        torch.testing.assert_close(found, value, rtol=1e-12, atol=0)


def test_on_a_flow_alpha_is_the_weight_one_minus_t() -> None:
    t, x = numbers(0.1, 0.5, 0.9), random(3, 4)
    torch.testing.assert_close(sample_weight("alpha", Flow(), x, t, x, minimum=1.0), 1 - t)


def test_the_weight_nu_is_one_over_the_mean_distance_to_the_teacher() -> None:
    x, teacher, t = random(3, 4), random(3, 4, seed=1), numbers(1, 2, 3)
    expected = 1 / (x - teacher).abs().mean(1)
    torch.testing.assert_close(sample_weight("nu", PATH, x, t, teacher, minimum=1e-5), expected)
    assert sample_weight("nu", PATH, x, t, x, minimum=0.25).tolist() == [4, 4, 4]


# Who steps, on what


def test_the_fake_score_steps_first_and_k_times_to_one_of_the_generator() -> None:
    updates = SiD(fake_updates=3).updates
    assert [(u.players, u.every) for u in updates] == [(("fake",), 1), (("generator",), 3)]


def test_the_two_losses_see_samples_of_their_own() -> None:
    players, draw, batch = scene(SiD())
    calls = watch(players)
    SiD().fake_loss(players, draw, batch)
    SiD().generator_loss(players, draw, batch)
    made = [given for name, given in calls if name == "generator"]
    assert len(made) == len(set(made)) == 2
    assert [name for name, _ in calls] == ["generator", "fake", "generator", "teacher", "fake"]


def test_augmentation_is_refused_with_a_network_that_takes_no_labels_of_it() -> None:
    with pytest.raises(UserError, match=r"method.fake_augment = 0.5: this network takes no augmentation labels"):
        scene(SiD(fake_augment=0.5))


class Told(nn.Module):
    """A network that is told of augmentation, and keeps what it was told."""

    accepts = frozenset({"label", "augmentation"})
    num_classes, has_null_condition, resolution_multiple = CLASSES, True, 1

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.told: list[Tensor | None] = []

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        self.told.append(cond.augmentation)
        return self.scale * x


def test_the_fake_score_alone_is_told_of_augmentation_and_in_its_own_loss_alone() -> None:
    method = SiD(fake_augment=1.0)
    problem = Problem(SHAPE, CLASSES, PATH, teacher=Denoiser(Told(), PATH, "edm"))
    players = Players(teacher=problem.teacher, **method.players(problem))
    draw = method.draw(StepRandom(0, 0, torch.arange(BATCH)), problem)
    method.fake_loss(players, draw, Batch(torch.empty(0)))
    method.generator_loss(players, draw, Batch(torch.empty(0)))
    first, second = players.fake.net.told
    assert first is not None
    assert first.abs().sum() > 0
    assert second is None
    assert players.generator.net.told == [None, None]
    assert players.teacher.net.told == [None]


# Several steps


def test_both_losses_share_the_drawn_step_and_only_it_has_a_gradient() -> None:
    method = SiD(steps=MULTI_STEP)
    players, draw, batch = scene(method)
    draw["step"] = torch.tensor(2)
    given: list[tuple[float, bool]] = []
    original = players.generator.forward

    def recorded(x: Tensor, t: Tensor, *rest, **named) -> Tensor:
        given.append((float(t[0]), torch.is_grad_enabled() and not x.requires_grad))
        return original(x, t, *rest, **named)

    players.generator.forward = recorded
    method.fake_loss(players, draw, batch)
    method.generator_loss(players, draw, batch)
    levels = [20.0, 5.0, 1.0]
    assert given == [(t, False) for t in levels] + [(20.0, False), (5.0, False), (1.0, True)]


def test_several_steps_with_one_step_are_the_one_step_method() -> None:
    players, draw, batch = scene(SiD(steps=FewSteps(later_noise="ddim")))
    losses = [
        SiD(steps=steps).generator_loss(players, draw, batch).total
        for steps in (FewSteps(), FewSteps(later_noise="fixed"))
    ]
    assert torch.equal(*losses)


# Problems that it can solve exactly


def descend(method: SiD, start: tuple[float, float], *, size: int, num_steps: int) -> tuple[float, float]:
    """Adam on mean and width of a Gaussian generator in `size` dimensions, its fake score exact at each step."""
    m, s, batch = 0.7, 0.5, 128
    mean, width = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in start)
    optimizer = torch.optim.Adam([mean, width], 0.01, betas=(0.0, 0.999))
    sigmas, generator = numbers(0.1, 0.5, 1.0, 2.5), torch.Generator().manual_seed(0)

    def denoise(x_t: Tensor, sigma: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
        return (variance * x_t + sigma**2 * mean) / (variance + sigma**2)

    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 0.01 if step < 0.7 * num_steps else 0.001
        z, eps = torch.randn(2, batch, size, dtype=torch.float64, generator=generator)
        sigma = sigmas[torch.randint(4, (batch,), generator=generator)][:, None]
        x = mean + width * z
        x_t = x + sigma * eps
        teacher, fake = denoise(x_t, sigma, m, s**2), denoise(x_t, sigma, mean.detach(), width.detach() ** 2)
        weight = sample_weight(method.weight, PATH, x, sigma[:, 0], teacher, minimum=1e-5)
        optimizer.zero_grad()
        (weight * score_identity(x, teacher, fake, fake, alpha=method.alpha)).mean().backward()
        optimizer.step()
    return mean.item(), abs(width.item())


@pytest.mark.parametrize(
    "start", [(0.0, 0.9), *(pytest.param((-1.0, width), marks=pytest.mark.full) for width in (0.1, 1.5))]
)
@pytest.mark.parametrize("alpha", [pytest.param(0.0, marks=pytest.mark.full), 0.5, 1.0, 1.2])
def test_in_64_dimensions_every_alpha_reaches_the_teacher(alpha: float, start: tuple[float, float]) -> None:
    found = descend(SiD(alpha=alpha), start, size=64, num_steps=800)
    assert found == pytest.approx((0.7, 0.5), abs=3e-3)  # Adam's last rate is 1e-3


def test_on_a_line_the_normaliser_carries_alpha_1_2_away_and_without_it_the_teacher_is_reached() -> None:
    start = (-1.0, 1.5)
    with_nu = descend(SiD(alpha=1.2), start, size=1, num_steps=2000)
    without = descend(SiD(alpha=1.2, weight="one"), start, size=1, num_steps=2000)
    assert abs(with_nu[0] - 0.7) > 1
    assert without == pytest.approx((0.7, 0.5), abs=0.05)


def ring_method(alpha: float) -> SiD:
    return SiD(
        alpha=alpha, steps=FewSteps(init_ratio=INIT_RATIO), fake_updates=3, time_law=TIME_LAW, fake_time_law=TIME_LAW
    )


def test_sid_learns_every_mode_of_the_ring_in_its_class() -> None:
    result = train_ring(ring_method(1.2), num_steps=600)
    assert result.passes, result


@pytest.mark.full
@pytest.mark.parametrize(("alpha", "seed"), [(1.2, 1), (1.2, 2), (1.0, 0)])
def test_sid_learns_the_ring_from_other_seeds_and_at_alpha_1(alpha: float, seed: int) -> None:
    result = train_ring(ring_method(alpha), num_steps=600, seed=seed)
    assert result.passes, result
