"""`diffdistill sample --first-steps` and `--estimates`: whose images, which states, what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from support.method_matrix import origin, train
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.diffusion.guidance.policies import Recorder
from diffdistill.diffusion.path import VPDiscrete
from diffdistill.diffusion.sampling import FewSteps, OneCall
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.export.run import ExportOptions, export
from diffdistill.export.stock import write_stock
from diffdistill.exported.first_steps import check_first_steps, estimates_along, with_first_steps
from diffdistill.exported.image_generators import open_image_generator
from diffdistill.exported.sample import SampleOptions, run_estimates, run_sample
from diffdistill.inference.image_generator import ModelImageGenerator, SampleRequest
from diffdistill.models.load import merge_model
from diffdistill.settings.schema import UserError

SD_LAST, SD_HALF = (
    VPDiscrete.from_scheduler({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
    .ratio(torch.tensor([999.0, 499.0]))
    .tolist()
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("first")


@pytest.fixture(scope="module")
def class_run(home: Path) -> Path:
    return train("sid", origin("mlp", "sid", home / "mlp"), home / "mlp-run")


@pytest.fixture(scope="module")
def text_run(home: Path) -> Path:
    return train("sid", origin("sd", "sid", home / "sd"), home / "sd-run", "lora.default={rank: 2}")


def imager(place: Path, **asked: Any) -> ModelImageGenerator:
    found = open_image_generator(str(place), SampleRequest(**asked))
    assert isinstance(found, ModelImageGenerator)
    return found


def sampled(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["sample", *map(str, arguments)])


def test_none_is_the_student_and_all_are_the_teacher(class_run: Path) -> None:
    student, teacher = imager(class_run, num_steps=3), imager(class_run.with_name("mlp"))
    index, alone = torch.arange(4), imager(class_run, num_steps=3)
    own = alone(index)
    assert torch.equal(with_first_steps(student, teacher, 0)(index), own)
    alone.model = replace(alone.model, denoiser=teacher.model.denoiser)
    assert torch.equal(with_first_steps(student, teacher, 3)(index), alone(index))
    assert torch.equal(student(index), own)  # which is left as it was


def test_only_the_first_call_is_the_teachers(class_run: Path) -> None:
    student, teacher = imager(class_run, num_steps=3), imager(class_run.with_name("mlp"))
    calls: list[str] = []
    for name, one in (("student", student), ("teacher", teacher)):
        one.model.denoiser.net.register_forward_hook(lambda *_, name=name: calls.append(name))
    with_first_steps(student, teacher, 1)(torch.arange(2))
    assert calls == ["teacher", "student", "student"]


def test_prompts_reach_both(text_run: Path, tmp_path: Path) -> None:
    asked = SampleRequest(prompts=("a red fox",), num_steps=2)
    [mixed] = run_sample(str(text_run), SampleOptions(asked, tmp_path / "a.png", count=2, first_steps=1))
    own = imager(text_run, prompts=("a red fox",), num_steps=2)(torch.arange(2))
    assert mixed.images.shape == own.shape
    assert float((mixed.images - own).abs().max()) > 0
    assert mixed.caption.startswith("first step by the teacher: 2 NFE, ")


def test_beside_the_teacher_there_are_three_grids(class_run: Path, tmp_path: Path) -> None:
    asked = SampleRequest(num_steps=2)
    options = SampleOptions(asked, tmp_path / "a.png", count=3, first_steps=1, has_teacher=True, teacher_steps=3)
    made = run_sample(str(class_run), options)
    assert [one.name for one in made] == ["teacher", "student", "first step by the teacher"]
    assert len({float(one.images.sum()) for one in made}) == 3


def test_estimates_are_those_of_the_states_on_the_way(class_run: Path) -> None:
    student, teacher = imager(class_run, num_steps=3, seed=4), imager(class_run.with_name("mlp"))
    own, other = estimates_along(student, {"student": student, "teacher": teacher}, states="student", count=5, batch=2)
    assert own.images.shape == other.images.shape == (5, 3, *student.model.spec.image_shape)
    images = student(torch.arange(5))
    torch.testing.assert_close(own.images[:, -1], images, atol=1e-5, rtol=0)  # the last estimate is the image
    seen = Recorder(1.0)
    student.guidance = seen
    student(torch.arange(5))
    cond = teacher.model.denoiser.class_cond(student.labels_of(torch.arange(5)))
    for column, call in enumerate(seen.evaluations):
        with torch.no_grad():
            expected = teacher.model.denoiser(call.x, call.t, cond)
        torch.testing.assert_close(other.images[:, column], expected.float(), atol=1e-5, rtol=0)
    assert own.ratios == pytest.approx(
        [float(student.model.denoiser.path.ratio(call.t[0])) for call in seen.evaluations]
    )
    assert own.caption.startswith("student's estimates, student's states, sigma / alpha ")


def test_the_teachers_way_is_shown_too(class_run: Path, tmp_path: Path) -> None:
    asked, out = SampleRequest(num_steps=2), tmp_path / "a.png"
    options = SampleOptions(asked, out, count=2, has_teacher=True, teacher_steps=5, first_steps=1)
    made = run_estimates(str(class_run), options)
    assert [(one.of, one.states, *one.images.shape[:2]) for one in made] == [
        ("student", "student", 2, 2),
        ("teacher", "student", 2, 2),
        ("student", "teacher", 2, 5),
        ("teacher", "teacher", 2, 5),
    ]
    assert Image.open(out).height > 14 + 2 * 32


def test_the_command_says_what_it_wrote(class_run: Path, tmp_path: Path) -> None:
    result = sampled(class_run, "--steps", 2, "--estimates", "--count", 2, "--out", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert "a.png: student's estimates, student's states, sigma / alpha " in result.stdout
    result = sampled(class_run, "--steps", 2, "--first-steps", 1, "--count", 2, "--out", tmp_path / "b.png")
    assert "b.png: 2 images; first step by the teacher: 2 NFE, " in result.stdout


def test_what_cannot_be_is_refused(class_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pure noise at every time, which no teacher can denoise"):
        check_first_steps(1, OneCall())
    check_first_steps(0, OneCall())
    check_first_steps(1, FewSteps())
    folder = tmp_path / "code"
    export(str(class_run), folder, ExportOptions(kind="self-contained", is_verified=False))
    for place, arguments, said in (
        (class_run, ("--first-steps", 2), "--first-steps 2: the student has 1 NFE; give it"),
        (folder, ("--trust-code", "--first-steps", 1), "--first-steps: an exported folder with its own code"),
        (folder, ("--trust-code", "--estimates"), "--estimates: an exported folder with its own code"),
        (class_run.with_name("mlp"), ("--first-steps", 1), "--teacher: "),
    ):
        result = sampled(place, "--out", tmp_path / "a.png", *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert said in result.stderr, arguments
    assert not (tmp_path / "a.png").exists()


def test_estimates_without_the_noisiest_states_are_refused(class_run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="--teleport: skips steps, which --estimates shows"):
        run_estimates(str(class_run), SampleOptions(SampleRequest(), tmp_path / "a.png", teleport=2.0))


def test_an_export_is_refused_with_what_to_do_instead(class_run: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["export", str(class_run), "--out", str(tmp_path / "a"), "--first-steps", "1"])
    assert told.exit_code == 2
    assert "--first-steps 1: a folder holds one network, and no pipeline of diffusers changes it" in told.output
    assert not (tmp_path / "a").exists()


def test_a_callback_lets_the_teacher_make_the_first_call_of_a_stock_folder(text_run: Path, tmp_path: Path) -> None:
    """As the page on export says."""
    sampler = FewSteps(init_ratio=SD_LAST, later_ratios=(SD_HALF,), later_noise="ddim", init_noise="unit")
    student, teacher = (imager(place, prompts=("a red fox",)) for place in (text_run, text_run.with_name("sd")))
    student.model = replace(student.model, spec=replace(student.model.spec, sampler=sampler))
    with torch.no_grad():
        for weight in student.model.denoiser.parameters():  # three steps of training leave it near the teacher
            weight.mul_(1.05)
    stock = write_stock(merge_model(student.model), tmp_path / "stock")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "stock")
    pipe.set_progress_bar_config(disable=True)
    own, other = pipe.unet, UNet2DConditionModel.from_pretrained(text_run.with_name("sd"), subfolder="unet")

    def after_call(pipe: Any, number: int, time: Any, tensors: Any) -> Any:
        if number == 0:
            pipe.unet = own
        return tensors

    made = {}
    for name, first in (("mixed", other), ("student", own)):
        pipe.unet = first
        noise = StepRandom(0, 0, torch.arange(1)).normal("noise", student.model.spec.image_shape)
        call = dict(stock.call) | {"latents": noise, "output_type": "pt", "callback_on_step_end": after_call}
        made[name] = pipe(prompt="a red fox", **call).images * 2 - 1
    index = torch.arange(1)
    torch.testing.assert_close(made["student"], student(index).clamp(-1, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        made["mixed"], with_first_steps(student, teacher, 1)(index).clamp(-1, 1), rtol=0, atol=1e-5
    )
    assert float((made["mixed"] - made["student"]).abs().max()) > 1e-3
