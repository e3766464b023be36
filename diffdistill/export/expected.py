"""The images that an exported pipeline should make, from the run's own code: what `verify` compares with."""

from pathlib import Path as FilePath

import torch
from torch import Tensor

from diffdistill.denoiser import NO_COND, Cond
from diffdistill.export.stock import StockFolder
from diffdistill.export.verify import Check
from diffdistill.model import TrainedModel
from diffdistill.path import Flow

PROMPTS = ("a red square", "two dogs")
COUNT = 2


def check_self_contained(model: TrainedModel, folder: FilePath, *, guidance_scale: float) -> Check:
    """An exported folder with code of its own: images in [-1, 1], not clipped."""
    labels = _labels(model)
    call = {"output_type": "latent", "batch_size": COUNT} | ({"class_labels": labels} if labels else {})
    cond = model.denoiser.class_cond(torch.tensor(labels))
    return Check(folder, call, _sample(model, cond, guidance_scale))


@torch.no_grad()
def check_stock(model: TrainedModel, folder: FilePath, stock: StockFolder) -> Check:
    """An exported folder of diffusers' classes: images in [0, 1], behind the VAE where there is one."""
    source, call, cond = stock.source, {**stock.call, "output_type": "np"}, NO_COND
    if source.family.takes_text:
        cond = source.conditions(PROMPTS).rows(torch.arange(COUNT))
        call["prompt"] = list(PROMPTS)
    elif model.spec.num_classes:
        cond = Cond(label=torch.tensor(_labels(model)))
        call["class_labels"] = _labels(model)
    else:
        call["batch_size"] = COUNT
    images = _sample(model, cond, 1.0)
    if source.class_of("vae"):
        images = source.family.to_images(source.load_vae(), images)
    return Check(folder, call, (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))


def _labels(model: TrainedModel) -> list[int]:
    """Two of the classes that the model was trained on; none for a model without."""
    classes = model.spec.classes or tuple(range(model.spec.num_classes))
    return [classes[number % len(classes)] for number in range(COUNT)] if classes else []


@torch.no_grad()
def _sample(model: TrainedModel, cond: Cond, guidance_scale: float) -> Tensor:
    """By the generators that `reload` hands to a pipeline."""
    shape, generator = (COUNT, *model.spec.image_shape), torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    # Pipelines of flows do not hand their generator on to the scheduler.
    later = torch.Generator().manual_seed(1) if isinstance(model.denoiser.path, Flow) else generator
    return model.spec.sampler(
        model.denoiser,
        noise,
        cond,
        guidance=guidance_scale,
        fresh_noise=lambda step: torch.randn(shape, generator=later),
    )
