"""Discrete consistency: closed forms of its fixed point, the erf law, the curricula, the distance, whom it reaches."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support.closed_forms import normal_nodes, numbers, on_every_path, one_gaussian, pairs, random
from support.tiny_players import BATCH, due, learned, scene
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.path import EDM, Path
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import LogNormal
from diffdistill.distillation.curricula import Doubling, Nearing
from diffdistill.distillation.losses import pseudo_huber
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.methods.consistency import Consistency
from diffdistill.settings.schema import UserError

S = 0.5  # of the data, N(0, S^2)


class Gains(nn.Module):
    """f(x, t) = k(t) x on the line, k one number for each level of a grid."""

    def __init__(self, grid: Tensor) -> None:
        super().__init__()
        self.path, self.grid, self.k = EDM(), grid, torch.ones_like(grid)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = NO_COND) -> Tensor:
        return self.k[torch.searchsorted(self.grid, t)][:, None] * x


def one_step_std(method: Consistency, num_intervals: int) -> float:
    """Of the loss's minimum under squares, level by level, over the data's: by the method's own levels and targets."""
    curriculum = Doubling(first=num_intervals, last=num_intervals)
    z, eps, weights = pairs(normal_nodes(2), normal_nodes(2))  # exact for squares
    grid = EDM().karras_times(num_intervals + 1).flip(0)
    student, batch = Gains(grid), Batch((S * z)[:, None])
    players = Players(generator=student, teacher=one_gaussian(0.0, S))
    for i in range(1, num_intervals + 1):
        t, r = curriculum.pair(((grid[i] + grid[i - 1]) / 2).expand(4), EDM(), 0, 1)
        assert torch.equal(t, grid[i].expand(4))
        x_t = EDM().diffuse(batch.images, eps[:, None], t)
        target = method.target(players, {"t": t, "r": r, "eps": eps[:, None]}, batch, x_t)
        moments = (weights[:, None] * torch.stack([target * x_t, x_t * x_t])).sum((1, 2))
        student.k[i] = moments[0] / moments[1]
    return float(student.k[-1]) * math.sqrt(S**2 + 80.0**2) / S


@pytest.mark.parametrize(("num_intervals", "expected"), [(10, 0.753), (160, 0.9826), (1280, 0.9978)])
def test_the_gap_of_the_discrete_fixed_point_is_its_closed_form(num_intervals: int, expected: float) -> None:  # E1
    grid, gain = EDM().karras_times(num_intervals + 1).flip(0).tolist(), 1.0
    for low, high in pairwise(grid):
        gain *= (S**2 + low * high) / (S**2 + high**2)
    found = one_step_std(Consistency(velocity="data"), num_intervals)
    assert found == pytest.approx(gain * math.sqrt(S**2 + 80.0**2) / S, rel=1e-9)
    assert found == pytest.approx(expected, abs=5e-4)
    if num_intervals == 10:  # Euler's steps of the teacher have the same
        assert one_step_std(Consistency(), num_intervals) == pytest.approx(found, rel=1e-9)


def test_the_gap_halves_as_the_grid_doubles() -> None:
    gaps = [1 - one_step_std(Consistency(velocity="data"), n) for n in (160, 320)]
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.1)


def test_a_grid_and_a_log_normal_law_are_the_paper_s_differences_of_erf() -> None:
    law, grid, num_draws = LogNormal(mean=-1.1, std=2.0), EDM().karras_times(11).flip(0), 200_000
    uniform = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    t, r = Doubling().pair(law(uniform, EDM()), EDM(), 0, 400_000)
    edges = torch.erf((grid.log() + 1.1) / (math.sqrt(2) * 2.0))
    shares = (edges[1:] - edges[:-1]) / (edges[-1] - edges[0])
    found = torch.bincount(torch.searchsorted(grid, t), minlength=11)[1:].double() / num_draws
    torch.testing.assert_close(found, shares, rtol=0, atol=2e-5)
    assert torch.equal(torch.searchsorted(grid, r), torch.searchsorted(grid, t) - 1)


@pytest.mark.parametrize(
    ("step", "num_intervals"),
    [(0, 10), (49_999, 10), (50_000, 20), (199_999, 80), (350_000, 1280), (399_999, 1280), (10**6, 1280)],
)
def test_the_grid_doubles_at_the_paper_s_iterations(step: int, num_intervals: int) -> None:
    assert Doubling().intervals(step, 400_000) == num_intervals


