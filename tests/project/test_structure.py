"""The house rules that no type checker knows: who may import whom, sizes, links, and files that belong together."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffdistill.distillation.method import REGISTRY
from diffdistill.settings.registry import load, modules_of
from diffdistill.training.config import json_schema, load_config

ROOT = Path(__file__).parents[2]
LINTER = str(Path(sys.executable).with_name("lint-imports"))
MODULE = re.compile(r"\bdiffdistill\.(?!json\b)[a-z_]+[.:]|^diffdistill\.[a-z_]+\.[a-z_.]+$")
TABLES = (
    "diffdistill/__init__.py",
    "diffdistill/settings/registry.py",
    "diffdistill/data/registry.py",
    "diffdistill/distillation/method.py",
    "diffdistill/distillation/rewards.py",
    "diffdistill/models/teachers/registry.py",
    "diffdistill/networks/registry.py",
)
TOP_LEVEL_ROOMS = ("methods", "eval", "configs")


def linked(file: Path) -> bool:
    """Whether a file of the package has its home in a top-level folder."""
    return file.relative_to(ROOT / "diffdistill").parts[0] in TOP_LEVEL_ROOMS


COMMAND_FILES = ("benchmark", "cli", "exit_codes", "images", "checkpoints", "evaluation")
LIGHT = (
    "diffdistill.settings.terminal",
    "diffdistill.settings.launcher",
    "diffdistill.settings.limits",
    "diffdistill.commands",
)
SOURCES = sorted(p for p in (ROOT / "diffdistill").glob("**/*.py") if not linked(p))
METHODS = sorted((ROOT / "methods").glob("*.py"))
EVAL = sorted((ROOT / "eval").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("train_*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))


def imports(file: Path, *, top_level_only: bool = False) -> set[str]:
    """Every dotted name that a file imports: `from a import b` gives a and a.b."""
    return set(_imports(ast.parse(file.read_text()), top_level_only))


def _imports(tree: ast.Module, top_level_only: bool) -> Iterator[str]:
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "relative imports hide who is imported"
            assert not node.level, "relative imports hide who is imported"
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def has_doc(node: ast.AST) -> bool:
    return isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_imports_go_in_one_direction() -> None:
    done = subprocess.run([LINTER, "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_linter_sees_a_circle_and_a_step_up(tmp_path: Path) -> None:
    """Planted: settings imports the trainer, late and for types alone, and two siblings each other."""
    shutil.copytree(ROOT / "diffdistill", tmp_path / "diffdistill", symlinks=True)
    for room in TOP_LEVEL_ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    late = "\n\ndef up() -> None:\n    from diffdistill.training import trainer as _\n"
    with (tmp_path / "diffdistill" / "settings" / "values.py").open("a") as file:
        file.write(late)
    typed = "\nif TYPE_CHECKING:\n    from diffdistill.diffusion import denoiser as _\n"
    with (tmp_path / "diffdistill" / "diffusion" / "path.py").open("a") as file:
        file.write(typed)
    command = [LINTER, "--no-logo", "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "diffdistill.settings is not allowed to import diffdistill.training" in done.stdout
    assert "No cycles are allowed in diffdistill.diffusion" in done.stdout


@pytest.mark.parametrize("file", SOURCES + METHODS + EVAL, ids=relative)
def test_no_string_names_a_module_but_in_the_tables_of_the_registry(file: Path) -> None:
    named = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
    docstrings = {
        ast.get_docstring(node, clean=False) for node in ast.walk(ast.parse(file.read_text())) if has_doc(node)
    }
    texts = [text for text in named if isinstance(text, str) and text not in docstrings and MODULE.search(text)]
    assert not texts or relative(file) in TABLES, texts


def test_the_command_line_imports_nothing_heavy_before_a_command_runs() -> None:
    light = {"functools", "inspect", "os", "sys", "collections", "pathlib", "typing", "typer", "rich", "diffdistill"}
    for name in COMMAND_FILES:
        top = imports(ROOT / "diffdistill" / "commands" / f"{name}.py", top_level_only=True)
        assert {name.split(".")[0] for name in top} <= light
        own = {name for name in top if name.startswith("diffdistill.")}
        assert {name for name in own if not name.startswith(LIGHT)} <= {"diffdistill.__version__"}
    assert imports(ROOT / "diffdistill" / "__init__.py", top_level_only=True) == set()


def test_pyproject_lists_every_package_on_disk() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    homes = {room: ROOT / room for room in TOP_LEVEL_ROOMS}
    found = {"diffdistill"} | {f"diffdistill.{room}" for room in TOP_LEVEL_ROOMS}
    for top, folder in [(None, ROOT / "diffdistill"), *homes.items()]:
        for init in folder.glob("*/**/__init__.py"):
            inner = init.parent.relative_to(folder).parts
            if top is not None or not linked(init):
                found.add(".".join(("diffdistill", *([top] if top else []), *inner)))
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize("room", TOP_LEVEL_ROOMS)
def test_the_package_links_to_its_top_level_rooms(room: str) -> None:
    link = ROOT / "diffdistill" / room
    # A checkout without symbolic links holds their text instead.
    assert (str(link.readlink()) if link.is_symlink() else link.read_text()) == f"../{room}"


@pytest.mark.parametrize("room", ["methods", "eval"])
def test_a_bare_import_from_the_root_says_the_right_name(room: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"ImportError: import diffdistill.{room}" in done.stderr


@pytest.mark.parametrize("file", METHODS, ids=relative)
def test_a_method_file_has_at_most_200_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 200


@pytest.mark.parametrize("file", SOURCES + EVAL, ids=relative)
def test_any_other_source_file_has_at_most_400_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400


@pytest.mark.parametrize("file", CONFIGS, ids=relative)
def test_a_config_has_at_most_40_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 40


@pytest.mark.parametrize("file", SCRIPTS, ids=relative)
def test_a_training_script_has_20_to_40_lines(file: Path) -> None:
    assert 20 <= len(file.read_text().splitlines()) <= 40


@pytest.mark.parametrize("file", CONFIGS, ids=relative)
def test_a_packaged_config_parses(file: Path) -> None:
    assert load_config(file).method.name == file.parent.name


def test_the_editors_schema_is_fresh() -> None:
    assert (ROOT / "configs" / "schema.json").read_text() == json_schema(), "run `make schema`"


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_a_method_has_a_file_and_a_config(name: str) -> None:
    assert (ROOT / "methods" / f"{name}.py").exists()
    assert (ROOT / "configs" / name / "digits.yaml").exists()


def test_every_file_of_a_method_is_known() -> None:
    assert {file.stem for file in METHODS} - {"__init__"} == set(REGISTRY)


def test_a_file_without_a_class_of_its_name_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tools_of_test").mkdir()
    (tmp_path / "tools_of_test" / "saw.py").write_text("class Saw:\n    name = 'sow'\n")
    (tmp_path / "tools_of_test" / "axe.py").write_text("class Tool:\n    name = 'axe'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = modules_of("tools_of_test")
    assert list(found) == ["axe", "saw"]
    assert load(found["axe"]).__name__ == "Tool"
    with pytest.raises(ImportError, match="saw: must have one class with the name of its file, not 0"):
        load(found["saw"])
