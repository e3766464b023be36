"""Teachers that are told the size of their images: what of the model depends on it, and sizes that are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_config
from PIL import Image
from support.stand_ins import save_stand_in

from diffdistill.data.decode import ENLARGED, Sizing, decode
from diffdistill.models.composed import ComposedTeacher
from diffdistill.models.encoders import encode_prompts, encoder_of
from diffdistill.models.load import describe_model, load_model
from diffdistill.models.teachers import Pipeline, open_pipeline
from diffdistill.models.teachers.compose import compose, tell_made_of
from diffdistill.models.teachers.families.flux2 import NUM_STEPS, _mu
from diffdistill.settings.schema import UserError
from diffdistill.training.inputs import open_inputs
from diffdistill.training.plan import plan
from diffdistill.training.trainer import Trainer


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("teachers")
    return {family: save_stand_in(family, home / family) for family in ("sdxl", "sd3", "flux2", "dit", "auraflow")}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sized(place: Path, resolution: Any) -> Pipeline:
    return open_pipeline(compose(ComposedTeacher(name=str(place), resolution=resolution)))


def test_latents_and_images_are_of_the_size_that_is_asked_for(places: dict[str, Path]) -> None:
    made = sized(places["sdxl"], (32, 16))
    assert made.spec.image_shape == (4, 16, 8)
    assert made.image_size == (32, 16)
    assert sized(places["sdxl"], 32).image_size == (32, 32)
    assert sized(made.folder, 16).image_size == (16, 16)


def test_the_weights_and_the_options_of_the_network_stay(places: dict[str, Path]) -> None:
    made, base = sized(places["sdxl"], 32), open_pipeline(places["sdxl"])
    assert made.options == base.options
    file = "unet/diffusion_pytorch_model.safetensors"
    assert (made.folder / file).samefile(base.folder / file)
    assert tell_made_of(made) is None  # LoRA over it is LoRA over the base
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    cond = base.conditions(["a red fox"]).rows(torch.tensor([0]))
    outputs = [one.load_denoiser().net(x, torch.tensor([500.0]), cond) for one in (made, base)]
    assert torch.equal(*outputs)


def test_sdxl_is_told_the_size_and_its_cached_prompts_are_of_it(places: dict[str, Path], cache: Path) -> None:
    """Original height and width, no crop, target height and width; the empty prompt's too."""
    tables = []
    for resolution in (None, (32, 16)):
        place = places["sdxl"] if resolution is None else sized(places["sdxl"], resolution).folder
        encoder = encoder_of(describe_model(place))
        assert encoder is not None
        tables.append(encode_prompts(encoder, ["a red fox"], root=cache))
    own, asked = ([table.rows(torch.tensor([number])).size.tolist() for number in (0, 1)] for table in tables)  # type: ignore[union-attr]
    assert own == [[[16, 16, 0, 0, 16, 16]]] * 2
    assert asked == [[[32, 16, 0, 0, 32, 16]]] * 2
    assert tables[0].key != tables[1].key


