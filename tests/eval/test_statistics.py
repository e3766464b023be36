"""Streamed means and covariances: the same bits however the samples arrive."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.made_features import normal

from diffdistill.eval.metrics.moments import Moments, Summary


def same_bits(a: Summary, b: Summary) -> bool:
    return a.count == b.count and torch.equal(a.mean, b.mean) and torch.equal(a.scatter, b.scatter)


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return normal(1000, 12).float()


@pytest.fixture(scope="module")
def whole(features: torch.Tensor) -> Summary:
    """All at once."""
    moments = Moments(12, block_size=64)
    moments.update(features)
    return moments.summary()


@pytest.mark.parametrize("batch_size", [1, 7, 64, 256])
def test_the_batch_size_changes_no_bit(features: torch.Tensor, whole: Summary, batch_size: int) -> None:
    moments = Moments(12, block_size=64)
    for batch in features.split(batch_size):
        moments.update(batch)
    assert same_bits(moments.summary(), whole)


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_the_order_of_arrival_changes_no_bit(features: torch.Tensor, whole: Summary, batch_size: int) -> None:
    moments = Moments(12, block_size=64)
    for index in torch.randperm(1000, generator=torch.Generator().manual_seed(0)).split(batch_size):
        moments.update(features[index], index)
    assert same_bits(moments.summary(), whole)


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("share", ["strided", "contiguous", "batches"])
def test_the_processes_shares_change_no_bit(
    features: torch.Tensor, whole: Summary, num_processes: int, share: str
) -> None:
    owner = {
        "strided": torch.arange(1000) % num_processes,
        "contiguous": torch.arange(1000) * num_processes // 1000,
        "batches": torch.arange(1000) // 50 % num_processes,
    }[share]
    parts = []
    for process in range(num_processes):
        index = torch.nonzero(owner == process)[:, 0]
        parts.append(Moments(12, block_size=64))
        parts[-1].update(features[index], index)
    for first in range(num_processes):  # whichever process collects
        total = Moments(12, block_size=64)
        for part in parts[first:] + parts[:first]:
            total.merge(part)
        assert same_bits(total.summary(), whole)


def test_three_real_processes_and_two_threads_change_no_bit(tmp_path: Path, whole: Summary) -> None:
    program = """
import json, sys, torch
from support.made_features import normal
from safetensors.torch import save_file
from diffdistill.eval.metrics.moments import Moments
process, out = json.loads(sys.argv[1])
index = torch.arange(process, 1000, 3)
moments = Moments(12, block_size=64)
for part in index.split(7):
    moments.update(normal(1000, 12).float()[part], part)
save_file(moments.state_dict(), out)
"""
    files = [tmp_path / f"{process}.safetensors" for process in range(3)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, json.dumps([process, str(file)])],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(1 + process % 2)},
        )
        for process, file in enumerate(files)
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    total = Moments(12, block_size=64)
    for file in files:
        total.merge(Moments.from_state_dict(load_file(file)))
    assert same_bits(total.summary(), whole)


def test_a_broken_off_stream_goes_on_with_the_same_bits(features: torch.Tensor, whole: Summary, tmp_path: Path) -> None:
    moments = Moments(12, block_size=64)
    moments.update(features[:333])
    save_file(moments.state_dict(), tmp_path / "moments.safetensors")
    again = Moments.from_state_dict(load_file(tmp_path / "moments.safetensors"))
    again.update(features[333:])
    assert same_bits(again.summary(), whole)


def test_reading_a_summary_between_batches_changes_no_bit(features: torch.Tensor, whole: Summary) -> None:
    moments = Moments(12, block_size=64)
    moments.update(features[:30])
    assert moments.summary().count == 30
    moments.update(features[30:])
    early = moments.summary()
    moments.update(features)
    assert same_bits(early, whole)


def test_they_equal_numpys_mean_and_unbiased_covariance(features: torch.Tensor, whole: Summary) -> None:
    np.testing.assert_allclose(whole.mean, features.double().numpy().mean(0), atol=1e-14)
    np.testing.assert_allclose(whole.covariance, np.cov(features.double().numpy().T), atol=1e-14)


def test_a_mean_far_from_zero_cancels_no_digits() -> None:
    features = normal(1000, 3)
    moments = Moments(3, block_size=64)
    moments.update(features + 1e6)
    # Adding 1e6 rounds the features themselves at 1e-10; a sum of squares would be wrong by 1e-4.
    torch.testing.assert_close(moments.summary().covariance, torch.cov(features.T), atol=1e-9, rtol=0)


def test_samples_in_order_are_held_for_one_block_at_most(features: torch.Tensor) -> None:
    moments = Moments(12, block_size=64)
    for batch in features.split(10):
        moments.update(batch)
        assert len(moments.state_dict()["features"]) < 64


def test_merging_an_empty_part_changes_no_bit(features: torch.Tensor, whole: Summary) -> None:
    moments = Moments(12, block_size=64)
    moments.update(features)
    moments.merge(Moments(12, block_size=64))
    assert same_bits(moments.summary(), whole)


def test_merging_leaves_the_other_part_as_it_is(features: torch.Tensor) -> None:
    first, second = Moments(12, block_size=64), Moments(12, block_size=64)
    second.update(features[:100])
    before = second.summary()
    first.merge(second)
    first.update(features[100:])
    assert same_bits(second.summary(), before)


@pytest.mark.parametrize("index", [[5, 5], [70, 3], [1, 71]], ids=["in a batch", "summed", "held"])
def test_a_sample_that_comes_twice_is_refused(index: list[int]) -> None:
    moments = Moments(4, block_size=64)
    moments.update(normal(72, 4)) if index != [5, 5] else None
    with pytest.raises(ValueError, match="was added twice"):
        moments.update(normal(2, 4), torch.tensor(index))


def test_two_streams_that_both_count_from_zero_are_not_merged() -> None:
    first, second = Moments(4, block_size=8), Moments(4, block_size=8)
    first.update(normal(9, 4))
    second.update(normal(9, 4))
    with pytest.raises(ValueError, match="sample 0 was added twice"):
        first.merge(second)


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="counted from 0, not from -1"):
        Moments(4).update(normal(1, 4), torch.tensor([-1]))


def test_nan_is_refused_and_leaves_no_trace() -> None:
    moments = Moments(4)
    bad = normal(3, 4)
    bad[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite values, first at \[2, 1\]"):
        moments.update(bad)
    assert moments.summary().count == 0


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[B, 5\]"):
        Moments(5).update(normal(3, 4))
    with pytest.raises(ValueError, match="same number of features"):
        Moments(5).merge(Moments(4))


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="2 samples or more"):
        _ = Summary.of(normal(1, 4)).covariance
