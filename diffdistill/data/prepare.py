"""From files to one memory-mapped uint8 array, once: kept in a cache, keyed by content, whole or absent.

A prepared set is a folder `<key>` with images.npy [N, C, H, W], labels.npy [N] where there are labels, and meta.json.
The key is the SHA-256 of every name, size, content and label, and of the sizing. Beside it, `sources/<fingerprint>`
remembers the key of files with these paths, sizes and times, so that an unchanged folder is not read again.
"""

import hashlib
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path as FilePath
from typing import IO, Annotated, Any

import numpy as np
import torch
from numpy.lib import format as npy
from pydantic import Field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffdistill.data import cache as kept
from diffdistill.data.collection import MAX_UNREADABLE, Collection, Item, UnreadableImage, is_minority, shown
from diffdistill.data.colour import may_be_converted
from diffdistill.data.decode import Decoded, Sizing, decode, size_of
from diffdistill.data.source import MappedImages
from diffdistill.settings.limits import MAX_CLASSES
from diffdistill.settings.links import open_plain
from diffdistill.settings.numbers import NonNegativeInt
from diffdistill.settings.reading import read_json
from diffdistill.settings.schema import UserError, schema
from diffdistill.settings.terminal import Console, say
from diffdistill.settings.values import validate
from diffdistill.storage.atomic import naming, write_bytes

VERSION = 1  # of the decoding; another one makes another key
COLOUR_VERSION = 2  # of the decoding of what `may_be_converted`, whose key alone it enters
SOURCES_VERSION = 2  # of how a key is found: another one looks through every source again, once
NUM_LISTED = 5
MOST_KEPT = 10_000  # unreadable images in meta.json, which has a limit of its own
CHUNK = 256  # images in flight
LONG = 5_000  # images, from which on a log without a terminal gets a line


def load_prepared(
    settings: dict[str, Any],
    collect: Callable[[], Collection],
    *,
    files: Sequence[FilePath],
    sizing: Sizing,
    cache: str | None,
) -> MappedImages:
    """The images of a data set from the cache, prepared now if they are not there.

    settings: whatever else decides on the content.  collect: lists the images; called only if need be.
    files: all that the content is read from; none, and the content is hashed every time.
    Raises UserError if as many images as the collection says or more cannot be read, or the cache cannot be written.
    """
    root = kept.cache_folder(cache)
    fingerprint = _fingerprint(settings, sizing, files) if files else None
    key = kept.recall(root, fingerprint)
    if key and kept.is_whole(root / key):
        return _open(root / key)
    collection = collect()
    key = _key(collection, sizing)
    if not kept.is_whole(root / key):
        _prepare(root, collection, sizing, key)
    if fingerprint and collection.is_lasting:
        kept.remember(root, fingerprint, key)
    return _open(root / key)


def remembered(
    settings: dict[str, Any], find: Callable[[], str], *, files: Sequence[FilePath], cache: str | None
) -> str:
    """A short text that these files and settings decide on, from the cache, or found now."""
    root = kept.cache_folder(cache)
    fingerprint = _fingerprint(settings, Sizing(), files) if files else None
    known = kept.recall(root, fingerprint)
    if known is None:
        known = find()
        if fingerprint:
            kept.remember(root, fingerprint, known)
    return known


def sizes_of(collection: Collection) -> list[tuple[int, int] | None]:
    """Height and width of each image, as it is shown; None of those that cannot be read."""

    def look(item: Item) -> tuple[int, int] | None:
        try:
            return size_of(item.read())
        except (UnreadableImage, OSError):
            return None

    with _progress(f"measuring {collection.origin}", len(collection.items)) as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            found: list[tuple[int, int] | None] = []
            for begin in range(0, len(collection.items), CHUNK):
                found += threads.map(look, collection.items[begin : begin + CHUNK])
                advance(min(CHUNK, len(collection.items) - begin))
    return found


def _prepare(root: FilePath, collection: Collection, sizing: Sizing, key: str) -> None:
    """Write a set into the cache, unless another process does so first."""
    with kept.locked(root, key) as is_alone:
        if not kept.is_whole(root / key):
            with kept.new_folder(root, key, is_alone=is_alone) as folder:
                _write(folder, collection, sizing, key)


@schema
class About:
    """What is read of meta.json."""

    num_classes: NonNegativeInt
    class_names: Annotated[tuple[str, ...], Field(max_length=MAX_CLASSES)]
    warnings: tuple[str, ...]


ABOUT = tuple(field.name for field in fields(About))


