"""Files that are whole or absent: written beside their place, synced, renamed. They follow no links and the umask.

Every OSError names the file.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path as FilePath

from torch import Tensor

from diffdistill.settings.links import open_plain, refuse_link
from diffdistill.storage.tensor_file import write_and_hash

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room left."""
    return (isinstance(error, OSError) and error.errno in FULL) or "No space left" in str(error)


def write_text_atomically(file: FilePath, text: str, *, is_derived: bool = False) -> None:
    """The old text or the new one, never a part.  is_derived: it can be made anew, and need not outlast a power cut."""
    _write_atomically(file, lambda place: _write_parts(place, [text.encode()], is_synced=not is_derived))


def write_bytes_atomically(file: FilePath, content: bytes) -> None:
    """The old content or the new one, never a part."""
    _write_atomically(file, lambda place: write_bytes(place, content))


def write_lines_atomically(file: FilePath, lines: Iterable[str]) -> None:
    """The old lines or the new ones, never a part; each is written as it comes."""
    _write_atomically(file, lambda place: _write_parts(place, (line.encode() + b"\n" for line in lines)))


def write_tensors_atomically(file: FilePath, tensors: Mapping[str, Tensor]) -> None:
    """The old file or the new one, never a part."""
    _write_atomically(file, lambda place: write_tensors(place, tensors))


def _write_atomically(file: FilePath, write: Callable[[FilePath], object]) -> None:
    refuse_link(file)
    if file.exists() and not file.is_file() and not file.is_dir():  # /dev/null, a pipe: nothing to put in its place
        write(file)
        return
    temporary = file.with_name(f".{file.name}.writing")
    try:
        temporary.unlink(missing_ok=True)
        write(temporary)
        temporary.replace(file)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_tensors(file: FilePath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file and fsync. Returns its SHA-256. Raises OSError."""
    with naming(file), open_plain(file, "wb") as handle:
        sha256 = write_and_hash(handle, tensors, metadata)
        handle.flush()
        if file.is_file():
            os.fsync(handle.fileno())
    return sha256


def write_synced(file: FilePath, text: str) -> None:
    write_bytes(file, text.encode())


def write_bytes(file: FilePath, content: bytes) -> None:
    """Write through to the disk."""
    _write_parts(file, [content])


def _write_parts(file: FilePath, parts: Iterable[bytes], *, is_synced: bool = True) -> None:
    with naming(file), open_plain(file, "wb") as handle:
        handle.writelines(parts)
        handle.flush()
        if is_synced and file.is_file():
            os.fsync(handle.fileno())


def append_text(file: FilePath, text: str) -> None:
    """What is no Unicode is written as an escape."""
    with naming(file), open_plain(file, "a", encoding="utf-8", errors="backslashreplace") as handle:
        handle.write(text)


@contextmanager
def naming(file: FilePath) -> Iterator[None]:
    """While open, an OSError that names no file (of a full disk, say) names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(file)) from error


def sync(path: FilePath) -> None:
    """See a file, or a folder's entries, through to the disk. Windows does the latter by itself, and cannot be told."""
    is_windows = os.name == "nt"
    if is_windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def follow_umask(folder: FilePath) -> None:
    """Give the files of a folder that others' code has written the permissions that new files get: safetensors' are
    their owner's alone."""
    for place, _, names in os.walk(folder):
        files = [FilePath(place, name) for name in names]
        if not files:
            continue
        probe = FilePath(place, ".umask")
        write_bytes(probe, b"")
        mode = probe.stat().st_mode
        probe.unlink()
        for file in files:
            if not file.is_symlink():
                file.chmod(file.stat().st_mode | mode)
