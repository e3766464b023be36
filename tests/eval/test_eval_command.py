"""`diffdistill eval`: any place by any protocol, records, tables, comparisons, and what is refused."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import Result
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.data.digits import Digits
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import VPDiscrete
from diffdistill.diffusion.sampling import DDIM
from diffdistill.eval.images.diffusers_folder import open_diffusers
from diffdistill.eval.images.generate import SampledImages
from diffdistill.eval.images.places import SamplingOptions, seconds_until
from diffdistill.eval.protocols.packaged import find_protocol
from diffdistill.eval.records.record import Record, read_records
from diffdistill.models.load import find_checkpoint, load_model
from diffdistill.networks.diffusers_unet import DiffusersUNet
from diffdistill.storage.checkpoint import MANIFEST

PROTOCOL = {
    "name": "small-digits",
    "num_images": 100,
    "image_shape": [1, 8, 8],
    "labels": {"policy": "cyclic", "num_classes": 10},
    "reference": {"name": "digits-train", "dataset": "digits", "split": "train", "num_images": 1437},
    "metrics": [
        {"name": "frechet", "features": {"name": "pixels"}},
        {"name": "precision_recall", "features": {"name": "pixels"}},
    ],
}


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["eval", *map(str, arguments)])


def done(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DIFFDISTILL_REFERENCES", str(tmp_path / "references"))
    return tmp_path / "cache"


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    return write_protocol(tmp_path)


def write_protocol(folder: Path, **changes: Any) -> Path:
    file = folder / "protocol.yaml"
    file.write_text(yaml.safe_dump(PROTOCOL | changes))
    return file


def only_record(file: Path) -> Record:
    (record,) = read_records(file)
    return record


def values(record: Record) -> dict[str, tuple[float, ...]]:
    return {name: metric.values for name, metric in record.metrics.items()}


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of diffusers' own, untrained."""
    folder = tmp_path_factory.mktemp("pipeline") / "ddpm"
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(network, DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder)
    return folder


