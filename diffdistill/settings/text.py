"""Text in files: UTF-8, and what a file that is none seems to be."""

import codecs
import io
from typing import BinaryIO, TextIO

from diffdistill.settings.faults import UserError
from diffdistill.settings.limits import MAX_ROWS

NUM_LOOKED_AT = 1_000
"""Bytes by which an encoding is guessed, for a message."""
CHUNK = 2**20
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
NULS = {
    "utf-32le": (False, True, True, True),
    "utf-32be": (True, True, True, False),
    "utf-16le": (False, True, False, True),
    "utf-16be": (True, False, True, False),
}
"""Which of four bytes are 0 in Latin text of an encoding."""
MISREAD_MARKS = ("\u00ff\u00fe", "\u00fe\u00ff")
"""UTF-16's byte order marks where the file was taken for latin-1 once."""


def read_text(content: bytes, *, origin: str) -> str:
    """UTF-8, with or without a byte order mark.

    Raises UserError naming the line of the first byte that is not, and what the file seems to be in its place.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{origin}, line {line}: {why_not_utf8(error, content)}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{origin}, line {line}: holds a NUL character{_hint(text, content)}")
    return text


def open_text(handle: BinaryIO, *, origin: str, newline: str | None = None) -> TextIO:
    """The same text, of a table, to be read line by line; it is looked through first, in little memory.

    newline: as of `open`; by default lines end by line feeds, by carriage returns where there are none.
    Raises UserError as `read_text`, and on more than MAX_ROWS lines.
    """
    decoder, feeds, returns, is_text = codecs.getincrementaldecoder("utf-8")(), 0, 0, True
    while is_text and (chunk := handle.read(CHUNK)):
        feeds, returns = feeds + chunk.count(b"\n"), returns + chunk.count(b"\r")
        try:
            is_text = "\0" not in decoder.decode(chunk)
        except UnicodeDecodeError:
            is_text = False
    handle.seek(0)
    if not is_text or decoder.getstate()[0]:
        read_text(handle.read(), origin=origin)
        raise UserError(f"{origin}: has changed while it was read")
    if max(feeds, returns) > MAX_ROWS:
        raise UserError(f"{origin}: {max(feeds, returns):,} lines; at most {MAX_ROWS:,} are read")
    return io.TextIOWrapper(handle, "utf-8-sig", newline=newline if newline is not None else ("\n" if feeds else "\r"))


def why_not_utf8(error: UnicodeDecodeError, content: bytes | None = None) -> str:
    """The fault, and what to do about it.  content: the whole file, where the error knows a part of it alone."""
    wide = wide_encoding(error.object if content is None else content)
    what = f"the file seems to be {wide.upper()}" if wide else "if the file is in another encoding"
    how = f"convert it first, as in: iconv -f {wide or 'latin1'} -t utf-8"
    return f"byte 0x{error.object[error.start]:02x} is not UTF-8; {what}, {how}"


def wide_encoding(content: bytes) -> str | None:
    """The encoding of 2 or 4 bytes a character that text begins in, by its byte order mark or its NUL bytes."""
    for mark, name in MARKS:
        if content.startswith(mark):
            return name
    head = content[:NUM_LOOKED_AT]
    for name, pattern in NULS.items():
        columns = [head[place::4] for place in range(4)]
        if all(
            column and (column.count(0) > len(column) // 2 if is_nul else not column.count(0))
            for column, is_nul in zip(columns, pattern, strict=True)
        ):
            return name
    return None


def _hint(text: str, content: bytes) -> str:
    if text.startswith(MISREAD_MARKS):
        return "; the file seems to have been UTF-16 that was converted as latin-1: convert the original from utf-16"
    wide = wide_encoding(content)
    return f"; the file seems to be {wide.upper()}: convert it first, as in: iconv -f {wide} -t utf-8" if wide else ""
