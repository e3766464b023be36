"""Images of several aspects: the list of sizes, and the order in which batches of one size each are drawn."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffdistill.data.buckets import BLOCK, BucketedImages, BucketOrder, BucketsConfig, bucket_sizes, nearest_bucket
from diffdistill.data.captioned_images import CaptionedImages
from diffdistill.data.order import DataOrder
from diffdistill.data.source import TensorImages
from diffdistill.settings.schema import UserError

BATCH = 4


def test_sizes_are_of_about_one_area_within_the_aspects_and_the_steps() -> None:
    sizes = bucket_sizes((1024, 1024), BucketsConfig(step=64, most_aspect=2.0))
    assert (1024, 1024) in sizes
    assert all(side % 64 == 0 for size in sizes for side in size)
    assert all(max(size) <= 2 * min(size) for size in sizes)
    assert all(abs(height * width / 1024**2 - 1) < 32 / 704 for height, width in sizes)
    assert set(sizes) == {(width, height) for height, width in sizes}
    assert [round(height / width, 6) for height, width in sizes] == sorted(
        round(height / width, 6) for height, width in sizes
    )
    assert {size for size in sizes if size[0] >= size[1]} == {
        *((1024, 1024), (1088, 960), (1152, 896), (1280, 832), (1344, 768)),
    }
    assert (40, 24) in bucket_sizes((40, 24), BucketsConfig(step=16))


@pytest.mark.parametrize(
    ("size", "found"), [((100, 100), 1), ((100, 199), 0), ((3000, 1000), 2), ((13, 12), 1), ((4, 3), 2)]
)
def test_an_image_goes_to_the_nearest_aspect(size: tuple[int, int], found: int) -> None:
    assert nearest_bucket(size, [(8, 16), (10, 10), (13, 9)]) == found


def part(count: int, height: int, width: int, first_label: int) -> TensorImages:
    images = torch.arange(count).reshape(-1, 1, 1, 1).expand(count, 1, height, width).float()
    return TensorImages(images, first_label + torch.arange(count))


@pytest.fixture
def source() -> BucketedImages:
    """Of 30, 9 and 1 images, whose labels are their numbers."""
    return BucketedImages([part(30, 2, 2, 0), part(9, 1, 4, 30), part(1, 4, 1, 39)], (1, 2, 2))


def labels_of(order: BucketOrder, steps: range, batch: int = BATCH) -> list[list[int]]:
    found = []
    for step in steps:
        images, labels = order.take(step * batch, batch, next_first=(step + 1) * batch)
        assert labels is not None
        assert len(images) == batch
        found.append(labels.tolist())
    return found


def bucket_of(label: int) -> int:
    return 0 if label < 30 else 1 if label < 39 else 2


def test_a_batch_is_of_one_bucket_and_each_bucket_has_its_share(source: BucketedImages) -> None:
    batches = labels_of(BucketOrder(source, 0, batch=BATCH), range(2 * BLOCK))
    assert all(len({bucket_of(label) for label in batch}) == 1 for batch in batches)
    for block in (batches[:BLOCK], batches[BLOCK:]):
        counts = Counter(bucket_of(batch[0]) for batch in block)
        assert all(abs(counts[number] - BLOCK * share / 40) < 1 for number, share in enumerate((30, 9, 1)))
    buckets = [bucket_of(batch[0]) for batch in batches]
    assert buckets[:BLOCK] != buckets[BLOCK:]


def test_a_bucket_s_images_come_once_an_epoch_each(source: BucketedImages) -> None:
    batches = labels_of(BucketOrder(source, 3, batch=BATCH), range(BLOCK))
    for number, count in enumerate((30, 9, 1)):
        seen = [label for batch in batches for label in batch if bucket_of(label) == number]
        epochs = [sorted(seen[at : at + count]) for at in range(0, len(seen) - count + 1, count)]
        assert len(epochs) > 2
        assert all(epoch == epochs[0] and len(set(epoch)) == count for epoch in epochs)


def test_it_depends_on_the_seed_and_the_step_alone(source: BucketedImages) -> None:
    """So a resumed run goes on as it would have, and processes and micro-batches share one batch."""
    whole = labels_of(BucketOrder(source, 0, batch=BATCH), range(BLOCK + 40))
    late = BucketOrder(source, 0, batch=BATCH)
    assert labels_of(late, range(BLOCK + 30, BLOCK + 40)) == whole[-10:]
    assert labels_of(late, range(5)) == whole[:5]
    parts = [late.take(7 * BATCH + at, 2, next_first=8 * BATCH + at)[1] for at in (0, 2)]
    assert torch.cat([one for one in parts if one is not None]).tolist() == whole[7]
    assert labels_of(BucketOrder(source, 1, batch=BATCH), range(20)) != whole[:20]


def test_images_of_some_classes_alone_are_drawn(source: BucketedImages) -> None:
    batches = labels_of(BucketOrder(source, 0, batch=BATCH, classes=(2, 31)), range(64))
    assert {label for batch in batches for label in batch} == {2, 31}
    with pytest.raises(UserError, match="no image of the classes"):
        BucketOrder(source, 0, batch=BATCH, classes=(99,))


def test_images_of_one_bucket_alone_are_read_at_once(source: BucketedImages) -> None:
    assert source.rows(torch.tensor([30, 38])).shape == (2, 1, 1, 4)
    assert source.rows(torch.tensor([38]))[0, 0, 0, 0] == 8
    with pytest.raises(ValueError, match=r"buckets \[0, 1\] are of different sizes"):
        source.rows(torch.tensor([29, 30]))


def test_without_buckets_the_order_is_as_it_was() -> None:
    """Numbers that runs of before have seen."""
    rows: Tensor = DataOrder(part(5, 2, 2, 0), 0).rows(0, 10)
    assert sorted(rows[:5].tolist()) == sorted(rows[5:].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["no image", "the end is missing"])
def test_a_damaged_image_counts_among_all_not_in_its_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """The only image of the middle size is damaged: one of 101. Two are too many, in one bucket or in two."""
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for number in range(101):
        (tmp_path / "images" / f"{number}.txt").write_text("a caption")
        Image.new("RGB", (40, 20) if number % 2 else (20, 40), (number, 0, 0)).save(
            tmp_path / "images" / f"{number}.png"
        )
    (tmp_path / "images" / "7.png").write_bytes(b"no image" if damage == "no image" else cut_short((16, 16)))
    data = CaptionedImages(path=str(tmp_path / "images"))
    found = data.captions().bucketed((16, 16), [(12, 20), (16, 16), (20, 12)], 3, None)
    assert {part.image_shape: len(part) for part in found.parts} == {(3, 12, 20): 49, (3, 20, 12): 51}
    assert len(found.notes) == 1
    assert "1 of 101 images (0.99%) cannot be read and are left out: 7.png" in found.notes[0]
    again = data.captions().bucketed((16, 16), [(12, 20), (16, 16), (20, 12)], 3, None)
    assert again.key == found.key
    (tmp_path / "images" / "8.png").write_bytes(cut_short((16, 16)))
    with pytest.raises(UserError, match=r"2 of 101 images cannot be read \(fewer than 1% are left out"):
        data.captions().bucketed((16, 16), [(12, 20), (16, 16), (20, 12)], 3, None)
    Image.new("RGB", (20, 40)).save(tmp_path / "images" / "8.png")
    for name in ("7.png", "9.png"):  # each of another bucket, and fewer than a hundredth
        (tmp_path / "images" / name).write_bytes(b"no image" if name == "7.png" else cut_short((40, 20)))
    with pytest.raises(UserError, match="2 of 101 images cannot be read"):
        data.captions().bucketed((16, 16), [(12, 20), (16, 16), (20, 12)], 3, None)


def cut_short(size: tuple[int, int]) -> bytes:
    """A PNG whose end is missing."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, "PNG")
    return made.getvalue()[:400]
