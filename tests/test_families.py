"""Diffusers pipelines as teachers: the same numbers as the pipeline's own network and scheduler."""

import json
import struct
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from parity import assert_steps_agree, watched_steps
from safetensors.torch import load_file, save_file
from stand_ins import save_stand_in

from diffdistill.conditions import Conditions
from diffdistill.config import dump, validate
from diffdistill.denoiser import NO_COND, Cond, freeze
from diffdistill.families import open_pipeline
from diffdistill.model import ModelSpec, load_model
from diffdistill.networks.discriminator import make_head
from diffdistill.schema import UserError

PROMPTS = ["a red fox", "two blue birds"]


@pytest.fixture(scope="module", params=["ddpm", "dit", "sd", "sdxl"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stand_in(request.param, tmp_path_factory.mktemp(request.param))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(place: Path) -> Conditions | None:
    """Two prompts by number, for a family that takes text."""
    opened = open_pipeline(place)
    return opened.conditions(PROMPTS) if opened.family.takes_text else None


def asked(pipeline: Any) -> dict[str, Any]:
    """What makes a pipeline of any family run three steps on two samples."""
    common = {"num_inference_steps": 3, "generator": seeded(1)}
    if "DDPM" in type(pipeline).__name__:
        return common | {"batch_size": 2}
    if "DiT" in type(pipeline).__name__:
        return common | {"class_labels": [3, 998]}
    return common | {"prompt": PROMPTS, "output_type": "latent"}


@pytest.mark.parametrize("w", [1.0, 3.5])
def test_every_step_of_the_pipeline_is_ours(place: Path, w: float) -> None:
    teacher, opened = load_model(place), open_pipeline(place)
    cond = NO_COND
    if opened.family.takes_text:
        teacher.denoiser.conditions = opened.conditions(PROMPTS)
        cond = teacher.denoiser.class_cond(torch.arange(2))
    elif teacher.spec.num_classes:
        cond = Cond(label=torch.tensor([3, 998]))
    elif w != 1:
        pytest.skip("this family knows no condition")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(place)
    guidance = {"guidance_scale": w} if cond.parts() else {}
    steps = watched_steps(pipeline, **asked(pipeline), **guidance)
    assert_steps_agree(teacher.denoiser, steps, cond, guidance=w)


def test_v_predictions_are_read(tmp_path: Path) -> None:
    save_stand_in("sd", tmp_path, prediction_type="v_prediction")
    teacher = load_model(tmp_path)
    teacher.denoiser.conditions = open_pipeline(tmp_path).conditions(PROMPTS)
    assert teacher.denoiser.predicts == "v"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    steps = watched_steps(pipeline, **asked(pipeline), guidance_scale=2.0)
    assert_steps_agree(teacher.denoiser, steps, teacher.denoiser.class_cond(torch.arange(2)), guidance=2.0)


def test_a_model_is_built_again_from_its_description_alone(place: Path) -> None:
    teacher = load_model(place)
    spec = validate(ModelSpec, json.loads(json.dumps(dump(teacher.spec))), origin="state.json")
    assert spec == teacher.spec
    again = spec.build()
    again.load_state_dict(teacher.denoiser.state_dict())
    freeze(again)
    teacher.denoiser.conditions = again.conditions = numbered(place)
    x, t = torch.randn(2, *spec.image_shape, generator=seeded(1)), torch.full((2,), 321.0, dtype=torch.float64)
    cond = again.class_cond(torch.tensor([1, 0]))
    assert torch.equal(again(x, t, cond), teacher.denoiser(x, t, cond))


def test_the_tap_is_a_map_and_stops_there(place: Path) -> None:
    denoiser = load_model(place).denoiser
    denoiser.conditions = numbered(place)
    shape = open_pipeline(place).spec.image_shape
    x, t = torch.randn(2, *shape, generator=seeded(2)), torch.full((2,), 321.0, dtype=torch.float64)
    cond = denoiser.class_cond(torch.tensor([0, 1]))
    x0, features = denoiser(x, t, cond, want="both")
    assert torch.equal(features, denoiser(x, t, cond, want="features"))
    assert torch.equal(x0, denoiser(x, t, cond))
    assert make_head(denoiser, shape)(features).shape == (2,)


def test_dit_drops_no_labels_of_its_own_in_training(tmp_path: Path) -> None:
    denoiser = load_model(save_stand_in("dit", tmp_path)).denoiser
    x, t = torch.randn(64, 4, 8, 8, generator=seeded(3)), torch.full((64,), 321.0, dtype=torch.float64)
    cond = Cond(label=torch.arange(64))
    torch.testing.assert_close(denoiser.train()(x, t, cond), denoiser.eval()(x, t, cond), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["dit", "sd", "sdxl"])
def test_latents_are_the_pipelines_own(family: str, tmp_path: Path) -> None:
    opened = open_pipeline(save_stand_in(family, tmp_path))
    vae, latents = opened.load_vae(), torch.randn(2, *opened.spec.image_shape, generator=seeded(4))
    images = opened.family.to_images(vae, latents)
    assert images.shape == (2, 3, *opened.image_size)
    theirs = vae.decode(latents / vae.config.scaling_factor).sample
    torch.testing.assert_close(images, theirs, atol=1e-6, rtol=0)
    found = opened.family.to_latents(vae, images, torch.zeros_like(latents))
    torch.testing.assert_close(
        found, vae.encode(images).latent_dist.mean * vae.config.scaling_factor, atol=1e-6, rtol=0
    )


def test_latents_of_a_vae_that_names_its_statistics(tmp_path: Path) -> None:
    opened = open_pipeline(save_stand_in("sdxl", tmp_path))
    vae, latents = opened.load_vae(), torch.randn(2, 4, 8, 8, generator=seeded(4))
    mean, std = torch.tensor([0.1, -2, 3, 0.5]), torch.tensor([1.5, 0.5, 2, 1])
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    raw = latents * std[:, None, None] / vae.config.scaling_factor + mean[:, None, None]  # as in the pipeline
    torch.testing.assert_close(opened.family.to_images(vae, latents), vae.decode(raw).sample, atol=1e-6, rtol=0)
    images = opened.family.to_images(vae, latents)
    expected = vae.encode(images).latent_dist.mean - mean[:, None, None]
    expected = expected * vae.config.scaling_factor / std[:, None, None]
    found = opened.family.to_latents(vae, images, torch.zeros_like(latents))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_without_prompts_a_text_network_says_what_it_needs(tmp_path: Path) -> None:
    denoiser = load_model(save_stand_in("sdxl", tmp_path)).denoiser
    with pytest.raises(ValueError, match="needs pooled_text, size, text"):
        denoiser(torch.zeros(1, 4, 8, 8), torch.ones(1, dtype=torch.float64))


def test_half_precision_weights_are_read_where_there_are_no_others(tmp_path: Path) -> None:
    folder = save_stand_in("sd", tmp_path) / "unet"
    before = load_model(tmp_path).denoiser.state_dict()
    weights = {name: weight.half() for name, weight in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    save_file(weights, folder / "diffusion_pytorch_model.fp16.safetensors")
    after = load_model(tmp_path).denoiser.state_dict()
    for name, weight in after.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name].half().float())


HOSTILE = [
    ({"_class_name": "os.system"}, "_class_name = 'os.system': no family of teachers"),
    ({"_class_name": ["pipeline", "Mine"]}, r"_class_name = \['pipeline', 'Mine'\]: no family"),
    ({"_class_name": "KandinskyPipeline"}, "no family of teachers; choose from DDPMPipeline"),
    ({"unet": ["subprocess", "Popen"]}, "unet: names subprocess.Popen, which is not loaded"),
    ({"unet": ["diffusers", "UNet2DModel"]}, "unet: names diffusers.UNet2DModel, which is not loaded"),
    ({"text_encoder": ["planted", "CLIPTextModel"]}, "text_encoder: names planted.CLIPTextModel"),
    ({"tokenizer": ["transformers", "AutoTokenizer"]}, "tokenizer: names transformers.AutoTokenizer"),
    ({"vae": "AutoencoderKL"}, "vae = 'AutoencoderKL': must be a library and a class"),
    ({"unet": [None, None]}, "names no unet"),
]


@pytest.mark.parametrize(("change", "said"), HOSTILE)
def test_a_foreign_class_in_model_index_is_refused_by_name(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    index = save_stand_in("sd", tmp_path) / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(UserError, match=said):
        load_model(tmp_path)


def test_a_part_that_no_family_loads_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_stand_in("sd", tmp_path / "pipeline")
    index = folder / "model_index.json"
    change = {"safety_checker": ["planted", "Checker"], "image_encoder": ["planted", "Encoder"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    (tmp_path / "planted.py").write_text("raise SystemExit('the planted module ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    opened = open_pipeline(folder)
    assert len(opened.conditions(PROMPTS)) == 2
    assert opened.load_denoiser().num_classes == 0
    assert opened.load_vae() is not None


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("model_index.json", "{", "model_index.json: cannot be read"),
        ("model_index.json", "[]", "model_index.json: must be a JSON object"),
        ("unet/config.json", '{"_class_name": "Evil"}', "config.json: _class_name = 'Evil'"),
        ("unet/config.json", '{"_class_name": "UNet2DConditionModel", "sample_size": "x"}', "must be whole numbers"),
        (
            "scheduler/scheduler_config.json",
            '{"_class_name": "FlowMatchEulerDiscreteScheduler"}',
            "no schedule of betas",
        ),
        ("scheduler/scheduler_config.json", '{"beta_schedule": "linear", "beta_start": "x"}', "scheduler_config.json"),
        (
            "scheduler/scheduler_config.json",
            '{"beta_schedule": "linear", "prediction_type": "flow"}',
            "choose from eps",
        ),
    ],
)
def test_damaged_configs_are_refused_by_file(file: str, text: str, said: str, tmp_path: Path) -> None:
    (save_stand_in("sd", tmp_path) / file).write_text(text)
    with pytest.raises(UserError, match=said):
        load_model(tmp_path)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    file = save_stand_in("sd", tmp_path) / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gguf"}}))
    with pytest.raises(UserError, match="quantised weights are not read"):
        load_model(tmp_path)


WEIGHTS = "diffusion_pytorch_model.safetensors"


def rewrite_header(file: Path, change: Any) -> None:
    """Change a safetensors file's header and leave its numbers as they are."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size :])


def outside(header: dict[str, Any]) -> None:
    header["conv_in.bias"]["data_offsets"] = [0, 10**12]


def another_shape(header: dict[str, Any]) -> None:
    header["conv_in.weight"]["shape"] = header["conv_in.weight"]["shape"][::-1]


def another_name(header: dict[str, Any]) -> None:
    header["planted"] = header.pop("conv_in.bias")


@pytest.mark.parametrize("lie", [outside, another_shape, another_name])
def test_a_lying_safetensors_header_is_refused(lie: Any, tmp_path: Path) -> None:
    rewrite_header(save_stand_in("ddpm", tmp_path) / "unet" / WEIGHTS, lie)
    with pytest.raises(UserError, match="unet"):
        load_model(tmp_path)


def test_a_header_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    file = save_stand_in("ddpm", tmp_path) / "unet" / WEIGHTS
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    with pytest.raises(UserError, match="unet: cannot be read"):
        load_model(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    file = save_stand_in("ddpm", tmp_path) / "unet" / WEIGHTS
    file.rename(file.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(UserError, match="unet: cannot be read"):
        load_model(tmp_path)
