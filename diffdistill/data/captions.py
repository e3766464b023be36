"""Captions: prompts, with the image of each where there are some. Text is UTF-8 and nothing else.

What captions are, and the reading and checking of them that all data sets share: `prompts`, `captioned_images`,
`web_dataset`, `huggingface`. Encoders meet them in `diffdistill.models.encoders`; a protocol's are in
`diffdistill.eval.protocols.captions`.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache as once
from functools import cached_property, partial
from itertools import chain, count, islice
from pathlib import Path as FilePath
from typing import Any, BinaryIO, Protocol, runtime_checkable

from diffdistill.data.buckets import BucketedImages, Size, nearest_bucket
from diffdistill.data.cache import warn
from diffdistill.data.collection import MAX_UNREADABLE, Classes, Collection, Item, UnreadableImage, listed
from diffdistill.data.decode import Sizing
from diffdistill.data.prepare import load_prepared, remembered, sizes_of, too_many
from diffdistill.data.source import MappedImages
from diffdistill.settings.limits import MAX_LINE_BYTES, MAX_TABLE_BYTES
from diffdistill.settings.reading import check_regular
from diffdistill.settings.schema import UserError
from diffdistill.settings.text import open_text

Row = tuple[int, dict[str, Any]]
"""A row of a table by its columns, and its line."""
COLUMNS = ("caption", "text", "prompt")
"""What a column of captions is called, where none is named."""
TABLES = (".csv", ".tsv", ".jsonl")
"""Files that `read_rows` reads."""
NUM_LOOKED_AT = 100
"""Rows by which the columns of a table are known."""
MAX_CHARACTERS = 10_000
"""A longer caption is taken for a mistake: text encoders read some hundred tokens."""


@dataclass(frozen=True)
class Captions:
    """prompts: in their order, repeated ones included.  items: the image of each; empty where there are none.

    files: all that the content is read from, if it is in files.  notes: what the user should know.
    """

    origin: str
    prompts: tuple[str, ...]
    items: tuple[Item, ...] = ()
    files: tuple[FilePath, ...] = ()
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def different(self) -> tuple[str, ...]:
        """Each prompt once, by its first place: a prompt's number is its place here."""
        return tuple(dict.fromkeys(self.prompts))

    def images(self, sizing: Sizing, cache: str | None) -> MappedImages:
        """The prepared images; their labels are the numbers of their prompts. Raises UserError if there are none."""
        if not self.items:
            raise UserError(f"{self.origin}: holds prompts and no images")
        number = {prompt: place for place, prompt in enumerate(self.different)}
        classes = Classes(tuple(number[prompt] for prompt in self.prompts), len(number))
        for note in self.notes:
            warn(note)
        images = load_prepared(
            self.settings,
            lambda: Collection(self.origin, self.items, classes),
            files=self.files,
            sizing=sizing,
            cache=cache,
        )
        images.notes = (*self.notes, *images.notes)
        return images

    def bucketed(self, size: Size, sizes: Sequence[Size], channels: int, cache: str | None) -> BucketedImages:
        """The same, each image of the size whose aspect is nearest to its own; a prepared set for each that has some.

        size: among `sizes`, what the run is said to be for.  Raises UserError as `images`.
        """
        if not self.items:
            raise UserError(f"{self.origin}: holds prompts and no images")
        settings = self.settings | {"buckets": [list(one) for one in sizes]}
        prompts = {prompt: place for place, prompt in enumerate(self.different)}
        labels = [prompts[prompt] for prompt in self.prompts]

        @once
        def numbers() -> list[int]:
            return [nearest_bucket(one or size, sizes) for one in sizes_of(Collection(self.origin, self.items))]

        def chosen(number: int) -> Collection:
            places = [place for place, bucket in enumerate(numbers()) if bucket == number]
            classes = Classes(tuple(labels[place] for place in places), len(prompts))
            return Collection(self.origin, [self.items[place] for place in places], classes, whole=self.items)

        def used() -> str:
            return " ".join(str(number) for number in sorted(set(numbers())))

        parts = [
            load_prepared(
                settings | {"bucket": number},
                partial(chosen, number),
                files=self.files,
                sizing=Sizing(sizes[number], channels),
                cache=cache,
            )
            for number in map(int, remembered(settings, used, files=self.files, cache=cache).split())
        ]
        lost = len(self.items) - sum(map(len, parts))
        if lost >= MAX_UNREADABLE * len(self.items) and len({item.part for item in self.items}) == 1:
            raise UserError(too_many(self.origin, lost, f"{len(self.items):,}"))
        for note in self.notes:
            warn(note)
        notes = tuple(dict.fromkeys((*self.notes, *(note for part in parts for note in part.notes))))
        some = [part for part in parts if len(part)]  # a few images of one size may all be damaged
        return BucketedImages(some, (channels, *size), notes=notes)


