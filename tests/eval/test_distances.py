"""The Frechet distance: closed forms, plain references, faults."""

import warnings

import numpy as np
import pytest
import torch
from support.made_features import covariance, linear_pair, normal

from diffdistill.diffusion.gaussians import frechet_distance
from diffdistill.eval.metrics.distances import (
    frechet_from_features,
    frechet_from_few,
    frechet_from_summaries,
)
from diffdistill.eval.metrics.moments import Summary


def test_commuting_covariances_give_the_sum_of_squared_gaps_of_deviations() -> None:
    mean, a, b = normal(8), normal(8, seed=1).abs() + 0.1, normal(8, seed=2).abs() + 0.1
    expected = float((mean**2).sum() + ((a - b) ** 2).sum())
    got = frechet_distance(mean, torch.diag(a**2), torch.zeros(8), torch.diag(b**2))
    assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("condition", [10.0, 1e6, 1e12, 1e15])
def test_a_linear_map_of_a_gaussian_has_its_closed_form(condition: float) -> None:
    cov_a, cov_b, expected = linear_pair(64, condition)
    zero = torch.zeros(64)
    assert frechet_distance(zero, cov_a, zero, cov_b) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("condition", [10.0, 1e12])
def test_as_many_features_as_inceptions_have_the_closed_form(condition: float) -> None:
    cov_a, cov_b, expected = linear_pair(2048, condition)
    zero = torch.zeros(2048)
    assert frechet_distance(zero, cov_a, zero, cov_b) == pytest.approx(expected, rel=1e-12)


def test_singular_covariances_of_many_features_equal_the_nuclear_norm() -> None:
    a, b = normal(300, 1024).relu(), normal(400, 1024, seed=1).relu() + 0.1
    by_covariance = frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    with pytest.warns(UserWarning, match="300 samples of 1024 features"):
        by_nuclear_norm = frechet_from_features(a, b)
    assert by_covariance == pytest.approx(by_nuclear_norm, rel=1e-12)


@pytest.mark.parametrize("rank", [1, 6, 19])
def test_a_singular_linear_map_has_its_closed_form(rank: int) -> None:
    basis, move = normal(20, rank), covariance(20, seed=1)
    cov_b = basis @ basis.T
    cov_a = move @ cov_b @ move
    expected = float(cov_a.trace() + cov_b.trace() - 2 * (move @ cov_b).trace())
    zero = torch.zeros(20)
    assert frechet_distance(zero, (cov_a + cov_a.T) / 2, zero, cov_b) == pytest.approx(expected, abs=1e-11)


def test_a_singular_covariance_is_at_no_distance_from_itself() -> None:
    basis = normal(50, 10)
    cov = basis @ basis.T
    assert frechet_distance(torch.zeros(50), cov, torch.zeros(50), cov) == pytest.approx(0, abs=1e-11)


def test_one_singular_side_gives_the_same_both_ways_round() -> None:
    basis = normal(20, 6)
    full, singular = (torch.zeros(20), covariance(20)), (torch.zeros(20), basis @ basis.T)
    # With S_a = F F^T the root's trace is the sum of the roots of the eigenvalues of F^T S_b F, [6, 6] and full rank.
    shared = torch.linalg.eigvalsh(basis.T @ full[1] @ basis).sqrt().sum()
    expected = float(full[1].trace() + singular[1].trace() - 2 * shared)
    assert frechet_distance(*full, *singular) == pytest.approx(expected, abs=1e-12)
    assert frechet_distance(*singular, *full) == pytest.approx(expected, abs=1e-12)


def test_it_is_the_same_both_ways_round() -> None:
    a, b = (normal(10), covariance(10)), (normal(10, seed=1), covariance(10, seed=1))
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), abs=1e-12)


def test_it_equals_the_plain_formula_with_scipys_matrix_root() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    (mean_a, cov_a), (mean_b, cov_b) = ((normal(30, seed=i), covariance(30, seed=i)) for i in (0, 1))
    root = linalg.sqrtm(cov_a.numpy() @ cov_b.numpy()).real
    expected = float(((mean_a - mean_b) ** 2).sum() + cov_a.trace() + cov_b.trace()) - 2 * np.trace(root)
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_samples", [50, 10])
@pytest.mark.filterwarnings("ignore:10 samples")
def test_a_set_is_at_no_distance_from_itself(num_samples: int) -> None:
    features = normal(num_samples, 20)
    assert frechet_from_features(features, features) == pytest.approx(0, abs=1e-12)


