"""The page "Use it as a library" is true: its programs run, and its package's six kinds work by the command line."""

import ast
import json
import os
import subprocess
import sys
import tomllib
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from click.testing import Result
from support.pages import ROOT, files_of
from support.plugins import install, on_the_path, write_wheel
from support.stand_ins import save_stand_in
from typer.testing import CliRunner

import diffdistill as dd
from diffdistill.commands.cli import app
from diffdistill.commands.methods import OTHER_KINDS
from diffdistill.distillation.method import METHODS
from diffdistill.export.bundle import _module
from diffdistill.models.load import describe_model, load_model
from diffdistill.settings.schema import UserError
from diffdistill.training.config import json_schema

FILES = files_of("library.md")
PACKAGE = "diffdistill_example"
MODULES = {Path(name).name: text for name, text in FILES.items() if name.startswith(f"example/{PACKAGE}/")}
POINTS = tomllib.loads(FILES["example/pyproject.toml"])["project"]["entry-points"]
CLEAN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DIFFDISTILL_CACHE")}


def run_program(text: str, *arguments: object) -> dict[str, Any]:
    """What a program of the page leaves behind: its names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    with patch.object(sys, "argv", ["program", *map(str, arguments)]), torch.random.fork_rng():
        exec(compile(text, "program", "exec"), names)
    return names


def test_importing_the_package_imports_nothing_and_every_name_is_there(tmp_path: Path) -> None:
    program = """
import sys
before = set(sys.modules)
import diffdistill as dd
print(sorted(name for name in set(sys.modules) - before if not name.startswith("diffdistill")))
assert set(dd.__all__) - set(dir(dd)) == set()
for name in dd.__all__:
    assert getattr(dd, name) is not None, name
try:
    dd.Trainr
except AttributeError as error:
    print(error)
