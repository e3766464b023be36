"""RF++: its loss on the line, the law, the start at the teacher, LPIPS beside it, the ring."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.closed_forms import numbers, on_every_path, one_gaussian, random
from support.tiny_players import due, learned, scene
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.path import EDM, Flow, Path
from diffdistill.diffusion.sampling import FewSteps, Heun
from diffdistill.diffusion.time_distributions import UShaped
from diffdistill.distillation import distances
from diffdistill.distillation.method import Batch, Players
from diffdistill.methods.rectified_flow import RectifiedFlow
from diffdistill.settings.schema import UserError

FEW = RectifiedFlow(pairs=20, pair_sampler=Heun(num_steps=3), huber_constant=0.01)


def test_the_loss_is_the_velocity_s_error_on_the_line() -> None:
    players, draw, batch = scene(FEW)
    pair = {name: value[draw["pair"]] for name, value in batch.stored.items()}
    z, x, d = pair["noise"], pair["image"], 16
    s = (draw["t"] / (1 + draw["t"]))[:, None, None, None]
    z_s = (1 - s) * x + s * z
    estimate = players.generator(z_s / (1 - s), draw["t"], Cond(label=pair["label"]))  # EDM's own coordinates
    velocity = (z_s - estimate) / s
    norm = (velocity - (z - x)).square().flatten(1).sum(1)
    c = 0.01 * d
    expected = ((1 - s.flatten()) * ((norm + c**2).sqrt() - c) / d).mean()
    torch.testing.assert_close(FEW.generator_loss(players, draw, batch).total, expected, rtol=1e-9, atol=0)


@on_every_path
def test_the_law_is_the_paper_s(path: Path) -> None:
    """Of the flow's time: density cosh(4 (s - 1/2)) within the path, and E|s - 1/2| = 0.3096 over the whole line."""
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    ratio = path.ratio(UShaped()(uniform, path))
    s = ratio / (1 + ratio)
    low, high = ((r / (1 + r)).item() for r in path.ratio(numbers(path.t_min, path.t_max)))
    edges = torch.linspace(low, high, 9, dtype=torch.float64)
    shares = torch.sinh(4 * (edges - 0.5))
    shares = (shares[1:] - shares[:-1]) / (shares[-1] - shares[0])
    found = torch.histogram(s.clamp(low, high), edges)[0] / len(s)
    torch.testing.assert_close(found, shares, rtol=0, atol=2e-4)
    if isinstance(path, Flow) and path.shift == 1:
        wide = UShaped()(uniform, Flow(t_start=1e-6, t_end=1 - 1e-6))
        assert float((wide - 0.5).abs().mean()) == pytest.approx(0.3096, abs=2e-4)


@on_every_path
def test_the_teacher_s_flow_is_its_posterior_mean_on_the_line(path: Path) -> None:
    """The change of variables loses nothing: v of a Gaussian teacher is E[z - x | z_s]."""
    teacher, s = one_gaussian(0.7, 0.5, path), torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    z_s, t = random(9, 1), path.time_of_ratio(s / (1 - s))
    velocity = (z_s - teacher(path.alpha(t)[:, None] * z_s / (1 - s)[:, None], t)) / s[:, None]
    variance = (1 - s) ** 2 * 0.25 + s**2
    slope = (s - (1 - s) * 0.25) / variance
    expected = -0.7 + slope[:, None] * (z_s - (1 - s)[:, None] * 0.7)
    torch.testing.assert_close(velocity, expected, rtol=1e-6, atol=1e-8)


class Straight(nn.Module):
    """D of the one line that each of a few pairs lies on: it finds the pair by its noise."""

    def __init__(self, pairs: dict[str, Tensor]) -> None:
        super().__init__()
        self.path, self.pairs, self.shift = EDM(), pairs, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def class_cond(self, label: Tensor) -> Cond:
        return NO_COND

    def forward(self, x: Tensor, t: Tensor, cond: Cond = NO_COND, guidance: float = 1.0) -> Tensor:
        lines = self.pairs["image"][None] + t[:, None, None] * self.pairs["noise"][None]
        nearest = (lines - x[:, None]).square().sum(2).argmin(1)
        return self.pairs["image"][nearest] + self.shift


def test_a_student_that_is_straight_on_the_pairs_is_at_rest_and_makes_them_in_any_number_of_steps() -> None:
    pairs = {"noise": random(6, 3), "image": random(6, 3, seed=1), "label": torch.zeros(6, dtype=torch.int64)}
    student = Straight(pairs)
    draw = {"pair": torch.arange(6), "t": torch.logspace(-1, 1, 6, dtype=torch.float64)}
    loss = RectifiedFlow().generator_loss(Players(generator=student), draw, Batch(torch.empty(0), stored=pairs))
    loss.total.backward()
    assert float(loss.total.detach()) == pytest.approx(0, abs=1e-12)
    assert float(student.shift.grad) == pytest.approx(0, abs=1e-9)  # type: ignore[arg-type]
    for later in ((), (20.0, 1.0, 0.1)):
        steps = FewSteps(init_ratio=80.0, later_ratios=later, later_noise="fixed")
        torch.testing.assert_close(steps(student, pairs["noise"]), pairs["image"])  # type: ignore[arg-type]


def test_only_the_generator_learns() -> None:
    players, draw, batch = scene(FEW)
    due(players, *players)
    FEW.generator_loss(players, draw, batch).total.backward()
    assert learned(players) == {"generator"}


def test_the_perceptual_distance_is_over_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances.LPIPS, "of_each", lambda self, x, target: (x - target).abs().flatten(1).mean(1))
    lpips = distances.LPIPS(weights="none", sha256="0" * 8)
    players, draw, batch = scene(FEW)
    pair = {name: value[draw["pair"]] for name, value in batch.stored.items()}
    s = draw["t"] / (1 + draw["t"])
    x_t = players.generator.path.diffuse(pair["image"], pair["noise"], draw["t"])
    estimate = players.generator(x_t, draw["t"], Cond(label=pair["label"]))
    each = (estimate - pair["image"]).abs().flatten(1).mean(1)
    plain = FEW.generator_loss(players, draw, batch).total
    for weight, factor in (("1/t", 1 / s), ("one", torch.ones_like(s))):
        method: Any = replace(FEW, perceptual=lpips, perceptual_weight=weight)
        torch.testing.assert_close(method.generator_loss(players, draw, batch).total - plain, (factor * each).mean())


def test_guidance_needs_a_teacher_that_knows_no_class() -> None:
    from support.tiny_players import CLASSES, PATH, SHAPE, small_teacher

    from diffdistill.distillation.method import Problem

    teacher = small_teacher()
    teacher.net.has_null_condition = False
    with pytest.raises(UserError, match=r"method\.guidance: 2"):
        RectifiedFlow(guidance=2.0).players(Problem(SHAPE, CLASSES, PATH, teacher=teacher))
