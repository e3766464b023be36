"""Pipelines whose network and scheduler lie beside model_index.json, as google/ddpm-*: for all that others are for."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import small_config
from support.other_libraries import assert_steps_agree, watched_steps
from support.stand_ins import save_stand_in

from diffdistill.diffusion.cond import NO_COND
from diffdistill.export.run import ExportOptions, write
from diffdistill.inference.draw import sample_images
from diffdistill.models.load import load_model
from diffdistill.models.places import content_of
from diffdistill.models.teachers import open_pipeline
from diffdistill.training.trainer import Trainer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As google/ddpm-cifar10-32: the config of diffusers 0.1, whose heads have one size."""
    folder = save_stand_in("ddpm", tmp_path_factory.mktemp("root") / "ddpm-tiny")
    for file in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
        shutil.move(file, folder / file.name)
    for part in ("unet", "scheduler"):
        (folder / part).rmdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


def test_its_steps_are_the_pipelines(place: Path) -> None:
    rng = torch.Generator().manual_seed(1)
    pipe = diffusers.DDPMPipeline.from_pretrained(place)
    steps = watched_steps(pipe, num_inference_steps=3, batch_size=2, generator=rng)
    assert_steps_agree(load_model(place).denoiser, steps, NO_COND, guidance=1.0)


def test_its_content_is_its_networks_alone(place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    (copy / "README.md").write_text("another")
    assert content_of(copy) == content_of(place)
    assert [file.name for file in open_pipeline(place).network_files] == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_it_is_trained_from_sampled_and_exported(place: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=np.zeros((8, 8, 8, 3), np.uint8))
    data = f"data={{name: npz, path: {tmp_path / 'data.npz'}}}"
    more = (
        "method.guidance=1",
        "method.gan_weight=0",
        "train.steps=1",
        "health=null",
        "method.steps={init_ratio: 10, init_noise: unit}",
    )
    Trainer(small_config("dmd2", tmp_path / "run", data, *more, teacher=place), quiet=True).run()
    student = load_model(tmp_path / "run")
    assert sample_images(student, count=2).shape == (2, 3, 8, 8)
    assert sample_images(load_model(place), count=2).shape == (2, 3, 8, 8)
    written = write(str(tmp_path / "run"), tmp_path / "stock", ExportOptions(kind="stock"))
    assert written.kind == "stock"
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "stock")
    exported, own = loaded.unet.state_dict(), student.denoiser.net.model.state_dict()
    assert all(torch.equal(exported[name], weight) for name, weight in own.items())
    write(str(tmp_path / "run"), tmp_path / "own", ExportOptions(kind="self-contained"))
    index = json.loads((tmp_path / "own" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert (tmp_path / "own" / "scheduler" / "scheduler_config.json").is_file()
