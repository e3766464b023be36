"""What `diffdistill play` draws: teacher and students, loaded once, from the same noise."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.method_matrix import origin, train

from diffdistill.export.record import read_record
from diffdistill.export.run import ExportOptions, export
from diffdistill.export.space_app import PageRequest
from diffdistill.exported.image_generators import open_image_generator
from diffdistill.exported.side_by_side import SideBySide, pictures
from diffdistill.inference.image_generator import SampleRequest
from diffdistill.models.load import find_checkpoint
from diffdistill.models.teachers import hub
from diffdistill.settings.schema import UserError

ASKED = SampleRequest(trusts_code=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher and its one-step student."""
    home = tmp_path_factory.mktemp("play")
    teacher = origin("mlp", "sid", home / "teacher")
    return teacher, train("sid", teacher, home / "student")


def same(made: Any, place: Path, count: int = 3, **asked: Any) -> bool:
    images = open_image_generator(str(place), SampleRequest(trusts_code=True, **asked))(torch.arange(count))
    return [one.tobytes() for one in made.images] == [one.tobytes() for one in pictures(images)]


def test_the_teacher_stands_first_and_every_model_has_the_same_noise(runs: tuple[Path, Path]) -> None:
    teacher, student = runs
    models = SideBySide([str(student)], ASKED)
    assert models.names == ["teacher", "student"]
    assert models.has_teacher
    assert not models.takes_text
    first, second = models.draw(PageRequest(count=3, seed=7))
    assert same(first, teacher, seed=7)
    assert same(second, student, seed=7)
    assert (first.num_evaluations > 1, second.num_evaluations) == (True, 1)
    assert first.seconds > 0 < second.seconds


def test_a_teacher_that_is_named_too_is_shown_once(runs: tuple[Path, Path]) -> None:
    assert SideBySide([str(runs[1]), str(runs[0])], ASKED).names == ["teacher", "student"]


def test_an_early_checkpoint_of_the_teacher_does_not_stand_in_its_place(runs: tuple[Path, Path]) -> None:
    teacher, student = runs
    newest = find_checkpoint(teacher)
    early = newest.with_name("step-00000000")
    shutil.copytree(newest, early)
    try:
        models = SideBySide([str(student), str(early)], ASKED)
        assert models.names == ["teacher", "student", early.name]
        assert SideBySide([str(student), str(newest)], ASKED).names == ["teacher", "student"]
    finally:
        shutil.rmtree(early)


def test_steps_guidance_and_class_reach_the_models_they_are_meant_for(runs: tuple[Path, Path]) -> None:
    teacher, student = runs
    models = SideBySide([str(student)], ASKED)
    label = models.classes[1]
    first, second = models.draw(PageRequest(count=3, label=label, teacher_steps=5))
    assert first.num_evaluations == 5
    assert same(first, teacher, labels=(label,), num_steps=5)
    assert same(second, student, labels=(label,))


def test_what_a_model_does_not_know_is_said_in_its_place(runs: tuple[Path, Path]) -> None:
    first, second = SideBySide([str(runs[1])], ASKED).draw(PageRequest(count=2, steps=4, label="nothing"))
    assert not first.images
    assert "--label nothing: unknown class" in first.fault
    assert "--label nothing: unknown class" in second.fault


def test_an_exported_folder_stands_beside_its_run_and_makes_the_same(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(str(runs[1]), folder, ExportOptions(is_verified=False))
    _, run, exported = SideBySide([str(runs[1]), str(folder)], ASKED).draw(PageRequest(count=3))
    assert same(exported, runs[1])
    assert [one.tobytes() for one in run.images] == [one.tobytes() for one in exported.images]
    with pytest.raises(UserError, match="--trust-code"):
        SideBySide([str(folder)], SampleRequest())


def test_a_teacher_alone_and_a_moved_one(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = SideBySide([str(runs[0])], ASKED)
    assert (alone.names, alone.has_teacher) == ([runs[0].name], False)
    assert "shown without a teacher" in capsys.readouterr().err
    with pytest.raises(UserError, match="has none; it was trained from images"):
        SideBySide([str(runs[0])], ASKED, teacher_from=str(tmp_path))


def test_students_stand_alone_where_their_teacher_is_not_on_this_machine(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, gone = tmp_path / "out", tmp_path / "gone"
    export(str(runs[1]), folder, ExportOptions(is_verified=False))
    record = read_record(folder)
    assert record is not None

    replace(record, teacher=str(gone)).write(folder)
    models = SideBySide([str(folder)], ASKED)
    assert (models.names, models.has_teacher) == (["out"], False)
    assert f"shown without a teacher: {gone}: no such folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="elsewhere: no such folder"):
        SideBySide([str(folder)], ASKED, teacher_from=str(tmp_path / "elsewhere"))

    monkeypatch.setattr(hub, "_fetch", lambda *_: pytest.fail("fetched"))
    replace(record, teacher="someone/large").write(folder)
    assert SideBySide([str(folder)], ASKED).names == ["out"]
    assert "is on the hub and is downloaded only on request: --teacher-from someone/large" in capsys.readouterr().err


def test_runs_of_one_name_are_told_by_their_paths(runs: tuple[Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / runs[1].name
    shutil.copytree(runs[1], copy)
    assert SideBySide([str(runs[1]), str(copy)], ASKED).names == ["teacher", str(runs[1]), str(copy)]


def test_models_that_are_told_differently_what_to_draw_do_not_stand_together(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    other = origin("sd", "sid", tmp_path / "sd")
    with pytest.raises(UserError, match="only models with the same conditions"):
        SideBySide([str(runs[1]), str(other)], ASKED)


def test_too_many_places_are_refused() -> None:
    with pytest.raises(UserError, match="play: 9 models; at most 8"):
        SideBySide(["here"] * 9, ASKED)


def test_one_channel_becomes_grey() -> None:
    [picture] = pictures(torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3))
    assert isinstance(picture, Image.Image)
    assert picture.tobytes() == bytes([0, 0, 0, 128, 128, 128, 255, 255, 255])