def test_a_record_says_what_was_measured_how_and_where(quick_teacher: Path, protocol: Path, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    done(quick_teacher, "--protocol", protocol, "--records", file, "--name", "a teacher")
    record = only_record(file)
    checkpoint = find_checkpoint(quick_teacher)
    assert (record.kind, record.name, record.method, record.seed) == ("measured", "a teacher", "pretrain", 0)
    assert record.model is not None
    assert record.model.sha256 == json.loads((checkpoint / MANIFEST).read_text())["files"]["ema.safetensors"]
    assert record.model.parameters == sum(p.numel() for p in load_model(checkpoint).denoiser.parameters())
    assert record.sampler is not None
    assert (record.sampler.name, record.sampler.num_evaluations, record.sampler.guidance) == ("heun", 5, 1.0)
    assert record.cost is not None
    assert (record.cost.train_steps, record.cost.train_images) == (10, 80)
    assert record.environment is not None
    assert record.environment.tf32 is False
    assert {"torch", "diffdistill"} <= record.environment.versions.keys()
    assert record.protocol["num_images"] == 100
    assert set(record.protocol["reference_sha256"]) == {"pixels"}  # type: ignore[arg-type]
    assert list(record.metrics) == ["fd-pixels", "precision", "recall"]


def test_images_on_disk_score_as_the_model_that_made_them(quick_teacher: Path, protocol: Path, tmp_path: Path) -> None:
    """The protocol's quantiser comes before the features, so that a folder, a zip and a .npz have the same ones."""
    folder, archive, arrays = tmp_path / "images", tmp_path / "images.zip", tmp_path / "images.npz"
    record = tmp_path / "model.jsonl"
    done(quick_teacher, "--protocol", protocol, "--records", record, "--save-images", folder, "--name", "x")
    files = sorted(folder.rglob("*.png"))
    assert [file.stem for file in files] == [f"{number:08d}" for number in range(100)]
    with zipfile.ZipFile(archive, "w") as writer:
        for file in files:
            writer.write(file, file.name)
    np.savez(arrays, images=np.stack([np.array(Image.open(file).convert("L"))[..., None] for file in files]))
    for place in (folder / "x", archive, arrays):
        again = tmp_path / f"{place.name}.jsonl"
        done(place, "--protocol", protocol, "--records", again)
        assert values(only_record(again)) == values(only_record(record))
        assert only_record(again).images == only_record(record).images
        assert only_record(again).sampler is None


def test_real_digits_score_better_than_an_untrained_model(quick_teacher: Path, protocol: Path, tmp_path: Path) -> None:
    images, _ = Digits(split="test").tensors()
    np.savez(tmp_path / "real.npz", images=((images[:100] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1))
    file = tmp_path / "records.jsonl"
    done(quick_teacher, tmp_path / "real.npz", "--protocol", protocol, "--records", file)
    model, real = read_records(file)
    assert real.metrics["fd-pixels"].mean < 0.3 * model.metrics["fd-pixels"].mean
    assert real.metrics["precision"].mean > 0.8


def test_repeats_have_seeds_of_their_own(quick_teacher: Path, protocol: Path, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    done(quick_teacher, "--protocol", protocol, "--records", file, "--repeats", 2)
    done(quick_teacher, "--protocol", protocol, "--records", file, "--seed", 1)
    both, second = read_records(file)
    assert both.images is not None
    assert both.images.seeds == ((0, 100), (100, 200))
    fd = both.metrics["fd-pixels"]
    assert fd.values[0] != fd.values[1] == second.metrics["fd-pixels"].values[0]
    assert fd.std == pytest.approx(abs(fd.values[0] - fd.values[1]) / 2**0.5)
    assert both.protocol_id != second.protocol_id


def test_the_table_and_the_json_rows_agree(quick_teacher: Path, protocol: Path, tmp_path: Path) -> None:
    result = done(quick_teacher, "--protocol", protocol, "--out", tmp_path / "rows.json", "--name", "teacher")
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert list(row) == ["name", "num_evaluations", "fd_pixels", "precision", "recall", "ms_per_image"]
    assert "small-digits: 100 images against the train split" in result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("│ teacher"))
    assert [cell.strip() for cell in line.split("│")[2:5]] == [
        "5",
        f"{row['fd_pixels']:.3f}",
        f"{row['precision']:.3f}",
    ]


def test_grids_lie_beside_the_records_and_nothing_else_is_left(
    quick_teacher: Path, protocol: Path, tmp_path: Path, cache: Path
) -> None:
    file = tmp_path / "records" / "all.jsonl"
    done(quick_teacher, "--protocol", protocol, "--records", file, "--grid", "--name", "teacher")
    record = only_record(file)
    assert record.images is not None
    assert record.images.grid is not None
    assert Image.open(file.parent / record.images.grid).size == (340, 340)
    assert sorted(path.name for path in file.parent.iterdir()) == [".all.jsonl.lock", "all.jsonl", "grids"]
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_efficiency_goes_into_the_record(quick_teacher: Path, protocol: Path, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    done(quick_teacher, "--protocol", protocol, "--records", file, "--efficiency", "--batch", 8)
    efficiency = only_record(file).efficiency
    assert efficiency is not None
    assert (efficiency.num_evaluations, efficiency.throughput_batch) == (5, 8)
    assert efficiency.latency_ms > 0


def test_another_sampler_and_guidance_are_recorded(quick_teacher: Path, protocol: Path, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    sampler = "{name: ddim, num_steps: 3}"
    done(quick_teacher, "--protocol", protocol, "--records", file, "--sampler", sampler, "--guidance", "1.5")
    done(quick_teacher, "--protocol", protocol, "--records", file, "--guidance", "{name: cfg, scale: 1.5}")
    scale, policy = (record.sampler for record in read_records(file))
    assert scale is not None
    assert policy is not None
    assert (scale.name, scale.num_evaluations, scale.guidance) == ("ddim", 3, 1.5)
    assert policy.guidance is None
    assert policy.settings["guidance_policy"] == {"name": "cfg", "scale": 1.5}


def test_a_diffusers_pipeline_is_the_denoiser_that_its_files_say(
    diffusers_folder: Path, protocol: Path, tmp_path: Path
) -> None:
    known = find_protocol(str(protocol))
    source = open_diffusers(diffusers_folder, known, SamplingOptions(sampler=DDIM(num_steps=2)), torch.device("cpu"))
    network = UNet2DModel.from_pretrained(diffusers_folder / "unet")
    path = VPDiscrete.from_scheduler(json.loads((diffusers_folder / "scheduler/scheduler_config.json").read_text()))
    own = SampledImages(
        denoiser=Denoiser(DiffusersUNet(network), path, "eps"),
        sampler=DDIM(num_steps=2),
        protocol=known,
        image_shape=(1, 8, 8),
        model=source.model,
    )
    index = torch.arange(3)
    assert torch.equal(source.take(0, index), own.take(0, index))
    file = tmp_path / "records.jsonl"
    done(diffusers_folder, "--protocol", protocol, "--records", file, "--sampler", "{name: ddim, num_steps: 2}")
    record = only_record(file)
    assert record.model is not None
    assert record.model.parameters == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "names diffusers.UNet2DConditionModel"),
        ("model_index.json", {"scheduler": None}, "cannot be read"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type = 'flow': choose from"),
        ("unet/config.json", {"out_channels": 2}, "cannot be read"),
    ],
)
def test_other_diffusers_folders_are_refused(
    diffusers_folder: Path, protocol: Path, tmp_path: Path, file: str, change: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(diffusers_folder, folder)
    settings = json.loads((folder / file).read_text()) | change
    if settings.get("scheduler", 0) is None:
        shutil.rmtree(folder / "scheduler")
    (folder / file).write_text(json.dumps(settings))
    assert_refused(call(folder, "--protocol", protocol), said)


def test_pickled_weights_are_not_read(diffusers_folder: Path, protocol: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(diffusers_folder, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    assert_refused(call(folder, "--protocol", protocol), "its weights are a pickle")


def test_two_models_are_compared_on_the_same_noise(quick_teacher: Path, protocol: Path) -> None:
    options = ("--protocol", protocol, "--replicates", 10)
    same = done("compare", quick_teacher, quick_teacher, *options).stdout
    assert same.count("not clear") == 3
    assert "95% interval" in same


def test_compare_takes_two_places(quick_teacher: Path) -> None:
    assert_refused(call("compare", quick_teacher), "eval compare: takes two models, not 1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--protocol", "nothing"), "protocol 'nothing': unknown (choices: digits-pixels"),
        (("--name", "a", "--name", "b"), "--name: 2 names for 1 models"),
        (("--device", "tpu"), "--device tpu: choose from auto, cpu"),
        (("--weights", "x=y"), "--weights x=y: x is not one of the protocol's features (pixels)"),
        (("--reference", "pixels"), "--reference pixels: write LABEL=FILE"),
        (("--reference", "pixels=none.npz"), "none.npz: no such file"),
        (("--sampler", "{name: euler}"), "sampler.name = 'euler': unknown"),
        (("--grid",), "--grid: is written next to the records"),
        (("--captions", "none.txt"), "--captions none.txt: protocol digits-pixels has none"),
        (("--records", "/proc/records.jsonl"), "/proc/records.jsonl: cannot be written"),
        (("--protocol", "coco-clip"), "coco-clip: give its captions"),
    ],
)
def test_what_cannot_be_is_refused(quick_teacher: Path, arguments: tuple[str, ...], said: str) -> None:
    assert_refused(call(quick_teacher, *arguments), said)


def test_images_without_a_protocol_ask_for_one(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert_refused(call(tmp_path / "images"), "name a --protocol (choices: digits-pixels, ")


@pytest.mark.parametrize(
    ("count", "side", "said"),
    [
        (99, 8, "holds 99 images; small-digits takes 1 x 100"),
        (100, 9, "images are 1 x 9 x 9; small-digits is for 1 x 8 x 8"),
    ],
)
def test_files_that_do_not_fit_the_protocol_are_refused(
    protocol: Path, tmp_path: Path, count: int, side: int, said: str
) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((count, side, side, 1), np.uint8))
    assert_refused(call(tmp_path / "images.npz", "--protocol", protocol), said)


def test_more_files_than_needed_are_noted(protocol: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", images=rng.integers(0, 256, (120, 8, 8, 1), np.uint8))
    done(tmp_path / "images.npz", "--protocol", protocol, "--records", tmp_path / "records.jsonl")
    assert only_record(tmp_path / "records.jsonl").notes == "the first 100 of 120 images by name"


def test_files_of_images_cannot_be_timed(protocol: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((100, 8, 8, 1), np.uint8))
    assert_refused(call(tmp_path / "images.npz", "--protocol", protocol, "--efficiency"), "files of images")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_shape": [3, 8, 8]}, "makes 1 x 8 x 8 images; small-digits is for 3 x 8 x 8"),
        ({"labels": {"policy": "cyclic", "num_classes": 7}}, "knows 10 classes; small-digits is for 7"),
        ({"labels": {"policy": "none"}}, "knows 10 classes, but small-digits names no labels"),
    ],
)
def test_a_model_that_does_not_fit_the_protocol_is_refused(
    quick_teacher: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    assert_refused(call(quick_teacher, "--protocol", write_protocol(tmp_path, **changes)), said)


def test_the_seconds_of_a_resumed_run_add_up(tmp_path: Path) -> None:
    reports = [(1, 5.0), (2, 9.0), (3, 2.0), (4, 4.0), (5, 7.0)]
    lines = [json.dumps({"step": step, "seconds": seconds}) for step, seconds in reports]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 6, "sec']))
    assert [seconds_until(tmp_path, step) for step in (0, 2, 4, 9)] == [None, 9.0, 13.0, 16.0]
