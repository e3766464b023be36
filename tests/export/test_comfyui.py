"""The workflow for ComfyUI: nodes and inputs that its classes have, and steps that are the student's.

ComfyUI itself is not at hand. What its classes take and give is written here from its nodes (`nodes.py`,
`comfy_extras`), and its arithmetic for networks that predict eps (`comfy.model_sampling.EPS`, samplers `euler` and
`lcm`) is done here again.
"""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.stand_ins import save_stand_in
from torch import Tensor

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.sampling import DDIM, TCD, AnySampler, FewSteps
from diffdistill.export.comfyui import WORKFLOW, steps_of, workflow, write_workflow
from diffdistill.models.load import load_model
from diffdistill.models.teachers import open_pipeline

SIZE = {"width": int, "height": int, "crop_w": int, "crop_h": int, "target_width": int, "target_height": int}
NODES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ({"ckpt_name": str}, ("MODEL", "CLIP", "VAE")),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": str, "strength_model": float}, ("MODEL",)),
    "CLIPTextEncode": ({"clip": "CLIP", "text": str}, ("CONDITIONING",)),
    "CLIPTextEncodeSDXL": ({"clip": "CLIP", **SIZE, "text_g": str, "text_l": str}, ("CONDITIONING",)),
    "EmptyLatentImage": ({"width": int, "height": int, "batch_size": int}, ("LATENT",)),
    "ManualSigmas": ({"sigmas": str}, ("SIGMAS",)),
    "KSamplerSelect": ({"sampler_name": str}, ("SAMPLER",)),
    "SamplerCustom": (
        {
            **{"model": "MODEL", "add_noise": bool, "noise_seed": int, "cfg": float, "positive": "CONDITIONING"},
            **{"negative": "CONDITIONING", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        },
        ("LATENT", "LATENT"),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": str}, ()),
}
"""What a class takes, by name, and what it gives."""


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    place = save_stand_in("sd", tmp_path_factory.mktemp("sd"))
    made = load_model(place).denoiser
    made.run_with(conditions=open_pipeline(place).conditions(["a red fox"]))
    return made


@torch.no_grad()
def comfyui(denoiser: Denoiser, sigmas: list[float], sampler: str, noise: Tensor, fresh: list[Tensor]) -> Tensor:
    """What its SamplerCustom makes of them: x is in units of the signal."""
    path, cond = denoiser.path, denoiser.class_cond(torch.zeros(len(noise), dtype=torch.long))
    last = float(path.ratio(torch.tensor(path.t_max, dtype=torch.float64)))
    is_max = sigmas[0] > last * (1 - 1e-5)
    x = noise * ((1 + sigmas[0] ** 2) ** 0.5 if is_max else sigmas[0])
    for sigma, following in pairwise(sigmas):
        t = path.time_of_ratio(torch.full((len(x),), sigma, dtype=torch.float64)).round()
        denoised = denoiser(x / (1 + sigma**2) ** 0.5, t, cond)
        if sampler == "lcm":
            x = denoised + following * (fresh.pop(0) if following else 0.0)
        else:
            x = x + (following - sigma) * (x - denoised) / sigma
    return x


STUDENTS: list[tuple[AnySampler, str]] = [
    (FewSteps(init_ratio=2.5), "euler"),
    (FewSteps(init_ratio=100.0, init_noise="unit"), "euler"),
    (FewSteps(init_ratio=100.0, init_noise="unit", later_ratios=(5.0, 2.0, 0.8)), "lcm"),
    (FewSteps(init_ratio=2.5, later_ratios=(1.0,), later_noise="ddim"), "euler"),
]


@pytest.mark.parametrize(("sampler", "name"), STUDENTS)
def test_its_steps_are_the_students(denoiser: Denoiser, sampler: AnySampler, name: str) -> None:
    found = steps_of(denoiser, sampler)
    assert found is not None
    sigmas, called = found
    assert called == name
    rng = torch.Generator().manual_seed(0)
    noise, *fresh = (torch.randn(2, 4, 8, 8, generator=rng) for _ in range(4))
    given = iter(fresh)
    cond = denoiser.class_cond(torch.zeros(2, dtype=torch.long))
    with torch.no_grad():
        own = sampler(denoiser, noise, cond, fresh_noise=lambda *_: next(given))
    listed = [float(f"{sigma:.6f}") for sigma in sigmas]
    torch.testing.assert_close(comfyui(denoiser, listed, called, noise, list(fresh)), own, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "sampler",
    [
        FewSteps(init_ratio=2.5, init_noise="unit"),  # it would give the network sigma_t times the noise
        FewSteps(init_ratio=2.5, later_ratios=(1.0,), later_noise="fixed"),
        TCD(num_steps=2),
    ],
)
def test_where_it_has_no_such_steps_there_is_no_workflow(denoiser: Denoiser, sampler: AnySampler) -> None:
    assert steps_of(denoiser, sampler) is None


def test_other_schedules_and_predictions_have_none(tmp_path: Path) -> None:
    v = load_model(save_stand_in("sd", tmp_path / "v", prediction_type="v_prediction")).denoiser
    assert steps_of(v, DDIM(num_steps=2)) is None
    pixels = load_model(save_stand_in("ddpm", tmp_path / "ddpm")).denoiser
    assert steps_of(pixels, DDIM(num_steps=2)) is None


@pytest.mark.parametrize("is_xl", [False, True])
def test_every_input_is_one_that_its_class_takes(is_xl: bool) -> None:
    nodes = workflow([14.6, 0.0], "euler", size=(512, 768), lora="a.safetensors", base="sd", is_xl=is_xl)
    for node in nodes.values():
        takes, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == takes.keys()
        for name, value in node["inputs"].items():
            if isinstance(takes[name], str):
                origin, output = value
                assert NODES[nodes[origin]["class_type"]][1][output] == takes[name]
            else:
                assert type(value) is takes[name]
    assert (nodes["5"]["inputs"]["width"], nodes["5"]["inputs"]["height"]) == (768, 512)
    assert nodes["6"]["inputs"]["sigmas"] == "14.600000, 0.000000"


def test_it_is_written_beside_the_factors(denoiser: Denoiser, tmp_path: Path) -> None:
    source = open_pipeline(save_stand_in("sd", tmp_path / "base"))
    model: Any = SimpleNamespace(denoiser=denoiser, spec=SimpleNamespace(sampler=STUDENTS[0][0]))
    assert write_workflow(model, source, tmp_path, "kohya_lora_weights.safetensors")
    nodes = json.loads((tmp_path / WORKFLOW).read_text())
    assert nodes["2"]["inputs"]["lora_name"] == "kohya_lora_weights.safetensors"
    assert nodes["5"]["inputs"]["width"] == 16
    assert nodes["1"]["inputs"]["ckpt_name"] == "base.safetensors"
