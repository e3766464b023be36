"""Statistics and distances of features: closed forms, plain references, invariances, faults."""

import numpy as np
import pytest
import torch
from torch import Tensor

from diffdistill.eval.distances import (
    density_coverage,
    frechet_distance,
    frechet_from_features,
    kid,
    precision_recall,
)
from diffdistill.eval.statistics import Moments, Summary


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d: int, condition: float = 10.0, seed: int = 0) -> Tensor:
    """Eigenvalues 1 .. 1/condition in a random basis."""
    basis = torch.linalg.qr(normal(d, d, seed=seed)).Q
    cov = basis * torch.logspace(0, -np.log10(condition), d, dtype=torch.float64) @ basis.T
    return (cov + cov.T) / 2


def neighbours(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))


def radii(x: np.ndarray, k: int) -> np.ndarray:
    return np.sort(neighbours(x, x) + np.diag(np.full(len(x), np.inf)), axis=1)[:, k - 1]


class TestMoments:
    @pytest.mark.parametrize("batch_size", [1, 7, 64, 100, 1000])
    def test_the_batch_size_changes_no_bit(self, batch_size: int) -> None:
        features = normal(1000, 12).float()
        whole, split = Moments(12, block_size=64), Moments(12, block_size=64)
        whole.update(features)
        for batch in features.split(batch_size):
            split.update(batch)
        assert torch.equal(whole.summary().mean, split.summary().mean)
        assert torch.equal(whole.summary().covariance, split.summary().covariance)

    def test_reading_a_summary_between_batches_changes_no_bit(self) -> None:
        features = normal(100, 4)
        plain, read = Moments(4, block_size=64), Moments(4, block_size=64)
        plain.update(features)
        read.update(features[:30])
        assert read.summary().count == 30
        read.update(features[30:])
        assert torch.equal(plain.summary().covariance, read.summary().covariance)

    def test_they_equal_numpys_mean_and_unbiased_covariance(self) -> None:
        features = normal(500, 9)
        moments = Moments(9, block_size=128)
        moments.update(features)
        np.testing.assert_allclose(moments.summary().mean, features.numpy().mean(0), atol=1e-14)
        np.testing.assert_allclose(moments.summary().covariance, np.cov(features.numpy().T), atol=1e-14)

    def test_a_mean_far_from_zero_cancels_no_digits(self) -> None:
        features = normal(1000, 3)
        moments = Moments(3, block_size=64)
        moments.update(features + 1e6)
        # Adding 1e6 rounds the features themselves at 1e-10; a sum of squares would be wrong by 1e-4.
        torch.testing.assert_close(moments.summary().covariance, torch.cov(features.T), atol=1e-9, rtol=0)

    def test_merged_parts_equal_one_stream(self) -> None:
        features = normal(300, 5)
        whole, first, second = (Moments(5, block_size=64) for _ in range(3))
        whole.update(features)
        first.update(features[:130])
        second.update(features[130:])
        first.merge(second)
        assert first.summary().count == 300
        torch.testing.assert_close(first.summary().covariance, whole.summary().covariance, atol=1e-14, rtol=0)

    def test_merging_an_empty_part_changes_no_bit(self) -> None:
        features = normal(64, 5)
        moments = Moments(5, block_size=64)
        moments.update(features)
        before = moments.summary()
        moments.merge(Moments(5))
        assert torch.equal(before.covariance, moments.summary().covariance)

    def test_features_of_another_width_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"must be \[B, 5\]"):
            Moments(5).update(normal(3, 4))

    def test_one_sample_has_no_covariance(self) -> None:
        with pytest.raises(ValueError, match="2 samples or more"):
            _ = Summary.of(normal(1, 4)).covariance


