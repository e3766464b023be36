"""TDM: at rest where the student follows the teacher's ODE, its importance weight, levels, roll-out, gradients."""

from dataclasses import replace

import pytest
import torch
from support.closed_forms import (
    LearnedGaussian,
    averaged_by,
    normal_nodes,
    numbers,
    on_every_path,
    one_gaussian,
    pairs,
    random,
)
from support.ring import TIME_LAW, measure_ring, ring_problem, trained_generator
from support.tiny_players import CLASSES, PATH, SHAPE, due, learned, scene, watch
from support.trajectory_ring import Sampled, fitted_student
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM, Path
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import Karras, shares_between
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.tdm import TDM
from diffdistill.networks.analytic import gaussian_denoiser, gaussian_flow
from diffdistill.settings.schema import UserError

MEAN, STD = 0.7, 0.5
TWO = FewSteps(init_ratio=3.0, later_ratios=(0.8,), later_noise="ddim")
NONE = Batch(torch.empty(0))


class Follows(nn.Module):
    """The student whose every step ends where the exact ODE of N(MEAN, STD^2) ends.  As the image itself last."""

    def __init__(self, path: Path, steps: FewSteps) -> None:
        super().__init__()
        self.path, self.times = path, steps.times(path)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = NO_COND) -> Tensor:
        following = torch.cat([self.times[1:], self.times.new_zeros(1)])[(t[:1] == self.times).int().argmax()]
        ends = following.expand(len(x))
        is_last = bool(following == 0)
        alpha, sigma = (torch.ones(()), torch.zeros(())) if is_last else (self.path.alpha(ends), self.path.sigma(ends))
        mean, covariance = numbers(MEAN), numbers(STD)[None] ** 2
        if is_last:
            top = self.path.alpha(t)[:, None] ** 2 * STD**2 + self.path.sigma(t)[:, None] ** 2
            return MEAN + (x - self.path.alpha(t)[:, None] * MEAN) * STD / top.sqrt()
        arrived = gaussian_flow(self.path, mean, covariance, x, t, ends)
        ratio = (sigma / self.path.sigma(t))[:, None]
        return (arrived - ratio * x) / (alpha[:, None] - self.path.alpha(t)[:, None] * ratio)


def on_the_way(path: Path, call: int) -> tuple[dict[str, Tensor], Tensor]:
    """A draw whose steps start at the teacher's own law, over nodes of (start, eps); and their weights."""
    z, eps, weights = pairs(normal_nodes(12), normal_nodes(12))
    t = TWO.times(path)[call]
    start = path.alpha(t) * MEAN + (path.alpha(t) ** 2 * STD**2 + path.sigma(t) ** 2).sqrt() * z
    middle = path.time_of_ratio(numbers((1.5, 0.3)[call])).expand(len(z))
    draw = {
        "call": torch.full((len(z),), call),
        "start": start[:, None],
        "label": torch.zeros(len(z), dtype=torch.int64),
    }
    noises = {f"{who}eps": eps[:, None] for who in ("", "fake ")} | {f"{who}t": middle for who in ("", "fake ")}
    return draw | noises, weights


@on_every_path
@pytest.mark.parametrize("call", [0, 1])
def test_the_points_of_arrival_of_an_exact_student_noised_have_the_teacher_s_law(path: Path, call: int) -> None:  # E2
    draw, weights = on_the_way(path, call)
    teacher, t = gaussian_denoiser(path, numbers(MEAN), numbers(STD)[None] ** 2), draw["t"]
    variances = {}
    for name, student in {"exact": Follows(path, TWO), "one step of DDIM": teacher}.items():
        x0 = student(draw["start"], TWO.times(path)[call].expand(len(t)))
        x_t, _ = TDM(steps=TWO).noised(path, draw, draw["start"], x0, t, draw["eps"])
        mean = (weights[:, None] * x_t).sum()
        torch.testing.assert_close(mean, path.alpha(t[0]) * MEAN)
        variances[name] = float((weights[:, None] * (x_t - mean) ** 2).sum())
    wanted = float(path.alpha(t[0]) ** 2 * STD**2 + path.sigma(t[0]) ** 2)
    assert variances["exact"] == pytest.approx(wanted, rel=1e-10)
    assert abs(variances["one step of DDIM"] / wanted - 1) > 0.01


class Weighted(LearnedGaussian):
    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        return averaged_by(super().forward(x, time_input, NO_COND), self.weights)


def pull_on_the_fake(method: TDM, student: nn.Module, call: int) -> Tensor:
    """The gradient of the fake score's loss by its mean and variance, where it is the teacher."""
    draw, weights = on_the_way(EDM(), call)
    fake = Weighted([MEAN], STD**2)
    fake.weights = weights
    players = Players(generator=student, fake=Denoiser(fake, EDM(), "x0"), teacher=one_gaussian(MEAN, STD))
    method.fake_loss(players, draw, NONE).total.backward()
    assert fake.mean.grad is not None
    assert fake.variance.grad is not None
    return torch.cat([fake.mean.grad, fake.variance.grad[None]])


