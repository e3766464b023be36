"""A map-style torch Dataset as images to train on."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffdistill.data.dataset_classes import names_of_dataset
from diffdistill.data.source import ImageSource
from diffdistill.diffusion.on_device import upload
from diffdistill.settings.faults import short
from diffdistill.settings.schema import UserError

Range = tuple[float, float]
PICTURE_MODES = ("L", "RGB")
"""Pillow's whose numbers are grey or colours."""
CHANNELS = (1, 3, 4)
"""Of pictures. An array with more rows and columns than that shows by its axes which of them is the channels'."""
READ_AGAIN = 16  # rows that are read twice: what a coin flips is found out but for one case in 65536


def as_source(
    dataset: Any,
    *,
    value_range: Range | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    key: str | None = None,
) -> ImageSource:
    """A Dataset of images, or of (image, label), as an ImageSource; what is one already is handed back.

    An image is a PIL picture of mode L or RGB, a tensor [C, H, W], or an array [H, W, C], [C, H, W] or [H, W], uint8 or
    float.  All rows are read once, for their labels and for the key that tells this content from another when a run is
    resumed.
    value_range: of floats, (-1, 1) or (0, 1); need only be said where no value is negative.
    num_classes: where the labels do not name the last.  class_names: by label; default the dataset's `classes`, () for
    none.  key: of the content, instead of one that is made by reading.
    Raises UserError for what has no numbered rows, whose rows differ, or are not the same when they are read again,
    as those of random transforms are: such a run could not be resumed.  With `key` the caller vouches for that.  Also
    where it cannot be told which axis is the channels', or parts of the dataset number their classes in different ways.
    """
    if all(hasattr(dataset, name) for name in ("rows", "expect", "image_shape", "num_classes", "to")):
        return dataset
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UserError(f"data: {type(dataset).__name__} has no numbered rows; give a map-style Dataset")
    if not len(dataset):
        raise UserError(f"data: {type(dataset).__name__} is empty")
    if key is None:
        _check_repeats(dataset)
    found = _survey(dataset)
    if found.is_float and value_range is None and found.least >= 0:
        raise UserError(
            f"data: {type(dataset).__name__} has floats from {found.least:g} to {found.greatest:g}; say whether 0 is "
            f"black, value_range=(0, 1), or grey, value_range=(-1, 1)"
        )
    low, high = value_range or (-1.0, 1.0)
    if not low < high:
        raise UserError(f"data: value_range = {value_range}: must rise")
    if found.is_float and (found.least < low or found.greatest > high):
        raise UserError(f"data: values go from {found.least:g} to {found.greatest:g}, outside [{low:g}, {high:g}]")
    labels = torch.tensor(found.labels) if found.labels else None
    known = 0 if labels is None else int(labels.max()) + 1
    if num_classes is not None and num_classes < known:
        raise UserError(f"data: num_classes = {num_classes}, but there is a label {known - 1}")
    told = hashlib.sha256(f"{found.digest}{(low, high) if found.is_float else ''}".encode()).hexdigest()
    count = num_classes or known
    names, notes = names_of_dataset(dataset, class_names, num_classes=count, num_used=known)
    return DatasetImages(
        dataset,
        found.shape,
        labels,
        key=key or told,
        num_classes=count,
        value_range=(low, high),
        class_names=names,
        notes=notes,
    )


class DatasetImages:
    """Rows of a Dataset, read when they are asked for. A thread reads what is expected next."""

    def __init__(
        self,
        dataset: Any,
        image_shape: tuple[int, ...],
        labels: Tensor | None,
        *,
        key: str,
        num_classes: int,
        value_range: Range,
        class_names: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
        device: torch.device | None = None,
    ) -> None:
        """labels: [N] int64, below num_classes.  value_range: of floats, as the dataset has them.  class_names, notes:
        as of MappedImages."""
        self.class_names, self.notes = class_names, notes
        self.dataset, self.image_shape, self.key, self.num_classes = dataset, image_shape, key, num_classes
        self.value_range, self.device = value_range, device or torch.device("cpu")
        self.labels = None if labels is None else labels.to(self.device)
        self._reader: ThreadPoolExecutor | None = None
        self._expected: tuple[Tensor, Future[Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, index: Tensor) -> Tensor:
        expected, self._expected = self._expected, None
        ready = expected[1].result() if expected and torch.equal(expected[0], index) else self._read(index)
        return upload(ready, self.device)

    def expect(self, index: Tensor) -> None:
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="dataset")
        self._expected = (index, self._reader.submit(self._read, index))

    def to(self, device: torch.device) -> "DatasetImages":
        return self._with(device=device)

    def with_classes(
        self, labels: Tensor, *, num_classes: int, class_names: tuple[str, ...], key: str
    ) -> "DatasetImages":
        """The same images under other labels, [N] int64."""
        return self._with(labels=labels, num_classes=num_classes, class_names=class_names, key=key)

    def _with(self, **changes: Any) -> "DatasetImages":
        kept = ("labels", "key", "num_classes", "value_range", "class_names", "notes", "device")
        return DatasetImages(self.dataset, self.image_shape, **({name: getattr(self, name) for name in kept} | changes))

    def _read(self, index: Tensor) -> Tensor:
        low, high = self.value_range
        made = torch.empty(len(index), *self.image_shape)
        for place, number in enumerate(index.tolist()):
            image = _split(self.dataset[number])[0]
            scaled = image / 127.5 - 1 if image.dtype == torch.uint8 else (image - low) * (2 / (high - low)) - 1
            made[place] = scaled
        return made


