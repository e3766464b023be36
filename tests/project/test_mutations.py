"""The planted faults have a place and a test; with `full`, every one is caught."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from mutate import ROOT, Fault, faults, methods

LISTED = [(method, fault) for method in methods() for fault in faults(method)]


@cache
def functions_of(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("method", "fault"), LISTED, ids=lambda value: getattr(value, "name", value))
def test_a_fault_has_one_place_and_a_test(method: str, fault: Fault) -> None:
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.old != fault.new
    file, _, test = fault.test.partition("::")
    assert test.partition("[")[0] in functions_of(ROOT / "tests" / file)


@pytest.mark.parametrize("method", methods())
def test_a_method_has_at_least_four_faults_of_different_kinds(method: str) -> None:
    listed = faults(method)
    assert len(listed) >= 4
    assert len({(fault.file, fault.old, fault.new) for fault in listed}) == len(listed)


@pytest.mark.full
@pytest.mark.parametrize("method", methods())
def test_every_planted_fault_is_caught(method: str) -> None:
    command = [sys.executable, str(ROOT / "tests" / "mutate.py"), method]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