def test_a_shift_that_depends_on_the_tokens_is_of_the_size(places: dict[str, Path], tmp_path: Path) -> None:
    assert sized(places["flux2"], (64, 32)).spec.model.path.shift == pytest.approx(  # type: ignore[union-attr]
        np.exp(_mu(16 * 8, NUM_STEPS))
    )
    dynamic = save_stand_in("sd3", tmp_path / "sd3", use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    shift = np.exp(0.5 + (1.15 - 0.5) / (4096 - 256) * (8 * 4 - 256))
    assert sized(dynamic, (32, 16)).spec.model.path.shift == pytest.approx(shift)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("family", "resolution", "said"),
    [
        ("sdxl", (17, 16), r"resolution = \[17, 16\]: .*: sides must be multiples of 2 pixels; for 17 take 16 or 18"),
        ("sd3", 18, "resolution = 18: .*: sides must be multiples of 4 up to 32 pixels; for 18 take 16 or 20"),
        ("sd3", (16, 36), "up to 32 pixels; for 36 take 32"),
        ("auraflow", 32, "up to 16 pixels; for 32 take 16"),
        ("flux2", (1, 1), "multiples of 4 pixels; for 1 take 4"),
        ("dit", 32, "its pipeline makes images of its network's own size alone"),
    ],
)
def test_a_size_that_the_family_cannot_take_is_refused_with_the_nearest(
    places: dict[str, Path], cache: Path, family: str, resolution: Any, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        sized(places[family], resolution)
    assert not list(cache.glob("teacher-*"))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ('{"height": 32}', r"image_size\.json: does not say a height and a width"),
        ('{"height": 1e400, "width": 32}', r"image_size\.json: height, width = \[inf, 32\]: must be whole numbers"),
        ('{"height": 32, "width": 0}', r"width = \[32, 0\]: must be whole numbers of pixels, 1 to 16384"),
        ('{"height": 32.5, "width": 32}', r"width = \[32.5, 32\]: must be whole numbers"),
        ('{"height": 32, "width": 33}', r"images of \[32, 33\] pixels: sides must be multiples of 2"),
    ],
)
def test_a_damaged_size_is_refused(places: dict[str, Path], told: str, said: str) -> None:
    made = sized(places["sdxl"], 32)
    (made.folder / "image_size.json").write_text(told)
    with pytest.raises(UserError, match=said):
        assert open_pipeline(made.folder).spec


def test_images_are_cropped_in_the_middle_to_the_aspect_that_is_asked_for() -> None:
    """A picture of 40 x 20 whose columns count up, as 8 x 4 of its own aspect, of another, and enlarged."""
    columns = np.broadcast_to((4 * np.arange(20))[None, :, None], (40, 20, 1)).astype(np.uint8)
    assert decode(columns, Sizing((40, 20))).pixels.tolist() == columns.transpose(2, 0, 1).tolist()
    tall = decode(columns, Sizing((40, 10)))
    assert tall.pixels[0].tolist() == columns[:, 5:15, 0].tolist()
    assert not tall.notes
    wide = decode(columns, Sizing((20, 40)))
    assert wide.pixels.shape == (1, 20, 40)
    assert wide.notes == (ENLARGED,)
    square = [decode(columns, Sizing(sides)).pixels for sides in (16, (16, 16))]
    assert (square[0] == square[1]).all()


def images_and_run(home: Path, teacher: dict[str, Any], *more: str) -> Any:
    folder = home / "images"
    folder.mkdir(exist_ok=True)
    for number, size in enumerate([(40, 30), (30, 40), (32, 32)]):
        pixels = np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a red fox")
    data = {"name": "captioned_images", "path": str(folder)}
    return small_config(
        "dmd2",
        home / "run",
        f"data={json.dumps(data)}",
        f"teacher={json.dumps(teacher)}",
        *("train.steps=1", "train.global_batch_size=2", "train.micro_batch_size=null", "health=null"),
        *("method.steps={init_ratio: 10}", *more),
    )


def test_image_data_takes_the_teachers_size_where_it_says_none(places: dict[str, Path], tmp_path: Path) -> None:
    """Images of several shapes become latents of one; another `data.resolution` is refused."""
    teacher = {"name": str(places["sdxl"]), "resolution": [32, 16]}
    config = images_and_run(tmp_path, teacher)
    spec = describe_model(compose(config.teacher))
    assert open_inputs(config, spec, torch.device("cpu")).source.image_shape == (4, 16, 8)
    other = images_and_run(tmp_path, teacher, "data.resolution=32")
    with pytest.raises(UserError, match=r"data.resolution = 32: the teacher was made for images of \[32, 16\]"):
        open_inputs(other, spec, torch.device("cpu"))


def test_a_run_trains_at_the_size_and_goes_on_at_no_other(places: dict[str, Path], tmp_path: Path) -> None:
    teacher = {"name": str(places["sdxl"]), "resolution": [32, 16]}
    config = images_and_run(tmp_path, teacher)
    Trainer(config).run()
    assert load_model(tmp_path / "run").spec.image_shape == (4, 16, 8)
    assert plan(config, resume=True).step == 1
    for other in ({**teacher, "resolution": 16}, {"name": str(places["sdxl"])}):
        with pytest.raises(UserError, match=r"resolution|other weights"):
            plan(images_and_run(tmp_path, other), resume=True)
