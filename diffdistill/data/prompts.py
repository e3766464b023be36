"""Prompts without images, for methods that need none, and for samples."""

from pathlib import Path as FilePath
from typing import Literal

from diffdistill.data.captions import (
    TABLES,
    Captions,
    checked_caption,
    first_rows,
    lines_of,
    open_file,
    read_column,
    read_rows,
)
from diffdistill.data.decode import Sizing
from diffdistill.data.source import MappedImages
from diffdistill.settings.schema import UserError, schema


@schema
class Prompts:
    """A .txt file with one prompt per line, blank lines skipped, or a .csv, .tsv or .jsonl with a column of them.

    column: of the prompts; default caption, text or prompt.
    """

    name: Literal["prompts"] = "prompts"
    path: str
    column: str | None = None
    cache: str | None = None

    has_captions = True
    has_images = False
    sizing = Sizing()

    def load(self) -> MappedImages:
        """Raises UserError: there are no images."""
        raise UserError(f"data.name = 'prompts': {self.path} holds prompts and no images")

    def captions(self) -> Captions:
        """The prompts. Raises UserError if the file is not text, or has none."""
        file = FilePath(self.path).expanduser()
        suffix = file.suffix.lower()
        if suffix == ".txt":
            if self.column is not None:
                raise UserError(f"data.column = {self.column!r}: a .txt file has no columns; leave it out")
            return Captions(self.path, read_prompts(self.path, setting="data.path"))
        if suffix not in TABLES:
            raise UserError(f"data.path = {self.path!r}: give a file that ends in .txt, {', '.join(TABLES)}")
        with open_file(file) as handle:
            first, rows = first_rows(read_rows(handle, suffix=suffix, origin=self.path))
            if not first:
                raise UserError(f"data.path = {self.path!r}: holds no prompts")
            column = read_column(first, self.column, setting="data.column", origin=self.path)
            found = (checked_caption(row.get(column), origin=f"{self.path}, line {number}") for number, row in rows)
            return Captions(self.path, tuple(found))


def read_prompts(path: str, *, setting: str) -> tuple[str, ...]:
    """A prompt a line, blank lines passed over.

    setting: what names the file, for messages.  Raises UserError unless it is UTF-8 text that holds some.
    """
    with open_file(FilePath(path).expanduser(), setting=setting) as handle:
        lines = enumerate(lines_of(handle, origin=path), 1)
        texts = (checked_caption(line, origin=f"{path}, line {number}") for number, line in lines if line.strip())
        found = tuple(texts)
    if not found:
        raise UserError(f"{setting} = {path!r}: holds no prompts")
    return found
