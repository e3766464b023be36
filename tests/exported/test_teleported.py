"""`diffdistill sample --teleport`: whose images, which steps, what is refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config
from PIL import Image
from support.method_matrix import origin, train

from diffdistill.data import Digits
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import Heun
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.teleport import LowRankGaussian, Teleport, rest_of_grid
from diffdistill.exported.image_generators import open_image_generator
from diffdistill.exported.sample import SampleOptions, run_sample
from diffdistill.exported.teleported import fitted, with_teleport
from diffdistill.inference.image_generator import ModelImageGenerator, SampleRequest
from diffdistill.settings.schema import UserError
from diffdistill.training.trainer import Trainer


def imager(place: Path, **asked: int) -> ModelImageGenerator:
    found = open_image_generator(str(place), SampleRequest(**asked))  # type: ignore[arg-type]
    assert isinstance(found, ModelImageGenerator)
    return found


def test_the_rest_of_the_grid_is_its_own_levels():
    path, whole = EDM(sigma_min=0.02, sigma_max=20.0), Heun(num_steps=6, rho=5.0)
    grid = path.karras_times(6, 5.0)
    rest, start = rest_of_grid(whole, path, float(grid[2]) + 0.01, "--teleport")
    assert (rest.num_steps, start) == (4, pytest.approx(float(grid[2])))
    lower = replace(path, sigma_max=start)
    torch.testing.assert_close(lower.karras_times(4, 5.0), grid[2:])


@pytest.mark.parametrize(("ratio", "left_out"), [(20.0, 0), (30.0, 0), (0.02, 5), (0.001, 6)])
def test_a_ratio_that_leaves_out_nothing_or_too_much_is_refused(ratio: float, left_out: int):
    with pytest.raises(UserError, match=f"skips {left_out} steps"):
        rest_of_grid(Heun(num_steps=6, rho=5.0), EDM(sigma_min=0.02, sigma_max=20.0), ratio, "--teleport")


def test_a_run_is_sampled_with_fewer_calls_by_a_gaussian_of_its_own_images(tmp_path: Path):
    run = tmp_path / "run"
    config = small_config("pretrain", run, "train.steps=1", "method.teacher_sampler={name: heun, num_steps: 6, rho: 5}")
    Trainer(config, quiet=True).run()
    student, index = imager(run, seed=3), torch.arange(4)
    made = with_teleport(student, 5.0)
    assert made.num_evaluations < student.num_evaluations == 11
    data = Digits().load()
    model = student.model
    rest, start = rest_of_grid(Heun(num_steps=6, rho=5.0), model.denoiser.path, 5.0, "--teleport")
    teleport = Teleport(rest, start, LowRankGaussian.fit(data.rows(torch.arange(len(data))), data.labels))
    noise = StepRandom(3, 0, index).normal("noise", model.spec.image_shape)
    with torch.no_grad():
        expected = teleport(model.denoiser, noise, model.denoiser.class_cond(index))
    assert torch.equal(made(index), expected)
    [shown] = run_sample(str(run), SampleOptions(SampleRequest(), tmp_path / "a.png", count=2, teleport=5.0))
    assert shown.num_evaluations == made.num_evaluations


def test_other_samplers_are_refused(tmp_path: Path):
    run = train("sid", origin("mlp", "sid", tmp_path / "mlp"), tmp_path / "run")
    with pytest.raises(UserError, match=r"--teleport 2: skips steps of Heun, and the sampler is few_steps"):
        with_teleport(imager(run), 2.0)


def folder_of_classes(root: Path, names: str, count: int) -> dict[str, object]:
    """`count` images of each class, of one grey each: rising by class."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((8, 8), 40 + 80 * number + i, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    cache = str(root.parent / "cache")
    return {"name": "image_folder", "path": str(root), "labels": "folders", "channels": 1, "cache": cache}


def trained_on(tmp_path: Path, *overrides: str) -> ModelImageGenerator:
    """A run of one step on three classes, which are in the folder one after another."""
    data = folder_of_classes(tmp_path / "images", "abc", 4)
    heun = "method.teacher_sampler={name: heun, num_steps: 6, rho: 5}"
    size = ("train.steps=1", "train.global_batch_size=4", "train.preview_every=0", heun, "eval=null")
    Trainer(small_config("pretrain", tmp_path / "run", f"data={data}", *size, *overrides), quiet=True).run()
    return imager(tmp_path / "run")


def test_the_gaussian_is_of_images_from_all_over_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Folders have one class after another: the first images are of the first classes alone."""
    model = trained_on(tmp_path).model
    whole = fitted(model)
    monkeypatch.setattr("diffdistill.data.gaussian.MOST", 6)
    some = fitted(model)
    assert some.means.shape == whole.means.shape == (4, 64)
    torch.testing.assert_close(some.means, whole.means, rtol=0, atol=0.02)


def test_a_class_is_the_one_that_the_teacher_calls_so(tmp_path: Path):
    """Data of some of the teacher's classes: their numbers are the teacher's, as they were in training."""
    first = trained_on(tmp_path).model
    data = folder_of_classes(tmp_path / "some" / "images", "abc", 4)
    shutil.rmtree(tmp_path / "some" / "images" / "a")
    teacher, run = tmp_path / "run", tmp_path / "merged"
    small = ("train.steps=1", "train.global_batch_size=4", "train.preview_every=0", "eval=null", "health=null")
    named = (f"data={data}", f"teachers={{own: {teacher}}}", "method.steps={name: heun, num_steps: 6, rho: 5}")
    Trainer(small_config("merge_teachers", run, *named, *small, teacher=teacher), quiet=True).run()
    found, expected = fitted(imager(run).model).means, fitted(first).means
    torch.testing.assert_close(found[1:3], expected[1:3])
    torch.testing.assert_close(found[0], found[3])  # of which there are no images: as all