"""
    environment = {**CLEAN, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == ["[]", "module 'diffdistill' has no attribute 'Trainr'"]


def test_editors_are_told_of_every_name_and_of_no_other() -> None:
    stub = (ROOT / "diffdistill" / "__init__.pyi").read_text()
    told: dict[str, str] = {}
    for node in ast.parse(stub).body:
        if isinstance(node, ast.ImportFrom) and node.module != "typing":
            told |= {alias.asname or "": f"{node.module}:{alias.name}" for alias in node.names}
        elif isinstance(node, ast.FunctionDef):
            assert node.name.startswith("register_")
            told[node.name] = dd.PLACES[node.name]
    assert told == dd.PLACES


def test_the_loop_and_the_run_of_the_page_work(
    quick_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(FILES["loop.py"].splitlines()) <= 40
    run_program(FILES["loop.py"], quick_teacher)
    assert capsys.readouterr().out == "(10, 1, 8, 8)\n"
    run_program(FILES["run.py"], quick_teacher, tmp_path / "run")
    assert capsys.readouterr().out == "(4, 1, 8, 8)\n"
    run_program(FILES["objects.py"], tmp_path / "objects")
    assert capsys.readouterr().out == "step-00000004\n"


def test_the_loop_of_the_page_takes_the_trainer_s_first_step(quick_teacher: Path, tmp_path: Path) -> None:
    """The same losses on the same numbers: after one step of SGD the loop's fake score is the trainer's."""
    shorter = FILES["loop.py"].replace("num_steps=20, batch_size=32", "num_steps=1, batch_size=8")
    shorter = shorter.replace("Adam(player.parameters(), lr=3e-4)", "SGD(player.parameters(), 0.1)")
    found = run_program(shorter, quick_teacher)["players"].fake.state_dict()
    from diffdistill.methods.dmd2 import DMD2

    config = dd.RunConfig(
        run=str(tmp_path / "run"),
        teacher=str(quick_teacher),
        method=DMD2(steps=dd.FewSteps(init_ratio=2.5), gan_weight=0.0),
        optimizers={"default": dd.OptimizerConfig(name="sgd", lr=0.1)},
        train=dd.TrainConfig(steps=1, global_batch_size=8, device="cpu", preview_every=0),
    )
    trainer = dd.Trainer(config, quiet=True)
    trainer.run()
    expected = trainer.trained["fake"].state_dict()
    assert found.keys() == expected.keys()
    start = load_model(quick_teacher).denoiser.state_dict()
    assert any(not torch.equal(found[name], start[name]) for name in found)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The page's package, on the path as pip leaves it; every table is as before afterwards."""
    place = tmp_path / "site"
    (place / PACKAGE).mkdir(parents=True)
    on_the_path(monkeypatch, place)
    for name, text in MODULES.items():
        (place / PACKAGE / name).write_text(text)
    (place / PACKAGE / "__init__.py").touch()
    install(place, "diffdistill-example", {}, POINTS)
    for name in ("teacher.yaml", "student.yaml", "stripes.yaml"):
        (tmp_path / name).write_text(FILES[f"example/{name}"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    for registry in (METHODS, *OTHER_KINDS):
        monkeypatch.setattr(registry, "_found", {})
    _module.cache_clear()
    yield tmp_path
    for module in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[module]


def call(*arguments: object) -> str:
    done: Result = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def every_kind_works(call: Callable[..., str], folder: Path) -> None:
    """The six kinds of the page's package through the command line."""
    listed = call("methods")
    assert "sds" in listed
    assert "(from diffdistill-example 1.0)" in " ".join(listed.replace("│", " ").split())
    for kind, name in [("network", "tiny_conv"), ("data", "stripes"), ("family", "stripes_pipeline")]:
        assert f"{kind} '{name}', from diffdistill-example 1.0" in listed
    assert "reward 'brightness', from diffdistill-example 1.0" in listed
    assert "features 'patch_means', from diffdistill-example 1.0" in listed
    assert "not usable" not in listed
    call("pretrain", "teacher.yaml")
    call("train", "student.yaml")
    call("sample", "runs/stripes-student", "--out", "student.png")
    assert (folder / "student.png").is_file()
    call("reference", "{name: stripes}", "--protocol", "stripes.yaml")
    call("eval", "runs/stripes-student", "--protocol", "stripes.yaml", "--records", "records.jsonl")
    [record] = map(json.loads, (folder / "records.jsonl").read_text().splitlines())
    assert "fd-patch-means-4" in record["metrics"]
    assert record["method"] == "sds"
    call("report", "runs/stripes-student")
    assert (folder / "runs" / "stripes-student" / "report.html").is_file()
    said = " ".join(call("export", "runs/stripes-student", "--out", "exported").split())
    assert "self-contained" in said
    assert "without diffdistill" in said
    call("sample", "exported", "--out", "exported.png", "--trust-code")
    call("train", "student.yaml", "teacher=pipeline", "run=runs/of-pipeline", "data={name: digits}")
    call("sample", "runs/of-pipeline", "--out", "of-pipeline.png")
    call("export", "runs/of-pipeline", "--out", "exported-pipeline")


def save_foreign_pipeline(folder: Path) -> None:
    """A pipeline of the page's class."""
    save_stand_in("ddpm", folder, channels=1)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StripesPipeline"}))


def test_a_package_s_six_kinds_work_by_the_command_line(example: Path) -> None:
    save_foreign_pipeline(example / "pipeline")
    before = json_schema()
    every_kind_works(call, example)
    assert json_schema() == before
    [code] = (example / "exported" / "model").glob("network_*.py")
    assert "class TinyConv(Network)" in code.read_text()
    assert "What comes from diffdistill_example is under that package's own." in code.read_text()


def test_a_checkpoint_names_the_plug_in_that_is_missing(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call("pretrain", "teacher.yaml")
    save_foreign_pipeline(example / "pipeline")
    call("train", "student.yaml", "teacher=pipeline", "run=runs/of-pipeline", "data={name: digits}")
    for registry in (METHODS, *OTHER_KINDS):
        monkeypatch.setattr(registry, "_found", {})
    monkeypatch.syspath_prepend(str(example))
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(example / "site")])
    for place, said in [
        ("stripes-teacher", "model.network.name = 'tiny_conv': no installed package registers a network of this name"),
        ("of-pipeline", "model.network.family = 'stripes_pipeline': no installed package registers a family of this"),
    ]:
        for read in (load_model, describe_model):
            with pytest.raises(UserError, match=said):
                read(f"runs/{place}")
    done: Any = CliRunner().invoke(app, ["train", "student.yaml", "--resume"])
    assert done.exit_code == 2
    assert "method.name = 'sds': unknown" in done.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"from torch import Tensor, nn": "from torch import Tensor, nn\n\nimport numpy as np\nTEN = np.pi"}, None),
        (
            {"import torch\n": "import numpy as np\nimport torch\n", "time_input.cos()": "time_input.cos() * np.e"},
            "import numpy as np: an exported file imports torch and diffusers only",
        ),
        (
            {"import Cond, Network, schema": "import Cond, Network\nimport diffdistill as dd", "@schema": "@dd.schema"},
            "import diffdistill as dd: only `from module import name` can be put into one file",
        ),
    ],
)
def test_a_foreign_network_goes_into_a_self_contained_folder_or_the_reason_is_said(
    example: Path, changes: dict[str, str], said: str | None
) -> None:
    file = example / "site" / PACKAGE / "tiny_conv.py"
    text = file.read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new, 1)
    file.write_text(text)
    call("pretrain", "teacher.yaml")
    done: Any = CliRunner().invoke(app, ["export", "runs/stripes-teacher", "--out", "out", "--no-verify"])
    assert done.exit_code == (2 if said else 0), done.output
    assert (example / "out").exists() == (said is None)
    assert (said or "") in " ".join(done.stderr.split())


