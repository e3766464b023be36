"""Tables of tensors on disk, computed once: safetensors shards, written whole or not at all, so that a build that was
broken off goes on where it stopped; several processes that want the same table build it once.

A table is a folder `<key>` with 00000-<hash>.safetensors, ..., and, when all are there, meta.json. A shard's name holds
the beginning of the SHA-256 of its content: a damaged one is noticed, and made anew.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from diffdistill.data import cache as kept
from diffdistill.data.collection import shown
from diffdistill.settings.links import refuse_link
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import say
from diffdistill.storage.atomic import write_bytes

HASH_LENGTH = 16
LIMIT_HEADER_BYTES = 2**20
BF16 = "BF16"
"""NumPy has no such type: mapped as 16 bits, which torch takes for what they are."""
DTYPES = {
    BF16: np.int16,
    "F32": np.float32,
    "F16": np.float16,
    "F64": np.float64,
    "I64": np.int64,
    "U8": np.uint8,
    "BOOL": np.bool_,
}

Shard = Mapping[str, Tensor]
MakeRows = Callable[[int, int], Shard]
"""The rows `first` to `last` - 1 of a table: every part [last - first, ...]."""


def build_table(
    root: FilePath,
    key: str,
    count: int,
    *,
    rows_per_shard: int,
    start: Callable[[], MakeRows],
    title: str,
    about: Mapping[str, Any],
) -> list[dict[str, Tensor]]:
    """The shards of a table of `count` rows, memory-mapped, computed where they are missing.

    start: makes what computes rows; called only if some are missing, and let go at the end.
    title: for messages.  about: what meta.json says of the table.
    Raises UserError if the cache cannot be written.
    """
    folder = root / key
    if not _is_complete(folder):
        with kept.locked(root, key):
            if not _is_complete(folder):
                _build(folder, count, rows_per_shard, start, title, about)
    return [_mapped(file) for file in _shards(folder)]


def _build(
    folder: FilePath,
    count: int,
    rows_per_shard: int,
    start: Callable[[], MakeRows],
    title: str,
    about: Mapping[str, Any],
) -> None:
    refuse_link(folder)
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(".writing-*"):
        leftover.unlink()
    (folder / kept.META).unlink(missing_ok=True)
    bounds = [(first, min(first + rows_per_shard, count)) for first in range(0, count, rows_per_shard)]
    whole = {number for number in range(len(bounds)) if _find(folder, number)}
    if whole and len(whole) < len(bounds):
        say(f"{title}: {len(whole)} of {len(bounds)} shards exist; resuming")
    if len(whole) < len(bounds):
        make = start()
        for number, (first, last) in enumerate(bounds):
            if number not in whole:
                _write(folder, number, make(first, last))
    kept.seal(folder, {**about, "rows": count})


def _write(folder: FilePath, number: int, rows: Shard) -> None:
    """One shard, under its name only when it is on the disk."""
    content = save({name: part.detach().cpu().contiguous() for name, part in rows.items()})
    digest = hashlib.sha256(content).hexdigest()[:HASH_LENGTH]
    temporary = folder / f".writing-{number:05d}"
    try:
        write_bytes(temporary, content)
        temporary.rename(folder / f"{number:05d}-{digest}.safetensors")
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _find(folder: FilePath, number: int) -> FilePath | None:
    """The whole shard of this number; a damaged one goes."""
    for file in folder.glob(f"{number:05d}-*.safetensors"):
        if hashlib.sha256(file.read_bytes()).hexdigest()[:HASH_LENGTH] == file.stem.partition("-")[2]:
            return file
        say(f"{file}: damaged; writing it again")
        file.unlink()
    return None


def _shards(folder: FilePath) -> list[FilePath]:
    return sorted(folder.glob("*.safetensors"))


def _is_complete(folder: FilePath) -> bool:
    return (folder / kept.META).is_file() and kept.is_whole(folder)


def _mapped(file: FilePath) -> dict[str, Tensor]:
    """A shard's tensors, whose numbers stay on disk until they are asked for.

    The format: a uint64 length, a JSON header of dtype, shape and offsets, then the numbers (safetensors, "Format").
    Raises UserError on a header that does not fit the file.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8).ljust(8, b"\0"))
        if length > min(size, LIMIT_HEADER_BYTES):
            raise UserError(f"{file}: its header of {length:,} bytes does not fit the file")
        text = handle.read(length)
    try:
        header = json.loads(text)
        about = {name: _place(part) for name, part in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file}: its header is invalid") from None
    start = 8 + length
    parts: dict[str, Tensor] = {}
    for name, (kind, shape, first, last) in about.items():
        if last - first != np.dtype(DTYPES[kind]).itemsize * math.prod(shape) or start + last > size:
            raise UserError(f"{file}: {shown(name)} does not fit the file")
        # "c": torch wants memory that could be written; what is written stays in memory.
        part = torch.from_numpy(np.memmap(file, DTYPES[kind], "c", start + first, shape))
        parts[name] = part.view(torch.bfloat16) if kind == BF16 else part
    return parts


def _place(about: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """What a header says of a tensor: its type, its shape, and where it begins and ends. Raises anything."""
    first, last = about["data_offsets"]
    shape = tuple(about["shape"])
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError
    kind = about["dtype"]
    if kind not in DTYPES:
        raise ValueError
    return kind, shape, first, last


def table_key(*parts: object) -> str:
    """SHA-256 of everything that decides on a table's numbers: texts, numbers, and lists of them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def files_key(files: Sequence[FilePath], *, root: FilePath) -> str:
    """SHA-256 of the names and contents of files, remembered in the cache by their sizes and times."""
    facts = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    fingerprint = table_key("files", facts)
    known = kept.recall(root, fingerprint)
    if known:
        return known
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\0".encode())
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    kept.remember(root, fingerprint, digest.hexdigest())
    return digest.hexdigest()
