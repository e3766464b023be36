"""KID and CMMD: brute force, invariances, faults."""

import numpy as np
import pytest
import torch
from support.made_features import normal

from diffdistill.eval.metrics.kernels import cmmd, kid, kid_of_parts


def test_kid_of_whole_sets_equals_brute_force() -> None:
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


def test_equal_laws_are_at_zero_within_their_spread() -> None:
    mean, deviation = kid(normal(2000, 6), normal(2000, 6, seed=1), num_subsets=20, subset_size=100)
    assert abs(mean) < deviation


@pytest.mark.parametrize("block_size", [7, 2048])
def test_parts_together_equal_one_part_after_another(block_size: int) -> None:
    a, b = normal(40, 6), normal(30, 6, seed=1) + 0.2
    chosen = torch.arange(40) % 3 == torch.tensor([[0], [1]]), torch.arange(30) < torch.tensor([[9], [30]])
    found = kid_of_parts(a, b, *chosen, block_size=block_size)
    for value, in_a, in_b in zip(found.tolist(), *chosen, strict=True):
        parts = a[in_a], b[in_b]
        count = min(map(len, parts))
        subsets = [x[:count] for x in parts]
        equal = kid_of_parts(*subsets, *(torch.ones(1, count, dtype=torch.bool),) * 2)
        assert float(equal) == pytest.approx(kid(*subsets, num_subsets=1, subset_size=count)[0], abs=1e-12)
        assert value == pytest.approx(
            float(kid_of_parts(*parts, *(torch.ones(1, len(x)) > 0 for x in parts))), abs=1e-12
        )


def test_a_part_of_one_sample_is_refused() -> None:
    one = torch.tensor([[True, False, False]])
    with pytest.raises(ValueError, match="2 samples or more, not 1"):
        kid_of_parts(normal(3, 2), normal(3, 2), one, one)


def test_the_seed_decides_the_subsets() -> None:
    a, b = normal(100, 6), normal(100, 6, seed=1)
    first, again, other = (kid(a, b, num_subsets=3, subset_size=20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_a_set_smaller_than_a_subset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"subset_size must be 2 .. 50, not 1000"):
        kid(normal(50, 3), normal(60, 3))


def brute_cmmd(x: np.ndarray, y: np.ndarray, sigma: float) -> float:
    def mean(u: np.ndarray, v: np.ndarray) -> float:
        return np.exp(-((u[:, None] - v[None]) ** 2).sum(-1) / (2 * sigma**2)).mean()

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def test_cmmd_equals_brute_force_with_the_papers_constants() -> None:
    a, b = 5 * normal(40, 6), 5 * normal(55, 6, seed=1) + 1
    assert cmmd(a, b) == pytest.approx(1000 * brute_cmmd(a.numpy(), b.numpy(), 10.0), abs=1e-10)


def test_cmmd_of_two_points_has_its_closed_form() -> None:
    gap = torch.zeros(1, 3), torch.tensor([[3.0, 0.0, 4.0]])
    assert cmmd(*gap, sigma=5.0, scale=1.0) == pytest.approx(2 - 2 * np.exp(-0.5), abs=1e-15)


@pytest.mark.parametrize("block_size", [1, 13, 40])
def test_the_block_size_changes_rounding_alone(block_size: int) -> None:
    a, b = normal(40, 6), normal(55, 6, seed=1) + 0.2
    assert cmmd(a, b, block_size=block_size) == pytest.approx(cmmd(a, b), abs=1e-10)


def test_cmmd_of_a_set_with_itself_is_zero_for_it_is_biased() -> None:
    a = normal(50, 6)
    assert cmmd(a, a.flip(0)) == pytest.approx(0, abs=1e-9)
    assert kid(a, a, num_subsets=1, subset_size=50)[0] < 0  # the unbiased one leaves out a sample's own kernel


@pytest.mark.parametrize("distance", [kid, cmmd])
def test_nan_is_refused(distance) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"the second features: NaN or infinite values, first at \[1, 0\]"):
        distance(normal(5, 3), torch.tensor([[1.0, 2.0, 3.0], [torch.nan, 0.0, 0.0]]))


@pytest.mark.parametrize("distance", [kid, cmmd])
def test_other_shapes_are_refused(distance) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"must be \[N, d\] and \[M, d\]"):
        distance(normal(5, 3), normal(5, 4))
    with pytest.raises(ValueError, match="1 samples or more"):
        distance(normal(0, 3), normal(5, 3))
