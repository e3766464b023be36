"""A folder or a zip of images, with labels from the folders' names or a CSV file, or without."""

import csv
import io
from functools import partial
from pathlib import Path as FilePath
from typing import BinaryIO, Literal

from diffdistill.data import cache as kept
from diffdistill.data.captions import lines_of, open_file, read_item
from diffdistill.data.collection import MAX_UNREADABLE, Classes, Collection, listed, numbered_classes
from diffdistill.data.decode import Sizing
from diffdistill.data.files import Listing, list_images, without_common_folders
from diffdistill.data.names import find_name, match_names, nearest
from diffdistill.data.prepare import load_prepared
from diffdistill.data.source import MappedImages
from diffdistill.settings.numbers import Fraction, Sides
from diffdistill.settings.schema import UserError, schema

CSV_COLUMNS = ("file", "label")


@schema
class ImageFolder:
    """Images below a folder or in a zip, sorted by name, prepared once in the cache.

    labels: none; folders: the name of the outermost folder, without folders that all images share; csv: `labels_file`,
    a CSV file with the columns file and label, on disk or among the images. Labels that are numbers stay as they are,
    names are sorted and counted from 0.
    resolution: centre crop and Lanczos resize to this side, or height and width; default: the teacher's
    `resolution`, or else all images must have one size.
    max_unreadable: share of unreadable images below which they are skipped with a warning; otherwise the run is
    refused.
    """

    name: Literal["image_folder"] = "image_folder"
    path: str
    labels: Literal["none", "folders", "csv"] = "none"
    labels_file: str | None = None
    resolution: Sides | None = None
    channels: Literal[1, 3] = 3
    max_unreadable: Fraction = MAX_UNREADABLE
    cache: str | None = None

    def __post_init__(self) -> None:
        if (self.labels == "csv") != (self.labels_file is not None):
            raise ValueError(f"labels_file = {self.labels_file!r}: goes with labels: csv, and only with it")

    def load(self) -> MappedImages:
        """The prepared images. Raises UserError if there are none, or too many cannot be read."""
        root = FilePath(self.path).expanduser()
        listing = list_images(root)
        on_disk, inside = self._find_labels(listing)
        settings = {"name": self.name, "labels": self.labels, "labels_file": self.labels_file}
        if self.max_unreadable != MAX_UNREADABLE:
            settings["max_unreadable"] = repr(self.max_unreadable)
        images = load_prepared(
            settings,
            partial(self._collect, listing),
            files=[*listing.paths, *([on_disk] if on_disk else [])],
            sizing=Sizing(self.resolution, self.channels),
            cache=self.cache,
        )
        if on_disk is not None:
            inside = on_disk.relative_to(root).as_posix() if on_disk.is_relative_to(root) else None
        notes = listing.notes(self.path, used=() if inside is None else (inside,))
        for note in notes:
            kept.warn(note)
        images.notes = (*notes, *images.notes)
        return images

    def _collect(self, listing: Listing) -> Collection:
        names = [item.name for item in listing.items]
        classes: Classes | None = None
        notes: list[str] = []
        if self.labels == "folders":
            classes = classes_of_folders(names, origin=self.path)
        elif self.labels == "csv":
            handle, origin = self._open_labels(listing)
            with handle:
                classes, notes = classes_of_csv(names, handle, origin=origin)
        return Collection(self.path, listing.items, classes, tuple(notes), max_unreadable=self.max_unreadable)

    def _find_labels(self, listing: Listing) -> tuple[FilePath | None, str | None]:
        """Where `labels_file` is: on disk, and by its name among the images."""
        if self.labels_file is None:
            return None, None
        inside = find_name(self.labels_file, listing.others)
        places = (FilePath(self.labels_file), FilePath(self.path) / (inside or self.labels_file))
        return next((found for place in places if (found := place.expanduser()).is_file()), None), inside

    def _open_labels(self, listing: Listing) -> tuple[BinaryIO, str]:
        """The CSV file's bytes, and where it was found."""
        found, inside = self._find_labels(listing)
        origin = str(found or f"{self.path}:{inside}")
        if found:
            return open_file(found, setting="data.labels_file"), origin
        if inside:
            return io.BytesIO(read_item(listing.others[inside], origin=origin)), origin
        csvs = [name for name in listing.others if name.lower().endswith(".csv")]
        among = f"; among the images there is {listed(csvs)}" if csvs else ""
        raise UserError(f"data.labels_file = {self.labels_file!r}: no such file{among}")


def classes_of_folders(names: list[str], *, origin: str) -> Classes:
    """The name of the outermost folder that not all images share. Raises UserError if an image is in none."""
    parts = [name.split("/") for name in without_common_folders(names)]
    loose = [name for name, p in zip(names, parts, strict=True) if len(p) < 2]
    if loose:
        raise UserError(f"{origin}: labels: folders, but these images are in no subfolder: {listed(loose)}")
    return numbered_classes([p[0] for p in parts], origin=origin)


def classes_of_csv(names: list[str], handle: BinaryIO, *, origin: str) -> tuple[Classes, list[str]]:
    """Labels by file name, and what the user should know. Raises UserError unless every image has just one."""
    labels = _rows_of_csv(handle, origin)
    rows, notes = match_names(names, labels, origin=origin)
    missing = [name for name, row in zip(names, rows, strict=True) if row is None]
    if missing:
        has = nearest(missing, labels, set(rows))
        raise UserError(f"{origin}: {len(missing):,} of {len(names):,} images have no label: {listed(missing)}{has}")
    if unused := sorted(labels.keys() - set(rows) - set(without_common_folders(names))):
        notes.append(f"{origin}: {len(unused):,} rows name files that are not there: {listed(unused)}")
    return numbered_classes([labels[row] for row in rows if row is not None], origin=origin), notes


def _rows_of_csv(handle: BinaryIO, origin: str) -> dict[str, str]:
    """Labels by file name. Raises UserError if the table is not one of files and labels."""
    labels: dict[str, str] = {}
    rows = csv.DictReader(lines_of(handle, origin=origin, newline=""), strict=True)
    try:
        header = rows.fieldnames or []
        if not set(CSV_COLUMNS) <= set(header):
            raise UserError(f"{origin}: needs the columns file and label, separated by a comma; it has {header}")
        for row in rows:
            file, label = (row["file"] or "").strip().removeprefix("./"), (row["label"] or "").strip()
            if file in labels:
                raise UserError(f"{origin}, line {rows.line_num}: {shown_file(file)} is listed twice")
            labels[file] = label
    except csv.Error as error:
        raise UserError(f"{origin}, line {rows.line_num}: {error}") from None
    return labels


def shown_file(name: str) -> str:
    """A file of a table as it may be printed."""
    return listed([name])
