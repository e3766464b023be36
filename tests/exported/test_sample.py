"""`diffdistill sample`: prompts and classes, steps, folders of every kind, the teacher beside."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from support.exported_runs import class_student, exported, text_student
from support.stand_ins import save_stand_in
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import DDIM, TCD, FewSteps, Heun, OneCall, Sampler
from diffdistill.diffusion.steps import with_steps
from diffdistill.export.record import guidance_of, read_record
from diffdistill.exported import sample
from diffdistill.exported.image_generators import CodeImageGenerator, open_image_generator
from diffdistill.exported.sample import SampleOptions, run_sample, teacher_of
from diffdistill.exported.side_by_side import SideBySide
from diffdistill.inference.image_generator import ModelImageGenerator, SampleRequest
from diffdistill.models.load import load_model
from diffdistill.settings.schema import UserError

FOXES = ("a red fox", "two blue birds")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sampled")


@pytest.fixture(scope="module")
def text_run(home: Path) -> Path:
    return text_student(home)


@pytest.fixture(scope="module")
def class_run(home: Path) -> Path:
    return class_student(home)


def images(place: Path, count: int = 4, **asked: Any) -> torch.Tensor:
    return open_image_generator(str(place), SampleRequest(**asked))(torch.arange(count))


def sampled(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["sample", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["stock", "lora", "self-contained"])
def test_an_exported_folder_makes_the_runs_images(text_run: Path, kind: str) -> None:
    made, own = (images(at, prompts=FOXES, seed=3, trusts_code=True) for at in (exported(text_run, kind), text_run))
    torch.testing.assert_close(made.clamp(-1, 1), own.clamp(-1, 1), atol=2e-5, rtol=0)
    assert made.shape == (4, 3, 16, 16)


def test_an_image_is_of_its_number_alone_and_prompts_take_turns(text_run: Path) -> None:
    imager = open_image_generator(str(text_run), SampleRequest(prompts=FOXES))
    whole = imager(torch.arange(5))
    torch.testing.assert_close(imager(torch.tensor([3, 4])), whole[3:], atol=1e-5, rtol=0)
    other = images(text_run, 5, prompts=(FOXES[0], "a hat"))
    torch.testing.assert_close(other[::2], whole[::2], atol=1e-5, rtol=0)
    assert float((other[1::2] - whole[1::2]).abs().max()) > 1e-4


def test_a_class_conditional_folder_makes_the_runs_images(class_run: Path) -> None:
    folder = exported(class_run, "self-contained")
    for labels in ((), (3, 7)):
        made, own = (images(place, 12, seed=2, labels=labels, trusts_code=True) for place in (folder, class_run))
        torch.testing.assert_close(made, own.clamp(-1, 1), atol=1e-5, rtol=0)
    imager = open_image_generator(str(folder), SampleRequest(num_steps=3, trusts_code=True))
    assert isinstance(imager, CodeImageGenerator)
    assert imager.num_evaluations == 3


@pytest.mark.parametrize("num_steps", [1, 2, 8])
def test_the_number_of_calls_is_the_one_asked_for(class_run: Path, num_steps: int) -> None:
    imager = open_image_generator(str(class_run), SampleRequest(num_steps=num_steps))
    assert isinstance(imager, ModelImageGenerator)
    calls = []
    imager.model.denoiser.net.register_forward_hook(lambda *_: calls.append(1))
    imager(torch.arange(2))
    assert len(calls) == num_steps == imager.num_evaluations


@pytest.mark.parametrize(
    ("sampler", "num_steps", "calls"),
    [
        (Heun(), 1, 3),
        (Heun(), 8, 7),
        (Heun(num_steps=3), 5, 5),
        (DDIM(), 4, 4),
        (TCD(), 8, 8),
        (FewSteps(), 1, 1),
        (FewSteps(init_ratio=5, later_ratios=(1,)), 4, 4),
        (OneCall(), 1, 1),
    ],
)
def test_samplers_take_other_numbers_of_calls(sampler: Sampler, num_steps: int, calls: int) -> None:
    assert with_steps(sampler, EDM(), num_steps).num_evaluations == calls


def test_few_steps_keep_their_start_and_go_down_evenly() -> None:
    made = with_steps(FewSteps(init_ratio=80), EDM(sigma_min=0.002), 5)
    assert isinstance(made, FewSteps)
    assert made.init_ratio == 80
    roots = torch.tensor([80.0, *made.later_ratios, 0.002]) ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(5), atol=1e-4, rtol=0)


def test_the_teachers_images_are_of_the_same_noise(class_run: Path, tmp_path: Path) -> None:
    options = SampleOptions(SampleRequest(seed=5), tmp_path / "both.png", count=6, has_teacher=True, teacher_steps=5)
    teacher, student = run_sample(str(class_run), options)
    assert (teacher.name, student.name) == ("teacher", "student")
    assert torch.equal(teacher.images, images(class_run.with_name("mlp"), 6, seed=5, num_steps=5))
    assert torch.equal(student.images, images(class_run, 6, seed=5))
    assert teacher.caption.startswith("teacher: 5 NFE, ")
    assert student.caption.startswith("student: 1 NFE, ")
    assert student.seconds > 0
    assert (tmp_path / "both.png").exists()


def test_a_caption_is_never_cut(class_run: Path, tmp_path: Path) -> None:
    options = SampleOptions(SampleRequest(), tmp_path / "both.png", count=1, has_teacher=True, teacher_steps=5)
    made = run_sample(str(class_run), options)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    needed = sum(pen.textlength(one.caption) for one in made)
    assert Image.open(tmp_path / "both.png").width > needed > 2 * 34  # a single image of 8 x 8 is 34 wide


def test_the_teacher_is_guided_as_the_student_was_distilled() -> None:
    assert guidance_of({"guidance": 2.5}) == 2.5
    assert guidance_of({"guidance": [1.0, 6.0]}) == 3.5
    assert guidance_of({"base": {"guidance": 4.0}}) == 4.0
    assert guidance_of({}) == 1.0


def test_an_exported_folder_knows_its_teacher(class_run: Path) -> None:
    assert teacher_of(str(exported(class_run, "self-contained"))) == teacher_of(str(class_run))


def test_a_prompt_file_is_read_and_the_grid_written(text_run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red fox\n\ntwo blue birds\n", encoding="utf-8")
    result = sampled(text_run, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "grid.png")
    assert result.exit_code == 0, result.output
    assert "grid.png: 2 images; 1 NFE, " in result.stdout


def test_what_does_not_go_with_the_model_is_refused(text_run: Path, class_run: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "empty.txt").write_text("\n")
    code = exported(class_run, "self-contained")
    for place, arguments, said in (
        (text_run, (), "--prompt: "),
        (text_run, ("--label", 3), "knows no classes; give it a --prompt"),
        (text_run, ("--prompts", tmp_path / "latin.txt"), "line 1: byte 0xe9 is not UTF-8"),
        (text_run, ("--prompts", tmp_path / "empty.txt"), "holds no prompts"),
        (text_run, ("--prompts", tmp_path / "none.txt"), "cannot be read: No such file"),
        (class_run, ("--prompt", "a fox"), "takes no prompts"),
        (class_run, ("--label", 3, "--label", 10), "--label 10: unknown class; the model knows 0 to 9"),
        (class_run.with_name("mlp"), ("--teacher",), "--teacher: "),
        (code, (), "holds its own code"),
        (code, ("--trust-code", "--label", 10), "--label 10: unknown class"),
        (code, ("--trust-code", "--prompt", "a fox"), "takes none"),
        (code, ("--trust-code", "--guidance", "{name: cfg, scale: 2}"), "takes a number for --guidance"),
    ):
        result = sampled(place, "--out", tmp_path / "a.png", *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert said in result.stderr, arguments
    assert not (tmp_path / "a.png").exists()


def test_steps_that_a_student_cannot_take_are_refused() -> None:
    with pytest.raises(UserError, match="num_steps = 2: this student has 1 NFE"):
        with_steps(OneCall(), EDM(), 2)
    with pytest.raises(UserError, match="num_steps = 60: the student was trained at 50 times"):
        with_steps(TCD(), EDM(), 60)


def test_the_code_of_a_folder_does_not_run_unless_it_is_trusted(class_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported(class_run, "self-contained"), tmp_path / "planted")
    (folder / "pipeline.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="read it, then add --trust-code"):
        open_image_generator(str(folder), SampleRequest())
    assert not (tmp_path / "ran").exists()


def test_a_damaged_record_is_named(class_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported(class_run, "self-contained"), tmp_path / "damaged")
    for text, said in (("{", "cannot be read"), ('{"kind": "stock"}', "version: is required")):
        (folder / "diffdistill.json").write_text(text)
        with pytest.raises(UserError, match=said):
            open_image_generator(str(folder), SampleRequest(trusts_code=True))


def test_a_pipeline_of_diffusers_is_sampled_as_it_is(tmp_path: Path) -> None:
    place = save_stand_in("dit", tmp_path / "dit")
    made = images(place, 2, labels=(5,), num_steps=2)
    model = load_model(place)
    expected = replace(model, spec=replace(model.spec, sampler=DDIM(num_steps=2)))
    assert torch.equal(made, ModelImageGenerator(expected, SampleRequest(labels=(5,)))(torch.arange(2)))
    assert made.shape == (2, 3, 16, 16)
    assert sample.read_record(place) is None


def test_code_runs_only_of_the_folder_that_was_named_and_not_of_the_teacher_that_it_names(
    class_run: Path, tmp_path: Path
) -> None:
    outer, inner = tmp_path / "outer", tmp_path / "outer/inner"
    shutil.copytree(exported(class_run, "self-contained"), outer)
    shutil.copytree(outer, inner)
    trap = tmp_path / "ran"
    with (inner / "pipeline.py").open("a") as file:
        file.write(f"\nopen({str(trap)!r}, 'w').close()\n")
    record = read_record(outer)
    assert record is not None
    replace(record, teacher=str(inner)).write(outer)
    options = SampleOptions(SampleRequest(trusts_code=True), tmp_path / "out.png", count=2, has_teacher=True)
    for act in (
        lambda: run_sample(str(outer), options),
        lambda: run_sample(str(outer), replace(options, has_teacher=False, first_steps=1)),
    ):
        with pytest.raises(UserError, match="folders that you name; read it, then add --teacher-from"):
            act()
    assert SideBySide([str(outer)], options.asked).names == ["outer"]
    assert not trap.exists()
    run_sample(str(outer), replace(options, teacher_from=str(inner)))
    assert trap.exists()
