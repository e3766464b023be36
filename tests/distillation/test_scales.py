"""Guidance on both sides of a field: a number, or a range from which each sample's scale is drawn."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.closed_forms import GaussianFixture, normal_nodes, numbers, pairs
from support.tiny_players import BATCH, CLASSES, PATH, SHAPE, scene, small_teacher
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Draw, Players, Problem
from diffdistill.distillation.score_distillation import generate, matching_field
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.f_distill import FDistill
from diffdistill.methods.sim import SIM
from diffdistill.networks.analytic import Mixture, mixture_denoiser
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
    with pytest.raises(
        UserError, match=r"method.fake_guidance.*(a finite number, or a range|must be increasing)"
    ) as caught:
        make_config("sim", f"method.fake_guidance={wrong}")
    assert "1 fault" in str(caught.value)


@every_method
@pytest.mark.parametrize("scale", [2.0, (0.5, 4.0)])
def test_same_is_the_teacher_s_scale_in_every_sample(method: Any, scale: Any) -> None:
    """PG-SB: one kappa for both scores.  Also that nothing more is drawn, and that the fake score learns "no class"."""
    same = replace(method, guidance=scale, fake_guidance="same")
    players, draw, batch = same_scene(same)
    assert ("fake_guidance" in draw, "guidance" in draw) == (False, isinstance(scale, tuple))
    assert any("label for fake loss" in name for name in draw)
    found = same.generator_loss(players, draw, batch).total
    apart = replace(method, guidance=scale, fake_guidance=scale)
    told = draw | ({"fake_guidance": draw["guidance"]} if isinstance(scale, tuple) else {})
    assert torch.equal(found, apart.generator_loss(players, told, batch).total)


def test_a_drawn_scale_has_the_field_of_its_mean() -> None:
    """Both sides are linear in it, so that PG-SB is no other mean than a fixed scale (the normaliser held)."""
    method = DMD2(gan_weight=0.0, guidance=(0.5, 4.0), fake_guidance="same", normaliser_minimum=1e3)
    players, draw, _ = same_scene(method)
    x = generate(players, draw, method.steps).detach()
    fields = [method.field(players, draw | {"guidance": torch.full((BATCH,), w)}, x) for w in (0.5, 2.25, 4.0)]
    torch.testing.assert_close((fields[0] + fields[2]) / 2, fields[1], rtol=1e-8, atol=1e-12)


class OneEach(nn.Module):
    """The denoiser of N(mean, variance) on the line in which every sample has a class of its own.  known: the samples,
    of which each class is then one; None: the classes say nothing."""

    accepts, has_null_condition, resolution_multiple = frozenset({"label"}), True, 1

    def __init__(self, mean: float, variance: float, num_classes: int, known: Tensor | None = None) -> None:
        super().__init__()
        self.mean, self.variance, self.num_classes, self.known = mean, variance, num_classes, known

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        square = EDM().time_of_input(time_input)[:, None] ** 2
        whole = (self.variance * x + square * self.mean) / (self.variance + square)
        if self.known is None or cond.label is None:
            return whole
        is_null = (cond.label == self.num_classes)[:, None]
        return torch.where(is_null, whole, self.known[cond.label.clamp_max(self.num_classes - 1)])


def esd_of_one_each(lam: float, theta: float, tau: float) -> Tensor:
    """The field's mean gradient by (theta, tau) of samples theta + tau z, times sigma."""
    at = GaussianFixture(theta, tau)
    x = theta + tau * at.z
    fake, teacher = OneEach(theta, tau**2, len(x), x), OneEach(at.m, at.s**2, len(x))
    players = Players(**{n: Denoiser(net, EDM(), "x0") for n, net in {"fake": fake, "teacher": teacher}.items()})
    draw = {"eps": at.eps, "t": at.t, "label": torch.arange(len(x))}
    method = DMD2(gan_weight=0.0, fake_guidance=1 - lam, normaliser_minimum=1e3)
    field = 1e3 * method.field(players, draw, x) / at.sigma
    return torch.stack([(at.weights[:, None] * field).sum(), (at.weights[:, None] * field * at.z).sum()])


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9, 1.0, 1.2])
def test_esd_with_one_class_a_sample_has_its_closed_form_and_fixed_point(lam: float) -> None:  # A2
    at = GaussianFixture()
    found = esd_of_one_each(lam, at.theta, at.tau)
    wanted = at.sigma * numbers((at.theta - at.m) / at.A, at.tau / at.A - lam * at.tau / at.B)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    squared = lam * at.s**2 - (1 - lam) * at.sigma**2
    if squared > 0:
        at_rest = esd_of_one_each(lam, at.m, math.sqrt(squared))
        torch.testing.assert_close(at_rest, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)


