"""What a denoiser is run with, beside its weights: one place changes it."""

import ast
import copy
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

import diffdistill
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, Runtime, compute_on, device_of
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.diffusion.router import RoutedDenoiser
from diffdistill.networks.mlp import MLPConfig

OWN = {field.name for field in fields(Runtime)} | {"runtime", "net", "path", "predicts", "sigma_data"}
ROOT = Path(diffdistill.__file__).parent
TABLE = PromptTable([Cond(text=torch.ones(2, 3, 4))], Cond(text=torch.zeros(1, 3, 4)))


def make_denoiser() -> Denoiser:
    return Denoiser(MLPConfig(width=8, blocks=1).build((4,), 0, 0.0), EDM(), "edm")


def assigned(file: Path) -> list[str]:
    """The attributes of others, named as a denoiser's own, that a file assigns or deletes."""
    found = [
        node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)) and node.attr in OWN
    ]
    others = [node for node in found if not (isinstance(node.value, ast.Name) and node.value.id == "self")]
    return [f"{file}:{node.lineno}: {node.attr}" for node in others]


def test_no_file_outside_diffusion_assigns_attributes_of_a_denoiser() -> None:
    root = ROOT.parent
    files = [file for part in ("diffdistill", "methods", "eval", "scripts") for file in (root / part).rglob("*.py")]
    assert len(files) > 150
    outside = [file for file in files if ROOT / "diffusion" not in file.parents]
    assert [found for file in outside for found in assigned(file)] == []


def test_what_is_assigned_is_found(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("for d in ():\n    d.conditions, x = 1, 2\nself.conditions = 3\ny.autocast = 4\n")
    assert {line.rpartition(":")[2] for line in assigned(tmp_path / "file.py")} == {" conditions", " autocast"}


def test_a_runtime_is_changed_by_name_alone() -> None:
    denoiser = make_denoiser()
    denoiser.run_with(conditions=TABLE)
    denoiser.run_with(autocast=torch.bfloat16)
    assert denoiser.runtime == Runtime(conditions=TABLE, autocast=torch.bfloat16)
    assert denoiser.conditions is TABLE
    with pytest.raises(TypeError, match="prompts"):
        denoiser.run_with(prompts=TABLE)
    denoiser.conditions = None  # a program's own line, and the same
    assert denoiser.runtime == Runtime(autocast=torch.bfloat16)


def test_all_students_behind_a_router_are_run_alike() -> None:
    students = [make_denoiser() for _ in range(3)]
    routed = RoutedDenoiser(students, lambda cond: torch.zeros(1, dtype=torch.int64))
    routed.run_with(conditions=TABLE, autocast=torch.bfloat16)
    assert {id(denoiser.runtime.conditions) for denoiser in (routed, *students)} == {id(TABLE)}
    assert {denoiser.runtime.autocast for denoiser in (routed, *students)} == {torch.bfloat16}


def test_a_denoiser_around_another_network_is_run_as_the_first() -> None:
    denoiser = make_denoiser()
    denoiser.run_with(conditions=TABLE)
    other = denoiser.with_net(make_denoiser().net)
    assert other.net is not denoiser.net
    assert (other.runtime, other.path, other.predicts) == (denoiser.runtime, denoiser.path, denoiser.predicts)
    other.run_with(conditions=None)
    assert denoiser.conditions is TABLE


def test_copies_have_a_runtime_of_their_own_and_share_the_table() -> None:
    denoiser = make_denoiser()
    denoiser.run_with(conditions=TABLE)
    made = copy.deepcopy(denoiser)
    made.run_with(autocast=torch.bfloat16)
    assert made.conditions is TABLE
    assert denoiser.runtime.autocast is None


@pytest.mark.parametrize("make", [make_denoiser, lambda: nn.Linear(2, 2)])
def test_where_a_module_computes_can_be_another_place_than_its_weights(make) -> None:
    module = make()
    compute_on(module, torch.device("meta"))
    assert device_of(module) == torch.device("meta")
