"""Precision, recall, density and coverage: brute force, ties, invariances, faults."""

import numpy as np
import pytest
import torch
from support.made_features import normal
from torch import Tensor

from diffdistill.eval.metrics.neighbours import Prdc, density_coverage, prdc, precision_recall


def neighbours(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))


def radii(x: np.ndarray, k: int) -> np.ndarray:
    return np.sort(neighbours(x, x) + np.diag(np.full(len(x), np.inf)), axis=1)[:, k - 1]


def sets() -> tuple[Tensor, Tensor]:
    return normal(70, 5), 0.7 * normal(90, 5, seed=1) + 0.5


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_brute_force(k: int) -> None:
    real, fake = sets()
    x, y = real.numpy(), fake.numpy()
    gaps = neighbours(x, y)
    precision = (gaps <= radii(x, k)[:, None]).any(0).mean()
    recall = (gaps <= radii(y, k)[None]).any(1).mean()
    assert 0 < recall < precision < 1
    assert precision_recall(real, fake, k=k) == (precision, recall)


def test_density_and_coverage_equal_brute_force() -> None:
    real, fake = sets()
    inside = neighbours(real.numpy(), fake.numpy()) <= radii(real.numpy(), 5)[:, None]
    assert density_coverage(real, fake) == pytest.approx((inside.sum() / (5 * len(fake)), inside.any(1).mean()))


def test_one_pass_equals_both_metrics_with_their_own_k() -> None:
    real, fake = sets()
    for nearest_k, density_k in [(3, 5), (5, 2)]:
        apart = precision_recall(real, fake, k=nearest_k) + density_coverage(real, fake, k=density_k)
        assert prdc(real, fake, nearest_k=nearest_k, density_k=density_k) == Prdc(*apart)


def test_the_block_size_changes_nothing() -> None:
    real, fake = sets()
    assert precision_recall(real, fake, block_size=13) == precision_recall(real, fake)
    assert density_coverage(real, fake, block_size=13) == density_coverage(real, fake)


def test_a_set_recalls_itself_wholly() -> None:
    real, _ = sets()
    assert precision_recall(real, real) == (1.0, 1.0)


def test_repeated_samples_still_lie_in_their_own_balls_of_radius_zero() -> None:
    real = normal(5, 4).repeat_interleave(4, 0)  # matrix products leave 1e-16 between equal samples
    assert precision_recall(real, real[::4].repeat(4, 1)) == (1.0, 1.0)
    assert density_coverage(real, real[::4], k=3)[1] == 1.0


def test_copies_lie_on_the_surfaces_of_the_same_balls_as_their_originals() -> None:
    real = normal(200, 40)
    fake = real[torch.randint(200, (150,), generator=torch.Generator().manual_seed(0))]
    expected = neighbours(fake.numpy(), real.numpy()) <= radii(real.numpy(), 5)
    for block_size in (7, 64, 1000):  # in another block the same distance comes with other last bits
        density, coverage = density_coverage(real, fake, block_size=block_size)
        assert (density, coverage) == (expected.sum() / (5 * 150), expected.any(0).mean())


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_distances_far_from_the_origin_keep_their_digits(offset: float) -> None:
    # Multiples of 1/8, so that the offset rounds nothing; many ties, as between images of few grey levels.
    real, fake = ((8 * x).round() / 8 for x in sets())
    expected = neighbours(fake.numpy(), real.numpy()) <= radii(real.numpy(), 3)
    assert precision_recall(real + offset, fake + offset)[0] == expected.any(1).mean()


def test_far_fakes_have_neither_precision_nor_recall() -> None:
    real, fake = sets()
    assert precision_recall(real, fake + 100) == (0.0, 0.0)
    assert density_coverage(real, fake + 100) == (0.0, 0.0)


def test_one_repeated_real_sample_is_precise_and_recalls_next_to_nothing() -> None:
    real, _ = sets()
    assert precision_recall(real, real[:1].repeat(90, 1)) == (1.0, 1 / 70)


def test_nan_is_refused() -> None:
    real, fake = sets()
    fake[3, 2] = torch.nan
    with pytest.raises(ValueError, match="the second features: NaN"):
        precision_recall(real, fake)


def test_too_many_neighbours_are_refused() -> None:
    real, fake = sets()
    with pytest.raises(ValueError, match=r"k must be 1 .. 69 for 70 samples, not 70"):
        precision_recall(real, fake, k=70)


def test_features_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[N, d\] and \[M, d\]"):
        precision_recall(normal(5, 3), normal(5, 4))
