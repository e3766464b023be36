"""Images in a folder or a zip, with a caption each."""

from pathlib import Path as FilePath
from typing import Any, Literal

from diffdistill.data.captions import (
    TABLES,
    Captions,
    checked_caption,
    find_column,
    paired,
    read_column,
    read_file,
    read_item,
    read_rows,
    read_text,
)
from diffdistill.data.decode import Sizing
from diffdistill.data.files import Listing, list_images, without_common_folders
from diffdistill.data.source import MappedImages
from diffdistill.settings.schema import PositiveInt, UserError, schema

FILE_COLUMNS = ("file", "file_name")


@schema
class CaptionedImages:
    """Images below a folder or in a zip, with a caption each: in a .txt file of the same name beside it, or in
    `captions_file`, a .csv, .tsv or .jsonl on disk or among the images, with the columns file, or file_name, and
    caption.

    caption_column: default caption, text or prompt.
    resolution: centre crop and Lanczos resize to this side; without it all images must be of one size.
    """

    name: Literal["captioned_images"] = "captioned_images"
    path: str
    captions_file: str | None = None
    caption_column: str | None = None
    resolution: PositiveInt | None = None
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
        listing = list_images(FilePath(self.path).expanduser())
        names = [item.name for item in listing.items]
        if self.captions_file:
            found, more = self._of_file(listing, names, self.captions_file)
        else:
            found, more = _beside(listing, names, FilePath(self.path).expanduser())
        items, prompts, notes = paired(listing.items, found, origin=self.path)
        if not items:
            raise UserError(f"data.path = {self.path!r}: no image has a caption")
        settings = {"name": self.name, "captions": [self.captions_file, self.caption_column]}
        return Captions(self.path, tuple(prompts), tuple(items), (*listing.paths, *more), tuple(notes), settings)

    def _of_file(
        self, listing: Listing, names: list[str], captions_file: str
    ) -> tuple[list[str | None], list[FilePath]]:
        """A caption for each image, or None, and the file that they are in."""
        content, origin, files = _find(listing, FilePath(self.path).expanduser(), captions_file)
        suffix = FilePath(captions_file).suffix.lower()
        if suffix not in TABLES:
            raise UserError(f"data.captions_file = {captions_file!r}: must end in {', '.join(TABLES)}")
        rows = read_rows(read_text(content, origin=origin), suffix=suffix, origin=origin)
        if not rows:
            raise UserError(f"{origin}: holds no captions")
        file_column = find_column(rows, None, FILE_COLUMNS, setting="the file's column to `file`", origin=origin)
        caption_column = read_column(rows, self.caption_column, setting="data.caption_column", origin=origin)
        return _match(rows, names, file_column, caption_column, origin), files


def _match(
    rows: list[tuple[int, dict[str, Any]]], names: list[str], file_column: str, caption_column: str, origin: str
) -> list[str | None]:
    captions: dict[str, str] = {}
    for number, row in rows:
        place = f"{origin}, line {number}"
        file = checked_caption(row.get(file_column), origin=place).removeprefix("./")
        if file in captions:
            raise UserError(f"{place}: {file!r} stands there twice")
        captions[file] = checked_caption(row.get(caption_column), origin=place)
    short = without_common_folders(names)
    return [captions.get(name, captions.get(brief)) for name, brief in zip(names, short, strict=True)]


def _find(listing: Listing, root: FilePath, named: str) -> tuple[bytes, str, list[FilePath]]:
    """A table's content and where it is: on disk, below the images' folder, or in their zip."""
    for file in (FilePath(named).expanduser(), root / named):
        if file.is_file():
            return read_file(file, setting="data.captions_file"), str(file), [file]
    if named in listing.others:
        origin = f"{root}:{named}"
        return read_item(listing.others[named], origin=origin), origin, []
    raise UserError(f"data.captions_file = {named!r}: no such file")


def _beside(listing: Listing, names: list[str], root: FilePath) -> tuple[list[str | None], list[FilePath]]:
    """The text of a .txt file beside each image, or None, and those files where they are on disk."""
    found: list[str | None] = []
    files: list[FilePath] = []
    for name in names:
        beside = name.rpartition(".")[0] + ".txt"
        item = listing.others.get(beside)
        if item is None:
            found.append(None)
            continue
        origin = f"{root / beside}"
        found.append(checked_caption(read_text(read_item(item, origin=origin), origin=origin), origin=origin))
        if root.is_dir():
            files.append(root / beside)
    return found, files
