"""docs/systems.md: there are 29 systems, each with its paper, and every name that the page gives is there."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.diffusion.sampling import AnySampler
from diffdistill.distillation.method import METHODS, AnyMethod
from diffdistill.eval.metrics.settings import CLASSES
from diffdistill.networks import NETWORKS
from diffdistill.settings.registry import load
from diffdistill.training.config import RunConfig

METRICS = {kind.__dataclass_fields__["name"].default for kind in CLASSES}

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "systems.md").read_text()
ROWS = [re.split(r"\s*\|\s*", line.strip("| \n"), maxsplit=3) for line in TEXT.splitlines() if re.match(r"\| \d", line)]
NAMES = sorted(set(re.findall(r"`([^`]+)`", TEXT)))
SAMPLERS = {kind.__dataclass_fields__["name"].default for kind in AnySampler.__args__[0].__args__}  # type: ignore[attr-defined]


def fault(name: str) -> str | None:
    """Why a name of the page is none of the kinds of things that it may name."""
    if name.startswith("diffdistill "):
        verb, *options = name.split()[1:]
        said = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        missing = [option for option in options if option not in said.output]
        return None if said.exit_code == 0 and not missing else f"no command {verb} with {options}"
    if name.startswith("diffdistill."):
        module, _, attribute = name.rpartition(".")
        return None if load(f"{module}:{attribute}") else "no such thing"
    if "/" in name and ":" not in name:
        return None if (ROOT / name).is_file() else "no such file"
    if name in (*METHODS.names(), *NETWORKS.names(), *SAMPLERS, *METRICS):
        return None
    owner, _, setting = name.partition(".")
    key, _, value = setting.partition(": ")
    kind = RunConfig if owner == "RunConfig" else METHODS.find(owner)
    if key not in {one.name for one in fields(kind)}:
        return f"{owner} has no setting {key}"
    if value:
        given = {"name": owner, key: yaml.safe_load(value)}
        TypeAdapter(AnyMethod).validate_json(json.dumps(given))
    return None


def test_there_are_29_systems_each_with_a_paper_of_its_own() -> None:
    assert [int(row[0]) for row in ROWS] == list(range(1, 30))
    papers = [re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", row[1]) for row in ROWS]
    assert all(len(found) == 1 for found in papers)
    assert len({found[0] for found in papers}) == 29
    assert all(row[2].strip() or row[3].strip(" |") for row in ROWS)  # here, or why not


@pytest.mark.parametrize("name", NAMES)
def test_what_the_page_names_exists(name: str) -> None:
    assert fault(name) is None


@pytest.mark.parametrize("name", ["dmd2.no_such", "diffdistill no-such", "examples/no_such.py", "score_field.gamma: 7"])
def test_a_name_that_is_not_there_is_found(name: str) -> None:
    try:
        assert fault(name) is not None
    except ValueError:  # of a value, which the schema refuses
        assert ": " in name


FORMS = (ROOT / "docs" / "closed-forms.md").read_text()
HELD = re.findall(r"`(tests/[\w/.]+)::(\w+)`", FORMS)


def test_every_closed_form_has_a_test_that_exists() -> None:
    rows = [line for line in FORMS.splitlines() if re.match(r"\| [A-F]\d ", line)]
    assert len(rows) > 25
    assert all("::test_" in row for row in rows)
    assert {name for name in HELD if f"def {name[1]}(" not in (ROOT / name[0]).read_text()} == set()