@dataclass
class Report:
    """What could not be read, and what was changed."""

    unreadable: list[tuple[str, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    parts: set[str] = field(default_factory=set)  # those that hold what could not be read

    def warning(self, origin: str, total: int) -> str | None:
        """All of it in one line."""
        parts, count = [], len(self.unreadable)
        if count:
            parts = [f"{count:,} of {total:,} images ({count / total:.2%}) cannot be read and are left out: {self}"]
        parts += [f"{number:,} are {note}" for note, number in sorted(self.notes.items())]
        return f"{origin}: {'; '.join(parts)}" if parts else None

    def is_local(self, collection: Collection) -> bool:
        """Whether the damage is in a few of the files that the images lie in, not all over the set."""
        return is_minority(len(self.parts), len({item.part for item in collection.all_items}))

    def __str__(self) -> str:
        first = ", ".join(f"{shown(name)} ({reason})" for name, reason in self.unreadable[:NUM_LISTED])
        more = len(self.unreadable) - NUM_LISTED
        return first + (f" and {more:,} more" if more > 0 else "")


def is_prepared(folder: FilePath) -> bool:
    """Whether a folder is one of the cache's prepared sets."""
    return (folder / kept.META).is_file() and (folder / kept.IMAGES).is_file()


def open_prepared(folder: FilePath) -> MappedImages:
    """A prepared set by its folder. Raises UserError if it is damaged."""
    if not kept.is_whole(folder):
        raise UserError(f"{folder}: the prepared data are damaged; prepare them again")
    return _open(folder)


def _open(folder: FilePath) -> MappedImages:
    """A prepared set. Raises UserError on one that is not as we write them."""
    try:
        meta = read_json(folder / kept.META)
        about = validate(About, {name: meta[name] for name in ABOUT}, origin=str(folder / kept.META))
        images = np.load(folder / kept.IMAGES, mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / kept.LABELS, mmap_mode="r", allow_pickle=False) if about.num_classes else None
    except UserError:
        raise
    except Exception as error:  # NumPy has no class for all of its own on damaged files
        raise UserError(f"{folder}: not prepared data ({type(error).__name__}: {error}); remove it") from None
    fits = labels is None or (labels.dtype == np.int64 and labels.shape == images.shape[:1])
    if images.dtype != np.uint8 or images.ndim != 4 or not fits:
        raise UserError(f"{folder}: not prepared data: images or labels do not match their description; remove it")
    for line in about.warnings:
        kept.warn(line)
    content = json.dumps([meta["files"], about.num_classes])
    return MappedImages(
        np.asarray(images),
        None if labels is None else torch.from_numpy(np.array(labels)),
        key=hashlib.sha256(content.encode()).hexdigest(),  # of what is there, wherever it came from
        num_classes=about.num_classes,
        class_names=about.class_names,
        notes=about.warnings,
    )


def _write(folder: FilePath, collection: Collection, sizing: Sizing, key: str) -> None:
    """images.npy, labels.npy and meta.json of a collection."""
    report = Report()
    file = folder / kept.IMAGES
    with naming(file), open_plain(file, "wb") as handle, closing(_decoded(collection, sizing, report)) as found:
        rows, shape = _write_images(handle, collection, found)
    classes = collection.classes
    if classes:
        content = io.BytesIO()  # np.save to a file does not say what is wrong with the disk
        np.save(content, np.array(classes.labels, dtype=np.int64)[rows], allow_pickle=False)
        write_bytes(folder / kept.LABELS, content.getvalue())
    warning = report.warning(collection.origin, len(collection.all_items))
    meta = {
        "version": VERSION,
        "key": key,
        "origin": collection.origin,
        "shape": [len(rows), *shape],
        "num_classes": classes.count if classes else 0,
        "class_names": list(classes.names) if classes else [],
        "warnings": [*collection.notes, *([warning] if warning else [])],
        "unreadable": report.unreadable[:MOST_KEPT],
    }
    kept.seal(folder, meta)


def _write_images(
    handle: IO[bytes], collection: Collection, found: Iterator[tuple[int, Decoded]]
) -> tuple[list[int], tuple[int, ...]]:
    """images.npy, not through memory. Returns which rows of the collection it has, and an image's shape; () of none."""
    rows: list[int] = []
    shape: tuple[int, ...] = ()
    for row, decoded in found:
        if not rows:
            shape = decoded.pixels.shape
            _write_header(handle, (len(collection.items), *shape))  # of a fixed length: written again at the end
        if decoded.pixels.shape != shape:
            names = [collection.items[number].name for number in (rows[0], row)]
            raise UserError(_different(collection.origin, names, [shape, decoded.pixels.shape]))
        handle.write(decoded.pixels.data)
        rows.append(row)
    handle.seek(0)
    _write_header(handle, (len(rows), *(shape or (1, 1, 1))))
    return rows, shape


def _decoded(collection: Collection, sizing: Sizing, report: Report) -> Generator[tuple[int, Decoded], None, None]:
    """The readable images with their row numbers, in order; the others go into `report`.

    Raises UserError as soon as too many are unreadable.
    """
    items, total = collection.items, len(collection.items)
    with _progress(f"preparing {collection.origin}", total) as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on images that are odd but readable
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for begin in range(0, total, CHUNK):
                chunk = items[begin : begin + CHUNK]
                for row, made in enumerate(threads.map(lambda item: _try(item, sizing), chunk), begin):
                    if isinstance(made, Decoded):
                        report.notes.update(made.notes)
                        yield row, made
                    else:
                        report.unreadable.append((items[row].name, made))
                        report.parts.add(items[row].part)
                advance(len(chunk))
                _refuse_too_many(collection, report, begin + len(chunk))


def _refuse_too_many(collection: Collection, report: Report, looked_at: int) -> None:
    total, most = len(collection.all_items), collection.max_unreadable
    if report.unreadable and len(report.unreadable) >= most * total and not report.is_local(collection):
        seen = f"the first {looked_at:,} of {total:,}" if looked_at < len(collection.items) else f"{total:,}"
        raise UserError(too_many(collection.origin, len(report.unreadable), seen, f": {report}", most=most))


def too_many(origin: str, count: int, total: str, which: str = "", *, most: float = MAX_UNREADABLE) -> str:
    """Why images are not left out."""
    return (
        f"{origin}: {count:,} of {total} images cannot be read (fewer than {most:.0%} are left out with a "
        f"warning){which}. Repair or remove them"
    )


def _try(item: Item, sizing: Sizing) -> Decoded | str:
    """An image, or why there is none."""
    try:
        return decode(item.read(), sizing)
    except UnreadableImage as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)


def _different(origin: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> str:
    sizes = [f"{shown(name)} is {shape[2]} x {shape[1]}" for name, shape in zip(names, shapes, strict=True)]
    return f"{origin}: images differ in size ({', '.join(sizes)}); set data.resolution"


def _write_header(handle: IO[bytes], shape: tuple[int, ...]) -> None:
    """NumPy leaves room for any N, so that a header can be written over another."""
    npy.write_array_header_1_0(handle, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _key(collection: Collection, sizing: Sizing) -> str:
    """SHA-256 of all that decides on the prepared arrays."""
    digest = hashlib.sha256(f"{VERSION} {sizing.resolution} {sizing.channels}".encode())
    if collection.max_unreadable != MAX_UNREADABLE:
        digest.update(b"unreadable %r" % collection.max_unreadable)
    classes = collection.classes
    if classes:
        digest.update(json.dumps([classes.count, classes.names, classes.labels]).encode())
    with _progress(f"looking through {collection.origin}", len(collection.items)) as advance:
        for number, item in enumerate(collection.items, 1):
            content: Any = b""
            with suppress(UnreadableImage, OSError):  # it will be named when it is decoded
                content = item.read()
            if isinstance(content, np.ndarray):
                digest.update(repr(content.shape).encode())
                content = np.ascontiguousarray(content).tobytes()
            elif may_be_converted(content):
                digest.update(b"colour %d " % COLOUR_VERSION)
            name = item.name.encode("utf-8", "surrogateescape")
            digest.update(b"%d %s %d " % (len(name), name, len(content)))
            digest.update(hashlib.sha256(content).digest())
            if number % CHUNK == 0:
                advance(CHUNK)
    return digest.hexdigest()


def _fingerprint(settings: dict[str, Any], sizing: Sizing, files: Sequence[FilePath]) -> str:
    """SHA-256 of the files' places, sizes and times, and of the settings."""
    digest = hashlib.sha256(json.dumps([SOURCES_VERSION, settings, sizing.resolution, sizing.channels]).encode())
    for file in files:
        found = file.stat()
        place = os.fsencode(file.absolute())
        digest.update(b"%s %d %d %d\0" % (place, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    return digest.hexdigest()


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line elsewhere, nothing for what is soon done. Yields how to say that n more are done."""
    console = Console(stderr=True)
    if total < LONG or not console.is_terminal:
        if total >= LONG:
            say(f"{title}: {total:,} images")
        yield lambda number: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda number: bar.advance(task, number)
