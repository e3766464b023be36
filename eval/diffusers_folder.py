"""Diffusers pipelines on disk whose network makes pixels, as images to judge. No pickles are read."""

from pathlib import Path as FilePath

import torch

from diffdistill.denoiser import Denoiser
from diffdistill.eval.generate import SampledImages
from diffdistill.eval.places import SamplingOptions, count_parameters, hash_weights
from diffdistill.eval.protocol import Protocol
from diffdistill.eval.records import ModelRecord
from diffdistill.families import Pipeline, open_pipeline
from diffdistill.families.pipeline import INDEX, read_json
from diffdistill.schema import UserError


def is_diffusers(place: FilePath) -> bool:
    """Whether a folder is a diffusers pipeline's or one of its networks'."""
    if (place / INDEX).exists():
        return True
    config = place / "config.json"
    return config.exists() and str(read_json(config).get("_class_name", "")).endswith("Model")


def open_diffusers(
    place: FilePath, protocol: Protocol, options: SamplingOptions, device: torch.device
) -> SampledImages:
    """The images of a diffusers pipeline on pixels; by 50 steps of DDIM if no sampler is named.

    Raises UserError for anything else.
    """
    if not (place / INDEX).exists():
        raise UserError(f"{place}: a network without its scheduler; give the pipeline's folder, with {INDEX}")
    pipeline = open_pipeline(place)
    if pipeline.class_of("vae"):
        what = pipeline.index["_class_name"]
        raise UserError(f"{place}: a diffusers {what}: its network makes latents; give a folder of its images")
    denoiser = _knowing_no_class(pipeline, protocol.labels.num_classes).to(device)
    return SampledImages(
        denoiser=denoiser,
        sampler=options.sampler or pipeline.family.sampler,
        protocol=protocol,
        image_shape=pipeline.spec.image_shape,
        guidance=options.guidance,
        model=ModelRecord(source=str(place), sha256=hash_weights(denoiser), parameters=count_parameters(denoiser)),
    )


def _knowing_no_class(pipeline: Pipeline, num_classes: int) -> Denoiser:
    """The pipeline's denoiser; if it has one class more than the protocol, that one is "no class": a network that was
    trained here has one embedding more."""
    denoiser = pipeline.load_denoiser()
    if 0 < num_classes == denoiser.num_classes - 1:
        denoiser.net = pipeline.family.wrap(denoiser.net.model, num_classes, class_dropout=0.1)  # type: ignore[arg-type]
    return denoiser
