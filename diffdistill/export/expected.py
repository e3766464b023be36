"""The images that an exported pipeline should make, from the run's own code: what `verify` compares with."""

from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.export.lora_files import DIFFUSERS_FILE, KOHYA_FILE
from diffdistill.export.stock import StockFolder
from diffdistill.export.verify import Check
from diffdistill.models.encoders import encoder_of
from diffdistill.models.spec import TrainedModel
from diffdistill.models.teachers import Pipeline, pipeline_of

PROMPTS = ("a red square", "two dogs")
COUNT = 2


def check_self_contained(model: TrainedModel, folder: FilePath, *, guidance_scale: float) -> Check:
    """An exported folder with code of its own."""
    source = pipeline_of(model.spec)
    cond, call = _asked(model)
    images = _sample(model, cond, guidance_scale, hands_on_generator=True)
    if source is None or not source.has_vae:
        return Check(folder, {**call, "output_type": "latent"}, images)  # the network's own, not clipped
    return Check(folder, {**call, "output_type": "np"}, _decoded(source, images))


def check_stock(model: TrainedModel, folder: FilePath, stock: StockFolder) -> Check:
    """An exported folder of diffusers' classes: images in [0, 1], behind the VAE where there is one."""
    cond, call = _asked(model)
    call |= {**stock.call, "output_type": "np"}
    images = _sample(model, cond, 1.0, hands_on_generator=stock.source.family.hands_on_generator)
    return Check(folder, call, _decoded(stock.source, images))


def check_lora(model: TrainedModel, folder: FilePath, stock: StockFolder, *, is_kohya: bool) -> Check:
    """LoRA's file over the teacher's own pipeline.  model: with the factors merged."""
    check = check_stock(model, stock.source.folder, stock)
    file = KOHYA_FILE if is_kohya else DIFFUSERS_FILE
    return Check(check.folder, check.call, check.expected, lora=(folder, file))


def _asked(model: TrainedModel) -> tuple[Cond, dict[str, Any]]:
    """The condition, and how a pipeline is asked for the same: two prompts, two classes, or two images."""
    encoder = encoder_of(model.spec)
    if encoder is not None:
        return encoder.encode(encoder.load("cpu"), PROMPTS), {"prompt": list(PROMPTS)}
    if not model.spec.num_classes:
        return NO_COND, {"batch_size": COUNT}
    classes = model.spec.classes or tuple(range(model.spec.num_classes))
    labels = [classes[0], classes[-1]]  # of different students, where there are several
    return Cond(label=torch.tensor(labels)), {"class_labels": labels}


@torch.no_grad()
def _decoded(source: Pipeline | None, images: Tensor) -> Tensor:
    """[B, H, W, C] in [0, 1]."""
    if source is not None and source.has_vae:
        images = source.family.to_images(source.load_vae(), images)
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@torch.no_grad()
def _sample(model: TrainedModel, cond: Cond, guidance_scale: float, *, hands_on_generator: bool) -> Tensor:
    """By the generators of `reload`: one is given to the pipeline, torch's own is seeded with 1."""
    shape, generator = (COUNT, *model.spec.image_shape), torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    later = generator if hands_on_generator else torch.Generator().manual_seed(1)
    return model.spec.sampler(
        model.denoiser,
        noise,
        cond,
        guidance=guidance_scale,
        fresh_noise=lambda step: torch.randn(shape, generator=later),
    )