def test_a_constant_feature_needs_no_special_care() -> None:
    a, b = normal(50, 4), normal(60, 4, seed=1)
    padded = [torch.cat([x, torch.ones(len(x), 1)], 1) for x in (a, b)]
    assert frechet_from_features(*padded) == pytest.approx(frechet_from_features(a, b), abs=1e-12)


def test_two_constant_sets_are_as_far_apart_as_their_means() -> None:
    assert frechet_from_features(torch.zeros(5, 3), torch.ones(5, 3)) == 3.0


def test_an_offset_of_a_million_costs_no_digits_that_the_features_have() -> None:
    a, b = normal(50, 4), normal(60, 4, seed=1)
    assert frechet_from_features(a + 1e6, b + 1e6) == pytest.approx(frechet_from_features(a, b), abs=1e-8)


@pytest.mark.parametrize(("num_a", "num_b"), [(12, 15), (12, 100), (100, 12), (2, 2), (30, 30), (31, 31)])
def test_few_samples_equal_their_covariances(num_a: int, num_b: int) -> None:
    a, b = normal(num_a, 30), normal(num_b, 30, seed=1)
    by_covariance = frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert frechet_from_features(a, b) == pytest.approx(by_covariance, abs=1e-10)


@pytest.mark.parametrize(("num_a", "num_b"), [(12, 100), (100, 12)])
def test_fewer_samples_than_features_on_either_side_give_a_warning(num_a: int, num_b: int) -> None:
    with pytest.warns(UserWarning, match="12 samples of 30 features: the covariance is singular"):
        frechet_from_summaries(Summary.of(normal(num_a, 30)), Summary.of(normal(num_b, 30)))


def test_enough_samples_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_from_features(normal(31, 30), normal(32, 30))


@pytest.mark.parametrize("num_samples", [120, 400])
@pytest.mark.filterwarnings("ignore:12. samples")
def test_the_number_of_threads_changes_no_bit_and_stays_as_it_was(num_samples: int) -> None:
    pairs = [(normal(num_samples, 300, seed=i), 1.1 * normal(num_samples + i, 300, seed=i + 6)) for i in range(6)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        on_two = [frechet_from_features(*pair) for pair in pairs]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert on_two == [frechet_from_features(*pair) for pair in pairs]


@pytest.mark.parametrize("num_samples", [0, 1])
def test_fewer_than_two_samples_are_refused(num_samples: int) -> None:
    with pytest.raises(ValueError, match="2 samples or more"):
        frechet_from_features(normal(num_samples, 3), normal(5, 3))


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(place: int, value: float) -> None:
    arguments = [torch.zeros(3), torch.eye(3), torch.zeros(3), torch.eye(3)]
    arguments[place][0] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        frechet_distance(*arguments)


def test_nan_in_features_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        frechet_from_features(torch.full((5, 3), torch.nan), normal(5, 3))


def test_mismatched_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="same features"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))
    with pytest.raises(ValueError, match=r"must be \[d\]"):
        frechet_distance(torch.zeros(3), torch.eye(4), torch.zeros(3), torch.eye(3))


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_matrix_that_is_no_covariance_is_refused(side: str) -> None:
    good, bad = (torch.zeros(2), torch.eye(2)), (torch.zeros(2), torch.diag(torch.tensor([1.0, -1.0])))
    arguments = (*bad, *good) if side == "a" else (*good, *bad)
    with pytest.raises(ValueError, match=f"cov_{side} is no covariance: it has negative"):
        frechet_distance(*arguments)


def test_a_matrix_that_is_not_symmetric_is_refused() -> None:
    with pytest.raises(ValueError, match="not symmetric"):
        frechet_distance(torch.zeros(2), torch.ones(2, 2).triu(), torch.zeros(2), torch.eye(2))


@pytest.mark.parametrize("num_real", [300, 20])
def test_few_samples_against_a_summary_are_those_against_its_features(num_real: int) -> None:
    a, b = normal(20, 40, seed=0), normal(num_real, 40, seed=1) + 0.3
    with pytest.warns(UserWarning, match="20 samples of 40 features"):
        found = frechet_from_few(a, Summary.of(b))
    with pytest.warns(UserWarning, match="samples of 40 features"):
        assert found == pytest.approx(frechet_from_features(a, b), rel=1e-6)


def test_few_samples_of_other_features_are_refused() -> None:
    with pytest.raises(ValueError, match="a has 3, b has 4"):
        frechet_from_few(torch.rand(2, 3), Summary.of(torch.rand(9, 4)))
