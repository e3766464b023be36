"""The command line: every verb, the demo from end to end, what is refused, and what is not imported."""

import dataclasses
import inspect
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import typer
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from diffdistill import __version__
from diffdistill.commands import demo as demo_module
from diffdistill.commands import doctor
from diffdistill.commands.cli import app
from diffdistill.commands.methods import print_methods
from diffdistill.distillation.method import METHODS, REGISTRY
from diffdistill.eval.evaluation import digits
from diffdistill.eval.protocols.packaged import DIGITS_PIXELS
from diffdistill.exported import sample
from diffdistill.settings.terminal import Console
from diffdistill.training.config import RunConfig
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
COLUMNS = ["name", "num_evaluations", "fd_pixels", "precision", "recall", "ms_per_image"]
EXTRAS = ("torchvision", "cleanfid", "open_clip", "timm", "transformers", "peft", "datasets", "xformers")

TINY = ("train.steps=2", "train.global_batch_size=8", "train.preview_every=2", "train.checkpoint_every=1")
TINY_TEACHER = ("method.teacher_sampler={name: heun, num_steps: 2}", "model.network={name: mlp, width: 32, blocks: 2}")
TINY_DEMO = f"""
import dataclasses, sys
sys.modules |= dict.fromkeys({EXTRAS})  # importing one of them now raises ImportError
import torch
torch.set_num_threads(1)
from diffdistill.commands import cli
from diffdistill.commands import demo
from diffdistill.eval.evaluation import digits
demo.FAST = {TINY}
load = demo.load_config
demo.load_config = lambda file, settings: load(file, [*settings, *({TINY_TEACHER} if "pretrain" in str(file) else ())])
digits.DIGITS_PIXELS = dataclasses.replace(digits.DIGITS_PIXELS, num_images=200)
cli.main()
"""
"""The demo with two steps and 200 samples, where no optional package can be imported."""


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments)])


def in_new_process(code: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )


def assert_refused(result: Result, *fragments: str) -> None:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert [fragment for fragment in fragments if fragment not in result.stderr] == [], result.stderr


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol with 200 samples instead of 1,800."""
    few = dataclasses.replace(DIGITS_PIXELS, num_images=200)
    monkeypatch.setattr(digits, "DIGITS_PIXELS", few)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo that ran without any optional package."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    done = in_new_process(TINY_DEMO, "demo", "--fast", "--run", folder)
    assert done.returncode == 0, done.stderr
    assert "teacher.png, student.png and table.json; " in done.stdout
    return folder


def test_the_demo_needs_no_extras_and_writes_the_table(demo: Path) -> None:
    rows = json.loads((demo / "table.json").read_text())
    assert [list(row) for row in rows] == 5 * [COLUMNS]
    names = ["bootstrap floor", "Gaussian of the data", "teacher", "teacher, one step", "DMD student, one step"]
    assert [row["name"] for row in rows] == names
    assert [row["num_evaluations"] for row in rows] == [0, 0, 3, 1, 1]
    assert all(row["ms_per_image"] > 0 for row in rows[2:])


def test_the_demo_writes_pictures_and_previews(demo: Path) -> None:
    for name in ("teacher", "student"):
        assert Image.open(demo / f"{name}.png").width >= 10 * 32
        assert [p.name for p in (demo / name / "previews").iterdir()] == ["step-00000002.png"]
    assert Image.open(demo / "comparison.png").width > 10 * 72


def test_a_finished_demo_is_not_trained_again(demo: Path, few_images: None, monkeypatch: pytest.MonkeyPatch) -> None:
    load = demo_module.load_config

    def load_tiny(file: Path, settings: list[str]) -> RunConfig:
        return load(file, [*settings, *(TINY_TEACHER if "pretrain" in str(file) else ())])

    monkeypatch.setattr(demo_module, "load_config", load_tiny)
    monkeypatch.setattr(demo_module, "FAST", TINY)
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("a step was taken"))
    (demo / "table.json").unlink()
    result = call("demo", "--fast", "--run", demo)
    assert result.exit_code == 0, result.output
    assert len(json.loads((demo / "table.json").read_text())) == 5


def test_a_demo_s_folder_with_a_run_of_another_config_is_refused_by_name(
    demo: Path, few_images: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "FAST", TINY)
    result = call("demo", "--fast", "--seed", 7, "--run", demo)
    assert result.exit_code == 2
    assert f"{demo / 'teacher'}: holds a run of another config than this demo's; remove it" in result.stderr


@pytest.mark.parametrize("verb", sorted(COMMANDS))
def test_every_verb_explains_itself_with_an_example(verb: str) -> None:
    result = call(verb, "--help")
    assert result.exit_code == 0
    assert f"Example: diffdistill {verb}" in click.unstyle(result.stdout)


def test_the_verbs_are_listed() -> None:
    listed = click.unstyle(call("--help").stdout)
    assert {"demo", "pretrain", "train", "sample", "eval", "doctor", "methods"} <= set(COMMANDS)
    assert [verb for verb in COMMANDS if verb not in listed] == []


def test_the_version_is_printed() -> None:
    assert call("--version").stdout == f"diffdistill {__version__}\n"


def test_an_unknown_verb_is_refused() -> None:
    assert_refused(call("distil"), "No such command 'distil'")


def test_help_imports_neither_torch_nor_other_heavy_packages() -> None:
    heavy = ["torch", "numpy", "diffusers", "accelerate", "sklearn", "pydantic", "PIL", "tensorboard"]
    code = f"""