MEANS, STDS = (-1.0, 1.2), (0.5, 0.3)  # of the teacher's two classes
SIGMA = 1.3


def two_classes(means: tuple[float, ...], stds: tuple[float, ...]) -> Denoiser:
    """Two equally likely classes, each a Gaussian on the line; "no class" is their mixture."""
    return mixture_denoiser(EDM(), torch.ones(2), numbers(*means)[:, None], numbers(*stds) ** 2, torch.arange(2))


def kl_less_information(means: tuple[float, ...], stds: tuple[float, ...], lam: float) -> float:
    """E_c KL(q_c to p_c) - lam I(x_t; c), by a sum over a grid."""
    grid = torch.linspace(-14, 14, 28001, dtype=torch.float64)[:, None]
    t = torch.full((len(grid),), SIGMA, dtype=torch.float64)
    q, p = two_classes(means, stds).net, two_classes(MEANS, STDS).net
    assert isinstance(q, Mixture)
    assert isinstance(p, Mixture)
    whole, total = q.log_prob(grid, t, NO_COND), 0.0
    for c in (0, 1):
        cond = Cond(label=torch.full((len(grid),), c))
        log_q = q.log_prob(grid, t, cond)
        inside = (log_q - p.log_prob(grid, t, cond)) - lam * (log_q - whole)
        total += 0.5 * float((log_q.exp() * inside).sum()) * 28 / 28000
    return total


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_esd_descends_the_kl_of_each_class_less_the_information_about_it(lam: float) -> None:  # A3, A4: Zero-CFG is 1
    means, stds = (-0.3, 0.8), (0.9, 0.6)
    method = DMD2(gan_weight=0.0, fake_guidance=1 - lam, normaliser_minimum=1e3)
    players = Players(fake=two_classes(means, stds), teacher=two_classes(MEANS, STDS))
    z, eps, weights = pairs(normal_nodes(), normal_nodes())
    t = torch.full_like(z, SIGMA)
    found = []
    for c in (0, 1):
        draw = {"eps": eps[:, None], "t": t, "label": torch.full((len(z),), c)}
        field = 1e3 * method.field(players, draw, (means[c] + stds[c] * z)[:, None])[:, 0] / SIGMA**2
        found += [0.5 * float((weights * field).sum()), 0.5 * float((weights * field * z).sum())]
    step, wanted = 1e-4, []
    for c in (0, 1):
        for of_mean in (True, False):
            ends = []
            for h in (step, -step):
                moved = [list(means), list(stds)]
                moved[0 if of_mean else 1][c] += h
                ends.append(kl_less_information(tuple(moved[0]), tuple(moved[1]), lam))
            wanted.append((ends[0] - ends[1]) / (2 * step))
    torch.testing.assert_close(numbers(*found), numbers(*wanted), rtol=2e-6, atol=2e-6)


def test_stored_pairs_have_one_scale() -> None:
    with pytest.raises(ValueError, match="regression_weight: stored pairs have one scale"):
        DMD2(guidance=(1.0, 2.0), regression_weight=0.5)


def test_a_range_is_read_from_yaml() -> None:
    read = validate(DMD2, {"name": "dmd2", "guidance": [1, 2.5]}, origin="here")
    assert read.guidance == (1.0, 2.5)