@pytest.mark.parametrize(("first", "last"), [(10, 1000), (2, 3), (3, 10), (5, 5)])
def test_the_grid_reaches_its_last_size_before_the_end(first: int, last: int) -> None:
    sizes = [Doubling(first=first, last=last).intervals(step, 280) for step in range(280)]
    assert sizes[0] == first
    assert sizes[-1] == last
    assert all(b in (a, min(2 * a, last)) for a, b in pairwise(sizes))


def test_ect_starts_at_the_image_and_ends_next_to_the_level() -> None:
    ratio = torch.logspace(-2, 2, 50, dtype=torch.float64)
    shares = [Nearing().share(ratio, stage) for stage in range(12)]
    assert all(bool((late >= early).all()) for early, late in pairwise(shares))
    assert torch.equal(shares[0] == 0, 1 + 8 * torch.sigmoid(-ratio) >= 2)
    assert shares[-1].min() > 0.998
    t, r = Nearing(stages=4).pair(ratio.clamp(0.002, 80), EDM(), 0, 100)
    assert torch.equal(r == EDM().t_min, ratio * shares[0] <= EDM().t_min)
    late = Nearing(stages=4).pair(t, EDM(), 99, 100)[1]
    torch.testing.assert_close(late, torch.maximum(t * Nearing().share(t, 3), numbers(0.002)))


@on_every_path
def test_pairs_of_levels_are_in_the_path_and_apart(path: Path) -> None:
    uniform = torch.linspace(1e-6, 1 - 1e-6, 500, dtype=torch.float64)
    for curriculum in (Doubling(), Nearing()):
        for step in (0, 50, 99):
            t, r = curriculum.pair(LogNormal(mean=-1.1, std=2.0)(uniform, path), path, step, 100)
            assert path.t_min <= float(r.min()) < float(t.max()) <= path.t_max
            assert bool((path.ratio(t) > path.ratio(r)).all())


@on_every_path
@pytest.mark.parametrize("curriculum", [Nearing(), Nearing(stages=30), Nearing(stages=30, q=1e3, k=0.0)])
def test_ect_s_levels_are_apart_at_the_lowest_of_all_and_in_the_last_of_many_stages(
    path: Path, curriculum: Nearing
) -> None:
    lowest_and_others = torch.cat([numbers(path.t_min, path.t_min), path.karras_times(50, 7.0)]).clamp(
        path.t_min, path.t_max
    )
    for step in (0, 50, 99):
        t, r = curriculum.pair(lowest_and_others, path, step, 100)
        assert path.t_min <= float(r.min()) < float(t.max()) <= path.t_max
        weight = 1 / (path.ratio(t) - path.ratio(r))
        assert bool(torch.isfinite(weight).all())
        assert float(weight.min()) > 0
        assert torch.equal(t[3:-1], lowest_and_others[3:-1])  # of the others none is moved


def test_more_stages_than_a_level_has_digits_are_refused() -> None:
    with pytest.raises(UserError, match="less than or equal to 30"):
        Nearing(stages=31)


def test_the_distance_is_of_a_sample_s_norm() -> None:
    x, y = random(4, 2, 3), random(4, 2, 3, seed=1)
    squared, c = (x - y).square().flatten(1).sum(1), 0.3
    torch.testing.assert_close(pseudo_huber(x, y, c), (squared + c**2).sqrt() - c)
    torch.testing.assert_close(pseudo_huber(x, y, 0.0), squared.sqrt())
    small = 1e-4 * x
    torch.testing.assert_close(
        pseudo_huber(small, 0 * x, c), small.square().flatten(1).sum(1) / (2 * c), rtol=1e-5, atol=0
    )
    same = x.clone().requires_grad_()
    pseudo_huber(same, x, 0.0).sum().backward()
    assert same.grad is not None
    assert not same.grad.any()


@pytest.mark.parametrize("velocity", ["teacher", "data"])
def test_the_loss_is_the_weighted_distance_to_the_student_s_own_estimate(velocity: str) -> None:
    method = Consistency(velocity=velocity, curriculum=Doubling(first=2, last=2), huber_constant=0.1)  # type: ignore[arg-type]
    players, draw, batch = scene(method)
    t, r, eps = draw["t"], draw["r"], draw["eps"]
    x_t = batch.images + t[:, None, None, None] * eps
    estimate = players.teacher(x_t, t, batch.cond)
    slope = eps if velocity == "data" else (x_t - estimate) / t[:, None, None, None]
    x_r = x_t + (r - t)[:, None, None, None] * slope
    target = players.generator(x_r, r, batch.cond)
    target[r == 0.002] = x_r[r == 0.002]
    assert 0 < int((r == 0.002).sum()) < BATCH
    c = 0.1 * math.sqrt(16)
    distance = ((players.generator(x_t, t, batch.cond) - target).square().flatten(1).sum(1) + c**2).sqrt() - c
    torch.testing.assert_close(method.generator_loss(players, draw, batch).total, (distance / (t - r)).mean())


