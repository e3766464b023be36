"""Arrays of a .npz file. NumPy asks for the memory of the shape that a header says: it must fit what is there first."""

import zipfile
from collections.abc import Collection
from math import prod
from pathlib import Path as FilePath
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from diffdistill.data.files import check_unpacked_size

SUFFIX = ".npy"


def read_arrays(file: FilePath, wanted: Collection[str]) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """The arrays of these names that a .npz file has, and the names of its others.

    Raises UserError on a zip bomb, ValueError on Python objects and on a header that says more than the file holds; the
    errors of zipfile, zlib and NumPy on what is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        check_unpacked_size(archive, file)
        found, others = {}, []
        for info in archive.infolist():
            name = info.filename.removesuffix(SUFFIX)
            if name in wanted:
                with archive.open(info) as member:
                    check_header(member, info.file_size, f"`{name}`")
                with archive.open(info) as member:
                    found[name] = npy.read_array(member, allow_pickle=False)
            else:
                others.append(name)
    return found, others


def check_header(member: IO[bytes], size: int, origin: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, dtype. Raises ValueError where `size` is too small, and on objects."""
    version = npy.read_magic(member)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, is_fortran, dtype = read_header(member)
    if dtype.hasobject:
        raise ValueError(f"{origin} holds Python objects, a pickle, which is not read")
    held, said = size - member.tell(), prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or said > held:
        raise ValueError(f"{origin} says that it is {dtype} {list(shape)}, {said:,} bytes; it holds {held:,}")
    return shape, is_fortran, dtype