class TestFrechet:
    def test_commuting_covariances_give_the_sum_of_squared_gaps_of_deviations(self) -> None:
        mean, a, b = normal(8), normal(8, seed=1).abs() + 0.1, normal(8, seed=2).abs() + 0.1
        expected = float((mean**2).sum() + ((a - b) ** 2).sum())
        got = frechet_distance(mean, torch.diag(a**2), torch.zeros(8), torch.diag(b**2))
        assert got == pytest.approx(expected, abs=1e-12)

    # The bounds are the rounding that eigenvalues of size 1 leave in roots of size 1/condition.
    @pytest.mark.parametrize(("condition", "bound"), [(10.0, 1e-12), (1e12, 1e-9)])
    def test_a_linear_map_of_a_gaussian_has_its_closed_form(self, condition: float, bound: float) -> None:
        cov_b, move = covariance(64, condition), covariance(64, seed=1)
        cov_a = move @ cov_b @ move  # then (S_a S_b)^(1/2) has the trace of A S_b
        expected = float(cov_a.trace() + cov_b.trace() - 2 * (move @ cov_b).trace())
        zero = torch.zeros(64)
        assert frechet_distance(zero, (cov_a + cov_a.T) / 2, zero, cov_b) == pytest.approx(expected, abs=bound)

    def test_a_singular_linear_map_has_its_closed_form(self) -> None:
        basis, move = normal(20, 6), covariance(20, seed=1)
        cov_b = basis @ basis.T
        cov_a = move @ cov_b @ move
        expected = float(cov_a.trace() + cov_b.trace() - 2 * (move @ cov_b).trace())
        zero = torch.zeros(20)
        # Roots of eigenvalues that are 0 up to rounding: sqrt(1e-16).
        assert frechet_distance(zero, (cov_a + cov_a.T) / 2, zero, cov_b) == pytest.approx(expected, abs=1e-6)

    def test_it_is_the_same_both_ways_round(self) -> None:
        a, b = (normal(10), covariance(10)), (normal(10, seed=1), covariance(10, seed=1))
        assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), abs=1e-12)

    def test_it_equals_the_plain_formula_with_scipys_matrix_root(self) -> None:
        linalg = pytest.importorskip("scipy.linalg")
        (mean_a, cov_a), (mean_b, cov_b) = ((normal(30, seed=i), covariance(30, seed=i)) for i in (0, 1))
        root = linalg.sqrtm(cov_a.numpy() @ cov_b.numpy()).real
        expected = float(((mean_a - mean_b) ** 2).sum() + cov_a.trace() + cov_b.trace()) - 2 * np.trace(root)
        assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("num_samples", [50, 10])
    def test_a_set_is_at_no_distance_from_itself(self, num_samples: int) -> None:
        features = normal(num_samples, 20)
        assert frechet_from_features(features, features) == pytest.approx(0, abs=1e-12)

    def test_a_constant_feature_needs_no_special_care(self) -> None:
        a, b = normal(50, 4), normal(60, 4, seed=1)
        padded = [torch.cat([x, torch.ones(len(x), 1)], 1) for x in (a, b)]
        assert frechet_from_features(*padded) == pytest.approx(frechet_from_features(a, b), abs=1e-7)

    def test_two_constant_sets_are_as_far_apart_as_their_means(self) -> None:
        assert frechet_from_features(torch.zeros(5, 3), torch.ones(5, 3)) == 3.0

    def test_few_samples_by_the_nuclear_norm_equal_their_covariances(self) -> None:
        a, b = normal(12, 30), normal(15, 30, seed=1)
        by_covariance = frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
        # The covariances' zero eigenvalues are 1e-16, of which the roots are summed.
        assert frechet_from_features(a, b) == pytest.approx(by_covariance, abs=1e-6)

    @pytest.mark.parametrize("place", range(4))
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_nan_and_infinity_are_refused(self, place: int, value: float) -> None:
        arguments = [torch.zeros(3), torch.eye(3), torch.zeros(3), torch.eye(3)]
        arguments[place][0] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            frechet_distance(*arguments)

    def test_nan_in_features_is_refused(self) -> None:
        with pytest.raises(ValueError, match="NaN or infinite"):
            frechet_from_features(torch.full((5, 3), torch.nan), normal(5, 3))

    def test_mismatched_shapes_are_refused(self) -> None:
        with pytest.raises(ValueError, match="same features"):
            frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))
        with pytest.raises(ValueError, match=r"must be \[d\]"):
            frechet_distance(torch.zeros(3), torch.eye(4), torch.zeros(3), torch.eye(3))

    @pytest.mark.parametrize("side", ["a", "b"])
    def test_a_matrix_that_is_no_covariance_is_refused(self, side: str) -> None:
        good, bad = (torch.zeros(2), torch.eye(2)), (torch.zeros(2), torch.diag(torch.tensor([1.0, -1.0])))
        arguments = (*bad, *good) if side == "a" else (*good, *bad)
        with pytest.raises(ValueError, match=f"cov_{side} is no covariance: it has negative"):
            frechet_distance(*arguments)

    def test_a_matrix_that_is_not_symmetric_is_refused(self) -> None:
        with pytest.raises(ValueError, match="not symmetric"):
            frechet_distance(torch.zeros(2), torch.ones(2, 2).triu(), torch.zeros(2), torch.eye(2))


