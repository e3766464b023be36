"""Our CUDA kernels on a CPU: the very source, compiled by g++ against tests/support/emulator."""

import ctypes
import subprocess
import tempfile
from ctypes import Structure, byref
from functools import cache, partial
from pathlib import Path

from torch import Tensor

from diffdistill.attention.build import HERE
from diffdistill.attention.kernels import Kernel, Launch, Variant

EMULATOR = Path(__file__).parent / "emulator"
CHECKED = ("-fsanitize=alignment,bounds,shift", "-fsanitize-undefined-trap-on-error")
"""Ends the program at an access of memory that is not aligned, and at an index beyond an array of registers."""


def compile_emulated(variant: Variant, folder: Path, *, kernels: Path = HERE / "attention.cu") -> Path:
    """A shared library with the kernels in `kernels`, as `variant` builds them."""
    library = folder / f"{abs(hash(variant))}.so"
    options = [
        "-std=c++17",
        "-O1",
        "-U_FORTIFY_SOURCE",
        "-fPIC",
        "-shared",
        "-DDIFFDISTILL_EMULATOR",
        *CHECKED,
        *variant.defines,
    ]
    places = [f'-DKERNELS="{kernels}"', f"-I{EMULATOR}", f"-I{HERE}"]
    subprocess.run(["g++", *options, *places, EMULATOR / "emulator.cpp", "-o", library], check=True)
    return library


@cache
def _library(variant: Variant) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        return ctypes.CDLL(str(compile_emulated(variant, Path(folder))))


ORDERS = range(4)
"""+1: the last warp of a block goes first, not the first; +2: a copy arrives at once, not when it is waited for."""


def emulated(order: int = 0) -> Launch:
    """What starts a kernel in the emulator, in one of the ORDERS."""
    return partial(_launch, order)


def _launch(order: int, kernel: Kernel, arguments: Structure, variant: Variant, blocks: int, like: Tensor) -> None:
    run = getattr(_library(variant), f"run_{kernel}")
    run(byref(arguments), blocks, variant.shared_bytes(kernel), order)
