"""The size of a pipeline's images, where a run asks for another than its network's config says.

A composed teacher's folder says it in a file of its own: the network's `sample_size` is no place for it, for some
networks (DiT, PixArt) take their positions from it.
"""

import json
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from diffdistill.models.teachers.family import Family
from diffdistill.networks.empty import empty_weights
from diffdistill.networks.parameter_limit import limited_parameters
from diffdistill.settings.limits import MAX_SIDE
from diffdistill.settings.reading import read_json
from diffdistill.settings.schema import UserError
from diffdistill.storage.atomic import write_text_atomically

IMAGE_SIZE = "image_size.json"

Size = tuple[int, int]
"""Height and width."""


def write_size(folder: FilePath, size: Size) -> None:
    """Let a pipeline's folder say how large its images are, in pixels."""
    write_text_atomically(folder / IMAGE_SIZE, json.dumps({"height": size[0], "width": size[1]}) + "\n")


def size_files(folder: FilePath) -> list[FilePath]:
    """Where a folder says it, if it does."""
    return [folder / IMAGE_SIZE] if (folder / IMAGE_SIZE).is_file() else []


def read_size(folder: FilePath) -> Size | None:
    """What a folder says; None where it leaves it to its network's config. Raises UserError on a damaged file."""
    file = folder / IMAGE_SIZE
    if not file.is_file():
        return None
    try:
        found = read_json(file)
        sides = found["height"], found["width"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: does not say a height and a width: {error}") from None
    if not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
        raise UserError(f"{file}: height, width = {list(sides)}: must be whole numbers of pixels, 1 to {MAX_SIDE}")
    return sides


def check_size(family: Family, options: Mapping[str, Any], size: Size, *, pixels: int, origin: str) -> None:
    """Raise UserError, with the nearest sizes, unless a family's network takes images of this size.

    options: the network's.  size: in pixels.  pixels: for one of the latents, on each side.  origin: the pipeline.
    """
    if family.fixed_size:
        raise UserError(f"resolution = {_told(size)}: {origin}: {family.fixed_size}; leave it out")
    unit = pixels * latent_unit(family, options)
    most = family.most_side(options)
    limit = most * pixels // unit * unit if most else None
    nearest = [_nearest(side, unit, limit) for side in size]
    if all(side in found for side, found in zip(size, nearest, strict=True)):
        return
    told = f"multiples of {unit}" + (f" up to {limit}" if limit else "")
    wrong = {side: found for side, found in zip(size, nearest, strict=True) if side not in found}
    choices = "; ".join(f"for {side} take {' or '.join(map(str, found))}" for side, found in wrong.items())
    raise UserError(f"resolution = {_told(size)}: {origin}: sides must be {told} pixels; {choices}")


def latent_unit(family: Family, options: Mapping[str, Any]) -> int:
    """What the sides of latents must be multiples of, as the network says that a config without weights makes."""
    with empty_weights(), limited_parameters():
        net = family.build(options, family.image_shape(options), family.num_classes(options), family.class_dropout)
    return net.resolution_multiple


def _nearest(side: int, unit: int, limit: int | None) -> list[int]:
    """The allowed sides around one; itself alone where it is allowed."""
    below = side // unit * unit
    around = {below} if below == side else {below, below + unit}
    allowed = [one for one in sorted(around) if one > 0 and (limit is None or one <= limit)]
    return allowed or [limit if limit and side > limit else unit]


def _told(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else str(list(size))