@pytest.mark.parametrize("middle", [0.9, 1.5, 2.9])
def test_the_least_loss_of_the_fake_score_is_as_large_for_every_step_and_level(middle: float) -> None:
    """EDM's weight makes a denoiser's least loss 1 on Gaussian data; so is it with `target: noise`, however much noise
    a step leaves.  A level whose loss is larger than others' drowns them."""
    rng, losses = torch.Generator().manual_seed(0), []
    players = Players(generator=Follows(EDM(), TWO), fake=one_gaussian(MEAN, STD), teacher=one_gaussian(MEAN, STD))
    for call, ratio in ((0, middle), (1, middle / 4)):
        z, eps = torch.randn(2, 40_000, 1, generator=rng, dtype=torch.float64)
        t = TWO.times(EDM())[call]
        draw = {"call": torch.full((len(z),), call), "start": MEAN + (STD**2 + t**2).sqrt() * z, "fake eps": eps}
        draw |= {"label": torch.zeros(len(z), dtype=torch.int64), "fake t": numbers(ratio).expand(len(z))}
        losses.append(float(TDM(steps=TWO).fake_loss(players, draw, NONE).total))
    assert losses == pytest.approx([1, 1], rel=0.03)


@pytest.mark.parametrize("call", [0, 1])
def test_with_an_exact_student_the_teacher_is_the_fake_score_s_minimum(call: int) -> None:
    exact = Follows(EDM(), TWO)
    assert pull_on_the_fake(TDM(steps=TWO), exact, call).abs().max() < 1e-10
    assert pull_on_the_fake(TDM(steps=TWO), one_gaussian(MEAN, STD), call).abs().max() > 0.01
    # The image as the target has another minimum wherever the step ends in noise, weighted or not.
    for importance in ("sum", "mean"):
        pull = pull_on_the_fake(TDM(steps=TWO, target="image", importance=importance), exact, call).abs().max()
        assert (pull > 0.01) == (call == 0)


def test_in_one_step_tdm_is_dmd2() -> None:
    steps = FewSteps(init_ratio=4.0)
    method, other = TDM(steps=steps, guidance=2.0), DMD2(steps=steps, gan_weight=0.0, guidance=2.0)
    players, draw, batch = scene(method)
    draw |= {"step": torch.tensor(0)}
    for name, player in (("fake_loss", players.fake), ("generator_loss", players.generator)):
        losses = [made.call(name, players, draw, batch).total for made in (method, other)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-12)
        gradients = [torch.autograd.grad(loss, list(player.parameters()), allow_unused=True) for loss in losses]
        for found, wanted in zip(*gradients, strict=True):  # the loss alone does not know the field's sign
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)
    for importance in ("sum", "mean"):
        image = replace(method, target="image", importance=importance)
        torch.testing.assert_close(
            image.fake_loss(players, draw, batch).total, wanted_fake(other, players, draw, batch)
        )


def wanted_fake(other: DMD2, players: Players, draw: dict[str, Tensor], batch: Batch) -> Tensor:
    return other.fake_loss(players, draw, batch).total


def test_the_importance_weight_is_a_density_ratio_of_the_whole_sample() -> None:
    """Its mean over the added noise is one, and that of a sample is the product of its pixels', not their mean."""
    method, (eps, weights) = TDM(steps=TWO, target="image"), normal_nodes(80)
    draw = {"call": torch.zeros(len(eps), dtype=torch.int64)}
    start, x0, t = torch.full((80, 1), 2.0), torch.full((80, 1), 0.4), torch.full((80,), 2.9)
    x_t, beta = method.noised(EDM(), draw, start.double(), x0.double(), t.double(), eps[:, None])
    found = method.importance_of(EDM(), x_t, x0, t, eps[:, None], beta)
    assert float((weights * found).sum()) == pytest.approx(1, abs=1e-6)
    several = {"call": torch.zeros(5, dtype=torch.int64)}
    start, x0, eps, t = random(5, 3), random(5, 3, seed=1), random(5, 3, seed=2), torch.linspace(1, 2.5, 5).double()
    x_t, beta = method.noised(EDM(), several, start, x0, t, eps)
    by_pixel = [
        method.importance_of(EDM(), x_t[:, i : i + 1], x0[:, i : i + 1], t, eps[:, i : i + 1], beta) for i in range(3)
    ]
    whole = method.importance_of(EDM(), x_t, x0, t, eps, beta)
    torch.testing.assert_close(whole, by_pixel[0] * by_pixel[1] * by_pixel[2])
    mean = replace(method, importance="mean").importance_of(EDM(), x_t, x0, t, eps, beta)
    torch.testing.assert_close(mean, (whole / (beta / t) ** 3) ** (1 / 3))


