"""Text files of others: regular ones of a bounded size. A pipe or a device would be waited for, or read for ever.

What is wrong is an OSError without a number of its own, or a ValueError, as for any file that cannot be read.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

from diffdistill.settings.faults import UserError
from diffdistill.settings.limits import MAX_JSON_BYTES, MAX_LINE_BYTES, MAX_LOG_BYTES, MAX_NESTING


def check_regular(file: str | FilePath, *, limit: int | None = None) -> int:
    """A file's size in bytes. Raises OSError if it is not there, is no regular file (links are followed), or is larger
    than `limit`."""
    found = os.stat(file)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "a pipe or a device, not a regular file; save its content to a file", str(file))
    if limit is not None and found.st_size > limit:
        raise OSError(errno.EINVAL, f"{found.st_size:,} bytes; at most {limit:,} are read", str(file))
    return found.st_size


def read_bytes(file: str | FilePath, *, limit: int) -> bytes:
    """A file's bytes. Raises OSError as `check_regular`, also for files that grow meanwhile."""
    check_regular(file, limit=limit)
    with open(file, "rb") as handle:
        content = handle.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EINVAL, f"more than {limit:,} bytes", str(file))
    return content


def read_text(file: str | FilePath, *, limit: int) -> str:
    """A file's UTF-8 text, its line breaks as \\n. Raises OSError as `read_bytes`, UnicodeDecodeError."""
    return read_bytes(file, limit=limit).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def read_log(file: FilePath, *, limit: int = MAX_LOG_BYTES) -> str:
    """What a run has written line by line, "" if it is not there; what is no UTF-8 is replaced. Of more than `limit`
    bytes the last whole lines: a log grows for as long as its run. Raises UserError."""
    if not file.exists():
        return ""
    try:
        size = check_regular(file)
        with file.open("rb") as handle:
            handle.seek(max(0, size - limit))
            content = handle.read(limit)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if size > limit:
        content = content.partition(b"\n")[2]
    return content.decode("utf-8", errors="replace")


def lines_of_log(file: FilePath) -> Iterator[str]:
    """Every line of a log of any size, one by one, without its end; those beyond MAX_LINE_BYTES are left out. Raises
    UserError."""
    try:
        check_regular(file)
        with file.open("rb") as handle:
            is_rest = False  # of a line that is too long
            while line := handle.readline(MAX_LINE_BYTES):
                is_part = len(line) == MAX_LINE_BYTES and not line.endswith(b"\n")
                if not (is_part or is_rest):
                    yield line.rstrip(b"\r\n").decode("utf-8", errors="replace")
                is_rest = is_part
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def read_json(file: str | FilePath, *, limit: int = MAX_JSON_BYTES) -> Any:
    """A JSON value. Raises OSError as `read_bytes`, ValueError on what is no JSON and on what is nested too deep."""
    return parse_json(read_text(file, limit=limit))


def parse_json(text: str) -> Any:
    """A JSON value. Raises ValueError."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_NESTING} deep") from None
    if is_too_deep(found):
        raise ValueError(f"nested more than {MAX_NESTING} deep")
    return found


def is_too_deep(data: Any) -> bool:
    """Whether groups and lists stand more than MAX_NESTING within one another."""
    layer = [data]
    for _ in range(MAX_NESTING):
        layer = [
            item
            for value in layer
            if isinstance(value, (dict, list))
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, (dict, list))
        ]
        if not layer:
            return False
    return True
