"""`diffdistill eval` of pipelines on latents: captions in, through text encoder, network and VAE, scores out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from conftest import small_config
from support.stand_ins import save_stand_in
from support.tiny_clip import LABEL, METRIC, write_clip
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.router import RoutedDenoiser
from diffdistill.diffusion.sampling import DDIM
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.eval.images.diffusers_folder import open_diffusers
from diffdistill.eval.images.encoder_and_vae import open_around
from diffdistill.eval.images.generate import SampledImages
from diffdistill.eval.images.places import SamplingOptions
from diffdistill.eval.protocols.packaged import find_protocol
from diffdistill.eval.protocols.protocol import Protocol
from diffdistill.eval.records.record import read_records
from diffdistill.models.teachers import open_pipeline
from diffdistill.settings.schema import UserError
from diffdistill.training.trainer import Trainer

CAPTIONS = ["a red fox", "two blue birds", "a dog", "the same again"]
STEPS = DDIM(num_steps=2)
CPU = torch.device("cpu")


def protocol_file(folder: Path, **changes: Any) -> Path:
    settings = {
        "name": "tiny-captions",
        "num_images": len(CAPTIONS),
        "image_shape": [3, 16, 16],
        "labels": {"policy": "captions"},
        "captions": {"name": "captions.txt", "count": len(CAPTIONS)},
        "metrics": [METRIC],
    }
    (folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    (folder / "protocol.yaml").write_text(yaml.safe_dump({k: v for k, v in (settings | changes).items() if v}))
    return folder / "protocol.yaml"


def protocol(folder: Path, **changes: Any) -> Protocol:
    return find_protocol(str(protocol_file(folder, **changes)))


def opened(place: Path, known: Protocol, **options: Any) -> SampledImages:
    captions = CAPTIONS if known.captions else None
    return open_diffusers(place, known, SamplingOptions(sampler=STEPS, captions=captions, **options), CPU)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stand_in(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_image_i_is_caption_i_through_the_pipelines_own_parts(place: Path, guidance: float, tmp_path: Path) -> None:
    source = opened(place, protocol(tmp_path), guidance=guidance)
    index = torch.tensor([2, 1])
    images = source.take(0, index)
    assert images.shape == (2, 3, 16, 16)
    pipeline = open_pipeline(place)
    denoiser = pipeline.load_denoiser()
    denoiser.run_with(conditions=pipeline.conditions(CAPTIONS))
    noise = StepRandom(0, 0, index).normal("noise", pipeline.spec.image_shape)
    latents = STEPS(denoiser, noise, Cond(label=index), guidance=guidance)
    expected = pipeline.family.to_images(pipeline.load_vae(), latents)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("keeps_encoder", [True, False])
@torch.no_grad()
def test_students_behind_a_router_are_told_what_no_caption_is(place: Path, keeps_encoder: bool) -> None:
    pipeline = open_pipeline(place)
    alone, *students = (pipeline.load_denoiser() for _ in range(3))
    routed = RoutedDenoiser(students, lambda cond: torch.arange(len(next(iter(cond.parts().values())))) % 2)
    index = torch.tensor([2, 1, 0])
    noise = StepRandom(0, 0, index).normal("noise", pipeline.spec.image_shape)
    made = []
    for denoiser in (alone, routed):
        around = open_around(pipeline.spec, denoiser, CAPTIONS, CPU, origin="here", keeps_encoder=keeps_encoder)
        assert around is not None
        assert around.encode is not None
        made.append(STEPS(denoiser, noise, around.encode(index), guidance=3.0))
    torch.testing.assert_close(made[1], made[0], atol=1e-4, rtol=0)  # of latents of size 4, in other batches


def test_an_image_does_not_depend_on_its_batch(place: Path, tmp_path: Path) -> None:
    source = opened(place, protocol(tmp_path), guidance=3.0)
    together = source.take(0, torch.arange(4))
    for i in range(4):
        torch.testing.assert_close(source.take(0, torch.tensor([i]))[0], together[i], atol=1e-5, rtol=0)


def test_classes_on_latents_need_no_captions(tmp_path: Path) -> None:
    labels = {"policy": "random", "num_classes": 1000}
    place = save_stand_in("dit", tmp_path / "dit")
    source = opened(place, protocol(tmp_path, labels=labels, captions=None))
    assert source.take(0, torch.arange(3)).shape == (3, 3, 16, 16)
    assert list(source.model.around_sha256) == ["vae"]


def test_captions_and_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    text, classes = (save_stand_in(family, tmp_path / family) for family in ("sd", "dit"))
    without = protocol(tmp_path, labels=None, captions=None)
    with pytest.raises(UserError, match="takes captions; choose a protocol with captions"):
        opened(text, without)
    with pytest.raises(UserError, match="has captions, which this model does not take"):
        opened(classes, protocol(tmp_path))
    with pytest.raises(UserError, match="makes 3 x 16 x 16 images; tiny-captions is for 3 x 512 x 512"):
        opened(text, protocol(tmp_path, image_shape=[3, 512, 512]))


def evaluated(
    place: Path, folder: Path, *options: object, sampler: str | None = "{name: ddim, num_steps: 2}"
) -> Result:
    write_clip(folder)
    arguments = ["--captions", folder / "captions.txt", "--weights", f"{LABEL}={folder / 'clip.safetensors'}"]
    arguments += [*(["--sampler", sampler] if sampler else []), "--records", folder / "r.jsonl", *options]
    call = ["eval", str(place), "--protocol", str(folder / "protocol.yaml"), *map(str, arguments)]
    return CliRunner(env={"COLUMNS": "200", "DIFFDISTILL_CACHE": str(folder / "cache")}).invoke(app, call)


def test_a_clip_score_of_a_pipeline_names_everything_that_made_it(place: Path, tmp_path: Path) -> None:
    protocol_file(tmp_path)
    (place / "README.md").write_text("---\nlicense: openrail++\n---\n")
    result = evaluated(place, tmp_path, "--guidance", 3, "--efficiency", "--batch", 2, "--save-images", tmp_path / "i")
    assert result.exit_code == 0, result.output
    made = evaluated(tmp_path / "i" / str(place).strip("/").replace("/", "-").replace("_", "-")[-60:], tmp_path)
    assert made.exit_code == 0, made.output
    record, of_files = read_records(tmp_path / "r.jsonl")
    assert record.metrics["clip-score"].mean == pytest.approx(of_files.metrics["clip-score"].mean, rel=1e-6)
    assert record.model is not None
    assert list(record.model.around_sha256) == ["vae", "text_encoder"]
    assert record.model.licence == "openrail++"
    assert record.efficiency is not None
    encoders = {name for name in open_pipeline(place).family.text_parts if name.startswith("text_encoder")}
    assert len(record.efficiency.includes) == len(encoders) + 1
    assert {"vae", "text_encoder"} <= set(record.efficiency.includes)
    assert record.efficiency.num_evaluations == 2 * 2
    captions = record.protocol["captions"]
    assert isinstance(captions, dict)
    assert len(str(captions["sha256"])) == 64


def test_a_students_captions_are_judged_while_it_trains_as_its_checkpoint_is_afterwards(tmp_path: Path) -> None:
    place, captions = save_stand_in("sd", tmp_path / "sd"), tmp_path / "captions.txt"
    protocol_file(tmp_path)
    write_clip(tmp_path)
    watch = {
        "protocol": str(tmp_path / "protocol.yaml"),
        "captions": str(captions),
        "weights": {LABEL: str(tmp_path / "clip.safetensors")},
        "guidance": 2.0,
    }
    prompts = json.dumps({"name": "prompts", "path": str(captions)})
    settings = ("train.steps=2", "train.global_batch_size=2", "method.steps={init_ratio: 10}")
    config = small_config(
        "sim", tmp_path / "run", f"data={prompts}", f"eval={json.dumps(watch)}", *settings, teacher=place
    )
    Trainer(config, quiet=True).run()
    result = evaluated(tmp_path / "run", tmp_path, "--guidance", 2, sampler=None)
    assert result.exit_code == 0, result.output
    (seen,), (afterwards,) = read_records(tmp_path / "run" / "eval.jsonl"), read_records(tmp_path / "r.jsonl")
    assert seen.metrics["clip-score"].mean == pytest.approx(afterwards.metrics["clip-score"].mean, rel=1e-5)
    assert seen.protocol_id == afterwards.protocol_id
    assert seen.model is not None
    assert afterwards.model is not None
    assert seen.model.around_sha256 == afterwards.model.around_sha256
