"""A run's folder is one run's, and its files are in it."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath

from diffdistill.settings.schema import UserError

LOCK = ".lock"


@contextmanager
def locked(folder: FilePath) -> Iterator[None]:
    """While open, no other run can open the same folder. The lock ends with the process, however that ends.

    Raises UserError naming the process that holds it, and for links to files, through which a run would write
    elsewhere. A file system without locks keeps nobody out.
    """
    refuse_links(folder)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with open(descriptor, "r+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = handle.read(200).strip()
            raise UserError(
                f"run = {str(folder)!r}: another run is writing there ({holder}); name another `run`"
            ) from None
        except OSError:
            pass
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield


def refuse_links(folder: FilePath) -> None:
    """Raise UserError if the folder holds a link that is not to a folder: a run that came from elsewhere may."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() and not entry.is_dir():
            raise UserError(f"{entry}: is a link to {os.readlink(entry)}, which the run would write to; remove it")