import sys
from diffdistill.commands.cli import app
app(["--help"], standalone_mode=False)
print("imported:", [name for name in {heavy} if name in sys.modules])
"""
    done = in_new_process(code)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stdout.endswith("imported: []\n")


def test_methods_are_listed_with_their_papers_and_updates() -> None:
    shown = call("methods").stdout
    assert [name for name in REGISTRY if name not in shown] == []
    assert "2405.14867" in shown
    assert "generator (5), fake+discriminator (1)" in shown


def test_doctor_finds_this_machine_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED_GIB", 0.0)  # how full this disk is is not the question
    result = call("doctor", "--folder", tmp_path / "runs")
    assert result.exit_code == 0, result.stdout
    assert "FAULT" not in result.stdout
    assert f"{tmp_path / 'runs'} is writable" in result.stdout
    assert not (tmp_path / "runs").exists()


def test_doctor_says_which_torchvision_goes_with_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.11.0+cpu", "torchvision": "0.21.0"}
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda package: installed.get(package) or real(package))
    result = call("doctor", "--folder", tmp_path)
    assert result.exit_code == 1
    assert "FAULT torch and torchvision: 2.11.0+cpu with 0.21.0: install torchvision 0.26" in result.stdout


@pytest.mark.parametrize(
    ("torch_version", "torchvision_version", "fits"),
    [("2.0.1", "0.15.2", True), ("2.6.0+cu124", "0.21.0+cu124", True), ("2.6.0", "0.22.0", False)],
)
def test_torch_and_torchvision_fit_by_their_minor_versions(
    torch_version: str, torchvision_version: str, fits: bool
) -> None:
    assert doctor.torchvision_fits(torch_version, torchvision_version) is fits


@pytest.mark.parametrize("missing", ["diffusers", "torchvision"])
def test_doctor_tells_a_missing_core_package_from_an_optional_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    real = doctor.version_of
    monkeypatch.setattr(doctor, "REQUIRED_GIB", 0.0)
    monkeypatch.setattr(doctor, "version_of", lambda package: None if package == missing else real(package))
    result = call("doctor", "--folder", tmp_path)
    assert result.exit_code == (1 if missing == "diffusers" else 0)
    assert missing in result.stdout


def test_doctor_reports_a_full_disk_and_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor, "REQUIRED_GIB", 1e9)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    result = call("doctor", "--folder", tmp_path)
    assert result.exit_code == 1
    assert "FAULT disk" in result.stdout
    assert f"FAULT folder: {tmp_path} cannot be written: Permission denied" in result.stdout


def test_samples_are_written_as_a_grid(teacher: Path, tmp_path: Path) -> None:
    result = call("sample", teacher, "--count", 12, "--label", 3, "--guidance", 1.5, "--out", tmp_path / "a" / "b.png")
    assert result.exit_code == 0, result.output
    assert "12 images; 5 NFE, w = 1.5, " in result.stdout
    assert Image.open(tmp_path / "a" / "b.png").height < Image.open(tmp_path / "a" / "b.png").width


def test_the_seed_decides_the_samples(teacher: Path, tmp_path: Path) -> None:
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        assert call("sample", teacher, "--count", 4, "--seed", seed, "--out", tmp_path / f"{name}.png").exit_code == 0
    first, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("first", "again", "other"))
    assert first == again != other


@pytest.mark.parametrize("label", [-1, 10])
def test_an_unknown_class_is_refused_with_the_known_ones(teacher: Path, tmp_path: Path, label: int) -> None:
    result = call("sample", teacher, f"--label={label}", "--out", tmp_path / "a.png")
    assert_refused(result, f"--label {label}: unknown class; the model knows 0 to 9")
    assert not (tmp_path / "a.png").exists()


def test_a_picture_that_cannot_be_written_is_refused(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "a.png", tmp_path / "a.unknown", tmp_path):
        assert_refused(call("sample", teacher, "--count", 1, "--out", out), f"--out {out}: cannot be written")


def test_a_full_disk_is_a_failure_not_bad_input(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample, "save_grid", full)
    result = call("sample", teacher, "--count", 1, "--out", tmp_path / "a.png")
    assert result.exit_code == 1
    assert "error: the disk is full" in result.stderr


def test_a_place_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    assert_refused(call("sample", tmp_path), f"{tmp_path}: holds no checkpoint")
    assert_refused(call("eval", tmp_path / "none"), "no such folder; give a run's folder or one of its checkpoints")


def test_a_router_leads_to_runs_and_stands_in_none(teacher: Path, tmp_path: Path) -> None:
    assert_refused(call("join", teacher, "--out", teacher), f"{teacher}: holds a run already")
    assert call("join", teacher, "--out", tmp_path).exit_code == 0
    assert_refused(
        call("join", tmp_path, "--out", tmp_path), f"{tmp_path}: holds joined students; name them one by one"
    )
    router = json.loads((tmp_path / "router.json").read_text())
    (tmp_path / "router.json").write_text(json.dumps({**router, "students": ["."]}))  # it leads to itself
    assert_refused(call("sample", tmp_path, "--out", tmp_path / "x.png"), "holds joined students")


@pytest.mark.parametrize("verb", ["sample", "eval"])
def test_guidance_is_refused_where_it_means_nothing(make_config: MakeConfig, tmp_path: Path, verb: str) -> None:
    config = make_config("pretrain", "train.steps=1", "method.class_dropout=0.0")
    Trainer(config, quiet=True).run()
    out = tmp_path / "out"
    result = call(verb, config.run, "--guidance", 2, "--out", out)
    assert_refused(result, "--guidance: 2.0 needs a model trained with class_dropout > 0; use 1")
    assert not out.exists()


def test_samples_may_be_guided_by_a_policy(teacher: Path, tmp_path: Path) -> None:
    for name, guidance in (("number", "3"), ("everywhere", "high: 1e9}"), ("nowhere", "high: 1e-9}"), ("none", "1")):
        policy = f"{{name: interval, scale: 3, ratio_low: 0, ratio_{guidance}" if "high" in guidance else guidance
        out = tmp_path / f"{name}.png"
        assert call("sample", teacher, "--count", 4, "--guidance", policy, "--out", out).exit_code == 0
    images = {file.stem: file.read_bytes() for file in tmp_path.glob("*.png")}
    assert images["everywhere"] == images["number"]
    assert images["nowhere"] == images["none"] != images["number"]


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        (
            "{name: intervall, scale: 2}",
            "name = 'intervall': unknown; did you mean 'interval'?",
        ),
        ("{name: adaptive}", "scale: is required"),
        ("{name: cfg++, scale: 2}", "scale = 2: input should be less than or equal to 1"),
        ("much", "--guidance much: give a number, or a policy as {name: adaptive, scale: 2}"),
        ("nan", "--guidance nan: give a number"),
    ],
)
def test_a_guidance_that_is_no_policy_is_refused(teacher: Path, tmp_path: Path, guidance: str, message: str) -> None:
    assert_refused(call("sample", teacher, "--guidance", guidance, "--out", tmp_path / "a.png"), message)


def test_models_are_measured_and_their_rows_written(teacher: Path, few_images: None, tmp_path: Path) -> None:
    result = call("eval", teacher, teacher / "checkpoints" / "step-00000010", "--out", tmp_path / "table.json")
    assert result.exit_code == 0, result.output
    first, second = json.loads((tmp_path / "table.json").read_text())
    assert list(first) == COLUMNS
    assert first["name"] == str(teacher)
    assert first["num_evaluations"] == 5
    assert [first[column] for column in COLUMNS[2:5]] == [second[column] for column in COLUMNS[2:5]]
    assert 0 <= first["precision"] <= 1 <= first["fd_pixels"]  # ten steps make no digits


def test_a_table_that_cannot_be_written_is_refused(teacher: Path, few_images: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "table.json"
    assert_refused(call("eval", teacher, "--out", out), f"{out}: cannot be written")


def test_what_methods_are_called_is_one_line_with_its_paper() -> None:
    """`methods` shows the first line of a file alone."""
    for name in set(METHODS.own) - {"score_field"}:  # of several papers
        first = (inspect.getmodule(METHODS.find(name)).__doc__ or "").splitlines()[0]
        assert re.search(r"arXiv:\d{4}\.\d{5}", first), (name, first)


def test_methods_fit_80_columns() -> None:
    console = Console(width=80, file=io.StringIO())
    print_methods(console)
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, shown)) <= 80
    starts = [line.split()[0] for line in shown if line[:1].strip()]
    assert [name for name in REGISTRY if name not in starts] == [], "a name is broken up"
    assert len(shown) < 5 * len(REGISTRY) + 10
