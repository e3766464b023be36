"""DisBack: the recorded path, the way back along it, and that it is the base method where there is no path."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.closed_forms import random
from support.ring import INIT_RATIO, TIME_LAW, train_ring
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM, expand
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import Karras, LogNormal
from diffdistill.distillation.losses import DenoisingWeight, denoising_loss
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.methods import disback
from diffdistill.methods.disback import DisBack
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.sid import SiD
from diffdistill.settings.schema import UserError
from diffdistill.storage.checkpoint import flatten, select_group
from diffdistill.training.config import RunConfig
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]

PATH = EDM()
BASE = DMD2(gan_weight=0.0, fake_updates=2)
METHOD = DisBack(base=BASE, path_length=4, recording_interval=30, recording_lr=0.02, backtracking_interval=3)


class Gaussian(nn.Module):
    """The exact denoiser of N(mean, exp(log_std)^2), both trainable: an affine `Network` that predicts x0."""

    accepts: frozenset[str] = frozenset()
    num_classes = 0
    has_null_condition = False
    resolution_multiple = 1

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        noise = expand(PATH.time_of_input(time_input) ** 2, x).double()
        variance = (2 * self.log_std).exp()
        return (variance * x + noise * self.mean) / (variance + noise)


def gaussian(mean: float, std: float) -> Denoiser:
    return Denoiser(Gaussian(mean, std), PATH, "x0")


def problem(initial: Denoiser | None = None) -> Problem:
    """A teacher N(0.7, 0.5^2) in eight dimensions; its one step at sigma 2.5 makes far narrower samples."""
    start = {} if initial is None else {"generator": initial, "fake": initial}
    return Problem((8,), 0, PATH, teacher=gaussian(0.7, 0.5).requires_grad_(False), initial=start, batch_size=256)


def laws(stored: dict[str, Tensor], length: int) -> list[tuple[float, float]]:
    """Mean and standard deviation of each score's law, the teacher's first."""
    found = [select_group(stored, f"path {i}") for i in range(1, length + 1)]
    return [(0.7, 0.5), *((float(w["net.mean"]), float(w["net.log_std"].exp())) for w in found)]


def divergence(law: tuple[float, float], teacher: tuple[float, float]) -> float:
    """KL(law || teacher) of two Gaussians."""
    (mean, std), (m, s) = (torch.tensor(x, dtype=torch.float64) for x in (law, teacher))
    return float((s / std).log() + (std**2 + (mean - m) ** 2) / (2 * s**2) - 0.5)


def test_the_path_leaves_the_teacher_s_law_step_by_step():
    stored = METHOD.prepare(problem(gaussian(-0.4, 0.9)), seed=0)
    away = [divergence(law, (0.7, 0.5)) for law in laws(stored, 4)]
    assert all(near < far for near, far in pairwise(away))
    assert away[0] == 0
    assert away[-1] > 1


def test_the_path_ends_at_the_law_of_the_initial_generator():
    # One step of N(m, s^2) at sigma is m + s^2 / (s^2 + sigma^2) (x - m) at x ~ N(0, sigma^2).
    mean, std, sigma = -0.4, 0.9, 2.5
    gain = std**2 / (std**2 + sigma**2)
    method = replace(METHOD, recording_interval=200, recording_time_law=LogNormal(mean=-1.2, std=0.6))
    [*_, last] = laws(method.prepare(problem(gaussian(mean, std)), seed=0), 4)
    # 256 samples of 8 numbers a step: their noise, at a constant rate of 0.02, is a few hundredths.
    assert last == pytest.approx((mean * (1 - gain), gain * sigma), abs=0.05)


def test_a_score_is_kept_after_every_interval_and_the_initial_generator_is_left_alone():
    initial = gaussian(-0.4, 0.9)
    short = METHOD.prepare(problem(initial), seed=0)
    long = replace(METHOD, path_length=2, recording_interval=60).prepare(problem(initial), seed=0)
    for i in (1, 2):
        kept = select_group(short, f"path {2 * i}")
        assert all(torch.equal(value, kept[name]) for name, value in select_group(long, f"path {i}").items())
    assert initial.net.mean.item() == -0.4


def test_the_path_leaves_from_the_teacher_even_if_the_generator_comes_from_an_earlier_run():
    here = replace(problem(), initial={"generator": gaussian(-0.4, 0.9)})
    still = replace(METHOD, path_length=1, recording_interval=1, recording_lr=1e-12)
    [_, first] = laws(still.prepare(here, seed=0), 1)
    assert first == pytest.approx((0.7, 0.5))
    players = METHOD.players(here)
    assert players["generator"].net.mean.item() == -0.4


def test_the_path_is_recorded_by_its_own_law_of_times_and_weight(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[Tensor, str]] = []

    def noted(score: Denoiser, x: Tensor, eps: Tensor, t: Tensor, cond: Cond, *, weight: DenoisingWeight) -> Tensor:
        seen.append((t, weight))
        return denoising_loss(score, x, eps, t, cond, weight=weight)

    monkeypatch.setattr(disback, "denoising_loss", noted)
    law = Karras(ratio_min=0.5, ratio_max=0.6)
    method = replace(METHOD, path_length=1, recording_interval=3, recording_time_law=law, recording_weight="x0")
    method.prepare(problem(), seed=0)
    assert [weight for _, weight in seen] == 3 * ["x0"]
    assert all(bool(((t >= 0.5) & (t <= 0.6)).all()) for t, _ in seen)


def test_a_path_of_one_score_has_the_teacher_for_its_only_target():
    method, here = replace(METHOD, path_length=1), problem()
    players = Players(teacher=here.teacher, **method.players(here))
    assert set(players) == {"teacher", "generator", "fake"}
    stored = method.prepare(here, seed=0)
    method.initialise(players, stored)
    first = select_group(stored, "path 1")
    assert all(torch.equal(value, first[name]) for name, value in players.fake.state_dict().items())
    draw, batch = method.draw(StepRandom(0, 0, torch.arange(16)), here), Batch(torch.empty(0, 8), stored=stored)
    found, expected = (each.call("generator_loss", players, draw, batch).total for each in (method, BASE))
    assert torch.equal(found, expected)


def test_the_fake_score_starts_at_the_end_of_the_path_and_the_target_one_before():
    here = problem()
    stored = METHOD.prepare(here, seed=0)
    players = Players(teacher=here.teacher, **METHOD.players(here))
    METHOD.initialise(players, stored)
    for player, i in (("fake", 4), ("target", 3)):
        weights = select_group(stored, f"path {i}")
        assert all(torch.equal(value, weights[name]) for name, value in players[player].state_dict().items())


def test_the_target_is_not_the_teacher():
    here = problem()
    players = Players(teacher=here.teacher, **METHOD.players(here))
    METHOD.initialise(players, METHOD.prepare(here, seed=0))
    x, t = random(5, 8), torch.full((5,), 0.5, dtype=torch.float64)
    gap = (players.target(x, t) - players.teacher(x, t)).abs().min()
    assert gap > 0.01


class Shifted(Gaussian):
    """A network of other weights than the teacher's."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__(mean, std)
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        return super().forward(x, time_input, cond) + self.shift


