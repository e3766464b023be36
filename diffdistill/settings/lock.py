"""Locks between processes, by filelock; and a run's folder, which is one run's, and whose files are in it.

Where the system has flock, and on Windows, a lock ends with its process, however that ends. Elsewhere it is a file that
a killed process leaves behind: who is kept out by it is told its name.
"""

import errno
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path as FilePath

from diffdistill.settings.limits import MAX_TEXT
from diffdistill.settings.links import open_plain, refuse_links
from diffdistill.settings.reading import read_text
from diffdistill.settings.schema import UserError

LOCK = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # said by file systems without locks


class Held(Exception):  # noqa: N818
    """Another process holds the lock. Its text says which one."""


@contextmanager
def hold(file: FilePath, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold a lock while open. Yields whether there is one: a file system without locks keeps nobody out.

    waiting: called when another process holds it, before this one waits for it; without it, Held is raised instead.
    Raises OSError where the lock's file cannot be made, or is a link.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    if file.is_symlink():
        raise OSError(errno.ELOOP, f"is a link to {os.readlink(file)}, not a file of diffdistill; remove it", str(file))
    lock = FileLock(file, thread_local=False)
    try:
        with warnings.catch_warnings():  # that it falls back to a file where flock is not implemented
            warnings.simplefilter("ignore")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                if waiting is None:
                    stale = f"; if that is gone, remove {file}" if isinstance(lock, SoftFileLock) else ""
                    raise Held(_read_holder(file) + stale) from None
                waiting()
                lock.acquire()
        has_locks = isinstance(lock, FileLock)
    except NotImplementedError:
        has_locks = False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        has_locks = False
    if not has_locks:
        lock.release()
    try:
        if has_locks and waiting is None:
            _write_holder(file)
        yield has_locks
    finally:
        lock.release()


@contextmanager
def locked(folder: FilePath) -> Iterator[None]:
    """While open, no other run can open the same folder.

    Raises UserError naming the process that holds it, and for links out of the folder, which a run that came from
    elsewhere may hold.
    """
    refuse_links(folder)
    with ExitStack() as held:
        try:
            held.enter_context(hold(folder / LOCK))
        except Held as holder:
            raise UserError(
                f"run = {str(folder)!r}: another run writes to it ({holder}); choose another `run`"
            ) from None
        yield


def holder_of(folder: FilePath) -> str | None:
    """Who writes in a run's folder, as `locked` would say; None where nobody does."""
    file = folder / LOCK
    if not file.is_file():
        return None
    try:
        with hold(file):
            return None
    except Held as holder:
        return str(holder)


def _holder_file(file: FilePath) -> FilePath:
    """Beside the lock: Windows lets nobody else read a locked file."""
    return file.with_name(f"{file.name}-holder")


def _write_holder(file: FilePath) -> None:
    with suppress(OSError, UserError), open_plain(_holder_file(file), "w", encoding="utf-8") as handle:
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")  # without it the lock holds as well


def _read_holder(file: FilePath) -> str:
    holder = _holder_file(file)
    with suppress(OSError, UnicodeDecodeError):
        if not holder.is_symlink():
            return read_text(holder, limit=MAX_TEXT)[:200].strip()
    return f"of {file}"