@runtime_checkable
class Captioned(Protocol):
    """A data set that has captions, or may have: what a config names under `data`."""

    @property
    def cache(self) -> str | None: ...
    @property
    def has_captions(self) -> bool: ...
    @property
    def has_images(self) -> bool: ...
    @property
    def sizing(self) -> Sizing: ...
    def captions(self) -> Captions:
        """Read them all. Raises UserError."""
        ...


def open_file(file: FilePath, *, setting: str = "data.path") -> BinaryIO:
    """A table's bytes, a regular file of a bounded size. Raises UserError."""
    try:
        check_regular(file, limit=MAX_TABLE_BYTES)
        return file.open("rb")
    except OSError as error:
        raise UserError(f"{setting} = {str(file)!r}: cannot be read: {error.strerror}") from None


def read_rows(handle: BinaryIO, *, suffix: str, origin: str) -> Iterator[Row]:
    """The rows of a CSV, TSV or JSONL file one by one, each with its line. Raises UserError on one that is damaged."""
    if suffix == ".jsonl":
        return _rows_of_jsonl(handle, origin)
    return _rows_of_csv(handle, suffix, origin)


def first_rows(rows: Iterator[Row]) -> tuple[list[Row], Iterator[Row]]:
    """Those that `find_column` looks at, and all of them."""
    first = list(islice(rows, NUM_LOOKED_AT))
    return first, chain(first, rows)


def find_column(
    rows: Sequence[Row],
    named: str | None,
    known: Sequence[str],
    *,
    setting: str,
    origin: str,
) -> str:
    """The column of this name, or the only one whose name is known. Raises UserError with the columns there are."""
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    found = [name for name in ([named] if named else known) if name in columns]
    if len(found) == 1:
        return found[0]
    why = f"has the columns {', '.join(map(str, columns)) or 'none'}"
    raise UserError(f"{origin}: {why}; set {setting}" if named is None else f"{setting} = {named!r}: {origin} {why}")


def checked_caption(value: object, *, origin: str) -> str:
    """A caption without white space around it. Raises UserError on what is no text, or is too long to be one."""
    if not isinstance(value, str):
        raise UserError(f"{origin}: the caption must be text, not {type(value).__name__}")
    if len(value) > MAX_CHARACTERS:
        raise UserError(f"{origin}: a caption of {len(value):,} characters; the limit is {MAX_CHARACTERS:,}")
    return " ".join(value.split())


def lines_of(handle: BinaryIO, *, origin: str, newline: str | None = None) -> Iterator[str]:
    """The lines of a table's text, with their ends. Raises UserError as `open_text`, and on one that is too long."""
    text = open_text(handle, origin=origin, newline=newline)
    for number in count(1):
        try:
            line = text.readline(MAX_LINE_BYTES)
        except UnicodeDecodeError:
            raise UserError(f"{origin}: has changed while it was read") from None
        if not line:
            return
        if len(line) == MAX_LINE_BYTES:
            raise UserError(f"{origin}, line {number}: more than {MAX_LINE_BYTES:,} characters")
        yield line


def paired(
    items: Sequence[Item], captions: Sequence[str | None], *, origin: str, hint: str = ""
) -> tuple[list[Item], list[str], list[str]]:
    """Images that have a caption, their captions, and what was left out. Raises UserError if that is too many.

    hint: for its message.
    """
    lacking = [item.name for item, caption in zip(items, captions, strict=True) if caption is None]
    if len(lacking) > MAX_UNREADABLE * len(items):
        raise UserError(f"{origin}: {len(lacking):,} of {len(items):,} images have no caption: {listed(lacking)}{hint}")
    notes = [f"{origin}: {len(lacking):,} images without a caption are left out: {listed(lacking)}"] if lacking else []
    kept = [(item, caption) for item, caption in zip(items, captions, strict=True) if caption is not None]
    return [item for item, _ in kept], [caption for _, caption in kept], notes


def read_item(item: Item, *, origin: str) -> bytes:
    """A small file's content. Raises UserError."""
    try:
        content = item.read()
    except (OSError, UnreadableImage) as error:
        raise UserError(f"{origin}: cannot be read: {error}") from None
    assert isinstance(content, bytes)
    return content


def _rows_of_csv(handle: BinaryIO, suffix: str, origin: str) -> Iterator[Row]:
    lines = lines_of(handle, origin=origin, newline="")
    rows = csv.reader(lines, strict=True, delimiter="\t" if suffix == ".tsv" else ",")
    try:
        header = next(rows, [])
        for row in rows:
            if row and len(row) != len(header):
                raise UserError(f"{origin}, line {rows.line_num}: the number of cells differs from the header")
            if row:
                yield rows.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{origin}, line {rows.line_num}: {error}") from None


def _rows_of_jsonl(handle: BinaryIO, origin: str) -> Iterator[Row]:
    for number, line in enumerate(lines_of(handle, origin=origin), 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{origin}, line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{origin}, line {number}: must be a JSON object, not {type(row).__name__}")
        yield number, row


read_column = partial(find_column, known=COLUMNS)
"""`find_column` for captions."""
