"""The folder for a Hugging Face Space, and what its page shows."""

import ast
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from support.method_matrix import origin, train
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.export import space as space_module
from diffdistill.export import space_app
from diffdistill.export.record import read_record
from diffdistill.export.run import Exported, ExportOptions
from diffdistill.export.space import export_space
from diffdistill.export.space_app import MAX_COUNT, Drawn, Folders, PageRequest, caption, grid, request_of
from diffdistill.export.verify import ExportError
from diffdistill.settings.schema import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("space")
    return train("sid", origin("mlp", "sid", home / "teacher"), home / "student")


@pytest.fixture(scope="module")
def space(run: Path) -> Path:
    folder = run.with_name("digits-space")
    export_space(str(run), folder, ExportOptions(is_verified=False, licence="mit"))
    return folder


def pixels(images: Any) -> list[Any]:
    return [image.convert("RGB").tobytes() for image in images]


def test_a_space_holds_what_the_hub_asks_for(space: Path) -> None:
    front = yaml.safe_load((space / "README.md").read_text().split("---\n")[1])
    assert front["sdk"] == "gradio"
    assert front["license"] == "mit"
    assert (space / front["app_file"]).read_text() == Path(space_app.__file__).read_text()
    needed = (space / "requirements.txt").read_text().split()
    assert f"torch=={torch.__version__.partition('+')[0]}" in needed
    assert not any("diffdistill" in name or "transformers" in name for name in needed)


def test_its_program_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(space_app.__file__).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - sys.stdlib_module_names == {"torch", "diffusers", "gradio", "PIL"}


def test_its_models_draw_what_their_folders_draw(space: Path) -> None:
    models = Folders(space)
    assert models.names == ["teacher", "student"]
    drawn = models.draw(PageRequest(count=3, seed=5, teacher_steps=5))
    assert [one.num_evaluations for one in drawn] == [5, 1]
    noise = [torch.Generator().manual_seed(5 * MAX_COUNT + i) for i in range(3)]
    pipe = DiffusionPipeline.from_pretrained(space / "student", trust_remote_code=True)
    assert pixels(drawn[1].images) == pixels(pipe(class_labels=[0, 1, 2], generator=noise).images)
    assert pixels(drawn[0].images) != pixels(drawn[1].images)


def test_its_classes_are_chosen_and_its_faults_are_said(space: Path) -> None:
    models = Folders(space)
    models.labels, models.classes = [*models.labels, 99], [*models.classes, "broken"]
    label = models.classes[2]
    image = pixels(models.draw(PageRequest(count=3, label=label, seed=4))[1].images)[2]
    assert image == pixels(models.draw(PageRequest(count=3, seed=4))[1].images)[2]  # class 2, and noise 2
    assert "must be among 0 to" in models.draw(PageRequest(count=1, label="broken"))[1].fault
    models.models[1]["takes_steps"] = False
    assert "leave them empty" in models.draw(PageRequest(count=1, guidance=2.0))[1].fault


def test_seeds_share_no_noise_and_many_images_are_drawn_in_batches(space: Path) -> None:
    models, batches = Folders(space), []
    whole = models.pipelines[1]

    def seen(**asked: Any) -> Any:
        batches.append([one.initial_seed() for one in asked["generator"]])
        return whole(**asked)

    seen.model = whole.model  # type: ignore[attr-defined]
    made = models._draw(seen, models.models[1], PageRequest(count=MAX_COUNT, seed=1))
    assert [len(batch) for batch in batches] == [1, 16, 16, 4]
    assert [seed for batch in batches[1:] for seed in batch] == list(range(MAX_COUNT, 2 * MAX_COUNT))
    few = models._draw(whole, models.models[1], PageRequest(count=17, seed=1))
    assert pixels(made.images)[:17] == pixels(few.images)