REGISTRIES = (METHODS, *OTHER_KINDS)


def test_a_broken_package_is_a_line_of_methods_for_each_kind_and_stops_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And is not loaded before it is named or listed."""
    on_the_path(monkeypatch, tmp_path)
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_found", {})
    points = {registry.group: {"cracked": "cracked_package:Thing"} for registry in REGISTRIES}
    program = (
        "from pathlib import Path\nPath(__file__).with_name('loaded').touch()\nraise RuntimeError('two\\nlines')\n"
    )
    install(tmp_path, "cracked-package", {"cracked_package": program}, points)
    dd.load_config(dd.find_config("dmd2/digits"))
    assert call("--help")
    assert not (tmp_path / "loaded").exists()
    lines = [line for line in call("methods").splitlines() if line.startswith("not usable")]
    said = "'cracked' of cracked-package 1.0: cannot be loaded: RuntimeError: two lines"
    assert lines == [f"not usable: {registry.kind} {said}" for registry in REGISTRIES]
    assert (tmp_path / "loaded").exists()


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_our_names_are_not_given_away(registry: Any) -> None:
    for name in (*registry.own, *registry.unlisted):
        with pytest.raises(UserError, match=f"'{name}': diffdistill uses this name; choose another"):
            registry.register(registry.find(name), name=name)


def test_an_unregistered_method_in_python_is_one_sentence(quick_teacher: Path) -> None:
    from diffdistill.methods.dmd2 import DMD2

    @dd.schema
    class Mine(DMD2):
        name: Any = "mine"

    with pytest.raises(UserError) as caught:
        dd.RunConfig(
            run="run",
            teacher=str(quick_teacher),
            method=Mine(),
            optimizers={"default": dd.OptimizerConfig(lr=1e-3)},
            train=dd.TrainConfig(steps=1, global_batch_size=8),
        )
    assert "Mine is not registered; say diffdistill.register_method(Mine) first" in str(caught.value)
    assert str(caught.value).count("\n") == 1


@pytest.mark.full
def test_a_wheel_s_six_kinds_work_in_a_fresh_environment(tmp_path: Path) -> None:
    """Installed by pip without network into an environment that sees this one's packages, and run as programs."""
    place = tmp_path / "environment"
    venv.create(place, with_pip=False, symlinks=True)
    [packages] = place.glob("lib/python*/site-packages")
    (packages / "those-of-the-tests.pth").write_text("\n".join([str(ROOT), *(p for p in sys.path if "-packages" in p)]))
    files = {f"{PACKAGE}/{name}": text for name, text in {"__init__.py": "", **MODULES}.items()}
    wheel = write_wheel(tmp_path, "diffdistill-example", files, POINTS)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, "--target", str(packages), str(wheel)], check=True)
    for name in ("teacher.yaml", "student.yaml", "stripes.yaml"):
        (tmp_path / name).write_text(FILES[f"example/{name}"])
    save_foreign_pipeline(tmp_path / "pipeline")

    def program(*arguments: object) -> str:
        command = [str(place / "bin" / "python"), "-m", "diffdistill", *map(str, arguments)]
        environment = {**CLEAN, "OMP_NUM_THREADS": "1", "DIFFDISTILL_CACHE": str(tmp_path / "cache"), "COLUMNS": "160"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    every_kind_works(program, tmp_path)
