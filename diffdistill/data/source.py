"""Images as the trainer sees them: rows by number, float32 in [-1, 1], on the right device."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffdistill.diffusion.on_device import upload


class ImageSource(Protocol):
    """A data set that is ready to train on."""

    @property
    def key(self) -> str:
        """Tells one content from another: the same images and labels in the same order have the same key."""
        ...

    @property
    def image_shape(self) -> tuple[int, ...]:
        """[C, H, W]."""
        ...

    @property
    def num_classes(self) -> int:
        """0 without labels."""
        ...

    @property
    def labels(self) -> Tensor | None:
        """[N] int64 on the source's device."""
        ...

    def __len__(self) -> int: ...

    def rows(self, index: Tensor) -> Tensor:
        """The images with these numbers: [B, C, H, W] float32 in [-1, 1] on the source's device.

        index: [B] int64 on the CPU.
        """
        ...

    def expect(self, index: Tensor) -> None:
        """`rows` will soon be asked for these; the source may begin to read them."""
        ...

    def to(self, device: torch.device) -> "ImageSource":
        """The same images for another device."""
        ...


class TensorImages:
    """Images that lie in memory on the device."""

    def __init__(self, images: Tensor, labels: Tensor | None) -> None:
        """images: [N, C, H, W] float32 in [-1, 1]; labels: [N] int64."""
        self.images, self.labels = images, labels

    @cached_property
    def key(self) -> str:
        parts = [self.images, *([] if self.labels is None else [self.labels])]
        return hashlib.sha256(b"".join(part.cpu().contiguous().numpy().tobytes() for part in parts)).hexdigest()

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    @cached_property
    def num_classes(self) -> int:
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, index: Tensor) -> Tensor:
        return self.images[upload(index, self.images.device)]

    def expect(self, index: Tensor) -> None:
        """Nothing: they are there."""

    def to(self, device: torch.device) -> "TensorImages":
        return TensorImages(self.images.to(device), None if self.labels is None else self.labels.to(device))


class MappedImages:
    """uint8 images on disk, memory-mapped; x / 127.5 - 1 at access. A thread reads what is expected next."""

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: Tensor | None,
        *,
        key: str,
        num_classes: int,
        device: torch.device | None = None,
        class_names: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        """images: [N, C, H, W]; labels: [N] int64, below num_classes.  notes: what was left out or changed.

        class_names: by label; empty where labels are plain numbers.
        """
        self.images, self.key, self.num_classes, self.notes = images, key, num_classes, notes
        self.class_names = class_names
        self.device = device or torch.device("cpu")
        self.labels = None if labels is None else labels.to(self.device)
        self._reader: ThreadPoolExecutor | None = None
        self._expected: tuple[Tensor, Future[Tensor]] | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, index: Tensor) -> Tensor:
        expected, self._expected = self._expected, None
        ready = expected[1].result() if expected and torch.equal(expected[0], index) else self._read(index)
        return upload(ready, self.device)

    def expect(self, index: Tensor) -> None:
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._expected = (index, self._reader.submit(self._read, index))

    def to(self, device: torch.device) -> "MappedImages":
        return self._with(device=device)

    def with_classes(
        self, labels: Tensor, *, num_classes: int, class_names: tuple[str, ...], key: str
    ) -> "MappedImages":
        """The same images under other labels, [N] int64."""
        return self._with(labels=labels, num_classes=num_classes, class_names=class_names, key=key)

    def _with(self, **changes: Any) -> "MappedImages":
        kept = ("labels", "key", "num_classes", "class_names", "device", "notes")
        return MappedImages(self.images, **({name: getattr(self, name) for name in kept} | changes))

    def _read(self, index: Tensor) -> Tensor:
        # numpy, for it stays on one thread and lets go of the interpreter; torch would start a second team of threads.
        values = self.images.take(index.numpy(), axis=0).astype(np.float32)
        values /= 127.5
        values -= 1
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


class LatentImages:
    """Latents on disk, memory-mapped, in float32, as the network is given them."""

    def __init__(
        self,
        shards: Sequence[Tensor],
        labels: Tensor | None,
        *,
        key: str,
        num_classes: int,
        class_names: tuple[str, ...] = (),
        device: torch.device | None = None,
    ) -> None:
        """shards: [n_i, C, h, w] each, one after the other; labels: [N] int64, below num_classes."""
        self.shards, self.key, self.num_classes, self.class_names = tuple(shards), key, num_classes, class_names
        self.device = device or torch.device("cpu")
        self.labels = None if labels is None else labels.to(self.device)
        self._bounds = torch.tensor([0, *(len(shard) for shard in self.shards)]).cumsum(0)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.shards[0].shape[1:])

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def rows(self, index: Tensor) -> Tensor:
        which = torch.searchsorted(self._bounds, index, right=True) - 1
        found = torch.empty(len(index), *self.image_shape)
        for number in which.unique().tolist():
            is_here = which == number
            found[is_here] = self.shards[number][index[is_here] - self._bounds[number]]
        return upload(found, self.device)

    def expect(self, index: Tensor) -> None:
        """Nothing: the operating system reads ahead."""

    def to(self, device: torch.device) -> "LatentImages":
        return LatentImages(
            self.shards,
            self.labels,
            key=self.key,
            num_classes=self.num_classes,
            class_names=self.class_names,
            device=device,
        )


class NoImages:
    """Where a method needs none: a shape and no rows."""

    num_classes = 0
    labels: Tensor | None = None

    def __init__(self, image_shape: tuple[int, ...], device: torch.device | None = None, *, key: str = "none") -> None:
        self.image_shape, self.device, self.key = image_shape, device or torch.device("cpu"), key

    def __len__(self) -> int:
        return 0

    def rows(self, index: Tensor) -> Tensor:
        return torch.empty(0, *self.image_shape, device=self.device)

    def expect(self, index: Tensor) -> None:
        """Nothing: there are none."""

    def to(self, device: torch.device) -> "NoImages":
        return NoImages(self.image_shape, device, key=self.key)
