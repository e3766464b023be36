"""From the .cu source to a cubin: by nvcc, or by NVRTC, which comes with torch; kept in a cache on disk.

Nothing is compiled at import. The cache's key is the source, the flags and the compiler; a lock keeps two processes
from building the same thing at once.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p, create_string_buffer
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from diffdistill.attention.kernels import Variant
from diffdistill.settings.lock import hold

HERE = Path(__file__).parent / "cuda"
SOURCES = ("primitives.cuh", "attention.cu")


class BuildError(RuntimeError):
    """The kernels cannot be compiled here."""


def cache_folder() -> Path:
    """Where cubins are kept: $DIFFDISTILL_CACHE, or ~/.cache/diffdistill; below it, `kernels`."""
    home = os.environ.get("DIFFDISTILL_CACHE")
    return (Path(home) if home else Path.home() / ".cache" / "diffdistill") / "kernels"


def cubin(variant: Variant, architecture: int) -> bytes:
    """The compiled kernels.  architecture: as in 90 for sm_90.  Raises BuildError where they cannot be compiled."""
    compiler = find_compiler()
    flags = ("-std=c++17", f"-arch=sm_{architecture}", *variant.defines)
    text = "".join((HERE / name).read_text(encoding="utf-8") for name in SOURCES)
    key = hashlib.sha256("\0".join((text, *flags, compiler.version)).encode()).hexdigest()
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{key}.cubin"
    with hold(folder / f"{key}.lock", waiting=lambda: None):
        if not file.exists():
            partial = folder / f"{key}.{os.getpid()}.partial"
            try:
                compiler.compile(flags, partial)
                partial.replace(file)
            finally:
                partial.unlink(missing_ok=True)
    return file.read_bytes()


class Nvcc:
    """The CUDA toolkit's compiler."""

    def __init__(self, program: str) -> None:
        self.program = program

    @property
    def version(self) -> str:
        return subprocess.run([self.program, "--version"], capture_output=True, text=True, check=True).stdout

    def compile(self, flags: tuple[str, ...], file: Path) -> None:
        """Write a cubin. Raises BuildError."""
        command = [self.program, "-O3", "-cubin", *flags, str(HERE / "attention.cu"), "-o", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{self.program} failed:\n{done.stderr.strip()}")


class Nvrtc:
    """CUDA's run-time compiler, a shared library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    @property
    def version(self) -> str:
        major, minor = c_int(), c_int()
        self.library.nvrtcVersion(byref(major), byref(minor))
        return f"nvrtc {major.value}.{minor.value}"

    def compile(self, flags: tuple[str, ...], file: Path) -> None:
        """Write a cubin. Raises BuildError."""
        header, source = ((HERE / name).read_bytes() for name in SOURCES)
        program, names, headers = c_void_p(), (c_char_p * 1)(b"primitives.cuh"), (c_char_p * 1)(header)
        self.library.nvrtcCreateProgram(byref(program), source, b"attention.cu", 1, headers, names)
        options = (c_char_p * len(flags))(*(flag.encode() for flag in flags))
        failed = self.library.nvrtcCompileProgram(program, len(flags), options)
        try:
            if failed:
                raise BuildError(f"NVRTC failed:\n{self._text(program, 'ProgramLog').decode(errors='replace').strip()}")
            file.write_bytes(self._text(program, "CUBIN"))
        finally:
            self.library.nvrtcDestroyProgram(byref(program))

    def _text(self, program: c_void_p, what: str) -> bytes:
        size = c_size_t()
        getattr(self.library, f"nvrtcGet{what}Size")(program, byref(size))
        text = create_string_buffer(size.value)
        getattr(self.library, f"nvrtcGet{what}")(program, text)
        return text.raw


@cache
def find_compiler() -> Nvcc | Nvrtc:
    """nvcc on the path or under $CUDA_HOME, else NVRTC. Raises BuildError if there is neither."""
    home = os.environ.get("CUDA_HOME")
    program = shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)
    if program:
        return Nvcc(program)
    library = find_nvrtc()
    if library is None:
        raise BuildError("no CUDA compiler: neither nvcc on the path nor NVRTC in the environment of torch")
    return Nvrtc(library)


def find_nvrtc() -> ctypes.CDLL | None:
    """NVRTC from the packages that torch for CUDA brings, or from the system."""
    found = find_spec("nvidia")
    folders = [Path(place) for place in (found.submodule_search_locations or [])] if found else []
    files = [
        str(file) for folder in folders for file in sorted(folder.glob("*/lib/libnvrtc.so.*")) if "alt" not in file.name
    ]
    for name in (*files, "libnvrtc.so"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.nvrtcCreateProgram.argtypes = [POINTER(c_void_p), c_char_p, c_char_p, c_int, c_void_p, c_void_p]
        library.nvrtcCompileProgram.argtypes = [c_void_p, c_int, c_void_p]
        return library
    return None
