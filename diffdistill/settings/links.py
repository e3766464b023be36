"""Links in folders of ours. A folder may come from a stranger: what is written or removed in it stays inside it.

A folder that somebody names may be reached through links; below it none is followed that leads out of it. Links that
stay inside it (`checkpoints/best`, and what trackers make) harm nothing else and are allowed.
"""

import errno
import os
import stat
from pathlib import Path as FilePath
from typing import IO, Any

from diffdistill.settings.schema import UserError

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has none


def refuse_links(folder: FilePath) -> None:
    """Raise UserError if the folder holds, at any depth, a link that leads out of it, or what would be written to for
    ever. One that is not there holds none."""
    root = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            entry = FilePath(place, name)
            if _is_endless(entry):
                raise UserError(f"{entry}: is a pipe or a device, not a regular file; remove it")
            if entry.is_symlink() and not _is_inside(os.path.realpath(entry), root):
                raise UserError(f"{entry}: is a link to {os.readlink(entry)}, and writing would follow it; remove it")


def refuse_link(entry: FilePath) -> None:
    """Raise UserError if this is a link, where a file or a folder of ours goes."""
    if entry.is_symlink():
        raise UserError(f"{entry}: is a link to {os.readlink(entry)}, and writing would follow it; remove it")


def open_plain(file: FilePath, mode: str, **options: Any) -> IO[Any]:
    """As `open`, for writing, but raises UserError if the file is a link, and an OSError names the file."""
    refuse_link(file)

    def opener(path: str, flags: int) -> int:
        return os.open(path, flags | NO_FOLLOW, 0o666)

    try:
        return open(file, mode, opener=opener, **options)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{file}: is a link, and writing would follow it; remove it") from None
        raise


def _is_endless(entry: FilePath) -> bool:
    try:
        mode = entry.lstat().st_mode
    except FileNotFoundError:  # another run that is ending removes what it was writing
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)
