"""The distance to the teacher as a health signal: closed forms, when it speaks, what it costs, and that a run is the
same with it and without."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from support.digits_runs import DigitsRun
from support.ring import ring_curve, ring_samples
from torch import Tensor

from diffdistill.diffusion.gaussians import frechet_distance
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.methods.agd import AGD
from diffdistill.methods.dmd2 import DMD2
from diffdistill.training.assembly import make_distance
from diffdistill.training.config import find_config, load_config
from diffdistill.training.plan import plan
from diffdistill.training.reports import distance
from diffdistill.training.reports.distance import (
    FEATURES,
    READINGS,
    DistanceCurve,
    affordable,
    distilled_guidance,
    moments,
    read_readings,
    small_copies,
)
from diffdistill.training.reports.health import BANDS
from diffdistill.training.trainer import Trainer


def normal(count: int, d: int = 8, name: str = "x") -> Tensor:
    return StepRandom(11, 0, torch.arange(count)).normal(name, (d,))


def test_the_frechet_distance_of_two_gaussians() -> None:
    """|m|^2 + d (s_a - s_b)^2 for multiples of one covariance."""
    a, b = moments(2 * normal(500) + 1), moments(normal(500))
    shift = float((a[0] - b[0]).square().sum())
    assert frechet_distance(*a, *b) == pytest.approx(shift + float(b[1].trace()), rel=1e-7)
    assert frechet_distance(*b, *b) == pytest.approx(0, abs=1e-9)


def test_a_shifted_students_distance_is_its_shift_over_the_teachers_variance() -> None:
    curve = DistanceCurve(normal(4000, name="teacher"))
    curve.read(1, normal(4000, name="student") + 0.5)
    assert curve.value == pytest.approx(8 * 0.25 / 8, rel=0.1)


def test_the_bias_of_few_samples_is_taken_off() -> None:
    values = []
    for number in range(10):
        curve = DistanceCurve(normal(256, name=f"teacher {number}"))
        curve.read(1, normal(256, name=f"student {number}"))
        values.append(curve.value)
    raw = frechet_distance(*moments(normal(256, name="student 0")), *moments(normal(256, name="teacher 0"))) / 8
    assert raw > 0.01
    assert abs(sum(values) / 10) < raw / 4


def rises(scales: list[float], count: int = 1024) -> list[float]:
    """Of students that are the ring, scaled: 1 is the teacher."""
    curve, student, found = ring_curve(count), ring_samples(count, "student"), []
    for step, scale in enumerate(scales):
        curve.read(step, scale * student)
        found.append(curve.rise)
    return found


def test_a_student_that_approaches_is_silent() -> None:
    assert not any(rises([1.9, 1.6, 1.4, 1.3, 1.22, 1.16, 1.11, 1.08, 1.06, 1.05, 1.04]))


def test_a_student_that_swings_about_is_within_the_band() -> None:
    assert max(rises([1.5, 1.2, 1.13, 1.14, 1.12, 1.14, 1.12, 1.13, 1.12, 1.14, 1.12])) <= BANDS["teacher_rise"].high


def test_a_student_that_turns_away_leaves_the_band() -> None:
    found = rises([1.5, 1.2, 1.12, 1.1, 1.1, 1.12, 1.15, 1.18, 1.21, 1.24])
    assert not any(found[:6])
    assert found[-1] > found[-2] > BANDS["teacher_rise"].high


def test_what_is_not_finite_is_infinitely_far() -> None:
    assert rises([1.0, math.nan]) == [0.0, math.inf]


@pytest.mark.parametrize(("shape", "numbers"), [((1, 8, 8), 64), ((3, 32, 32), 48), ((4, 64, 64), 64), ((2,), 2)])
def test_samples_are_described_by_few_numbers(shape: tuple[int, ...], numbers: int) -> None:
    assert small_copies(torch.zeros(5, *shape)).shape == (5, numbers)
    assert numbers <= FEATURES


@pytest.mark.parametrize(
    ("evaluations", "images", "count"),
    [(35, 1_050 * 64, 256), (35, 5_000 * 64, 1024), (35, 40 * 64, 0), (1, 16_000, 1024)],
)
def test_samples_take_a_small_share_of_a_run(evaluations: int, images: int, count: int) -> None:
    assert affordable(evaluations, images) == count


def test_the_guidance_is_that_which_a_method_distils() -> None:
    assert distilled_guidance(DMD2()) == 1.0
    assert distilled_guidance(DMD2(guidance=3.0)) == 3.0
    assert distilled_guidance(AGD(guidance=(1.0, 4.0))) == 2.5


@pytest.fixture
def _affords_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance, "SHARE", 1e9)
    monkeypatch.setattr(distance, "MOST", 64)
    monkeypatch.setattr(distance, "FEWEST", 64)


SETTINGS = ("train.steps=6", "train.log_every=1", "train.checkpoint_every=3", "train.keep_checkpoints=9")


def done(make_config: MakeConfig, *overrides: str) -> Path:
    config = make_config("dmd2", *SETTINGS, *overrides)
    Trainer(config, quiet=True).run()
    return Path(config.run)


def logged(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if "seconds" not in key and "its" not in key} for line in lines]


def tensors(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "checkpoints/step-00000006").glob("*.safetensors")}


@pytest.mark.usefixtures("_affords_all")
def test_a_run_is_the_same_with_the_distance_and_without_and_when_it_is_resumed(make_config: MakeConfig) -> None:
    watched, plain = done(make_config, "health.distance_every=1"), done(make_config, "health.distance_every=0")
    assert tensors(watched) == tensors(plain)
    lines = logged(watched)
    assert all("health/teacher_distance" in line and "health/teacher_rise" in line for line in lines)
    without = [{key: value for key, value in line.items() if "teacher_" not in key} for line in lines]
    assert without == logged(plain)
    readings = (watched / READINGS).read_text()
    assert [one.step for one in read_readings(watched / READINGS)] == [1, 2, 3, 4, 5, 6]

    config = load_config(watched / "config.yaml")
    kept = {file.name: file.stat().st_mtime_ns for file in watched.glob("distance-*.safetensors")}
    Trainer(config, resume="step-00000003", quiet=True).run()
    assert (watched / READINGS).read_text() == readings
    assert logged(watched) == lines
    assert tensors(watched) == tensors(plain)
    assert {file.name: file.stat().st_mtime_ns for file in watched.glob("distance-*.safetensors")} == kept
    assert len(kept) == 1


@pytest.mark.usefixtures("_affords_all")
def test_another_rule_of_guidance_is_another_teacher(make_config: MakeConfig) -> None:
    rules = (None, "guidance_rule={name: rescaled, share: 0.7}", "guidance_rule={name: rescaled, share: 0.2}")
    keys = [
        make_distance(plan(make_config("dmd2", "health.distance_every=1", *filter(None, [rule])))).key  # type: ignore[union-attr]
        for rule in rules
    ]
    assert len(set(keys)) == 3


def test_a_short_run_pays_for_no_distance(make_config: MakeConfig) -> None:
    run = done(make_config, "health.distance_every=1")
    assert not (run / READINGS).exists()
    assert not any("teacher_distance" in key for line in logged(run) for key in line)


LONG_RUNS = json.loads((Path(__file__).parent / "distance_curves.json").read_text())
"""Of runs on digits from one teacher: config, settings, is_away, and readings: step, count, distance, halves."""


def said_at(name: str) -> list[int]:
    """The steps at which a long run speaks, by the band and two readings in a row."""
    curve, outside, found = DistanceCurve(torch.zeros(2, 1)), 0, []
    for told in LONG_RUNS[name]["readings"]:
        curve.readings.append(distance.Reading(told["step"], told["count"], told["distance"], tuple(told["halves"])))
        outside = outside + 1 if curve.rise > BANDS["teacher_rise"].high else 0
        if outside == 2:
            found.append(told["step"])
    return found


def test_dmd2_with_the_fake_score_s_features_moves_away_and_says_so() -> None:
    """Its Frechet distance to the teacher, 6,000 samples each, is about .17 after 1,000 steps and .23 after 5,000."""
    assert said_at("dmd2-gan") == [4000]


@pytest.mark.parametrize("name", [name for name, run in LONG_RUNS.items() if not run["is_away"]])
def test_runs_that_approach_their_teacher_are_silent(name: str) -> None:
    assert said_at(name) == []


@pytest.mark.parametrize("name", LONG_RUNS)
def test_a_long_run_s_settings_are_a_config_s_and_its_readings_go_to_its_end(name: str) -> None:
    run = LONG_RUNS[name]
    config = load_config(find_config(run["config"]), run["settings"])
    steps = [reading["step"] for reading in run["readings"]]
    assert steps == sorted(set(steps))
    assert steps[-1] > 0.8 * config.train.steps
    assert {len(reading["halves"]) for reading in run["readings"]} == {distance.HALVES}


@pytest.mark.full
def test_a_run_on_digits_is_silent_while_it_approaches_and_speaks_when_it_is_turned_away(
    digits_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("method.gan_features=teacher", "train.steps=2000", "health.distance_every=50")
    run = DigitsRun(digits_teacher, tmp_path / "run", *settings)
    run.train(800)
    assert run.said == []

    right = DMD2.field
    monkeypatch.setattr(DMD2, "field", lambda *given: -right(*given))
    run.train(1000, until_said="teacher_rise")
    print(f"step {run.trainer.step}: {run.said}")
    assert run.has_said("teacher_rise")
