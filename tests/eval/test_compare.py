"""Paired differences: the interval is the closed form's where there is one, and pairs cancel what they share."""

import math
from dataclasses import dataclass

import pytest
import torch
from support.judged import METRICS, TOY, TensorFeatures
from torch import Tensor

from diffdistill.diffusion.step_random import StepRandom
from diffdistill.eval.metrics.compare import paired_differences
from diffdistill.eval.metrics.settings import Frechet, KernelDistance
from diffdistill.settings.schema import UserError

COUNT = 600


@dataclass
class Side(TensorFeatures):
    """A side with everything that a metric may ask for."""

    @property
    def logits(self) -> Tensor:
        return self.features[:, :4]

    @property
    def texts(self) -> Tensor:
        return self.features

    @property
    def conditions(self) -> Tensor:
        return torch.arange(len(self.features)) % 10


def normal(name: str, count: int = COUNT, d: int = 16) -> Tensor:
    return StepRandom(3, 0, torch.arange(count)).normal(name, (d,))


REAL = {"toy": TensorFeatures(normal("real"))}
FRECHET = (Frechet(features=TOY),)


def test_the_interval_of_a_frechet_distance_is_the_delta_methods() -> None:
    """In one dimension d/dm of (m - m_r)^2 + (s - s_r)^2 is 2 (m - m_r): far away its error is that of the mean."""
    real = {"toy": TensorFeatures(normal("real", d=1))}
    far, origin = Side(normal("a", d=1) + 100), Side(normal("real", d=1))
    found = paired_differences(FRECHET, {"toy": far}, {"toy": origin}, real, num_replicates=800)["fd-toy"]
    expected = 1.96 * 2 * 100 * float(far.features.std()) / math.sqrt(COUNT)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.15)  # 800 replicates: 5% of a quantile
    assert found.difference == pytest.approx(found.a - found.b)
    assert found.low < found.difference < found.high


def test_pairs_cancel_what_both_share() -> None:
    shared, own = normal("a"), normal("b")
    near = {"toy": Side(shared + 0.3)}, {"toy": Side(shared + 0.31)}
    apart = {"toy": Side(shared + 0.3)}, {"toy": Side(own + 0.31)}
    paired, unpaired = (
        paired_differences(FRECHET, *sides, REAL, num_replicates=50)["fd-toy"] for sides in (near, apart)
    )
    assert paired.is_clear
    assert paired.high - paired.low < 0.1 * (unpaired.high - unpaired.low)


def test_equal_images_do_not_differ() -> None:
    side = {"toy": Side(normal("a"))}
    for found in paired_differences(METRICS, side, side, REAL, num_replicates=3).values():
        assert (found.difference, found.low, found.high) == (0, 0, 0)
        assert not found.is_clear


def test_the_intervals_cover_the_true_difference_as_often_as_they_say() -> None:
    """Two samples of one law differ by chance alone: of 20 intervals of 90%, 18 +- 1.3 hold zero."""
    covered = 0
    for trial in range(20):
        a, b = (Side(normal(f"{side} {trial}", count=200, d=4)) for side in "ab")
        real = {"toy": TensorFeatures(normal("real", count=2000, d=4) * 1.5)}
        found = paired_differences(FRECHET, {"toy": a}, {"toy": b}, real, num_replicates=60, confidence=0.9)
        covered += not found["fd-toy"].is_clear
    assert 14 <= covered < 20  # within 3 deviations, and not always


def test_the_same_seed_gives_the_same_intervals() -> None:
    sides = {"toy": Side(normal("a"))}, {"toy": Side(normal("b"))}
    first = paired_differences(FRECHET, *sides, REAL, num_replicates=5)
    assert paired_differences(FRECHET, *sides, REAL, num_replicates=5) == first
    assert paired_differences(FRECHET, *sides, REAL, num_replicates=5, seed=1) != first


def test_halves_of_kid_take_all_pairs_whatever_its_subsets_are() -> None:
    """Subsets as large as the whole do not fit into a half; nor need the subsets be many for a steady interval."""
    sides = {"toy": Side(normal("a"))}, {"toy": Side(normal("b"))}
    intervals = []
    for subsets in ({"num_subsets": 2, "subset_size": 500}, {"num_subsets": 100, "subset_size": 50}):
        found = paired_differences((KernelDistance(features=TOY, **subsets),), *sides, REAL, num_replicates=20)[
            "kid-toy"
        ]
        intervals.append((found.low - found.difference, found.high - found.difference))
    assert intervals[0] == pytest.approx(intervals[1], abs=1e-12)
    assert intervals[0][0] < 0 < intervals[0][1]


@pytest.mark.parametrize(("options", "said"), [({"num_replicates": 1}, "replicates = 1"), ({"confidence": 1.0}, "1.0")])
def test_what_gives_no_interval_is_refused(options: dict[str, float], said: str) -> None:
    side = {"toy": Side(normal("a"))}
    with pytest.raises(UserError, match=said):
        paired_differences(FRECHET, side, side, REAL, **options)  # type: ignore[arg-type]


def test_sides_of_different_sizes_are_no_pairs() -> None:
    with pytest.raises(UserError, match="as many images on both sides, not 600 and 300"):
        paired_differences(FRECHET, {"toy": Side(normal("a"))}, {"toy": Side(normal("a", 300))}, REAL)
