"""Image files of a folder or a zip by their relative names, sorted. Nothing is ever unpacked to disk."""

import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as FilePath

from diffdistill.data.collection import Item, UnreadableImage, checked_size, listed
from diffdistill.data.decode import SUFFIXES
from diffdistill.data.left_out import LeftOut
from diffdistill.settings.schema import UserError

MAX_UNPACKING = 100
"""An archive may unpack to this many times its size, or to the next constant. Images hardly shrink at all."""
ALWAYS_ALLOWED_BYTES = 2**29

SYSTEMS_OWN = frozenset(
    (
        *("__MACOSX", "@eaDir", "@Recycle", "#recycle", "@Recently-Snapshot", "#snapshot", "$RECYCLE.BIN"),
        *("System Volume Information", "lost+found"),
    )
)
"""Folders that macOS, Synology, QNAP, Windows and Linux make: thumbnails and deleted files, no images of the set."""
LINK, HIDDEN, SYSTEMS, NO_FILE, NO_IMAGE = (
    *("symbolic link", "hidden", "in a folder that a system made", "no regular file", "no image by its name"),
)


@dataclass(frozen=True)
class Listing:
    """items: images, sorted by name.  others: files that may hold labels, by name.  left_out: all other files.
    paths: every file whose change means a change of content."""

    items: tuple[Item, ...]
    others: dict[str, Item]
    paths: tuple[FilePath, ...]
    left_out: LeftOut = field(default_factory=LeftOut)

    def notes(self, origin: str, *, used: Collection[str] = ()) -> tuple[str, ...]:
        """What is not used, in a line.  used: which of `others` are."""
        read = self.others.keys() & set(used)
        left_out = self.left_out.with_more(NO_IMAGE, (name for name in sorted(self.others) if name not in read))
        return left_out.notes(origin, used=len(self.items) + len(read))


def list_images(path: FilePath, *, setting: str | None = "data.path") -> Listing:
    """The images in a folder or a zip; symbolic links, hidden files and folders that systems make are left out.

    setting: where the user named the path, for messages; None: it is named by itself.
    Raises UserError if it is neither, holds no images, or is an archive that must not be trusted.
    """
    where = f"{setting} = {str(path)!r}" if setting else str(path)
    if path.is_dir():
        listing = _list_folder(path)
    elif path.is_file():
        listing = _list_zip(path, where)
    else:
        raise UserError(f"{where}: no such folder or file")
    if not listing.items:
        found = listing.left_out.with_more(NO_IMAGE, listing.others)
        known = " ".join(SUFFIXES)
        raise UserError(f"{where}: holds no images{f' but {found}' if found.total else ''}; image files end in {known}")
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
    left_out = LeftOut()
    for path in _walk(root, root, left_out):
        name = path.relative_to(root).as_posix()
        found = items if is_image(name) else others
        found[name] = Item(name, partial(_read_file, path))
        if found is items:
            paths.append(path)
    return Listing(tuple(items[name] for name in sorted(items)), others, tuple(sorted(paths)), left_out)


def _walk(root: FilePath, folder: FilePath, left_out: LeftOut, reason: str | None = None) -> Iterator[FilePath]:
    """Regular files below a folder, links not followed.  reason: why all of them are left out."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        if reason is None:
            raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
        return left_out.add(reason, folder.relative_to(root).as_posix())
    for entry in entries:
        path = FilePath(entry.path)
        why = LINK if entry.is_symlink() else reason or _own_reason(entry.name)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root, path, left_out, why)
        elif why or not entry.is_file(follow_symlinks=False):
            left_out.add(why or NO_FILE, path.relative_to(root).as_posix())
        else:
            yield path
    return None


def _read_file(path: FilePath) -> bytes:
    with path.open("rb") as handle:
        checked_size(os.fstat(handle.fileno()).st_size)
        return handle.read()


def _list_zip(path: FilePath, where: str) -> Listing:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise UserError(f"{where}: neither a folder nor a readable zip file: {error}") from None
    members = _trusted_members(archive, path)
    items: dict[str, Item] = {}
    others: dict[str, Item] = {}
    left_out = LeftOut()
    for name, member in members.items():
        is_link = stat.S_ISLNK(member.external_attr >> 16)
        why = LINK if is_link else reason_by_name(name)
        if why:
            left_out.add(why, name)
        else:
            found = items if is_image(name) else others
            found[name] = Item(name, partial(_read_member, archive, member))
    return Listing(tuple(items[name] for name in sorted(items)), others, (path,), left_out)


def _trusted_members(archive: zipfile.ZipFile, path: FilePath) -> dict[str, zipfile.ZipInfo]:
    """The files of an archive by their cleaned names. Raises UserError if it tries to deceive."""
    if not all(member.filename for member in archive.infolist()):
        raise UserError(f"{path}: refused: an entry has no name")
    files = [member for member in archive.infolist() if not member.is_dir()]
    check_unpacked_size(archive, path)
    escaping = [member.filename for member in archive.infolist() if _escapes(member.filename)]
    if escaping:
        raise UserError(f"{path}: refused: these names point outside the archive: {listed(escaping)}")
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


def _own_reason(part: str) -> str | None:
    """Why a file or folder of this name is left out."""
    return HIDDEN if part.startswith(".") else SYSTEMS if part in SYSTEMS_OWN else None


def reason_by_name(name: str) -> str | None:
    """Why a file is left out, for its name or that of a folder it is in."""
    return next(filter(None, map(_own_reason, name.split("/"))), None)


def is_image(name: str) -> bool:
    """Whether a name ends as those of images do."""
    return name.lower().endswith(SUFFIXES)
