"""Images before they are prepared: a name and a way to read each, in a stable order, with labels."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffdistill.settings.limits import MAX_CLASSES, MAX_NAMES_BYTES
from diffdistill.settings.schema import UserError

MAX_FILE_BYTES = 256 * 2**20
"""The most that one encoded image may hold, on disk or unpacked."""

MAX_UNREADABLE = 0.01
"""The share of a set's images from which on they are not left out, but an error."""

NAME_ROOM = 8
"""Bytes around a name in state.json: a comma, a line break, and how far it is indented."""

Content = bytes | NDArray[np.uint8]
"""An encoded image file, or pixels [H, W, C]."""


class UnreadableImage(Exception):  # noqa: N818
    """One image that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Item:
    """One image. `read` raises UnreadableImage or OSError.  part: the file it lies in, where a set has several."""

    name: str
    read: Callable[[], Content]
    part: str = ""


@dataclass(frozen=True)
class Classes:
    """labels: one for each item.  names: of the classes, by label; empty where labels are plain numbers."""

    labels: tuple[int, ...]
    count: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Collection:
    """Everything that a data set holds.

    origin: what the user called it, for messages.  notes: what the user should know, a line each.
    is_lasting: whether the files that were named for it hold all of its content.
    whole: all items of the set that it is a part of, by which damage is judged; None: its own.
    max_unreadable: fewer than this share of them are left out where they cannot be read.
    """

    origin: str
    items: Sequence[Item]
    classes: Classes | None = None
    notes: tuple[str, ...] = ()
    is_lasting: bool = True
    whole: Sequence[Item] | None = None
    max_unreadable: float = MAX_UNREADABLE

    @property
    def all_items(self) -> Sequence[Item]:
        """Of the whole set."""
        return self.items if self.whole is None else self.whole


def numbered_classes(values: Sequence[str], *, origin: str) -> Classes:
    """Labels from text: numbers as they are, else names, sorted and counted from 0.

    Raises UserError on an empty label and on numbers that no network can hold.
    """
    if "" in values:
        raise UserError(f"{origin}: a label is empty")
    if all(re.fullmatch(r"[0-9]{1,9}", value) for value in values):
        return checked_classes([int(value) for value in values], origin=origin)
    names = sorted(set(values))
    _check_names(names, origin)
    number = {name: i for i, name in enumerate(names)}
    return Classes(tuple(number[value] for value in values), len(names), tuple(names))


def checked_classes(values: Iterable[int], *, origin: str, names: tuple[str, ...] = ()) -> Classes:
    """Labels that are numbers already. names: of the classes, where they are known.

    Raises UserError if one is negative or too large.
    """
    _check_names(names, origin)
    labels = tuple(int(value) for value in values)
    low, high = min(labels, default=0), max(labels, default=0)
    limit = len(names) or MAX_CLASSES
    if low < 0 or high >= limit:
        raise UserError(f"{origin}: labels go from {low} to {high}; they must lie in 0 to {limit - 1}")
    return Classes(labels, len(names) or high + 1, names)


def _check_names(names: Sequence[str], origin: str) -> None:
    """Raises UserError on more or longer names than a checkpoint's state.json holds: networks have a row for each."""
    if len(names) > MAX_CLASSES:
        raise UserError(f"{origin}: {len(names):,} classes; at most {MAX_CLASSES:,} are read")
    size = sum(len(json.dumps(name)) + NAME_ROOM for name in names)
    if size > MAX_NAMES_BYTES:
        raise UserError(f"{origin}: the names of its classes take {size:,} bytes; at most {MAX_NAMES_BYTES:,} are kept")


def shown(name: str) -> str:
    """A file's name as it may be printed: without control characters and bytes that are no text."""
    return name if name.isprintable() else ascii(name)


def listed(names: Sequence[str], *, most: int = 3) -> str:
    """The first few names, and how many more there are."""
    first = ", ".join(shown(name) for name in names[:most])
    return first + (f" and {len(names) - most:,} more" if len(names) > most else "")


def is_minority(damaged: int, total: int) -> bool:
    """Whether a set goes on without its damaged parts: as long as they are no more than half of several."""
    return total > 1 and 2 * damaged <= total


def checked_size(size: int) -> int:
    """`size` in bytes. Raises UnreadableImage if no image should be that large."""
    if size > MAX_FILE_BYTES:
        raise UnreadableImage(f"{size / 2**20:,.0f} MiB, over the limit of {MAX_FILE_BYTES // 2**20} MiB")
    return size