def test_the_path_is_of_the_network_that_the_fake_score_starts_as():
    smaller = {name: Denoiser(Shifted(0.7, 0.5), PATH, "x0") for name in ("generator", "fake")}
    here = replace(problem(), initial=smaller)
    players = Players(teacher=here.teacher, **METHOD.players(here))
    METHOD.initialise(players, METHOD.prepare(here, seed=0))
    assert all("net.shift" in players[name].state_dict() for name in ("fake", "target"))


def test_weights_under_other_names_are_refused():
    # What the released code does: the state of a module around the score, read without strictness.
    here = problem()
    stored = METHOD.prepare(here, seed=0)
    foreign = flatten(
        {f"path {i}": {f"fake_unet.{k}": v for k, v in select_group(stored, f"path {i}").items()} for i in range(1, 5)}
    )
    players = Players(teacher=here.teacher, **METHOD.players(here))
    with pytest.raises(UserError, match=r"path 4.*fake_unet.net.log_std is unknown"):
        METHOD.initialise(players, foreign)


def test_the_targets_go_back_to_the_teacher_and_stay_there():
    # Three generator updates against each, of which there is one in two iterations.
    assert [METHOD.position(step) for step in range(24)] == 6 * [3] + 6 * [2] + 6 * [1] + 6 * [0]


def test_each_loss_takes_the_target_of_its_step_for_the_teacher():
    here = problem()
    stored = METHOD.prepare(here, seed=0)
    players = Players(teacher=here.teacher, **METHOD.players(here))
    METHOD.initialise(players, stored)
    for step in range(24):
        draw = METHOD.draw(StepRandom(0, step, torch.arange(16)), here)
        teacher = gaussian(*laws(stored, 4)[METHOD.position(step)])
        expected = BASE.generator_loss(Players(**{**players, "teacher": teacher}), draw, Batch(torch.empty(0, 8)))
        found = METHOD.call("generator_loss", players, draw, Batch(torch.empty(0, 8), stored=stored))
        torch.testing.assert_close(found.total, expected.total, rtol=1e-6, atol=0)  # exp(log(std)) is rounded
        METHOD.after_step(players, stored, step + 1)