@pytest.mark.parametrize("velocity", ["teacher", "data"])
def test_the_loss_reaches_the_generator_s_first_call_alone(velocity: str) -> None:
    method = Consistency(velocity=velocity)  # type: ignore[arg-type]
    players, draw, batch = scene(method)
    due(players, *players)
    method.generator_loss(players, draw, batch).total.backward()
    assert learned(players) == {"generator"}
    found = [p.grad.clone() for p in players.generator.parameters() if p.grad is not None]
    players.generator.zero_grad()
    x_t = players.generator.path.diffuse(batch.images, draw["eps"], draw["t"])
    target = method.target(players, draw, batch, x_t)
    assert not target.requires_grad
    distance = pseudo_huber(players.generator(x_t, draw["t"], batch.cond), target, method.huber_constant * 4)
    (distance / (draw["t"] - draw["r"])).mean().backward()
    for gradient, parameter in zip(found, players.generator.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


class Exact(nn.Module):
    """Where the ODE of N(0, S^2) ends, by the path's least noise."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.scale = EDM(), nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Cond = NO_COND) -> Tensor:
        return self.scale * x * ((S**2 + 0.002**2) / (S**2 + t**2)).sqrt()[:, None]


def test_the_exact_student_is_nearly_at_rest_on_a_fine_grid() -> None:
    """Fixed point, to the first order in the step; on a coarse grid it is not one."""
    pulls = []
    for intervals in (10, 320, 1280):
        z, eps, weights = pairs(normal_nodes(8), normal_nodes(8))
        grid = EDM().karras_times(intervals + 1).flip(0)
        t, r = (grid[int(share * intervals) + i].expand(len(z)) for i, share in ((1, 0.5), (0, 0.5)))
        student = Exact()
        draw, batch = {"t": t, "r": r, "eps": eps[:, None]}, Batch((S * z)[:, None])
        players = Players(generator=student, teacher=one_gaussian(0.0, S))
        x_t = batch.images + t[:, None] * eps[:, None]
        target = Consistency().target(players, draw, batch, x_t)
        pulls.append(float((weights[:, None] * (student(x_t, t).detach() - target) * x_t).sum().abs()) * intervals)
    assert pulls[0] > 3 * pulls[1]
    assert pulls[2] == pytest.approx(pulls[1] / 4, rel=0.1)  # the square of the step, times their number


def test_guidance_reaches_the_teacher_and_needs_one() -> None:
    method = Consistency(guidance=3.0)
    players, draw, batch = scene(method)
    x_t = players.generator.path.diffuse(batch.images, draw["eps"], draw["t"])
    plain = replace(method, guidance=1.0).target(players, draw, batch, x_t)
    assert not torch.allclose(method.target(players, draw, batch, x_t), plain)
    with pytest.raises(UserError, match=r"method\.guidance: 2\.0 needs velocity: teacher"):
        scene(Consistency(guidance=2.0, velocity="data"))


def test_the_curriculum_goes_by_the_step() -> None:
    problem = Problem((2,), 0, EDM(), num_steps=80)
    gaps = []
    for step in (0, 79):
        draw = Consistency().draw(StepRandom(0, step, torch.arange(64)), problem)
        gaps.append(float((draw["r"] / draw["t"]).mean()))
    assert gaps[0] < 0.75
    assert gaps[1] > 0.98


class Masked(nn.Module):
    """A denoiser of one weight behind dropout, which keeps its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.weight, self.masks = EDM(), nn.Parameter(torch.ones(())), list[Tensor]()

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.masks.append(nn.functional.dropout(torch.ones(5, 3), 0.5, self.training))
        return self.weight * x * self.masks[-1]


def test_both_calls_have_the_same_dropout() -> None:
    student, t = Masked().train(), torch.linspace(0.1, 5, 5, dtype=torch.float64)
    draw = {"t": t, "r": t / 2, "eps": torch.ones(5, 3)}
    Consistency(velocity="data").generator_loss(Players(generator=student), draw, Batch(torch.ones(5, 3)))
    first, second = student.masks
    assert 0 < int((first == 0).sum()) < first.numel()
    assert torch.equal(first, second)
