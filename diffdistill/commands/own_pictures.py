"""A folder of images, measured: count, sizes, classes, unreadable files, and standard deviation."""

import io
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Literal

import torch
from torch import Tensor

from diffdistill.commands.doctor import Finding
from diffdistill.data.collection import Collection, listed
from diffdistill.data.files import list_images, without_common_folders
from diffdistill.data.image_folder import ImageFolder
from diffdistill.data.prepare import sizes_of
from diffdistill.data.source import MappedImages
from diffdistill.settings.schema import UserError

SIDES = (8, 16, 32, 64, 128)
"""Of the images that are made: those that there is a network for."""
MOST_BROKEN = 0.5
MEASURED = 2000
"""Images, evenly spread, that sigma_data is measured on."""
FEW = 100
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass(frozen=True)
class Pictures:
    """data: how a config reads them.  num_files: by their names; those that cannot be read are among them.
    sizes: [height, width] of each that can be measured.  sigma_data: the standard deviation of the pixels in [-1, 1],
    at the side that they are brought to.  loose: those beside the folders of others."""

    data: ImageFolder
    source: MappedImages
    num_files: int
    sizes: Sequence[tuple[int, int]]
    sigma_data: float
    loose: Sequence[str]

    @property
    def side(self) -> int:
        return self.source.image_shape[1]

    @property
    def num_broken(self) -> int:
        return self.num_files - len(self.source)

    @property
    def classes(self) -> dict[str, int]:
        """Images of each class, by its name."""
        if self.source.labels is None:
            return {}
        counts = torch.bincount(self.source.labels, minlength=self.source.num_classes).tolist()
        return dict(zip(self.source.class_names or map(str, range(len(counts))), counts, strict=True))

    def findings(self) -> list[Finding]:
        """What was measured, in words."""
        grey = ", all grey" if self.data.channels == 1 else ""
        found = [Finding("images", f"{len(self.source):,} in {self.data.path}{grey}"), self._sizes(), self._classes()]
        if self.num_broken:
            note = next(note for note in self.source.notes if "cannot be read" in note)
            found.append(Finding("unreadable files", note.removeprefix(f"{self.data.path}: ")))
        found.append(Finding("sigma_data", f"{self.sigma_data:g} at {self.side} x {self.side} pixels"))
        if len(self.source) < FEW:
            found.append(Finding("few", f"a network memorises {len(self.source)} images; use hundreds"))
        return found

    def _sizes(self) -> Finding:
        (height, width), count = Counter(self.sizes).most_common(1)[0]
        if count == len(self.sizes):
            return Finding("sizes", f"all {width} x {height}, resized to {self.side} x {self.side}")
        shorter = [min(size) for size in self.sizes]
        told = f"shorter sides of {min(shorter):,} to {max(shorter):,} pixels, median {statistics.median(shorter):g}"
        return Finding("sizes", f"{told}; cropped to their central square, resized to {self.side} x {self.side}")

    def _classes(self) -> Finding:
        counts = self.classes
        if counts:
            told = [f"{name} ({count:,})" for name, count in counts.items()]
            return Finding("classes", f"{len(counts)}, by folder: {listed(told, most=10)}")
        if self.loose:
            return Finding("classes", f"none: {len(self.loose):,} images are in no subfolder ({listed(self.loose)})")
        return Finding("classes", "none")