@pytest.mark.parametrize("function", ["generator_loss", "fake_loss"])
def test_no_gradient_reaches_teacher_or_target(function: str):
    here = problem()
    players = Players(teacher=here.teacher, **METHOD.players(here))
    stored = METHOD.prepare(here, seed=0)
    METHOD.initialise(players, stored)
    draw = METHOD.draw(StepRandom(0, 0, torch.arange(16)), here)
    METHOD.call(function, players, draw, Batch(torch.empty(0, 8), stored=stored)).total.backward()
    reached = {name for name, player in players.items() if any(p.grad is not None for p in player.parameters())}
    assert reached == {function.removesuffix("_loss")}


def test_the_base_s_pairs_are_not_mixed_up_with_the_path():
    method = replace(METHOD, base=replace(BASE, regression_weight=1.0, regression_pairs=7))
    here = problem()
    stored = method.prepare(here, seed=0)
    players = Players(teacher=here.teacher, **method.players(here))
    method.initialise(players, stored)
    pairs = {name: stored[name] for name in method.base.prepare(here, seed=0)}
    draw = method.draw(StepRandom(0, 23, torch.arange(16)), here)
    found, expected = (
        each.call("generator_loss", players, draw, Batch(torch.empty(0, 8), stored=held)).logs["regression"]
        for each, held in ((method, stored), (method.base, pairs))
    )
    assert torch.equal(found, expected)


def test_a_base_without_a_fake_score_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DMD2, "players", lambda self, problem: problem.copies("generator"))
    with pytest.raises(UserError, match=r"method.base.name = 'dmd2': has no fake score"):
        METHOD.players(problem())


def test_a_generator_that_waits_while_the_path_is_walked_is_refused():
    waiting = SiD(generator_start_images=1000)
    with pytest.raises(UserError, match=r"method.base.generator_start_images: .* use 0"):
        replace(METHOD, base=waiting).players(problem())
    assert "fake" in replace(METHOD, base=waiting, path_length=0).players(problem())


# Whole runs


def trained(config: RunConfig, steps: int, *, resume: bool = False) -> dict[str, Tensor]:
    trainer = Trainer(replace(config, train=replace(config.train, steps=steps)), resume=resume, quiet=True)
    trainer.run()
    return flatten(
        {name: module.state_dict() for name, module in (trainer.trained | trainer.assembly.plan.followers).items()}
    )


def test_without_a_path_it_is_the_base_method_bit_for_bit(make_config: MakeConfig):
    plain = trained(make_config("dmd2"), 4)
    wrapped = trained(make_config("disback", "method.path_length=0"), 4)
    assert plain.keys() == wrapped.keys()
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)


def test_with_a_path_it_is_not_the_base_method(make_config: MakeConfig):
    plain, wrapped = trained(make_config("dmd2"), 4), trained(make_config("disback"), 4)
    assert not all(torch.equal(plain[name], wrapped[name]) for name in plain if name.startswith("generator"))


def test_a_run_resumed_between_two_targets_equals_one_that_was_not_stopped(make_config: MakeConfig):
    config = make_config("disback")
    assert [config.method.position(step) for step in range(7)] == [2, 2, 1, 1, 0, 0, 0]  # type: ignore[attr-defined]
    whole = trained(make_config("disback"), 6)
    trained(config, 1)
    trained(config, 3, resume=True)
    parts = trained(config, 6, resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_recorded_path_lies_beside_the_run(make_config: MakeConfig):
    config = make_config("disback")
    trained(config, 1)
    assert (Path(config.run) / "prepared.safetensors").stat().st_size > 0


NUM_STEPS = 500  # 20 of them against recorded scores, and DMD2 alone needs 400


def on_the_ring() -> DisBack:
    base = DMD2(
        steps=FewSteps(init_ratio=INIT_RATIO),
        fake_updates=3,
        gan_weight=0.0,
        generator_time_law=TIME_LAW,
        fake_time_law=TIME_LAW,
    )
    return DisBack(
        base=base,
        path_length=3,
        recording_interval=15,
        recording_lr=5e-4,
        recording_time_law=TIME_LAW,
        backtracking_interval=10,
    )


def test_disback_learns_every_mode_of_the_ring_in_its_class():
    result = train_ring(on_the_ring(), num_steps=NUM_STEPS)
    assert result.passes, result


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 2])
def test_disback_learns_the_ring_from_other_seeds(seed: int):
    """With a fake score that follows more closely, as DMD2 needs it there: three updates leave seed 1 at quality 0.945,
    where the bar is 0.95."""
    method = on_the_ring()
    method = replace(method, base=replace(method.base, fake_updates=5))
    result = train_ring(method, seed=seed, num_steps=NUM_STEPS)
    assert result.passes, result
