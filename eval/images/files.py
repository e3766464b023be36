"""Images to be judged, or to be compared with, from files: a folder, a zip, or arrays in a .npz file.

They are read as the data sets of training are (diffdistill/data): nothing is unpacked, nothing is written, links are
not followed, no pickle is run. But where training leaves a damaged image out, here it is an error: a distance of
49,999 images is another number.
"""

import hashlib
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any, Literal
from typing import Protocol as Interface

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffdistill.data.arrays import check_header, read_arrays
from diffdistill.data.classes import class_names_of
from diffdistill.data.collection import Item, UnreadableImage, listed, shown
from diffdistill.data.decode import Sizing, decode
from diffdistill.data.files import check_unpacked_size, list_images
from diffdistill.data.image_folder import classes_of_folders
from diffdistill.data.npz import array_items, arrays_left_out, channels_last
from diffdistill.data.source import ImageSource, MappedImages
from diffdistill.eval.images.preparation import prepare
from diffdistill.eval.protocols.protocol import Preparation
from diffdistill.settings.schema import UserError
from diffdistill.storage.checkpoint import STATE

NPZ_KEYS = ("images", "arr_0")
"""Ours, and that of ADM's sample files."""
A_CHECKPOINT = re.compile(rf"((?:.*/)?)checkpoints/[^/]+/{re.escape(STATE)}")


class Images(Interface):
    """Images by number, as the protocol prepares them."""

    @property
    def origin(self) -> str:
        """What the user called them, for messages."""
        ...

    def __len__(self) -> int: ...

    def rows(self, index: Tensor) -> Tensor:
        """[B, C, H, W], uint8 or float in [-1, 1].  index: [B] int64."""
        ...

    @property
    def notes(self) -> str:
        """What was done to images that their owner may not expect, as far as they were read."""
        ...

    def class_names(self, count: int | None = None) -> tuple[str, ...]:
        """Of the classes of all, or the first `count`, by label; () where nothing says, or they are all the numbers."""
        ...


