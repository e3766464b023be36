"""A protocol's captions from a file, which is part of the protocol from then on.

Unlike those that a run is fed with (`diffdistill.data.captions`) they are taken as they stand, caption i on line i: all
who measure by the protocol judge the same text.
"""

import codecs
import hashlib
from dataclasses import replace
from pathlib import Path as FilePath

from diffdistill.eval.protocols.protocol import Captions, Protocol
from diffdistill.settings.limits import MAX_RECORDS_BYTES
from diffdistill.settings.reading import read_bytes
from diffdistill.settings.schema import UserError
from diffdistill.settings.text import read_text


def read_captions(
    protocol: Protocol, file: str | None, *, setting: str = "--captions"
) -> tuple[Protocol, list[str] | None]:
    """The protocol with its captions' SHA-256, and the captions, one a line; None where it has none.

    setting: what names the file, for messages.
    Raises UserError if there is no file, or it is another one than the protocol's.
    """
    if protocol.captions is None:
        if file is not None:
            raise UserError(f"{setting} {file}: protocol {protocol.name} has none")
        return protocol, None
    if file is None:
        raise UserError(f"protocol {protocol.name}: give its captions: {setting} FILE ({protocol.captions.name})")
    content = _content(file)
    lines = read_text(content, origin=file).splitlines()
    if content.startswith(codecs.BOM_UTF8):
        raise UserError(f"{file}: begins with a byte order mark, which is not part of caption 1; remove it")
    _check(protocol.captions, file, content, lines)
    known = replace(protocol.captions, sha256=hashlib.sha256(content).hexdigest())
    return replace(protocol, captions=known), lines


def captions_of(file: str) -> Captions:
    """What a protocol says of a file of captions. Raises UserError if it cannot be read, or is empty."""
    count = len(read_text(_content(file), origin=file).splitlines())
    if not count:
        raise UserError(f"{file}: holds no captions")
    return Captions(name=FilePath(file).name, count=count)


def _content(file: str) -> bytes:
    try:
        return read_bytes(FilePath(file).expanduser(), limit=MAX_RECORDS_BYTES)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _check(wanted: Captions, file: str, content: bytes, lines: list[str]) -> None:
    for name, known in (("sha256", wanted.sha256), ("md5", wanted.md5)):
        if known and hashlib.new(name, content, usedforsecurity=False).hexdigest() != known:
            raise UserError(f"{file}: is not {wanted.name}: its {name} is not {known}")
    if len(lines) != wanted.count:
        raise UserError(f"{file}: holds {len(lines):,} captions, not {wanted.count:,}")
