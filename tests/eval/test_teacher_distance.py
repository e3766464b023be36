"""A student's distance to its teacher: the floor, intervals that cover, pairs of one noise; all in closed form."""

import math

import pytest
import torch
from support.judged import TOY, TensorFeatures
from torch import Tensor

from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import Heun
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.eval.evaluation.teacher_distance import TeacherSamples
from diffdistill.eval.metrics.against import distances_above_floor, end_points
from diffdistill.eval.metrics.settings import Frechet
from diffdistill.models.spec import ModelConfig, ModelSpec, TrainedModel
from diffdistill.networks.mlp import MLPConfig
from diffdistill.settings.schema import UserError

COUNT = 600


def normal(name: str, count: int = COUNT, d: int = 4) -> Tensor:
    return StepRandom(5, 0, torch.arange(count)).normal(name, (d,))


def found(student: Tensor, same: Tensor, other: Tensor, **options: float):  # type: ignore[no-untyped-def]
    sides = [{"toy": TensorFeatures(x)} for x in (student, same, other)]
    return distances_above_floor((Frechet(features=TOY),), *sides, **options)["fd-toy"]  # type: ignore[arg-type]


def test_what_a_shifted_student_scores_above_the_floor_is_its_shift_squared() -> None:
    same, other = normal("same", 4000), normal("other", 4000)
    one = found(same + 0.5, same, other, num_replicates=20)
    gap = 2 * 0.5 * float((same - other).mean(0).sum())
    assert one.excess.value == pytest.approx(4 * 0.25 + gap, rel=1e-7)  # |m + d|^2 - |m|^2, the rest cancels
    assert one.excess.value == pytest.approx(one.student.value - one.floor.value)
    assert one.excess.low > 0.8
    assert one.student.low < one.student.value < one.student.high


def test_the_floor_falls_as_one_over_the_images() -> None:
    """Two sets of one Gaussian: E |m_a - m_b|^2 = 2 d / N, and the covariances' share is about as large again."""
    few, many = (found(*(normal(name, n, d=16) for name in ("same", "same", "other"))).floor for n in (500, 4000))
    assert few.value / many.value == pytest.approx(8, rel=0.4)


def test_a_student_that_is_its_teacher_is_not_above_the_floor() -> None:
    same, other = normal("same"), normal("other")
    one = found(same, same, other, num_replicates=5)
    assert (one.excess.value, one.excess.low, one.excess.high) == (0, 0, 0)
    assert one.student == one.floor


def test_the_interval_of_a_far_student_is_that_of_both_means() -> None:
    """In one dimension (m_s - m_o)^2 has the deviation 2 (m_s - m_o) sqrt(v_s / N + v_o / N): both sets vary."""
    same, other = normal("same", d=1), normal("other", d=1)
    one = found(same + 100, same, other, num_replicates=200).student
    variances = float(same.var() + other.var()) / COUNT
    assert (one.high - one.low) / 2 == pytest.approx(
        1.96 * 2 * 100 * math.sqrt(variances), rel=0.2
    )  # 200 replicates: 5 % of a deviation


def test_the_excess_covers_the_truth_as_often_as_it_says() -> None:
    """Students whose law is 0.3 away in each of 4 dimensions: of 20 intervals of 90 %, 18 +- 1.3 hold 0.36."""
    covered = 0
    for trial in range(20):
        same, own, other = (normal(f"{name} {trial}", 300) for name in ("same", "own", "other"))
        excess = found(own + 0.3, same, other, num_replicates=25, confidence=0.9).excess
        covered += excess.low <= 0.36 <= excess.high
    assert 14 <= covered <= 20


@pytest.mark.parametrize(("counts", "said"), [((8, 8, 6), r"\[8, 8, 6\]"), ((2, 2, 2), "4 images")])
def test_sets_that_are_no_equals_are_refused(counts: tuple[int, int, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        found(*(normal("same", count) for count in counts))


def test_end_points_are_the_root_mean_square_with_the_interval_of_the_mean_square() -> None:
    same = normal("same", d=64)
    shift = torch.linspace(0, 1, COUNT)[:, None]
    one = end_points(same + shift, same)
    squares = shift.square().double()
    reach = 1.96 * float(squares.std()) / math.sqrt(COUNT)
    assert one.same_noise.value == pytest.approx(float(squares.mean().sqrt()), rel=1e-6)
    assert one.same_noise.high == pytest.approx(math.sqrt(float(squares.mean()) + reach), rel=1e-4)
    assert one.unrelated == pytest.approx(math.sqrt(2), rel=0.02)
    assert one.count == COUNT


def test_unrelated_images_are_of_one_condition() -> None:
    same = (torch.arange(12) % 3).float()[:, None] + 0.01 * normal("same", 12, d=1)
    assert end_points(same, same, num_conditions=3).unrelated < 0.05 < end_points(same, same).unrelated
    for lone in (12, 24):  # no image is compared with itself
        assert end_points(same, same, num_conditions=lone).unrelated == end_points(same, same).unrelated


def tiny_teacher(seed: int, num_classes: int = 3) -> TrainedModel:
    config = ModelConfig(network=MLPConfig(width=16, blocks=1), path=EDM(sigma_min=0.02, sigma_max=20))
    spec = ModelSpec(
        model=config, image_shape=(1, 4, 4), num_classes=num_classes, class_dropout=0.1, sampler=Heun(num_steps=3)
    )
    torch.manual_seed(seed)
    denoiser = spec.build().eval()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return TrainedModel(denoiser=denoiser, spec=spec, source=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_teacher_measured_as_its_own_student_is_at_the_floor_and_at_its_own_end_points(num_classes: int) -> None:
    teacher, other = tiny_teacher(0, num_classes), tiny_teacher(1, num_classes)
    samples = TeacherSamples.of(teacher, num_images=300)
    own = samples.images(teacher.denoiser, teacher.spec.sampler)
    assert torch.equal(own, samples.same_noise)
    assert not torch.equal(samples.same_noise, samples.independent)
    assert samples.frechet(own, num_replicates=3).excess.value == 0
    assert samples.end_points(own).same_noise.value == 0
    made = samples.images(other.denoiser, other.spec.sampler)
    assert samples.frechet(made, num_replicates=10).excess.low > 0
    assert samples.end_points(made).same_noise.value > 0.01
