"""Arrays in a .npz file."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from diffdistill.data.arrays import read_arrays
from diffdistill.data.collection import Classes, Collection, Item, checked_classes, listed
from diffdistill.data.decode import Sizing
from diffdistill.data.prepare import load_prepared
from diffdistill.data.source import MappedImages
from diffdistill.settings.numbers import Sides
from diffdistill.settings.schema import UserError, schema


@schema
class Npz:
    """A .npz file with `images`, uint8 [N, H, W, C] or [N, C, H, W], and perhaps `labels`, integers [N].

    layout: for ambiguous arrays, such as [N, 3, 32, 3].
    resolution: centre crop and Lanczos resize to this side, or height and width.  channels: 1 for grey, 3 for RGB;
    default: unchanged.
    """

    name: Literal["npz"] = "npz"
    path: str
    layout: Literal["auto", "NHWC", "NCHW"] = "auto"
    resolution: Sides | None = None
    channels: Literal[1, 3] | None = None
    cache: str | None = None

    def load(self) -> MappedImages:
        """The prepared images. Raises UserError if the file does not hold what it should; pickles are not read."""
        file = FilePath(self.path).expanduser()
        if not file.is_file():
            raise UserError(f"data.path = {self.path!r}: no such file")
        return load_prepared(
            {"name": self.name, "layout": self.layout},
            partial(self._collect, file),
            files=[file],
            sizing=Sizing(self.resolution, self.channels),
            cache=self.cache,
        )

    def _collect(self, file: FilePath) -> Collection:
        images, labels, others = _read(file)
        images = channels_last(images, origin=self.path, layout=self.layout)
        classes = None if labels is None else _classes(labels, len(images), origin=self.path)
        return Collection(self.path, array_items(images), classes, arrays_left_out(others, origin=self.path))


def channels_last(
    images: NDArray[Any], *, origin: str, layout: Literal["auto", "NHWC", "NCHW"] = "auto"
) -> NDArray[np.uint8]:
    """[N, H, W, C] of either layout. Raises UserError unless images are uint8 of 1 or 3 channels."""
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise UserError(
            f"{origin}: `images` is {images.dtype} {list(images.shape)}; it must be uint8 [N, H, W, C] or [N, C, H, W]"
        )
    fits = {"NHWC": images.shape[3] in (1, 3), "NCHW": images.shape[1] in (1, 3)}
    if layout == "auto":
        if all(fits.values()):
            raise UserError(f"{origin}: `images` {list(images.shape)} is ambiguous; set data.layout")
        layout = "NHWC" if fits["NHWC"] else "NCHW"
    if not fits[layout]:
        raise UserError(f"{origin}: `images` is {list(images.shape)}; it must have one or three channels")
    return images if layout == "NHWC" else images.transpose(0, 2, 3, 1)


def array_items(images: NDArray[np.uint8]) -> tuple[Item, ...]:
    """One item for each of [N, H, W, C], named by its number."""
    return tuple(Item(str(number), partial(images.__getitem__, number)) for number in range(len(images)))


def arrays_left_out(names: Sequence[str], *, origin: str) -> tuple[str, ...]:
    """A note of the arrays of a file that are not used."""
    return (f"{origin}: arrays that are not used: {listed(sorted(names), most=8)}",) if names else ()


def _read(file: FilePath) -> tuple[NDArray[Any], NDArray[Any] | None, list[str]]:
    """`images`, `labels`, and the names of other arrays.

    Raises UserError if the file is damaged, a bomb, or not of this kind.
    """
    try:
        arrays, others = read_arrays(file, ("images", "labels"))
        if "images" not in arrays:
            names = ", ".join(sorted([*arrays, *others])) or "none"
            raise UserError(f"{file}: has the arrays {names}; it needs `images`")
        return arrays["images"], arrays.get("labels"), others
    except UserError:
        raise
    except Exception as error:  # a damaged zip, a pickle, a header that asks for more than there is
        raise UserError(f"{file}: cannot be read as .npz: {' '.join(str(error).split())[:200]}") from None


def _classes(labels: NDArray[Any], count: int, *, origin: str) -> Classes:
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(f"{origin}: `labels` is {labels.dtype} {list(labels.shape)}; it must be integers [{count}]")
    return checked_classes(labels.tolist(), origin=origin)
