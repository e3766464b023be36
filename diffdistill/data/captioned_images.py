"""Images in a folder or a zip, with a caption each."""

import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import BinaryIO, Literal

from diffdistill.data.buckets import BucketsConfig
from diffdistill.data.captions import (
    TABLES,
    Captions,
    Row,
    checked_caption,
    find_column,
    first_rows,
    open_file,
    paired,
    read_column,
    read_item,
    read_rows,
)
from diffdistill.data.collection import listed
from diffdistill.data.decode import Sizing
from diffdistill.data.files import Listing, list_images
from diffdistill.data.names import find_name, match_names, nearest
from diffdistill.data.source import MappedImages
from diffdistill.settings.numbers import Sides
from diffdistill.settings.schema import UserError, schema
from diffdistill.settings.text import read_text

FILE_COLUMNS = ("file", "file_name")


@schema
class CaptionedImages:
    """Images below a folder or in a zip, with a caption each: in a .txt file of the same name beside it, or in
    `captions_file`, a .csv, .tsv or .jsonl on disk or among the images, with the columns file, or file_name, and
    caption.

    caption_column: default caption, text or prompt.
    resolution: centre crop and Lanczos resize to this side, or height and width; default: the teacher's
    `resolution`, or else all images must have one size.  buckets: several sizes of about its area instead of one.
    """

    name: Literal["captioned_images"] = "captioned_images"
    path: str
    captions_file: str | None = None
    caption_column: str | None = None
    resolution: Sides | None = None
    buckets: BucketsConfig | None = None
    channels: Literal[1, 3] = 3
    cache: str | None = None

    has_captions = True
    has_images = True

    def __post_init__(self) -> None:
        if self.caption_column and not self.captions_file:
            raise ValueError(f"caption_column = {self.caption_column!r}: goes with captions_file")

    @property
    def sizing(self) -> Sizing:
        return Sizing(self.resolution, self.channels)

    def load(self) -> MappedImages:
        """The prepared images; their labels are the numbers of their captions."""
        return self.captions().images(self.sizing, self.cache)

    def captions(self) -> Captions:
        """Every image that has a caption. Raises UserError if a hundredth has none, or the captions are no UTF-8."""
        root = FilePath(self.path).expanduser()
        listing = list_images(root)
        names = [item.name for item in listing.items]
        if self.captions_file:
            found = self._of_file(listing, names, self.captions_file)
        else:
            found = _beside(listing, names, root)
        items, prompts, notes = paired(listing.items, found.captions, origin=self.path, hint=found.hint)
        if not items:
            raise UserError(f"data.path = {self.path!r}: no image has a caption")
        settings = {"name": self.name, "captions": [self.captions_file, self.caption_column]}
        notes = [*listing.notes(self.path, used=found.used), *found.notes, *notes]
        files = (*listing.paths, *found.files)
        return Captions(self.path, tuple(prompts), tuple(items), files, tuple(notes), settings)

    def _of_file(self, listing: Listing, names: list[str], captions_file: str) -> "_Found":
        """A caption for each image, or None, from the file that they are in."""
        root = FilePath(self.path).expanduser()
        handle, origin, files = _find(listing, root, captions_file)
        suffix = FilePath(captions_file).suffix.lower()
        if suffix not in TABLES:
            raise UserError(f"data.captions_file = {captions_file!r}: must end in {', '.join(TABLES)}")
        with handle:
            first, rows = first_rows(read_rows(handle, suffix=suffix, origin=origin))
            if not first:
                raise UserError(f"{origin}: holds no captions")
            file_column = find_column(first, None, FILE_COLUMNS, setting="the file's column to `file`", origin=origin)
            caption_column = read_column(first, self.caption_column, setting="data.caption_column", origin=origin)
            found = _match(rows, names, file_column, caption_column, origin)
        inside = [file.relative_to(root).as_posix() for file in files if file.is_relative_to(root)]
        used = tuple(inside) if files else (find_name(captions_file, listing.others) or captions_file,)
        return replace(found, files=tuple(files), used=used)


@dataclass(frozen=True)
class _Found:
    """captions: of each image, or None.  files: that they are in, where on disk; used: of the listing's others.
    hint: for a message about images that have none."""

    captions: list[str | None]
    files: tuple[FilePath, ...] = ()
    used: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    hint: str = ""


def _match(rows: Iterable[Row], names: list[str], file_column: str, caption_column: str, origin: str) -> _Found:
    captions: dict[str, str] = {}
    for number, row in rows:
        place = f"{origin}, line {number}"
        file = checked_caption(row.get(file_column), origin=place).removeprefix("./")
        if file in captions:
            raise UserError(f"{place}: {file!r} is listed twice")
        captions[file] = checked_caption(row.get(caption_column), origin=place)
    keys, notes = match_names(names, captions, origin=origin)
    used = set(keys)
    if unused := [file for file in captions if file not in used]:
        notes.append(f"{origin}: {len(unused):,} of {len(captions):,} rows name no image: {listed(unused)}")
    missing = [name for name, key in zip(names, keys, strict=True) if key is None]
    hint = nearest(missing, captions, used) if missing else ""
    return _Found([None if key is None else captions[key] for key in keys], notes=tuple(notes), hint=hint)


def _find(listing: Listing, root: FilePath, named: str) -> tuple[BinaryIO, str, list[FilePath]]:
    """A table's bytes and where it is: on disk, below the images' folder, or in their zip."""
    inside = find_name(named, listing.others)
    for file in (FilePath(named).expanduser(), root / (inside or named)):
        if file.is_file():
            return open_file(file, setting="data.captions_file"), str(file), [file]
    if inside is not None:
        origin = f"{root}:{inside}"
        return io.BytesIO(read_item(listing.others[inside], origin=origin)), origin, []
    raise UserError(f"data.captions_file = {named!r}: no such file")


def _beside(listing: Listing, names: list[str], root: FilePath) -> _Found:
    """The text of a .txt file beside each image, or None, and those files where they are on disk."""
    beside = [name.rpartition(".")[0] + ".txt" for name in names]
    keys, notes = match_names(beside, listing.others, origin=str(root), shortens=False)
    captions: list[str | None] = []
    for key in keys:
        origin = f"{root}/{key}"
        text = None if key is None else read_text(read_item(listing.others[key], origin=origin), origin=origin)
        captions.append(None if text is None else checked_caption(text, origin=origin))
    used = tuple(dict.fromkeys(key for key in keys if key is not None))
    return _Found(captions, tuple(root / key for key in used) if root.is_dir() else (), used, tuple(notes))
