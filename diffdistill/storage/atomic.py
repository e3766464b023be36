"""Files that are whole or absent: written beside their place, synced, renamed."""

import errno
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path as FilePath

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room left."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return (isinstance(error, OSError) and error.errno in full) or "No space left" in str(error)


def write_text_atomically(file: FilePath, text: str) -> None:
    """The old text or the new one, never a part."""
    temporary = file.with_name(f".{file.name}.writing")
    try:
        write_synced(temporary, text)
        temporary.replace(file)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_tensors_atomically(file: FilePath, tensors: Mapping[str, Tensor]) -> None:
    """The old file or the new one, never a part."""
    temporary = file.with_name(f".{file.name}.writing")
    try:
        write_tensors(temporary, tensors)
        temporary.replace(file)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_tensors(file: FilePath, tensors: Mapping[str, Tensor]) -> None:
    """Write and fsync. Raises OSError."""
    ready = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(ready, file)
    except SafetensorError as error:  # it wraps the operating system's error
        told = re.search(r"\(os error (\d+)\)", str(error))
        code = int(told[1]) if told else errno.EIO
        raise OSError(code, str(error), str(file)) from error
    sync(file)


def write_synced(file: FilePath, text: str) -> None:
    with file.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


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
