"""Planted faults: each is written into a copy of the package, where the test that is named for it must then fail.

    python tests/mutate.py            # every method
    python tests/mutate.py sid sim    # some

A fault is a replacement in the text of one file. It counts as caught if its test fails (an error before the test does
not count) and passed without it. tests/mutations/<method>.py lists the faults of a method.
"""

import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
MUTATIONS = ROOT / "tests" / "mutations"
COPIED = ("diffdistill", "methods", "eval", "configs", "tests", "pyproject.toml")
LIBRARIES = ("accelerate", "numpy", "pydantic", "pytest", "rich", "safetensors.torch", "sklearn", "torch", "yaml")
TESTS_FAILED = 1  # pytest's exit code; 2 and more are errors


@dataclass(frozen=True)
class Fault:
    """name: what is wrong.  file: where, from the root.  old: text that stands there once.  new: in its place.
    test: "test_file.py::test_name", the test that must notice."""

    name: str
    file: str
    old: str
    new: str
    test: str


def faults(method: str) -> tuple[Fault, ...]:
    """The faults of tests/mutations/<method>.py."""
    spec = importlib.util.spec_from_file_location(f"mutations_{method}", MUTATIONS / f"{method}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: tuple[Fault, ...] = module.FAULTS
    return found


def methods() -> list[str]:
    """The methods that have faults."""
    return sorted(file.stem for file in MUTATIONS.glob("*.py"))


def copy_package(folder: Path) -> None:
    """A copy of the package and its tests that can be changed."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, folder / name)


def run_test(folder: Path, test: str) -> int:
    """pytest's exit code for one test of the copy, in a process of its own that has the libraries already."""
    child = os.fork()
    if child == 0:
        os._exit(_pytest(folder, f"tests/{test}"))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _pytest(folder: Path, test: str) -> int:
    """Run one test here, where nothing of the package was imported yet."""
    import pytest

    os.chdir(folder)
    sys.path[:0] = [str(folder)]
    os.environ["PYTHONPATH"], os.environ["PYTHONDONTWRITEBYTECODE"] = str(folder), "1"  # for what the test starts
    sys.dont_write_bytecode = True
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", test]))


def is_caught(folder: Path, fault: Fault) -> bool:
    """Whether the fault's test fails in the copy while the fault is in it. Raises ValueError if it has no place."""
    file = folder / fault.file
    right = file.read_text()
    if right.count(fault.old) != 1:
        raise ValueError(f"{fault.file}: {fault.old!r} stands there {right.count(fault.old)} times, not once")
    try:
        file.write_text(right.replace(fault.old, fault.new))
        return run_test(folder, fault.test) == TESTS_FAILED
    finally:
        file.write_text(right)


def main(names: list[str]) -> int:
    """Plant the faults of these methods one by one. Returns how many were not caught.

    In a process that imported nothing of the package: the tests' processes are copies of it.
    """
    assert "diffdistill" not in sys.modules
    for library in LIBRARIES:
        importlib.import_module(library)
    missed = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        copy_package(folder)
        for method in names:
            listed = faults(method)
            passing = {test for test in dict.fromkeys(fault.test for fault in listed) if run_test(folder, test) == 0}
            for fault in listed:
                caught = fault.test in passing and is_caught(folder, fault)
                missed += not caught
                verdict = "caught" if caught else "NOT CAUGHT" if fault.test in passing else "ITS TEST FAILS ANYWAY"
                print(f"{method:<12} {fault.name:<60} {verdict}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:] or methods()) else 0)
