"""Image files of a folder or a zip by their relative names, sorted. Nothing is ever unpacked to disk."""

import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as FilePath

from diffdistill.data.collection import Item, UnreadableImage, checked_size, listed
from diffdistill.data.decode import SUFFIXES
from diffdistill.settings.schema import UserError

MAX_UNPACKING = 100
"""An archive may unpack to this many times its size, or to the next constant. Images hardly shrink at all."""
ALWAYS_ALLOWED_BYTES = 2**30


@dataclass(frozen=True)
class Listing:
    """items: images, sorted by name.  others: files that may hold labels, by name.  ignored: how many of what kind.
    paths: every file whose change means a change of content."""

    items: tuple[Item, ...]
    others: dict[str, Item]
    paths: tuple[FilePath, ...]
    ignored: Counter[str] = field(default_factory=Counter)


def list_images(path: FilePath, *, setting: str = "data.path") -> Listing:
    """The images in a folder or a zip; symbolic links, hidden files and __MACOSX are passed over.

    setting: where the user named the path, for messages.
    Raises UserError if it is neither, holds no images, or is an archive that must not be trusted.
    """
    if path.is_dir():
        listing = _list_folder(path)
    elif path.is_file():
        listing = _list_zip(path, setting)
    else:
        raise UserError(f"{setting} = {str(path)!r}: no such folder or file")
    if not listing.items:
        passed = ", ".join(f"{count} x {kind}" for kind, count in listing.ignored.items())
        known = " ".join(SUFFIXES)
        raise UserError(f"{setting} = {str(path)!r}: holds no images{passed and f' (passed over: {passed})'}; {known}")
    return listing


def without_common_folders(names: Iterable[str]) -> list[str]:
    """Names without the folders that all of them share, as long as each keeps one: data/cat/1.png as cat/1.png."""
    parts = [name.split("/") for name in names]
    while all(len(p) > 2 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return ["/".join(p) for p in parts]


def _list_folder(root: FilePath) -> Listing:
    items: dict[str, Item] = {}
    others: dict[str, Item] = {}
    paths: list[FilePath] = []
    ignored: Counter[str] = Counter()
    for path in _walk(root, ignored):
        name = path.relative_to(root).as_posix()
        found = items if _is_image(name) else others
        found[name] = Item(name, partial(_read_file, path))
        if found is items:
            paths.append(path)
        elif path.suffix.lower() != ".csv":
            ignored["no image by its name"] += 1
    return Listing(tuple(items[name] for name in sorted(items)), others, tuple(sorted(paths)), ignored)


def _walk(folder: FilePath, ignored: Counter[str]) -> Iterator[FilePath]:
    """Regular files below a folder, links not followed."""
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
    for entry in entries:
        if entry.is_symlink():
            ignored["symbolic link"] += 1
        elif _is_hidden(entry.name):
            ignored["hidden"] += 1
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(FilePath(entry.path), ignored)
        elif entry.is_file(follow_symlinks=False):
            yield FilePath(entry.path)
        else:
            ignored["no regular file"] += 1


def _read_file(path: FilePath) -> bytes:
    with path.open("rb") as handle:
        checked_size(os.fstat(handle.fileno()).st_size)
        return handle.read()


def _list_zip(path: FilePath, setting: str) -> Listing:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise UserError(f"{setting} = {str(path)!r}: neither a folder nor a zip that can be read: {error}") from None
    members = _trusted_members(archive, path)
    items: dict[str, Item] = {}
    others: dict[str, Item] = {}
    ignored: Counter[str] = Counter()
    for name, member in members.items():
        if stat.S_ISLNK(member.external_attr >> 16):
            ignored["symbolic link"] += 1
        elif any(_is_hidden(part) for part in name.split("/")):
            ignored["hidden"] += 1
        else:
            found = items if _is_image(name) else others
            found[name] = Item(name, partial(_read_member, archive, member))
            ignored["no image by its name"] += found is others and not name.lower().endswith(".csv")
    return Listing(tuple(items[name] for name in sorted(items)), others, (path,), +ignored)


def _trusted_members(archive: zipfile.ZipFile, path: FilePath) -> dict[str, zipfile.ZipInfo]:
    """The files of an archive by their cleaned names. Raises UserError if it tries to deceive."""
    if not all(member.filename for member in archive.infolist()):
        raise UserError(f"{path}: refused, for something in it has no name")
    files = [member for member in archive.infolist() if not member.is_dir()]
    check_unpacked_size(archive, path)
    escaping = [member.filename for member in archive.infolist() if _escapes(member.filename)]
    if escaping:
        raise UserError(f"{path}: refused, for these names lead out of the archive: {listed(escaping)}")
    names = ["/".join(p for p in re.split(r"[/\\]", member.filename) if p not in ("", ".")) for member in files]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise UserError(f"{path}: holds more than one file of the name {listed(twice)}")
    return dict(zip(names, files, strict=True))


def check_unpacked_size(archive: zipfile.ZipFile, path: FilePath) -> None:
    """Raises UserError if an archive unpacks to far more than its size: a zip bomb."""
    unpacked, packed = sum(member.file_size for member in archive.infolist()), path.stat().st_size
    if unpacked > max(ALWAYS_ALLOWED_BYTES, MAX_UNPACKING * packed):
        raise UserError(
            f"{path}: refused as a zip bomb: {packed / 2**20:,.1f} MiB that unpack to {unpacked / 2**20:,.0f} MiB"
        )


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.flag_bits & 1:
        raise UnreadableImage("encrypted")
    try:
        with archive.open(member) as handle:
            return handle.read(checked_size(member.file_size))
    except UnreadableImage:
        raise
    except Exception as error:  # zlib.error, BadZipFile, NotImplementedError, EOFError and more
        raise UnreadableImage(f"damaged in the zip: {error}") from error


def _escapes(name: str) -> bool:
    """Whether a member's name is absolute, or climbs out of the folder it would be unpacked into."""
    parts = re.split(r"[/\\]", name)
    return ".." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", name) is not None


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)