@dataclass
class ImageFiles:
    """Images in files, sorted by name; the next ones are decoded while these are used.

    channels: 1 for grey, 3 for RGB.  is_judged: files that have lost what JPEG loses are refused unless the
    preparation names them; real images may come as they are.  left_out: what of the place is not used, in lines.
    """

    origin: str
    items: Sequence[Item]
    preparation: Preparation
    channels: int = 3
    is_judged: bool = True
    left_out: tuple[str, ...] = ()
    _noted: Counter[str] = field(default_factory=Counter)
    _ahead: dict[int, Future[Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    def rows(self, index: Tensor) -> Tensor:
        """Raises UserError naming the first image that is damaged, of another size, or refused."""
        numbers = index.tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(self):
            raise UserError(f"{self.origin}: holds {len(self):,} images; number {max(numbers):,} was asked for")
        pending = {number: self._ahead.get(number) or self._submit(number) for number in numbers}
        following = range(numbers[-1] + 1, min(numbers[-1] + 1 + len(numbers), len(self)))
        self._ahead = {number: pending.get(number) or self._submit(number) for number in following}
        images = [pending[number].result() for number in numbers]
        for number, image in zip(numbers, images, strict=True):
            if image.shape != images[0].shape:
                raise UserError(self._sizes_differ((numbers[0], number), (images[0], image)))
        return torch.stack(images)

    @property
    def notes(self) -> str:
        parts = [f"{count:,} are {note}" for note, count in sorted(self._noted.items())]
        return "; ".join([*self.left_out, *([f"{self.origin}: {'; '.join(parts)}"] if parts else [])])

    def class_names(self, count: int | None = None) -> tuple[str, ...]:
        """Of the outermost folders, where all images are in such and they have other names than numbers."""
        try:
            classes = classes_of_folders([item.name for item in self.items], origin=self.origin)
        except UserError:  # some are in none
            return ()
        return tuple(classes.names[number] for number in sorted(set(classes.labels[:count]))) if classes.names else ()

    @cached_property
    def sha256(self) -> str:
        """Of all files' contents, in order; their names do not matter. Reads every file."""
        digest = hashlib.sha256()
        for item in self.items:
            content = self._read(item)
            digest.update(hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).digest())
        return digest.hexdigest()

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="images")

    def _submit(self, number: int) -> "Future[Tensor]":
        return self._threads.submit(self._decode, number)

    def _decode(self, number: int) -> Tensor:
        item = self.items[number]
        content = self._read(item)
        if self.is_judged and isinstance(content, bytes):
            self._refuse_other_encoding(item, content)
        try:
            made = decode(content, Sizing(channels=self.channels))
        except UnreadableImage as error:
            raise UserError(f"{self.origin}: {shown(item.name)} cannot be read: {error}") from None
        self._noted.update(made.notes)
        pixels = torch.from_numpy(np.require(made.pixels, requirements="W"))  # some of Pillow's are read-only
        return prepare(pixels[None], self.preparation)[0]

    def _read(self, item: Item) -> bytes | NDArray[np.uint8]:
        try:
            return item.read()
        except UnreadableImage as error:
            raise UserError(f"{self.origin}: {shown(item.name)} cannot be read: {error}") from None
        except OSError as error:
            raise UserError(f"{self.origin}: {shown(item.name)} cannot be read: {error.strerror}") from None

    def _refuse_other_encoding(self, item: Item, content: bytes) -> None:
        found, wanted = "jpeg" if is_lossy(content) else "lossless", self.preparation.encoding
        if found != wanted:
            raise UserError(
                f"{self.origin}: {shown(item.name)} is {'' if found == 'lossless' else 'no '}lossless file, and the "
                f"protocol's preparation.encoding is {wanted}; its metrics would not be comparable"
            )

    def _sizes_differ(self, numbers: tuple[int, int], images: tuple[Tensor, Tensor]) -> str:
        sizes = [
            f"{shown(self.items[number].name)} is {image.shape[2]} x {image.shape[1]}"
            for number, image in zip(numbers, images, strict=True)
        ]
        return f"{self.origin}: images differ in size ({', '.join(sizes)}), and the protocol does not resize them"


@dataclass
class DataImages:
    """A training data set as images to compare with."""

    origin: str
    source: ImageSource
    preparation: Preparation
    notes: str = ""

    def __len__(self) -> int:
        return len(self.source)

    def class_names(self, count: int | None = None) -> tuple[str, ...]:
        """Where some numbers have no image those that have are told by them."""
        if self.source.labels is None:
            return ()
        used = self.source.labels[:count].unique().tolist()
        names = class_names_of(self.source)
        if names:
            return tuple(names[number] for number in used)
        return () if used == list(range(len(used))) else tuple(map(str, used))

    def rows(self, index: Tensor) -> Tensor:
        if isinstance(self.source, MappedImages):  # uint8 as they lie on the disk
            return prepare(torch.from_numpy(self.source.images[index.numpy()]), self.preparation)
        return prepare(self.source.rows(index).cpu(), self.preparation)


def open_images(
    place: str | FilePath, preparation: Preparation, *, channels: int = 3, is_judged: bool = True
) -> ImageFiles:
    """The images of a folder, a zip or a .npz file. See ImageFiles for the options.

    Raises UserError if there are none, the folder is of runs, or the archive must not be trusted.
    """
    path = FilePath(place).expanduser()
    if path.suffix.lower() == ".npz" and path.is_file():
        images, others = _array(path)
        left_out = arrays_left_out(others, origin=str(place))
        layout: Literal["NHWC", "NCHW"] = "NHWC" if images.shape[-1:] in ((1,), (3,)) else "NCHW"
        items = array_items(channels_last(images, origin=str(place), layout=layout))
    else:
        listing = list_images(path, setting=None)
        _refuse_runs(str(place), listing.others)
        items, left_out = listing.items, listing.notes(str(place))
        _refuse_two_formats(str(place), [item.name for item in items], is_judged=is_judged)
    return ImageFiles(str(place), items, preparation, channels, is_judged, left_out)


