"""Runs on images of several aspects: what is cached, what networks are told, a run after a stop, and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_config
from PIL import Image
from support.stand_ins import save_stand_in

from diffdistill.commands.doctor_config import examine_config
from diffdistill.data.buckets import BucketedImages, order_of
from diffdistill.models.load import describe_model, load_players
from diffdistill.settings.schema import UserError
from diffdistill.training.inputs import open_inputs
from diffdistill.training.memory.prediction import plan_memory
from diffdistill.training.plan import plan
from diffdistill.training.trainer import Trainer

SIZES = [(40, 20), (20, 40), (30, 30), (41, 20), (32, 32), (30, 31)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of SDXL's family for images of 16 x 16, and images of several aspects; the last is on its side."""
    home = tmp_path_factory.mktemp("buckets")
    save_stand_in("sdxl", home / "teacher")
    (home / "images").mkdir()
    for number, size in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / "images" / f"{number}.png")
        (home / "images" / f"{number}.txt").write_text(f"caption {number % 4}")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(home / "images" / "6.jpg", exif=exif)
    (home / "images" / "6.txt").write_text("caption 6")
    return home


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(home / "cache"))
    return home / "cache"


def config(home: Path, run: Path, *more: str, method: str = "dmd2") -> Any:
    data = {"name": "captioned_images", "path": str(home / "images"), "buckets": {"step": 4, "most_aspect": 2.5}}
    return small_config(
        method,
        run,
        f"data={json.dumps(data)}",
        f"teacher={json.dumps(str(home / 'teacher'))}",
        *("train.global_batch_size=2", "train.micro_batch_size=1", "health={every: 2, distance_every: 0}"),
        *("train.preview_every=0", *(("method.steps={init_ratio: 10}",) if method == "dmd2" else ()), *more),
    )


def test_images_are_cached_by_bucket_as_latents_of_their_own_shape(home: Path, tmp_path: Path, cache: Path) -> None:
    wanted = config(home, tmp_path / "run")
    found = open_inputs(wanted, describe_model(home / "teacher"), torch.device("cpu"))
    source, conditions = found.source, found.conditions
    assert isinstance(source, BucketedImages)
    assert conditions is not None
    assert source.image_shape == (4, 8, 8)
    assert {part.image_shape: len(part) for part in source.parts} == {(4, 6, 10): 1, (4, 8, 8): 3, (4, 10, 6): 3}
    assert source.labels is not None
    texts = [conditions.texts[label] for label in source.labels.tolist()]
    assert texts == ["caption 1", "caption 2", "caption 0", "caption 1", "caption 0", "caption 3", "caption 6"]
    before = sorted(file.name for file in cache.iterdir())
    again = open_inputs(wanted, describe_model(home / "teacher"), torch.device("cpu"))
    assert again.source.key == source.key
    assert sorted(file.name for file in cache.iterdir()) == before


def test_networks_are_told_the_size_of_their_batch(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Original and target size, uncropped, as the student's own pipeline tells it at that size."""
    made = plan(config(home, tmp_path / "run"))
    assert made.teacher is not None
    denoiser, told = made.teacher.denoiser, []
    forward = type(denoiser.net).forward

    def keep(net: Any, x: Any, time_input: Any, cond: Any) -> Any:
        told.append(((2 * x.shape[2], 2 * x.shape[3]), cond.size.tolist()))
        return forward(net, x, time_input, cond)

    monkeypatch.setattr(type(denoiser.net), "forward", keep)
    label, t = torch.tensor([0, denoiser.num_classes]), torch.full((2,), 500.0, dtype=torch.float64)
    for shape in made.problem.image_shapes:
        denoiser(torch.zeros(2, *shape), t, denoiser.class_cond(label))
    assert {size for size, _ in told} == {(12, 20), (16, 16), (20, 12)}
    assert all(sizes == [[*size, 0, 0, *size]] * 2 for size, sizes in told)


def test_a_run_with_a_discriminator_goes_on_after_a_stop_to_the_bit(home: Path, tmp_path: Path) -> None:
    shapes, whole = [], Trainer(config(home, tmp_path / "whole", "train.steps=4"))
    draw = whole.method.draw

    def keep(rng: Any, problem: Any) -> Any:
        shapes.append(problem.image_shape)
        return draw(rng, problem)

    object.__setattr__(whole.method, "draw", keep)
    whole.run()
    assert len(set(shapes)) > 1
    assert shapes[::2] == shapes[1::2]  # both micro-batches of a step
    Trainer(config(home, tmp_path / "parts", "train.steps=2")).run()
    Trainer(config(home, tmp_path / "parts", "train.steps=4"), resume=True).run()
    first, second = (load_players(tmp_path / name).denoisers for name in ("whole", "parts"))
    for name, player in first.items():
        others = second[name].state_dict()
        assert all(torch.equal(weight, others[key]) for key, weight in player.state_dict().items())


def test_doctor_measures_the_largest_size(home: Path, tmp_path: Path) -> None:
    """Where the first batch of the run would be of another one."""
    source, shapes = plan(config(home, tmp_path / "run")).source, []
    orders = (order_of(source, seed, batch=2) for seed in range(20))
    first = [order.take(0, 2, next_first=2)[0].shape[1:] for order in orders]
    seed = next(seed for seed, shape in enumerate(first) if shape != (4, 8, 8))
    wanted = config(home, tmp_path / "run", f"train.seed={seed}", "health=null")
    draw = wanted.method.draw

    def keep(rng: Any, problem: Any) -> Any:
        shapes.append(problem.image_shape)
        return draw(rng, problem)

    object.__setattr__(wanted.method, "draw", keep)
    found = {finding.topic: finding.text for finding in examine_config(wanted)}
    assert "as predicted" in found["activations"]
    assert set(shapes) == {(4, 8, 8)}


def test_doctor_measures_at_the_teachers_resolution(home: Path, tmp_path: Path) -> None:
    def activations(*more: str) -> int:
        made = plan(config(home, tmp_path / "run", "method.gan_weight=0", "data.buckets=null", *more)).at_largest
        return plan_memory(made, made.iteration({})).peak_activations

    twice = f"teacher={{name: {home / 'teacher'}, resolution: 32}}"
    assert activations(twice) > 2 * activations()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("method.gan_weight=0",), "dmd2 sees no images, with these settings; say teacher.resolution"),
        (("method.regression_weight=1",), "with regression_weight its stored pairs are of one size"),
        (("speed.compile=eager",), "speed.compile compiles a network for each shape anew"),
        (
            ("data.buckets.step=7",),
            "step = 7: resolution = .* sides must be multiples of 2 pixels; for 21 take 20 or 22",
        ),
    ],
)
def test_what_takes_one_shape_alone_is_refused(home: Path, tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=rf"data\.buckets: .*{said}"):
        plan(config(home, tmp_path / "run", *more))