def test_too_little_memory_is_said(space: Path) -> None:
    def full(**asked: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    models = Folders(space)
    assert models._draw(full, models.models[1], PageRequest()).fault == "CUDA out of memory"


def test_a_space_is_refused_where_it_cannot_be(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something other than a Space"):
        export_space(str(run), tmp_path, ExportOptions())
    with pytest.raises(UserError, match="--space: needs a complete pipeline, not --kind lora"):
        export_space(str(run), tmp_path / "new", ExportOptions(kind="lora"))
    with pytest.raises(UserError, match="--push: uploads a model and not a Space"):
        export_space(str(run), tmp_path / "new", ExportOptions(push="me/space"))
    for words in ([], ["--out", "a", "--space", "b"]):
        said = CliRunner().invoke(app, ["export", str(run), *words])
        assert said.exit_code == 2
        assert "name one folder to write" in said.output


def test_a_space_that_was_broken_off_is_written_again(
    space: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def written_once(place: str, folder: Path, options: ExportOptions) -> Any:
        written.append(folder.name)
        raise UserError("written again")

    monkeypatch.setattr(space_module, "export", written_once)
    broken = tmp_path / "broken"
    shutil.copytree(space / "student", broken / "student")
    (broken / "app.py").write_text("")
    building = tmp_path / "killed/.exporting-student"
    building.mkdir(parents=True)
    for folder in (broken, building.parent):
        with pytest.raises(UserError, match="written again"):
            export_space(str(run), folder, ExportOptions())
    (broken / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something other than a Space"):
        export_space(str(run), broken, ExportOptions())
    assert written == ["student", "student"]


def test_a_teacher_that_cannot_be_exported_is_left_out_and_its_old_folder_goes(
    space: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    shutil.copytree(space, again)
    whole = space_module.export

    def without_teacher(place: str, folder: Path, options: ExportOptions) -> Any:
        if folder.name == "teacher":
            raise ExportError("other images")
        return whole(place, folder, options)

    monkeypatch.setattr(space_module, "export", without_teacher)
    export_space(str(run), again, ExportOptions(is_verified=False))
    assert "the Space shows the student alone: other images" in capsys.readouterr().err
    assert not (again / "teacher").exists()
    assert [model["name"] for model in json.loads((again / "space.json").read_text())["models"]] == ["student"]


@pytest.mark.parametrize(
    ("kind", "call", "wanted"),
    [
        ("stock", {"num_inference_steps": 35}, {"num_inference_steps": 35}),
        ("stock", {"timesteps": [9, 1], "guidance_scale": 1.0}, {"timesteps": [9, 1], "guidance_scale": 2.0}),
        ("self-contained", {}, {"guidance_scale": 2.0}),
    ],
)
def test_a_teacher_is_called_as_its_folder_says_under_the_students_guidance(
    space: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
    call: dict[str, Any],
    wanted: dict[str, Any],
) -> None:
    again = tmp_path / "again"
    shutil.copytree(space, again)
    record = read_record(again / "teacher")
    assert record is not None
    replace(record, kind=kind, call=call).write(again / "teacher")
    monkeypatch.setattr(space_module, "export", lambda place, folder, options: Exported(folder, "stock", None))
    monkeypatch.setattr(space_module, "guidance_of", lambda method: 2.0)
    export_space(str(run), again, ExportOptions())
    assert json.loads((again / "space.json").read_text())["models"][0]["call"] == wanted


def test_the_command_writes_one_and_says_how_to_go_on(run: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["export", str(run), "--space", str(tmp_path / "space"), "--no-verify"])
    assert said.exit_code == 0, said.output
    assert f"python {tmp_path}/space/app.py" in said.output
    assert len(json.loads((tmp_path / "space/space.json").read_text())["models"]) == 2


def test_without_its_teacher_the_student_is_shown_alone(run: Path, tmp_path: Path) -> None:
    teacher = run.parent / "teacher"
    hidden = teacher.rename(teacher.with_name("hidden"))
    try:
        said = CliRunner().invoke(app, ["export", str(run), "--space", str(tmp_path / "space"), "--no-verify"])
    finally:
        hidden.rename(teacher)
    assert said.exit_code == 0, said.output
    assert "the Space shows the student alone: no teacher at" in said.output
    assert Folders(tmp_path / "space").names == ["student"]


def test_captions_tell_the_time_of_an_image_and_how_much_faster_it_is() -> None:
    teacher, student = Drawn([], 35, 0.2), Drawn([], 1, 0.005)
    assert caption(teacher, 0.2) == "**200 ms** per image; 35 NFE"
    assert caption(student, 0.2) == "**5 ms** per image, 40 times as fast; 1 NFE"
    assert caption(Drawn(fault="no"), 0.2) == "**No images.** no"


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (3, 2, 2), (9, 3, 3), (10, 4, 3)])
def test_grids_are_square_and_small_images_are_enlarged_by_whole_numbers(count: int, columns: int, rows: int) -> None:
    images = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(count)]
    sheet = grid(images)
    side = 8 * (360 // (8 * columns))
    assert sheet.size == (columns * (side + 2) - 2, rows * (side + 2) - 2)
    last = count - 1
    corner = (last % columns * (side + 2), last // columns * (side + 2))
    assert sheet.getpixel(corner) == (last, 0, 0)


def test_large_images_keep_their_size() -> None:
    assert grid([Image.new("RGB", (512, 256))]).size == (512, 256)


def test_a_browser_cannot_ask_for_more_than_the_page_offers() -> None:
    assert request_of({"seed": None, "count": 10**9, "label": "", "steps": None}) == PageRequest(count=MAX_COUNT)
    assert request_of({"seed": -5, "count": 0, "label": "3"}) == PageRequest(count=1, label="3")


def test_space_followed_by_out_says_the_right_form(run: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["export", str(run), "--space", "--out", str(tmp_path / "x")])
    assert told.exit_code == 2
    assert "write --space FOLDER, without --out" in " ".join(told.output.replace("│", " ").split())
