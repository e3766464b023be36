"""Data sets of the `datasets` library: by hub name, saved to disk, or a folder of images as it reads them."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Literal

from diffdistill.data.buckets import BucketsConfig
from diffdistill.data.captions import Captions, checked_caption
from diffdistill.data.collection import (
    Classes,
    Collection,
    Item,
    UnreadableImage,
    checked_classes,
    checked_size,
    numbered_classes,
)
from diffdistill.data.decode import Sizing
from diffdistill.data.files import NO_IMAGE, is_image, reason_by_name
from diffdistill.data.left_out import LeftOut
from diffdistill.data.prepare import load_prepared
from diffdistill.data.source import MappedImages
from diffdistill.settings.numbers import Sides
from diffdistill.settings.schema import UserError, schema

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@schema
class HuggingFace:
    """One split of a Hugging Face data set, in its own order.

    path: a folder written by save_to_disk, a folder of images, or else a name on the hub.  subset: the hub's
    configuration name.  label_column: default none; ClassLabel, integers or text.  caption_column: default none; text,
    for a model that takes prompts.  image_column: null for captions only.
    resolution: centre crop and Lanczos resize to this side, or height and width; default: the teacher's
    `resolution`, or else all images must have one size.  buckets: several sizes of about its area instead of one.
    """

    name: Literal["huggingface"] = "huggingface"
    path: str
    subset: str | None = None
    split: str = "train"
    image_column: str | None = "image"
    label_column: str | None = None
    caption_column: str | None = None
    resolution: Sides | None = None
    buckets: BucketsConfig | None = None
    channels: Literal[1, 3] = 3
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.image_column is None and self.caption_column is None:
            raise ValueError("image_column and caption_column: give one, or both")
        if self.label_column and self.caption_column:
            raise ValueError("label_column and caption_column: a model takes classes or prompts; give one")

    @property
    def has_captions(self) -> bool:
        return self.caption_column is not None

    @property
    def has_images(self) -> bool:
        return self.image_column is not None

    @property
    def sizing(self) -> Sizing:
        return Sizing(self.resolution, self.channels)

    def captions(self) -> Captions:
        """Every row's caption, and its image. Raises UserError as `load`, and on cells that are no text."""
        datasets = _library()
        rows = self._open(datasets)
        assert self.caption_column is not None
        self._check_column(rows, "caption_column", self.caption_column)
        origin = f"data.caption_column = {self.caption_column!r}"
        values = list(rows[self.caption_column])
        prompts = tuple(checked_caption(value, origin=f"{origin}, row {row}") for row, value in enumerate(values))
        if not prompts:
            raise UserError(f"data.path = {self.path!r}: the split {self.split!r} is empty")
        settings = {"name": self.name, "captions": [self.image_column, self.caption_column], "split": self.split}
        if self.image_column is None:
            return Captions(self.path, prompts, settings=settings)
        encoded = self._encoded(rows, datasets)
        items = _items(partial(_read, encoded, self.image_column), len(encoded))
        return Captions(self.path, prompts, items, settings=settings)

    def load(self) -> MappedImages:
        """The prepared images. Raises UserError if the data set, split or columns are not there."""
        if self.has_captions:
            return self.captions().images(self.sizing, self.cache)
        folder = FilePath(self.path).expanduser()
        files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
        return load_prepared(
            {
                "name": self.name,
                "split": self.split,
                "columns": [self.image_column, self.label_column],
                "subset": self.subset,
            },
            self._collect,
            files=files,
            sizing=self.sizing,
            cache=self.cache,
        )

    def _collect(self) -> Collection:
        datasets = _library()
        rows = self._open(datasets)
        encoded = self._encoded(rows, datasets)
        classes = self._classes(rows) if self.label_column else None
        assert self.image_column is not None
        read = partial(_read, encoded, self.image_column)
        if not len(encoded):
            raise UserError(f"data.path = {self.path!r}: the split {self.split!r} is empty")
        is_lasting = _is_held(encoded[0][self.image_column], FilePath(self.path).expanduser())
        notes = self._unused(encoded)
        return Collection(self.path, _items(read, len(encoded)), classes, notes, is_lasting=is_lasting)

    def _unused(self, encoded: Any) -> tuple[str, ...]:
        """Notes of a folder's files that are of no row, and of images that are of one and should hardly be."""
        folder = FilePath(self.path).expanduser()
        if not folder.is_dir() or _is_saved(folder):
            return ()
        cells = encoded.with_format("arrow")[self.image_column].to_pylist()
        rows = {os.path.relpath(cell["path"], folder.absolute()) for cell in cells if cell["path"]}
        left_out, strange = LeftOut(), LeftOut()
        for file in sorted(file for file in folder.rglob("*") if not file.is_dir() or file.is_symlink()):
            name = file.relative_to(folder).as_posix()
            why = reason_by_name(name)
            if name in rows and why:
                strange.add(why, name)
            elif name not in rows and file.name not in METADATA_FILES:
                left_out.add(why or (f"of no row of {self.split}" if is_image(name) else NO_IMAGE), name)
        notes = (f"{self.path}: `datasets` takes for images of the set: {strange}",) if strange.total else ()
        return (*notes, *left_out.notes(self.path, used=len(rows)))

    def _encoded(self, rows: Any, datasets: Any) -> Any:
        """The column of images alone, as files. Raises UserError if there is none."""
        assert self.image_column is not None
        self._check_column(rows, "image_column", self.image_column)
        if not isinstance(rows.features[self.image_column], datasets.Image):
            kinds = {name: type(kind).__name__ for name, kind in rows.features.items()}
            raise UserError(f"data.image_column = {self.image_column!r}: holds no images; the columns are {kinds}")
        return rows.select_columns([self.image_column]).cast_column(self.image_column, datasets.Image(decode=False))

    def _open(self, datasets: Any) -> Any:
        """The split. Nothing of a data set is ever run as a program."""
        folder = FilePath(self.path).expanduser()
        try:
            if _is_saved(folder):
                opened = datasets.load_from_disk(str(folder))
                return self._choose_split(opened, datasets)
            if folder.is_dir():
                return datasets.load_dataset("imagefolder", data_dir=str(folder), split=self.split)
            if self.path.startswith(("/", ".", "~")):
                raise UserError(f"data.path = {self.path!r}: no such folder")
            return datasets.load_dataset(self.path, self.subset, split=self.split)
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"data.path = {self.path!r}: cannot be loaded by `datasets`: {reason}") from None

    def _choose_split(self, opened: Any, datasets: Any) -> Any:
        if isinstance(opened, datasets.DatasetDict):
            if self.split not in opened:
                raise UserError(f"data.split = {self.split!r}: choose from {', '.join(opened)}")
            return opened[self.split]
        if opened.split is not None and str(opened.split) != self.split:
            raise UserError(f"data.split = {self.split!r}: {self.path} holds only {str(opened.split)!r}")
        return opened

    def _check_column(self, rows: Any, setting: str, column: str) -> None:
        if column not in rows.column_names:
            raise UserError(f"data.{setting} = {column!r}: choose from {', '.join(rows.column_names)}")

    def _classes(self, rows: Any) -> Classes:
        assert self.label_column is not None
        self._check_column(rows, "label_column", self.label_column)
        values, kind = list(rows[self.label_column]), rows.features[self.label_column]
        origin = f"data.label_column = {self.label_column!r}"
        if any(value is None for value in values):
            raise UserError(f"{origin}: {sum(value is None for value in values):,} of {len(values):,} are missing")
        if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            return checked_classes(values, origin=origin, names=tuple(getattr(kind, "names", None) or ()))
        if all(isinstance(value, str) for value in values):
            return numbered_classes([value.strip() for value in values], origin=origin)
        raise UserError(f"{origin}: holds neither integers nor text, but {type(values[0]).__name__}")


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("the `datasets` library is missing: pip install 'diffdistill[data]'") from None
    return datasets


def _is_saved(folder: FilePath) -> bool:
    """Whether save_to_disk wrote a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _items(read: Callable[[int], bytes], count: int) -> tuple[Item, ...]:
    return tuple(Item(str(number), partial(read, number)) for number in range(count))


def _is_held(cell: Any, folder: FilePath) -> bool:
    """Whether an image lies in the table, or in a file of the data set's folder."""
    return cell is not None and (cell["bytes"] is not None or FilePath(cell["path"]).is_relative_to(folder.absolute()))


def _read(rows: Any, column: str, number: int) -> bytes:
    """The encoded image, from the table or from the file that it names."""
    cell = rows[number][column]
    if cell is None:
        raise UnreadableImage("missing")
    if cell["bytes"] is not None:
        return cell["bytes"]
    file = FilePath(cell["path"])
    checked_size(file.stat().st_size)
    return file.read_bytes()
