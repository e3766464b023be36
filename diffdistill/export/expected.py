"""The images that an exported pipeline should make, from the run's own code: what `verify` compares with."""

from collections.abc import Callable
from pathlib import Path as FilePath

import torch
from torch import Tensor

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.threads import sampling_threads, threads
from diffdistill.export.record import ExportRecord
from diffdistill.export.usage import LATER_SEED, asked_of, draws_by_torch, makes_pictures, usage_code
from diffdistill.export.verify import Check
from diffdistill.models.encoders import encoder_of
from diffdistill.models.spec import TrainedModel
from diffdistill.models.teachers import Pipeline, pipeline_of

COUNT = 2
Layout = Callable[[Callable[[tuple[int, ...]], Tensor], tuple[int, ...]], Tensor]


def check_of(model: TrainedModel, folder: FilePath, record: ExportRecord, *, guidance_scale: float = 1.0) -> Check:
    """That the card's program, run beside the folder, makes the run's images, and its pipeline two more of them.

    model: without LoRA.  guidance_scale: of calls that name none, for a student that takes it as input.
    """
    source = pipeline_of(model.spec)
    is_plain = record.kind == "self-contained" and not (source and source.has_vae)  # not clipped
    cond, by_torch = _condition(model), draws_by_torch(model, record)
    layout = source.family.later_noise if source and record.kind != "self-contained" else None
    several = _sample(model, cond, COUNT, guidance_scale, layout, by_torch=by_torch)
    one = _sample(model, cond[:1], 1, guidance_scale, layout, by_torch=by_torch)
    images = _decoded(source, torch.cat([several, one])) if makes_pictures(model) else torch.cat([several, one])
    return Check(
        folder=folder,
        code=usage_code(model, record, repr(str(folder.resolve()))),
        call={**asked_of(model, COUNT), **record.call, "output_type": "latent" if is_plain else "np"},
        expected=several if is_plain else images[:COUNT],
        shown=images[COUNT],
        num_threads=sampling_threads(model.denoiser, model.spec.image_shape),
    )


def _condition(model: TrainedModel) -> Cond:
    asked = asked_of(model, COUNT)
    if "prompt" in asked:
        encoder = encoder_of(model.spec, "fp32")  # as the folder's own are loaded
        assert encoder is not None
        return encoder.encode(encoder.load("cpu"), asked["prompt"])
    return Cond(label=torch.tensor(asked["class_labels"])) if "class_labels" in asked else NO_COND


@torch.no_grad()
def _decoded(source: Pipeline | None, images: Tensor) -> Tensor:
    """[B, H, W, C] in [0, 1]."""
    if source is not None and source.has_vae:
        images = source.family.to_images(source.load_vae(), images)
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@torch.no_grad()
def _sample(
    model: TrainedModel, cond: Cond, count: int, scale: float, layout: Layout | None, *, by_torch: bool
) -> Tensor:
    """By the generators of `reload`.  layout: of the noise between steps.  by_torch: whether it is of torch's own."""
    shape, generator = (count, *model.spec.image_shape), torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    later = torch.Generator().manual_seed(LATER_SEED) if by_torch else generator

    def draw(wanted: tuple[int, ...]) -> Tensor:
        return torch.randn(wanted, generator=later)

    with threads(sampling_threads(model.denoiser, model.spec.image_shape)):
        return model.spec.sampler(
            model.denoiser,
            noise,
            cond,
            guidance=scale,
            fresh_noise=lambda step: layout(draw, shape) if layout else draw(shape),
        )