def in_number_order(images: ImageFiles) -> ImageFiles:
    """The same in the order of the numbers in their names, 2.png before 10.png: so that image i is caption i's."""
    items = sorted(images.items, key=lambda item: (_by_number(item.name), item.name))
    if [item.name for item in items] == [item.name for item in images.items]:
        return images
    first = ", ".join(shown(item.name) for item in items[:3])
    note = f"{images.origin}: captions are taken for images by the numbers in their names: {first}, ..."
    return replace(images, items=tuple(items), left_out=(*images.left_out, note))


def _by_number(name: str) -> list[tuple[int, str]]:
    """Text and numbers in turn; of two numbers the one of fewer digits is less."""
    parts = re.split(r"([0-9]+)", name)
    return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else (0, part) for i, part in enumerate(parts)]


def is_lossy(content: bytes) -> bool:
    """Whether a file's first bytes are those of a JPEG or of a WebP that is not lossless."""
    is_webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    return content[:3] == b"\xff\xd8\xff" or (is_webp and content[12:16] == b"VP8 ")


def _refuse_two_formats(origin: str, names: list[str], *, is_judged: bool) -> None:
    """Two formats among judged images mean two sets in one folder, or a broken run."""
    kinds = Counter(FilePath(name).suffix.lower().replace(".jpeg", ".jpg") for name in names)
    if is_judged and len(kinds) > 1:
        found = ", ".join(f"{count:,} x {kind}" for kind, count in kinds.most_common())
        odd = min(kinds, key=lambda kind: (kinds[kind], kind))
        first = [name for name in names if FilePath(name).suffix.lower().replace(".jpeg", ".jpg") == odd]
        raise UserError(f"{origin}: holds images of more than one format ({found}), such as {listed(first, most=1)}")


def _refuse_runs(origin: str, files: Iterable[str]) -> None:
    """Raise UserError for runs, whose pictures are their curves and previews.  files: that are no images, by name."""
    found = sorted({FilePath(match[1]) for match in map(A_CHECKPOINT.fullmatch, files) if match})
    if found == [FilePath()]:
        raise UserError(f"{origin}: is a run, not images")
    if found:
        choices = listed([str(FilePath(origin) / run) for run in found], most=5)
        raise UserError(f"{origin}: holds runs, not images; name one of them: {choices}")


def _array(file: FilePath) -> tuple[NDArray[Any], list[str]]:
    """The images of a .npz file, mapped from the disk where they are not compressed, and the other arrays' names.

    Raises UserError if the file is damaged, a bomb, or has no images.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            check_unpacked_size(archive, file)
            names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
            key = next((key for key in NPZ_KEYS if key in names), None)
            if key is None:
                raise UserError(
                    f"{file}: has the arrays {listed(names, most=8) or 'none'}; it needs `images` or `arr_0`"
                )
            others = [name for name in names if name != key]
            info = archive.getinfo(f"{key}.npy")
            if info.compress_type == zipfile.ZIP_STORED:
                return _mapped(file, info), others
        return read_arrays(file, (key,))[0][key], others
    except UserError:
        raise
    except Exception as error:  # a damaged zip, a pickle, a header that asks for more than there is
        raise UserError(f"{file}: cannot be read as .npz: {' '.join(str(error).split())[:200]}") from None


def _mapped(file: FilePath, info: zipfile.ZipInfo) -> NDArray[Any]:
    """An uncompressed member as a memory map, so that memory does not grow with the number of images."""
    with file.open("rb") as handle:
        handle.seek(info.header_offset + 26)
        name_length, extra_length = np.frombuffer(handle.read(4), "<u2").tolist()
        handle.seek(name_length + extra_length, os.SEEK_CUR)
        shape, is_fortran, dtype = check_header(handle, file.stat().st_size, f"`{info.filename}`")
        return np.memmap(file, dtype, "r", handle.tell(), shape, "F" if is_fortran else "C")