@on_every_path
def test_levels_are_the_law_s_between_the_ends_of_each_step(path: Path) -> None:
    method, law = TDM(), Karras(ratio_min=0.05, ratio_max=40.0)
    low, high = path.time_of_ratio(numbers(0.3, 5.0)).tolist()
    uniform, call = torch.linspace(0.001, 0.999, 400, dtype=torch.float64), torch.arange(400) % 4
    t = method.levels(law, uniform, call, path)
    times = method.steps.times(path)
    ends = torch.cat([times[1:], torch.tensor([path.t_min])])
    assert bool((t >= ends[call] - 1e-9).all())
    assert bool((t <= times[call] + 1e-9).all())
    first, last = shares_between(law, path, low, high)
    inside = law(torch.linspace(0, 1, 4001, dtype=torch.float64), path)
    share = float(((inside >= low) & (inside <= high)).double().mean())
    assert last - first == pytest.approx(share, abs=1e-3)


def test_a_law_without_levels_in_a_step_is_refused() -> None:
    method = TDM(time_law=Karras(ratio_min=0.01, ratio_max=2.0))
    with pytest.raises(UserError, match=r"^time_law: karras has no ratio between 5 and 80"):
        method.draw(StepRandom(0, 0, torch.arange(4)), Problem(SHAPE, CLASSES, PATH))
    method = TDM(fake_time_law=Karras(ratio_min=0.01, ratio_max=2.0))
    with pytest.raises(UserError, match=r"^fake_time_law: karras has no ratio between 5 and 80"):
        method.draw(StepRandom(0, 0, torch.arange(4)), Problem(SHAPE, CLASSES, PATH))


def test_both_updates_share_one_roll_out_in_which_each_sample_has_a_step_of_its_own() -> None:
    method = TDM(steps=replace(TWO, init_ratio=20.0, later_ratios=(5.0, 1.0)))
    players, draw, batch = scene(method)
    assert len(set(draw["call"].tolist())) > 1
    calls = watch(players)
    carry = method.fake_loss(players, draw, batch).carry
    with_carry = method.generator_loss(players, draw | carry, batch).total
    assert [name for name, _ in calls].count("generator") == 2 + 1 + 1
    assert torch.equal(with_carry, method.generator_loss(players, draw, batch).total)
    cond = players.teacher.class_cond(draw["label"])
    for i, call in enumerate(draw["call"].tolist()):
        own = method.steps.roll_out(players.generator, draw["z"], cond, step=call)
        torch.testing.assert_close(carry["start"][i], own.x[i])


def test_each_loss_reaches_its_player_alone() -> None:
    method = TDM(guidance=(1.0, 3.0))
    for loss, player in (("fake_loss", "fake"), ("generator_loss", "generator")):
        players, draw, batch = scene(method)
        due(players, *players)
        method.call(loss, players, draw, batch).total.backward()
        assert learned(players) == {player}


@pytest.mark.parametrize("target", ["noise", "image"])
def test_a_fake_score_that_is_the_teacher_pushes_nothing_and_guidance_reaches_the_teacher(target: str) -> None:
    method = TDM(target=target)  # type: ignore[arg-type]
    players, draw, batch = scene(method)
    same = Players(**{**players, "fake": players.teacher})
    assert method.generator_loss(same, draw, batch).logs["field"] == 0
    assert replace(method, guidance=2.0).generator_loss(same, draw, batch).logs["field"] > 0


def test_the_huber_distance_has_its_gradient() -> None:
    method = TDM(distance="huber", huber_width=0.3)
    players, draw, _ = scene(method)
    start = method.start(players, draw)
    x0 = method.image(players, draw, start).detach()
    nu = (x0 - teacher_at(method, players, draw, start, x0)).abs().flatten(1).mean(1).reshape(-1, 1, 1, 1)
    gap = replace(method, distance="square").field(players, draw, start, x0) * nu
    x = gap.clone().requires_grad_()
    ((x.square() + 0.3**2).sqrt() / nu).sum().backward()
    torch.testing.assert_close(method.field(players, draw, start, x0), x.grad)


def teacher_at(method: TDM, players: Players, draw: dict[str, Tensor], start: Tensor, x0: Tensor) -> Tensor:
    x_t, _ = method.noised(PATH, draw, start, x0, draw["t"], draw["eps"])
    return players.teacher(x_t, draw["t"], players.teacher.class_cond(draw["label"]))


def test_noise_between_the_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps.later_noise = fresh: tdm's student follows an ODE; use ddim"):
        TDM(steps=FewSteps(init_ratio=4.0, later_ratios=(1.0,)))


@pytest.mark.full
def test_tdm_learns_the_ring_in_two_steps() -> None:
    steps = FewSteps(init_ratio=3.0, later_ratios=(0.2,), later_noise="ddim")
    law = replace(TIME_LAW, ratio_min=0.03)
    method = TDM(steps=steps, time_law=law, fake_time_law=law, generator_updates_every=2)
    problem = ring_problem(method)
    start = fitted_student()
    assert not measure_ring(Sampled(start, steps)).passes
    problem = replace(problem, initial={"generator": start, "fake": problem.initial["fake"]})
    result = measure_ring(Sampled(trained_generator(method, num_steps=500, problem=problem), steps))
    assert result.passes, result