class _Survey(NamedTuple):
    """Of all rows.  least, greatest: of their values."""

    shape: tuple[int, ...]
    is_float: bool
    least: float
    greatest: float
    labels: list[int]
    digest: str


def _survey(dataset: Any) -> _Survey:
    """Every row once. Raises UserError naming the row that is not like the first."""
    digest, labels = hashlib.sha256(), list[int]()
    first, least, greatest = _split(dataset[0])[0], float("inf"), float("-inf")
    for number in range(len(dataset)):
        image, label = _split(dataset[number])
        if image.shape != first.shape or image.dtype != first.dtype:
            raise UserError(
                f"data: row {number} is {image.dtype} {list(image.shape)}, row 0 {first.dtype} {list(first.shape)}"
            )
        if (label is None) != (not labels) and number:
            raise UserError(f"data: row {number} has {'no' if label is None else 'a'} label, unlike row 0")
        if label is not None:
            if label < 0:
                raise UserError(f"data: row {number} has the label {label}; labels start at 0")
            labels.append(label)
        if not image.isfinite().all():
            raise UserError(f"data: row {number} holds NaN or infinite values")
        least, greatest = min(least, float(image.min())), max(greatest, float(image.max()))
        digest.update(_bytes_of(image, label))
    digest.update(f"{first.dtype} {list(first.shape)}".encode())
    return _Survey(
        tuple(first.shape), first.is_floating_point(), least, greatest, labels, f"{len(dataset)} {digest.hexdigest()}"
    )


def _check_repeats(dataset: Any) -> None:
    """Raise UserError if a row is not the same when it is read again."""
    for number in sorted({len(dataset) * part // READ_AGAIN for part in range(READ_AGAIN)}):
        if _bytes_of(*_split(dataset[number])) != _bytes_of(*_split(dataset[number])):
            raise UserError(
                f"data: row {number} of {type(dataset).__name__} changes between reads, so a run could not be "
                "resumed; remove random transforms, or identify the content with key=..."
            )


def _split(row: Any) -> tuple[Tensor, int | None]:
    """A row's image, uint8 or float32 [C, H, W], and its label. Raises UserError."""
    parts = row if isinstance(row, (tuple, list)) and len(row) in (1, 2) else (row,)
    image, label = parts if len(parts) == 2 else (parts[0], None)
    if not isinstance(image, Tensor):
        if (mode := getattr(image, "mode", "RGB")) not in PICTURE_MODES:  # numbers of a palette, say, are no colours
            raise UserError(f"data: an image has the mode {mode!r}; use image.convert('RGB'), or convert('L')")
        try:
            image = torch.from_numpy(np.array(image))
        except (TypeError, ValueError):
            raise UserError(f"data: a row is {type(row).__name__}; give an image, or (image, label)") from None
        image = _channels_first(image)
    elif _ends_in_channels(image):
        raise UserError(
            f"data: an image is a tensor {list(image.shape)}; tensors are [C, H, W]: image.permute(2, 0, 1)"
        )
    if image.ndim != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise UserError(f"data: an image is {image.dtype} {list(image.shape)}; give uint8 or float [C, H, W]")
    if label is not None and not _is_number(label):
        raise UserError(f"data: a label is {short(label)}; give the number of its class")
    return (image if image.dtype == torch.uint8 else image.float()), None if label is None else int(label)


def _channels_first(array: Tensor) -> Tensor:
    """What was an array as [C, H, W]. Raises UserError if its axes do not show which one is the channels'."""
    if array.ndim != 3:
        return array[None] if array.ndim == 2 else array
    starts, ends = (array.shape[axis] in CHANNELS for axis in (0, 2))
    if array.dtype == torch.uint8:
        return array if starts and not ends else array.permute(2, 0, 1)
    if ends and not _ends_in_channels(array):
        raise UserError(
            f"data: an image is a float array {list(array.shape)}, [C, H, W] or [H, W, C]; give a tensor [C, H, W]"
        )
    return array.permute(2, 0, 1) if ends else array


def _ends_in_channels(image: Tensor) -> bool:
    """Whether an image can be nothing but [H, W, C]."""
    return image.ndim == 3 and image.shape[2] in CHANNELS and min(image.shape[:2]) > max(CHANNELS)


def _is_number(label: Any) -> bool:
    """Whether it is one integer."""
    if isinstance(label, Tensor):
        return label.numel() == 1 and not label.is_floating_point() and label.dtype != torch.bool
    return isinstance(label, (int, np.integer)) and not isinstance(label, bool)


def _bytes_of(image: Tensor, label: int | None) -> bytes:
    return image.cpu().contiguous().numpy().tobytes() + f"|{label}|".encode()
