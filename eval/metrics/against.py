"""How far a student is from its teacher, beside how far two sets of the teacher's own samples are from each other.

Three sets of N images: the student's, the teacher's on the same noise, and the teacher's on independent noise, which
the other two are compared with. A distance of finite sets is above zero even where the laws are equal: what the
teacher scores against itself is the floor, and only what is above it is the student's. Student and floor share their
noise and their reference, so much of the chance in either cancels in their difference.

Intervals are normal ones around the values of all images. Their standard deviations are those of the same statistic
over random halves of every set, drawn without replacement (the delete-half jackknife, see compare.py): for smooth
statistics that is the spread over other noise. Near the floor a distance is no smooth statistic, and the halves'
spread is then rather too large.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, stdev

import torch
from torch import Tensor

from diffdistill.eval.metrics.halves import draw_half, score_halves
from diffdistill.eval.metrics.scoring import score
from diffdistill.eval.metrics.settings import AnyMetric
from diffdistill.eval.metrics.sides import JudgedFeatures
from diffdistill.settings.numbers import Number
from diffdistill.settings.schema import NonNegative, PositiveInt, UserError, schema

Sides = Mapping[str, JudgedFeatures]


@schema
class Measured:
    """A number and the interval in which it lies with the stated confidence."""

    value: Number
    low: Number
    high: Number

    @staticmethod
    def around(value: float, deviation: float, confidence: float) -> "Measured":
        """A normal interval."""
        reach = NormalDist().inv_cdf((1 + confidence) / 2) * deviation
        return Measured(value=value, low=value - reach, high=value + reach)


@schema
class AboveFloor:
    """One metric.  student: against the teacher's independent set.  floor: the same of the teacher's samples on the
    student's noise.  excess: student less floor."""

    student: Measured
    floor: Measured
    excess: Measured


def distances_above_floor(
    metrics: Sequence[AnyMetric],
    student: Sides,
    same_noise: Sides,
    independent: Sides,
    *,
    num_replicates: int = 50,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, AboveFloor]:
    """Every metric by name.  student, same_noise, independent: features by label, N images each; the first two image
    for image on the same noise and condition.

    Raises UserError for fewer than 2 replicates, a confidence outside 0 .. 1, and sets of different sizes.
    """
    _check(num_replicates, confidence)
    sets = (student, same_noise, independent)
    counts = [next(iter(side.values())).summary.count for side in sets]
    if len(set(counts)) > 1 or counts[0] < 4:
        raise UserError(f"distances above a floor need sets of equal size, 4 images or more, not {counts}")
    whole = [score(metrics, side, independent).values for side in (student, same_noise)]
    rng = torch.Generator().manual_seed(seed)
    drawn = [(draw_half(counts[0], rng), draw_half(counts[0], rng)) for _ in range(num_replicates)]
    halves, of_reference = zip(*drawn, strict=True)
    of_student, of_floor = score_halves(metrics, (student, same_noise), independent, halves, of_reference)

    def measured(name: str, first: int, second: int) -> Measured:
        """A combination of the student's value and the floor's."""
        spread = stdev(first * a[name] + second * b[name] for a, b in zip(of_student, of_floor, strict=True))
        return Measured.around(first * whole[0][name] + second * whole[1][name], spread, confidence)

    return {
        name: AboveFloor(student=measured(name, 1, 0), floor=measured(name, 0, 1), excess=measured(name, 1, -1))
        for name in whole[0]
    }


@schema
class EndPoints:
    """The root mean square difference of pixels, in units of [-1, 1], between two sets of images.  same_noise: image
    for image on the same noise and condition.  unrelated: the teacher's own images of different noise, for scale.
    count: pairs."""

    same_noise: Measured
    unrelated: NonNegative
    count: PositiveInt


def end_points(student: Tensor, same_noise: Tensor, *, num_conditions: int = 1, confidence: float = 0.95) -> EndPoints:
    """student, same_noise: [N, d].  num_conditions: images so many apart have the same condition; where there are no
    two of them, unrelated images are of different ones.

    The interval is the normal one of the mean square, over images.
    """
    _check(2, confidence)
    squares = (student.double() - same_noise.double()).square().mean(1)
    apart = num_conditions if num_conditions % len(squares) else 1
    unrelated = (same_noise.roll(apart, 0).double() - same_noise.double()).square().mean().sqrt()
    mean = Measured.around(float(squares.mean()), float(squares.std()) / math.sqrt(len(squares)), confidence)
    value, low, high = (math.sqrt(max(square, 0.0)) for square in (mean.value, mean.low, mean.high))
    root = Measured(value=value, low=low, high=high)
    return EndPoints(same_noise=root, unrelated=float(unrelated), count=len(squares))


def _check(num_replicates: int, confidence: float) -> None:
    if num_replicates < 2 or not 0 < confidence < 1:
        raise UserError(f"replicates = {num_replicates} must be 2 or more, confidence = {confidence} in 0 .. 1")