class TestNeighbours:
    def sets(self) -> tuple[Tensor, Tensor]:
        return normal(70, 5), 0.7 * normal(90, 5, seed=1) + 0.5

    @pytest.mark.parametrize("k", [1, 3])
    def test_precision_and_recall_equal_brute_force(self, k: int) -> None:
        real, fake = self.sets()
        x, y = real.numpy(), fake.numpy()
        gaps = neighbours(x, y)
        precision = (gaps <= radii(x, k)[:, None]).any(0).mean()
        recall = (gaps <= radii(y, k)[None]).any(1).mean()
        assert 0 < recall < precision < 1
        assert precision_recall(real, fake, k=k) == (precision, recall)

    def test_density_and_coverage_equal_brute_force(self) -> None:
        real, fake = self.sets()
        inside = neighbours(real.numpy(), fake.numpy()) <= radii(real.numpy(), 5)[:, None]
        assert density_coverage(real, fake) == pytest.approx((inside.sum() / (5 * len(fake)), inside.any(1).mean()))

    def test_the_block_size_changes_nothing(self) -> None:
        real, fake = self.sets()
        assert precision_recall(real, fake, block_size=13) == precision_recall(real, fake)
        assert density_coverage(real, fake, block_size=13) == density_coverage(real, fake)

    def test_a_set_recalls_itself_wholly(self) -> None:
        real, _ = self.sets()
        assert precision_recall(real, real) == (1.0, 1.0)

    def test_repeated_samples_still_lie_in_their_own_balls_of_radius_zero(self) -> None:
        real = normal(5, 4).repeat_interleave(4, 0)
        assert precision_recall(real, real[::4].repeat(4, 1)) == (1.0, 1.0)
        assert density_coverage(real, real[::4], k=3)[1] == 1.0

    def test_far_fakes_have_neither_precision_nor_recall(self) -> None:
        real, fake = self.sets()
        assert precision_recall(real, fake + 100) == (0.0, 0.0)
        assert density_coverage(real, fake + 100) == (0.0, 0.0)

    def test_one_repeated_real_sample_is_precise_and_recalls_next_to_nothing(self) -> None:
        real, _ = self.sets()
        assert precision_recall(real, real[:1].repeat(90, 1)) == (1.0, 1 / 70)

    def test_nan_is_refused(self) -> None:
        real, fake = self.sets()
        fake[3, 2] = torch.nan
        with pytest.raises(ValueError, match="the second features: NaN"):
            precision_recall(real, fake)

    def test_too_many_neighbours_are_refused(self) -> None:
        real, fake = self.sets()
        with pytest.raises(ValueError, match=r"k must be 1 .. 69 for 70 samples, not 70"):
            precision_recall(real, fake, k=70)

    def test_features_of_different_widths_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"must be \[N, d\] and \[M, d\]"):
            precision_recall(normal(5, 3), normal(5, 4))


class TestKid:
    def test_whole_sets_as_subsets_equal_brute_force(self) -> None:
        a, b = normal(40, 6), normal(40, 6, seed=1) + 0.2
        x, y = a.numpy(), b.numpy()
        total = 0.0
        for i in range(40):
            for j in range(40):
                within = (x[i] @ x[j] / 6 + 1) ** 3 + (y[i] @ y[j] / 6 + 1) ** 3
                total += (within / (40 * 39) if i != j else 0) - 2 * (x[i] @ y[j] / 6 + 1) ** 3 / 40**2
        mean, deviation = kid(a, b, num_subsets=3, subset_size=40)
        assert mean == pytest.approx(total, abs=1e-12)
        assert deviation == pytest.approx(0, abs=1e-12)

    def test_equal_laws_are_at_zero_within_their_spread(self) -> None:
        mean, deviation = kid(normal(2000, 6), normal(2000, 6, seed=1), num_subsets=20, subset_size=100)
        assert abs(mean) < deviation

    def test_the_seed_decides_the_subsets(self) -> None:
        a, b = normal(100, 6), normal(100, 6, seed=1)
        first, again, other = (kid(a, b, num_subsets=3, subset_size=20, seed=seed) for seed in (0, 0, 1))
        assert first == again != other

    def test_a_set_smaller_than_a_subset_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"subset_size must be 2 .. 50, not 1000"):
            kid(normal(50, 3), normal(60, 3))
