"""A workflow for ComfyUI, in the format of its API, that makes a student's images: beside files of LoRA's factors.

ComfyUI works on x / alpha, so that a time is its ratio sigma / alpha, and the step to the next ratio is `lcm` with
fresh noise, or `euler` without. It starts from noise of the first ratio, below its schedule's last; from there on it
gives the network unit noise. Its own schedule is Stable Diffusion's, whose networks predict eps.
"""

import json
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import torch

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import VPDiscrete
from diffdistill.diffusion.sampling import DDIM, AnySampler, FewSteps
from diffdistill.models.spec import TrainedModel
from diffdistill.models.teachers import Pipeline
from diffdistill.storage.atomic import write_text_atomically

WORKFLOW = "comfyui_workflow.json"
FAMILIES = ("sd", "sdxl")
NEAR = 0.01  # of the first noise's scale, where the student's start is not quite ComfyUI's
PROMPT = "a photo of a red fox in the snow"

Nodes = dict[str, dict[str, Any]]


def write_workflow(model: TrainedModel, source: Pipeline, folder: FilePath, file: str) -> bool:
    """Write the workflow beside a file of factors, where ComfyUI can make the student's steps.

    model: without LoRA.  file: the name of the factors'.  Returns whether it was written.
    """
    found = steps_of(model.denoiser, model.spec.sampler) if source.family.name in FAMILIES else None
    if found is None:
        return False
    sigmas, sampler = found
    nodes = workflow(
        sigmas,
        sampler,
        size=source.image_size,
        lora=file,
        base=FilePath(source.place).name,
        is_xl=source.family.name == "sdxl",
    )
    write_text_atomically(folder / WORKFLOW, json.dumps(nodes, indent=1) + "\n")
    return True


def steps_of(denoiser: Denoiser, sampler: AnySampler) -> tuple[list[float], str] | None:
    """The ratios of a student's steps, the last 0, and ComfyUI's name of its sampler; None where it has none."""
    path = denoiser.path
    if not isinstance(path, VPDiscrete) or denoiser.predicts != "eps" or not _is_stable_diffusions(path):
        return None
    if not isinstance(sampler, (FewSteps, DDIM)) or getattr(sampler, "later_noise", None) == "fixed":
        return None
    times = sampler.times(path)
    starts_unit = isinstance(sampler, FewSteps) and sampler.init_noise == "unit"
    is_last = float(times[0]) >= path.t_max
    if starts_unit != is_last and 1 - float(path.sigma(times[:1])) > NEAR:
        return None
    is_fresh = isinstance(sampler, FewSteps) and sampler.later_noise == "fresh" and len(times) > 1
    return [*path.ratio(times).tolist(), 0.0], "lcm" if is_fresh else "euler"


def workflow(sigmas: list[float], sampler: str, *, size: tuple[int, int], lora: str, base: str, is_xl: bool) -> Nodes:
    """The nodes by number: each names its class, and its inputs, those from other nodes by number and output.

    size: height and width in pixels.  base: what the checkpoint under the factors is called.
    """
    height, width = size
    listed = ", ".join(f"{sigma:.6f}" for sigma in sigmas)  # its reader knows no exponents
    return {
        "1": _node("CheckpointLoaderSimple", f"the checkpoint of {base}", ckpt_name=f"{base}.safetensors"),
        "2": _node("LoraLoaderModelOnly", "the student", model=["1", 0], lora_name=lora, strength_model=1.0),
        "3": _text(PROMPT, size, is_xl=is_xl),
        "4": _text("", size, is_xl=is_xl),
        "5": _node("EmptyLatentImage", "the size", width=width, height=height, batch_size=1),
        "6": _node("ManualSigmas", "the student's steps", sigmas=listed),
        "7": _node("KSamplerSelect", "what is between them", sampler_name=sampler),
        "8": _node(
            "SamplerCustom",
            "cfg 1: guidance is in the student",
            model=["2", 0],
            add_noise=True,
            noise_seed=0,
            cfg=1.0,
            positive=["3", 0],
            negative=["4", 0],
            sampler=["7", 0],
            sigmas=["6", 0],
            latent_image=["5", 0],
        ),
        "9": _node("VAEDecode", "pixels", samples=["8", 0], vae=["1", 2]),
        "10": _node("SaveImage", "the image", images=["9", 0], filename_prefix="student"),
    }


def _text(prompt: str, size: tuple[int, int], *, is_xl: bool) -> dict[str, Any]:
    """A prompt; Stable Diffusion XL is told the size with it."""
    if not is_xl:
        return _node("CLIPTextEncode", "the prompt", clip=["1", 1], text=prompt)
    height, width = size
    told = {"width": width, "height": height, "crop_w": 0, "crop_h": 0, "target_width": width, "target_height": height}
    return _node("CLIPTextEncodeSDXL", "the prompt", clip=["1", 1], text_g=prompt, text_l=prompt, **told)


def _node(kind: str, title: str, **inputs: Any) -> dict[str, Any]:
    meta: Mapping[str, str] = {"title": title}
    return {"class_type": kind, "inputs": inputs, "_meta": meta}


def _is_stable_diffusions(path: VPDiscrete) -> bool:
    """Whether the noise schedule is the one that ComfyUI takes these checkpoints to have."""
    own = VPDiscrete(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    if path.t_max != own.t_max:
        return False
    t = torch.arange(int(own.t_max) + 1, dtype=torch.float64)
    return bool(torch.allclose(path.ratio(t), own.ratio(t), rtol=1e-4))
