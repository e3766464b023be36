"""`diffdistill eval` of exported folders: they are judged as the run that they were exported from is."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from support.exported_runs import class_student, exported, text_student
from support.method_matrix import origin, train
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.eval.evaluation.setup import EvalOptions, open_place, set_up
from diffdistill.eval.images.describe import describe
from diffdistill.eval.records.record import Record, read_records

KINDS = ("stock", "lora", "self-contained")
FOXES = ("a red fox", "two blue birds")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judged")


@pytest.fixture(scope="module")
def text_run(home: Path) -> Path:
    return text_student(home)


@pytest.fixture(scope="module")
def class_run(home: Path) -> Path:
    return class_student(home)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))


def write_protocol(file: Path, shape: list[int], **more: Any) -> str:
    plain = {
        "name": "small",
        "num_images": 20,
        "image_shape": shape,
        "labels": {"policy": "cyclic", "num_classes": 10},
        "preparation": {"quantiser": "none"},
        "metrics": [{"name": "frechet", "features": {"name": "pixels"}}],
    }
    file.write_text(yaml.safe_dump(plain | more))
    return str(file)


def called(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["eval", *map(str, arguments)])


def refused(*arguments: object) -> str:
    result = called(*arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


def recorded(file: Path, *arguments: object) -> Record:
    result = called(*arguments, "--records", file)
    assert result.exit_code == 0, result.output
    return read_records(file)[-1]


def test_the_next_command_says_what_this_one_was_allowed(class_run: Path, tmp_path: Path) -> None:
    folder = exported(class_run, "self-contained")
    protocol = write_protocol(tmp_path / "small.yaml", list(describe(str(class_run)).made.shape))
    result = called(folder, "--against", class_run, "--protocol", protocol, "--trust-code")
    assert f"--protocol {protocol} --trust-code --records" in " ".join(result.output.split())


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_makes_the_runs_images_from_captions(text_run: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(FOXES * 10) + "\n")
    captions = {"name": "foxes", "count": 20, "sha256": None}
    protocol = write_protocol(tmp_path / "small.yaml", [3, 16, 16], labels={"policy": "captions"}, captions=captions)
    options = EvalOptions(protocol=protocol, captions=str(file), trusts_code=True)
    places = [str(exported(text_run, kind)), str(text_run)]
    bench = set_up(places, options)
    made, own = (open_place(place, bench, options).take(0, torch.tensor([0, 1, 7, 19])) for place in places)
    torch.testing.assert_close(made, own, atol=2e-5, rtol=0)
    assert made.shape == (4, 3, 16, 16)
    folder, run = (describe(place, trusts_code=True).made for place in places)
    assert (folder.shape, folder.takes_text) == (run.shape, run.takes_text) == ((3, 16, 16), True)


def test_a_folder_with_code_of_its_own_is_judged_as_its_run(class_run: Path, tmp_path: Path) -> None:
    folder, file = exported(class_run, "self-contained"), tmp_path / "records.jsonl"
    protocol = write_protocol(tmp_path / "small.yaml", list(describe(str(class_run)).made.shape))
    by = ("--protocol", protocol, "--trust-code")
    apart = recorded(file, folder, "--against", class_run, *by).against
    assert apart is not None
    assert apart.end_points is not None
    assert apart.end_points.same_noise.value < 1e-5
    turned = recorded(file, class_run, "--against", folder, *by).against
    assert turned is not None
    assert abs(turned.metrics["fd-pixels"].excess.value) < 1e-5
    assert turned.end_points is not None
    assert turned.end_points.same_noise.value < 1e-5
    record = recorded(file, folder, *by, "--against", folder, "--efficiency")
    assert record.sampler is not None
    assert record.efficiency is not None
    assert record.sampler.num_evaluations == record.efficiency.num_evaluations == 1


def test_its_code_runs_only_where_the_user_says(class_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported(class_run, "self-contained"), tmp_path / "planted")
    planted = folder / "pipeline.py"
    with planted.open("a") as end:
        end.write(f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    protocol = write_protocol(tmp_path / "small.yaml", list(describe(str(class_run)).made.shape))
    for arguments in ((folder,), (class_run, "--against", folder), (folder, "--against", class_run)):
        text = refused(*arguments, "--protocol", protocol)
        assert f"{folder}: holds its own code, {folder}/pipeline.py; read it, then add --trust-code" in text
    assert not (tmp_path / "ran").exists()
    called(folder, "--protocol", protocol, "--trust-code")
    assert (tmp_path / "ran").exists(), "it does run where the user says so"
    planted.write_text("nonsense")
    said = f"{folder}: its own code cannot be loaded: NameError: name 'nonsense' is not defined"
    assert said in refused(folder, "--protocol", protocol, "--trust-code")


def test_students_behind_a_router_are_judged_as_their_folder(home: Path, tmp_path: Path) -> None:
    joined = train("msd", origin("mlp", "msd", home / "mlp-msd"), home / "msd-run")
    folder, file = exported(joined, "self-contained"), tmp_path / "records.jsonl"
    protocol = write_protocol(tmp_path / "small.yaml", list(describe(str(joined)).made.shape))
    by = ("--protocol", protocol, "--trust-code", "--efficiency")
    record = recorded(file, folder, "--against", joined, *by)
    own = recorded(file, joined, "--against", joined, *by)
    assert record.against is not None
    assert record.against.end_points is not None
    assert record.against.end_points.same_noise.value < 1e-5
    assert record.efficiency is not None
    assert own.efficiency is not None
    assert record.efficiency.parameters == own.efficiency.parameters
    assert record.model is not None
    assert record.model.parameters == own.model.parameters  # type: ignore[union-attr]


def test_other_code_makes_other_images(class_run: Path, tmp_path: Path) -> None:
    """So that features which are kept are not taken for those of changed code."""
    folder = shutil.copytree(exported(class_run, "self-contained"), tmp_path / "changed")
    protocol = write_protocol(tmp_path / "small.yaml", list(describe(str(class_run)).made.shape))
    options = EvalOptions(protocol=protocol, trusts_code=True)
    bench = set_up([str(folder)], options)
    before = open_place(str(folder), bench, options).key
    file = folder / "pipeline.py"
    file.write_text(file.read_text() + "# changed\n")
    after = open_place(str(folder), bench, options).key
    assert before != after
    assert before["weights"] == after["weights"]


def test_a_folder_is_compared_with_its_run(class_run: Path, tmp_path: Path) -> None:
    folder = exported(class_run, "self-contained")
    reference = {"name": "digits-train", "dataset": "digits", "split": "train", "num_images": 1437}
    shape = list(describe(str(class_run)).made.shape)
    protocol = write_protocol(tmp_path / "small.yaml", shape, reference=reference)
    result = called("compare", folder, class_run, "--protocol", protocol, "--trust-code", "--replicates", 3)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("kind", ["stock", "lora"])
def test_a_text_model_s_folder_is_measured_against_its_run(text_run: Path, tmp_path: Path, kind: str) -> None:
    captions, file = tmp_path / "captions.txt", tmp_path / "records.jsonl"
    captions.write_text("\n".join(FOXES * 10) + "\n")
    asked = {"name": "foxes", "count": 20, "sha256": None}
    protocol = write_protocol(tmp_path / "small.yaml", [3, 16, 16], labels={"policy": "captions"}, captions=asked)
    for places in ((exported(text_run, kind), text_run), (text_run, exported(text_run, kind))):
        by = ("--protocol", protocol, "--captions", captions)
        apart = recorded(file, places[0], "--against", places[1], *by).against
        assert apart is not None
        assert apart.end_points is not None
        assert apart.end_points.same_noise.value < 1e-4


def test_what_an_exported_folder_does_not_take_is_said(class_run: Path, text_run: Path, tmp_path: Path) -> None:
    folder = exported(class_run, "self-contained")
    protocol = write_protocol(tmp_path / "small.yaml", list(describe(str(class_run)).made.shape))
    by = (folder, "--protocol", protocol, "--trust-code")
    assert f"--ema long: {folder} is an exported folder, which has one set of weights" in refused(*by, "--ema", "long")
    assert f"--sampler: {folder} is sampled by its own code" in refused(*by, "--sampler", "{name: ddim, num_steps: 2}")
    policy = "{name: adaptive, scale: 2}"
    assert f"--guidance: {folder} is sampled by its own code, which takes a number" in refused(
        *by, "--guidance", policy
    )
    kohya = exported(text_run, "kohya")
    assert "a LoRA file in kohya's keys" in refused(kohya, "--protocol", protocol)
    assert "a LoRA file in kohya's keys" in refused(class_run, "--protocol", protocol, "--against", kohya)
    stock = exported(text_run, "stock")
    assert f"--ema long: {stock} is a pipeline" in refused(stock, "--protocol", protocol, "--ema", "long")
    prompted = exported(text_run, "self-contained")
    assert f"{prompted}: takes captions" in refused(prompted, "--protocol", protocol, "--trust-code")
