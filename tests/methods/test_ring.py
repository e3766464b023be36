"""DMD2 learns the mixture ring, and what is wrong does not: planted faults are caught by the same bars."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.ring import INIT_RATIO, TIME_LAW, ring_curve, train_ring
from torch import Tensor

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.losses import denoising_loss
from diffdistill.distillation.method import Batch, Draw, Loss, Players, Problem
from diffdistill.distillation.score_distillation import condition, generate, guided_field
from diffdistill.methods.dmd2 import DMD2
from diffdistill.settings.schema import schema
from diffdistill.training.reports.distance import DistanceCurve
from diffdistill.training.reports.health import Health, HealthConfig, Reference


def right() -> DMD2:
    return DMD2(
        steps=FewSteps(init_ratio=INIT_RATIO),
        fake_updates=3,
        gan_weight=0.0,
        generator_time_law=TIME_LAW,
        fake_time_law=TIME_LAW,
    )


def test_dmd2_learns_every_mode_of_the_ring_in_its_class() -> None:
    curve = ring_curve()
    result = train_ring(right(), curve=curve)
    assert result.passes, result
    assert warnings_of(curve) == [], "the distance to the teacher"
    assert abs(curve.value) < 0.005


def warnings_of(curve: DistanceCurve) -> list[str]:
    """What a run with these readings of the distance would have said."""
    health, seen = Health(HealthConfig(warmup_steps=0), Reference(0.0, 1.0, 1.0)), DistanceCurve(curve.teacher)
    said = []
    for reading in curve.readings:
        seen.readings.append(reading)
        said += health.judge(reading.step, {"teacher_rise": seen.rise}, {})
    return said


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 2])
def test_dmd2_learns_the_ring_from_other_seeds(seed: int) -> None:
    """With a fake score that follows more closely, for longer: three updates and 400 steps leave these seeds short of
    the bars (quality 0.93 and 0.90, not 0.95)."""
    result = train_ring(replace(right(), fake_updates=5), seed=seed, num_steps=500)
    assert result.passes, result


@schema
class WrongSign(DMD2):
    def field(self, players: Players, draw: Draw, x: Tensor) -> Tensor:
        return -DMD2.field(self, players, draw, x)


@schema
class NoStopGradient(DMD2):
    """The generator's gradient also flows through the score networks."""

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        x = generate(players, draw, self.steps)
        with torch.enable_grad():
            field = guided_field.__wrapped__  # type: ignore[attr-defined]
            live = field(players, draw, x, scales=self.scales, minimum=self.normaliser_minimum)
        assert live.requires_grad
        return Loss((live * x).mean() + 0.5 * (live**2).mean(), carry={"x": x.detach()})


@schema
class FrozenFake(DMD2):
    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        loss = DMD2.fake_loss(self, players, draw, batch)
        return Loss(0 * loss.total)


@schema
class FakeOnReal(DMD2):
    needs_images = True

    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        args = (players.fake, batch.images, draw["fake eps"], draw["fake t"], batch.cond)
        return Loss(denoising_loss(*args, weight="edm"))


@schema
class TeacherWithoutClass(DMD2):
    guidance: float = 0.0


@schema
class FakeWithoutClass(DMD2):
    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        return DMD2.fake_loss(self, players, draw | {"label": torch.full_like(draw["label"], 4)}, batch)

    def field(self, players: Players, draw: Draw, x: Tensor) -> Tensor:
        return DMD2.field(self, _changed(players, fake=_blind), draw, x)


@schema
class TeacherAtTwiceSigma(DMD2):
    def field(self, players: Players, draw: Draw, x: Tensor) -> Tensor:
        def twice(teacher: Denoiser) -> Any:
            return lambda x_t, t, cond, **options: teacher(x_t, 2 * t, cond, **options)

        return DMD2.field(self, _changed(players, teacher=twice), draw, x)


@schema
class RawScores(DMD2):
    """The difference of scores, without weight or normaliser."""

    def field(self, players: Players, draw: Draw, x: Tensor) -> Tensor:
        path, t, cond = players.teacher.path, draw["t"], condition(players, draw)
        with torch.no_grad():
            x_t = path.diffuse(x, draw["eps"], t)
            gap = players.fake(x_t, t, cond) - players.teacher(x_t, t, cond)
        return gap / t[:, None].float() ** 2


@schema
class FakeLossLeaks(DMD2):
    """The generator is also trained to be denoised easily."""

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        loss = DMD2.generator_loss(self, players, draw, batch)
        x = generate(players, draw, self.steps)
        x_t = players.teacher.path.diffuse(x, draw["fake eps"], draw["fake t"])
        estimate = players.fake(x_t, draw["fake t"], condition(players, draw))
        weight = (1 / draw["fake t"] ** 2 + 4)[:, None].float()
        return replace(loss, total=loss.total + (weight * (estimate - x) ** 2).mean())


@schema
class FakePredictsNoise(DMD2):
    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        with torch.no_grad():
            x = generate(players, draw, self.steps)
        x_t = players.teacher.path.diffuse(x, draw["fake eps"], draw["fake t"])
        estimate = players.fake(x_t, draw["fake t"], condition(players, draw))
        return Loss(((estimate - draw["fake eps"]) ** 2).mean())


def _changed(players: Players, **changes: Any) -> Any:
    """Players of which some are seen through a function; the teacher keeps its path."""
    seen = {name: changes[name](player) if name in changes else player for name, player in players.items()}
    return _Seen(seen, players)


class _Seen:
    def __init__(self, seen: dict[str, Any], players: Players) -> None:
        self._seen, self._players = seen, players

    def __getattr__(self, name: str) -> Any:
        player, original = self._seen[name], self._players[name]
        if player is original:
            return player

        class Wrapped:
            path = original.path
            class_cond = staticmethod(original.class_cond)  # type: ignore[arg-type]

            def __call__(self, *args: Any, **options: Any) -> Any:
                return player(*args, **options)

        return Wrapped()


def _blind(fake: Denoiser) -> Any:
    return lambda x_t, t, cond, **options: fake(x_t, t, fake.unconditional(cond), **options)


@schema
class GoesElsewhere(DMD2):
    """Another term, such as a GAN's of other data, draws the samples to the middle from the half of the run on."""

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        is_late = torch.full((len(rng.index),), float(rng.step >= 600))
        return DMD2.draw(self, rng, problem) | {"is late": is_late}

    def field(self, players: Players, draw: Draw, x: Tensor) -> Tensor:
        return DMD2.field(self, players, draw, x) + draw["is late"][:, None] * x


@pytest.mark.full
def test_the_distance_to_the_teacher_sees_a_run_that_goes_elsewhere() -> None:
    curve = ring_curve()
    train_ring(GoesElsewhere(**{name: getattr(right(), name) for name in SETTINGS}), curve=curve)
    (said,) = warnings_of(curve)
    assert "move away from the teacher's" in said


SETTINGS = ("steps", "fake_updates", "gan_weight", "generator_time_law", "fake_time_law")

FAULTS = [
    WrongSign,
    NoStopGradient,
    FrozenFake,
    FakeOnReal,
    TeacherWithoutClass,
    FakeWithoutClass,
    TeacherAtTwiceSigma,
    RawScores,
    FakeLossLeaks,
    FakePredictsNoise,
]


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_ring_catches_a_planted_fault(fault: type[DMD2]) -> None:
    settings = {name: getattr(right(), name) for name in ("steps", "fake_updates", "gan_weight")}
    laws = dict.fromkeys(("generator_time_law", "fake_time_law"), TIME_LAW)
    result = train_ring(fault(**settings, **laws))
    assert not result.passes, result
