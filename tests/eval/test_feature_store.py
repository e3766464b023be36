"""Features on disk: in order whatever wrote them, and never a damaged block."""

from pathlib import Path

import pytest
import torch

from diffdistill.eval.features.store import BLOCK, FeatureStore, hash_features, locked
from diffdistill.settings.schema import UserError

FEATURES = torch.randn(BLOCK + 44, 3, generator=torch.Generator().manual_seed(0))


def filled(folder: Path, *, order: tuple[int, ...] = (0, 1)) -> FeatureStore:
    store = FeatureStore(folder, len(FEATURES))
    for block in order:
        store.write(block, {"pixels": FEATURES[store.samples(block)]})
    return store


def test_features_come_back_in_the_samples_order_bit_for_bit(tmp_path: Path) -> None:
    store = filled(tmp_path, order=(1, 0))
    assert torch.equal(store.all("pixels"), FEATURES)
    assert [len(rows) for rows in store.rows("pixels")] == [BLOCK, 44]


@pytest.mark.parametrize("count", [1, BLOCK, BLOCK + 1, 10**6])
def test_the_first_samples_are_read_alone(tmp_path: Path, count: int) -> None:
    assert torch.equal(filled(tmp_path).all("pixels", max_samples=count), FEATURES[:count])


def test_what_is_not_there_is_missing(tmp_path: Path) -> None:
    store = filled(tmp_path, order=(1,))
    assert [store.has(block) for block in (0, 1)] == [False, True]
    with pytest.raises(UserError, match="block 0 is missing"):
        store.read(0)


@pytest.mark.parametrize("fault", ["truncated", "changed", "empty"])
def test_a_damaged_block_is_missing_and_removed(tmp_path: Path, fault: str) -> None:
    store = filled(tmp_path)
    file = next(tmp_path.glob("000001-*"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes({"truncated": file.read_bytes()[:-1], "changed": bytes(data), "empty": b""}[fault])
    assert [store.has(block) for block in (0, 1)] == [True, False]
    assert not file.exists()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        filled(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_hash_is_of_all_rows_and_not_of_the_blocks(tmp_path: Path) -> None:
    whole = hash_features([filled(tmp_path / "whole")], "pixels")
    first, second = FeatureStore(tmp_path / "first", 100), FeatureStore(tmp_path / "second", len(FEATURES) - 100)
    first.write(0, {"pixels": FEATURES[:100]})
    second.write(0, {"pixels": FEATURES[100:]})
    assert hash_features([first, second], "pixels") == whole
    assert hash_features([second, first], "pixels") != whole


def test_two_evaluations_do_not_share_a_folder(tmp_path: Path) -> None:
    under_way = pytest.raises(UserError, match="another evaluation of the same images is running")
    with locked(tmp_path), under_way, locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
