"""The house rules that no type checker knows: who may import whom, sizes, links, and files that belong together."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffdistill.distillation.method import REGISTRY
from diffdistill.training.config import json_schema, load_config

ROOT = Path(__file__).parents[1]
TOP_LEVEL_ROOMS = ("methods", "eval", "configs")


def linked(file: Path) -> bool:
    """Whether a file of the package has its home in a top-level folder."""
    return file.relative_to(ROOT / "diffdistill").parts[0] in TOP_LEVEL_ROOMS


COMMAND_FILES = ("image_commands", "checkpoint_commands", "eval_commands")
LIGHT = (
    "diffdistill.settings.terminal",
    "diffdistill.commands.exit_codes",
    *(f"diffdistill.{name}" for name in COMMAND_FILES),
)
CORE = sorted((ROOT / "diffdistill").glob("*.py"))
ROOMS = sorted(p for p in (ROOT / "diffdistill").glob("*/**/*.py") if not linked(p))
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


def reaches(file: Path, *rooms: str) -> set[str]:
    """The imports of a file that lead into the given modules or packages."""
    return {name for name in imports(file) for room in rooms if name == room or name.startswith(f"{room}.")}


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", METHODS, ids=relative)
def test_a_method_imports_neither_another_nor_the_trainer_nor_the_config(file: Path) -> None:
    rooms = [f"diffdistill.{name}" for name in ("methods", "eval", "trainer", "cli", "config", "demo")]
    assert reaches(file, *rooms) == set()


@pytest.mark.parametrize("file", EVAL, ids=relative)
def test_evaluation_imports_neither_methods_nor_the_trainer(file: Path) -> None:
    assert (
        reaches(file, "diffdistill.methods", "diffdistill.distillation.method", "diffdistill.training.trainer") == set()
    )


@pytest.mark.parametrize("file", CORE + ROOMS, ids=relative)
def test_the_core_reaches_methods_through_the_registry_only(file: Path) -> None:
    assert reaches(file, "diffdistill.methods", "methods") == set()
    if file.name != "method.py":
        assert "diffdistill.methods" not in file.read_text()


def test_paths_know_no_networks() -> None:
    known = ("diffdistill.networks", "diffdistill.diffusion.denoiser", "diffdistill.distillation.method", "torch.nn")
    assert reaches(ROOT / "diffdistill" / "diffusion" / "path.py", *known) == set()


@pytest.mark.parametrize("file", [p for p in ROOMS if p.parent.name in ("data", "networks")], ids=relative)
def test_data_and_networks_know_no_methods(file: Path) -> None:
    assert (
        reaches(file, "diffdistill.distillation.method", "diffdistill.training.trainer", "diffdistill.training.config")
        == set()
    )


@pytest.mark.parametrize("file", [p for p in ROOMS if p.parent.name == "export"], ids=relative)
def test_export_knows_nothing_of_what_samples_exported_folders(file: Path) -> None:
    assert (
        reaches(
            file, "diffdistill.exported.image_generators", "diffdistill.exported.sample", "diffdistill.commands.images"
        )
        == set()
    )


def test_the_command_line_imports_nothing_heavy_before_a_command_runs() -> None:
    light = {"functools", "os", "sys", "collections", "pathlib", "typing", "typer", "rich", "diffdistill"}
    for name in ("cli", "faults", *COMMAND_FILES):
        top = imports(ROOT / "diffdistill" / f"{name}.py", top_level_only=True)
        assert {name.split(".")[0] for name in top} <= light
        own = {name for name in top if name.startswith("diffdistill.")}
        assert {name for name in own if not name.startswith(LIGHT)} <= {"diffdistill.__version__"}
    assert imports(ROOT / "diffdistill" / "__init__.py") == set()


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


@pytest.mark.parametrize("file", CORE + ROOMS + EVAL, ids=relative)
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
def test_a_method_has_a_file_a_config_and_a_script(name: str) -> None:
    assert (ROOT / "methods" / f"{name}.py").exists()
    assert list((ROOT / "configs" / name).glob("*.yaml"))
    assert (ROOT / "scripts" / f"train_{name}.py").exists()


def test_every_method_file_is_registered() -> None:
    assert {file.stem for file in METHODS} - {"__init__"} == set(REGISTRY)
