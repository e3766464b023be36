"""Health signals: their values in closed form, when they speak, and that they tell right runs from planted faults."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.digits_runs import DigitsRun
from torch import Tensor

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import FewSteps, Heun
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Draw, Players, Problem
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.rectified_flow import RectifiedFlow
from diffdistill.methods.regression import Regression
from diffdistill.networks.analytic import gaussian_denoiser
from diffdistill.networks.mlp import MLPConfig
from diffdistill.training.reports.health import BANDS, Health, HealthConfig, Reference, compare_scores, mean_distance

SHAPE = (1, 4, 4)
NO_REFERENCE = Reference(mean=0.0, std=1.0, distance=1.0)


def images(mean: float, std: float, count: int = 4096, seed: int = 0) -> Tensor:
    return mean + std * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def gaussian(mean: float, std: float) -> Denoiser:
    size = math.prod(SHAPE)
    return gaussian_denoiser(EDM(), torch.full((size,), mean), std**2 * torch.eye(size))


def signals(teacher: Denoiser, fake: Denoiser, x: Tensor) -> dict[str, float]:
    return compare_scores(teacher, fake, x, StepRandom(0, 0, torch.arange(len(x))), NO_COND)


def test_two_samples_of_one_gaussian_are_sqrt_2_standard_deviations_apart() -> None:
    wide = torch.randn(64, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert mean_distance(wide, None) == pytest.approx(math.sqrt(2), rel=0.01)


def test_diversity_looks_within_a_condition_only() -> None:
    x = torch.cat([torch.zeros(8, *SHAPE), torch.ones(8, *SHAPE)])
    assert mean_distance(x, torch.arange(16) // 8) == 0
    assert mean_distance(x, None) == pytest.approx(8 / 15)


def test_a_fake_score_that_is_the_teacher_has_lag_1_and_cosine_1() -> None:
    found = signals(gaussian(0.5, 0.7), gaussian(0.5, 0.7), images(0.0, 0.3))
    assert found == pytest.approx({"fake_lag": 1.0, "cosine": 1.0})


def test_a_fake_score_at_its_optimum_has_the_ratio_of_the_two_errors_as_its_lag() -> None:
    """E (D_{m,s}(x + r n) - x)^2 = ((r^2 (m - mean))^2 + r^4 std^2 + s^4 r^2) / (s^2 + r^2)^2 on N(mean, std^2)."""
    m, s, mean, std = 0.5, 0.7, 0.0, 0.3

    def error(m: float, s: float, r: float) -> float:
        return (r**4 * (m - mean) ** 2 + r**4 * std**2 + s**4 * r**2) / (s**2 + r**2) ** 2

    weights = {r: 1 / r**2 + 1 / gaussian(m, s).sigma_data ** 2 for r in (0.2, 0.6, 2.0)}
    expected = sum(w * error(mean, std, r) for r, w in weights.items()) / sum(
        w * error(m, s, r) for r, w in weights.items()
    )
    found = signals(gaussian(m, s), gaussian(mean, std), images(mean, std))
    assert expected < 1
    assert found["fake_lag"] == pytest.approx(expected, rel=0.02)


def test_drift_and_contrast_are_measured_in_standard_deviations_of_the_data() -> None:
    health = Health(HealthConfig(samples=512), Reference.of(images(0.2, 0.5), None))
    student = Denoiser(MLPConfig(width=8, blocks=1).build(SHAPE, 0, 0.0), EDM(), "edm")
    found = health.examine(
        Players(generator=student),
        "generator",
        lambda *_, **__: images(0.7, 0.25, 512),  # type: ignore[arg-type]
        Problem(SHAPE, 0, EDM()),
        step=0,
        seed=0,
    )
    assert found["mean_drift"] == pytest.approx(1.0, abs=0.02)
    assert found["std_ratio"] == pytest.approx(0.5, abs=0.02)
    assert found["diversity"] == pytest.approx(0.5, abs=0.02)


def test_an_examination_leaves_the_generator_in_training_mode() -> None:
    student = Denoiser(MLPConfig(width=8, blocks=1).build(SHAPE, 0, 0.0), EDM(), "edm").train()
    health = Health(HealthConfig(samples=8), NO_REFERENCE)
    health.examine(Players(generator=student), "generator", FewSteps(), Problem(SHAPE, 0, EDM()), step=0, seed=0)
    assert student.training


def test_a_run_about_some_classes_is_examined_on_these_alone() -> None:
    seen: list[Tensor] = []

    def sampler(generator: Denoiser, noise: Tensor, cond: Cond, **_: object) -> Tensor:
        assert cond.label is not None
        seen.append(cond.label)
        return noise

    student = Denoiser(MLPConfig(width=8, blocks=1).build(SHAPE, 5, 0.0), EDM(), "edm")
    players = Players(generator=student, teacher=student)
    problem = Problem(SHAPE, 5, EDM(), teacher=student, classes=(4, 1))
    Health(HealthConfig(samples=32), NO_REFERENCE).examine(players, "generator", sampler, problem, step=0, seed=0)  # type: ignore[arg-type]
    assert seen[0].tolist() == 16 * [4, 1]


def said(config: HealthConfig, values: list[float], name: str = "std_ratio") -> list[int]:
    """The readings, by number, at which something was said."""
    health = Health(config, NO_REFERENCE)
    return [i for i, value in enumerate(values) if health.judge(1000 + i, {name: value}, {})]


def test_a_signal_speaks_once_when_it_has_been_outside_for_long_enough() -> None:
    assert said(HealthConfig(patience=2), [1, 9, 1, 9, 9, 9, 9, 1, 9, 9]) == [4, 9]


def test_nan_is_outside_every_band() -> None:
    assert said(HealthConfig(patience=1), [math.nan]) == [0]


def test_nothing_is_said_in_the_warm_up() -> None:
    health = Health(HealthConfig(patience=1, warmup_steps=100), NO_REFERENCE)
    assert health.judge(100, {"std_ratio": 9.0}, {}) == []


def test_what_is_outside_from_the_start_is_said_soon_after_the_warm_up() -> None:
    health = Health(HealthConfig(patience=2, warmup_steps=100), NO_REFERENCE)
    said_at = [step for step in range(50, 350, 50) if health.judge(step, {"cosine": 1.0}, {})]
    assert said_at == [200]


def test_a_warning_names_the_signal_its_value_its_band_and_what_to_try() -> None:
    (line,) = Health(HealthConfig(patience=1), NO_REFERENCE).judge(150, {"std_ratio": 9.0}, {})
    assert line.startswith("step 150: std_ratio = 9 (healthy: 0.6 to 1.4): ")
    assert "Try a tenth of the generator's learning" in line


def test_a_gradient_is_compared_with_its_usual_size() -> None:
    health = Health(HealthConfig(patience=1), NO_REFERENCE)
    readings = [health.judge(1000, {}, {"fake/gradient_norm": norm}) for norm in (1.0, 1.1, 0.9, 1.2, 100.0)]
    assert [len(lines) for lines in readings] == [0, 0, 0, 0, 1]
    assert "gradient_jump:fake = 95.24" in readings[-1][0]


@pytest.mark.parametrize("name", BANDS)
def test_every_end_of_a_band_that_can_be_left_says_what_to_try(name: str) -> None:
    band = BANDS[name]
    assert band.low < band.high
    for words, is_an_end in ((band.too_low, band.low > 0), (band.too_high, True)):
        assert not is_an_end or "try " in words.lower()


# On digits: 500 steps of the packaged config, right and wrong.

RIGHT = (0, 1, 2)
WRONG = {
    "frozen fake score": ["optimizers.fake={lr: 1e-12}"],
    "wrong sign": [],
    "tenfold rates": ["optimizers.generator.lr=6e-3", "optimizers.default.lr=1e-2"],
}


def learnt(method: Regression | RectifiedFlow, steps: int = 150) -> tuple[list[float], list[str]]:
    """Readings of `memorisation`, and what is said of them, of a small student of a Gaussian with 16 directions."""
    torch.manual_seed(0)
    spread = torch.linspace(0.1, 1.0, 16, dtype=torch.float64)
    teacher = gaussian_denoiser(EDM(), torch.zeros(16, dtype=torch.float64), torch.diag(spread**2))
    problem = Problem(SHAPE, 0, teacher.path, teacher=teacher)
    net = MLPConfig(width=64, blocks=2).build(SHAPE, 0, 0.0)
    student = Denoiser(net, teacher.path, "edm", sigma_data=0.6)
    players, stored = Players(generator=student), method.prepare(problem, seed=0)
    stored = {name: value.float() if value.is_floating_point() else value for name, value in stored.items()}
    optimizer, health = torch.optim.Adam(student.parameters(), lr=2e-3), Health(HealthConfig(), NO_REFERENCE)
    found, said = [], []
    for step in range(1, steps + 1):
        draw = method.draw(StepRandom(0, step, torch.arange(32)), problem)
        method.generator_loss(players, draw, Batch(torch.empty(0), stored=stored)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            signals = health.examine_method(method, players, problem, stored, step=step, seed=0)
            found.append(signals["memorisation"])
            said += health.judge(step, signals, {})
    assert student.training
    return found, said


METHODS = [
    lambda pairs: Regression(pairs=pairs, pair_sampler=Heun(num_steps=6), steps=FewSteps(init_ratio=80.0)),
    lambda pairs: RectifiedFlow(pairs=pairs, pair_sampler=Heun(num_steps=6)),
]


@pytest.mark.parametrize("make", METHODS, ids=["regression", "rectified_flow"])
def test_few_pairs_are_learnt_by_heart_and_that_is_said(make: Callable[[int], Regression | RectifiedFlow]) -> None:
    found, said = learnt(make(8))
    assert found[-1] > 3
    assert len(said) == 1
    assert "memorisation = " in said[0]
    assert "memorises them (teacher hacking)" in said[0]


@pytest.mark.parametrize("make", METHODS, ids=["regression", "rectified_flow"])
def test_many_pairs_are_not(make: Callable[[int], Regression | RectifiedFlow]) -> None:
    found, said = learnt(make(4096))
    assert all(0.6 < value < 1.5 for value in found)
    assert said == []


@pytest.mark.full
@pytest.mark.parametrize("fault", WRONG)
def test_a_fault_on_digits_warns_within_500_steps(
    digits_teacher: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "wrong sign":
        right = DMD2.field

        def wrong(self: DMD2, players: Players, draw: Draw, x: Tensor) -> Tensor:
            return -right(self, players, draw, x)

        monkeypatch.setattr(DMD2, "field", wrong)
    run = DigitsRun(digits_teacher, tmp_path / "run", *WRONG[fault])
    run.train(500, until_said="")
    print(f"{fault}: {run.said}")
    assert run.said


@pytest.mark.full
@pytest.mark.parametrize("seed", RIGHT)
def test_a_right_run_on_digits_says_nothing_in_500_steps(digits_teacher: Path, tmp_path: Path, seed: int) -> None:
    run = DigitsRun(digits_teacher, tmp_path / "run", f"train.seed={seed}")
    run.train(500)
    assert run.said == []