def look_at(place: str, *, side: int | None, with_classes: bool | None) -> Pictures:
    """Prepare the pictures in the cache, and measure them.

    side: of the images to be made; None for the largest of 8 and 16 (on a GPU up to 64) that the pictures have.
    with_classes: whether folders are classes; None where they look so: two or more that hold all pictures, two each on
    average at least.
    Raises UserError where there are none, half are broken, they are smaller than 8 pixels or of one colour, or their
    folders are a data set's parts and with_classes is None.
    """
    _check_text(place)
    listing = list_images(FilePath(place).expanduser(), setting="pictures")
    names = [item.name for item in listing.items]
    sizes = [size for size in sizes_of(Collection(place, listing.items)) if size]
    if not sizes:
        raise UserError(f"{place}: none of {len(names):,} files can be read as an image: {listed(names)}")
    folders = {name.split("/")[0] for name in without_common_folders(names) if "/" in name}
    loose = [name for name in without_common_folders(names) if "/" not in name] if folders else []
    if with_classes is None:
        _refuse_splits(place, names)
        with_classes = not loose and 1 < len(folders) <= len(names) // 2
    labels: Literal["folders", "none"] = "folders" if with_classes else "none"
    data = ImageFolder(path=place, labels=labels, resolution=side or _side_for(place, sizes))
    data, source = _prepared(data, len(names))
    if len(source) < 2:
        raise UserError(f"{place}: holds one image; a model needs many")
    sample = _sample(source)
    pixels = source.images[sample.numpy()]
    if (pixels == pixels[:1, :, :1, :1]).all():
        raise UserError(f"{place}: all {len(sample):,} images measured have a single colour; there is nothing to learn")
    if _is_grey(source):
        with quietly():
            data, source = _prepared(replace(data, channels=1), len(names))
    sigma = float(f"{source.rows(sample).std():.2g}")
    return Pictures(data, source, len(names), sizes, sigma, loose)


def _refuse_splits(place: str, names: Sequence[str]) -> None:
    inner = without_common_folders(names)
    folders = {name.split("/")[0] for name in inner if "/" in name}
    if len(folders) < 2 or not {folder.lower() for folder in folders} <= SPLITS:
        return
    parts = sorted(folders, key=str.lower)
    first = next((folder for folder in parts if folder.lower().startswith("train")), parts[0])
    one = FilePath(place) / names[0].removesuffix(inner[0]) / first
    how = f"name one of them, as {one}" if FilePath(place).expanduser().is_dir() else f"unpack it and name its {first}"
    raise UserError(
        f"{place}: {', '.join(parts)}: these are splits of a data set, not classes; {how}, or use all with --no-classes"
    )


def _is_grey(source: MappedImages) -> bool:
    """Whether all of them are; one that has colour ends the reading."""
    chunks = (source.images[begin : begin + MEASURED] for begin in range(0, len(source), MEASURED))
    return all((chunk == chunk[:, :1]).all() for chunk in chunks)


def _sample(source: MappedImages) -> Tensor:
    return torch.linspace(0, len(source) - 1, min(MEASURED, len(source))).long()


def _prepared(data: ImageFolder, num_files: int) -> tuple[ImageFolder, MappedImages]:
    """The images, and the setting that leaves out as many as are broken, where that is a hundredth or more."""
    try:
        return data, data.load()
    except UserError:
        found = replace(data, max_unreadable=MOST_BROKEN).load()  # which raises where something else is wrong
    tolerant = replace(data, max_unreadable=share_above(num_files - len(found), num_files))
    with quietly():
        return tolerant, tolerant.load()


def share_above(broken: int, num_files: int) -> float:
    """The least whole percentage above the share of the broken, which is below MOST_BROKEN: as many are refused."""
    return (100 * broken // num_files + 1) / 100


@contextmanager
def quietly() -> Iterator[None]:
    """What was said of the pictures once is not said again."""
    with redirect_stderr(io.StringIO()):
        yield


def _side_for(place: str, sizes: Sequence[tuple[int, int]]) -> int:
    shorter = statistics.median(min(size) for size in sizes)
    most = 64 if torch.cuda.is_available() else 16
    fitting = [side for side in SIDES if side <= min(shorter, most)]
    if not fitting:
        raise UserError(
            f"{place}: the shorter side of the images is {shorter:g} pixels; at least {SIDES[0]} are needed"
        )
    return fitting[-1]


def _check_text(place: str) -> None:
    try:
        place.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{place!r}: this name is not valid UTF-8, and a config cannot hold it; rename it") from None
