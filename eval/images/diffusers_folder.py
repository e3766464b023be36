"""Diffusers pipelines, on disk or by their name on the hub, as images to judge. No pickles are read."""

from pathlib import Path as FilePath

import torch

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.eval.images.encoder_and_vae import open_around
from diffdistill.eval.images.generate import SampledImages
from diffdistill.eval.images.places import SamplingOptions, count_parameters, licence_of
from diffdistill.eval.protocols.protocol import Protocol
from diffdistill.eval.records.hashes import hash_weights
from diffdistill.eval.records.record import ModelRecord
from diffdistill.export.record import read_record
from diffdistill.models.teachers import Pipeline, is_pipeline, open_pipeline
from diffdistill.models.teachers.pipeline import INDEX, read_json
from diffdistill.networks.diffusers_model import DiffusersNetwork
from diffdistill.settings.schema import UserError


def is_diffusers(place: FilePath) -> bool:
    """Whether a place is a diffusers pipeline's folder or one of its networks', or may be its name on the hub."""
    if is_pipeline(place):
        return True
    config = place / "config.json"
    return config.exists() and str(read_json(config).get("_class_name", "")).endswith("Model")


def open_diffusers(
    place: FilePath, protocol: Protocol, options: SamplingOptions, device: torch.device
) -> SampledImages:
    """The images of a diffusers pipeline, behind its VAE and from captions where it has them; if no sampler is named by
    that of the record of a folder that was exported here, or by 50 steps of DDIM.

    Raises UserError for anything else.
    """
    record = read_record(place)
    if options.ema:
        raise UserError(f"--ema {options.ema}: {place} is a pipeline, which has one set of weights")
    if place.exists() and not (place / INDEX).exists():
        raise UserError(f"{place}: a network without its scheduler; name the folder of the pipeline, with {INDEX}")
    pipeline = open_pipeline(place)
    denoiser = _knowing_no_class(pipeline, protocol.labels.num_classes).to(device)
    around = open_around(pipeline.spec, denoiser, options.captions, device, origin=str(place))
    return SampledImages(
        denoiser=denoiser,
        sampler=options.sampler or (record.sampler if record else pipeline.family.sampler),
        protocol=protocol,
        image_shape=pipeline.spec.image_shape,
        around=around,
        classes=record.classes if record else (),
        class_names=pipeline.spec.class_names,
        wanted=options.class_names,
        guidance=options.guidance,
        model=ModelRecord(
            source=str(place),
            sha256=hash_weights(denoiser),
            parameters=count_parameters(denoiser),
            around_sha256=dict(around.sha256) if around else {},
            licence=licence_of(str(place)),
        ),
    )


def _knowing_no_class(pipeline: Pipeline, num_classes: int) -> Denoiser:
    """The pipeline's denoiser; if it has one class more than the protocol, that one is "no class": a network that was
    trained here has one embedding more."""
    denoiser = pipeline.load_denoiser()
    if 0 < num_classes == denoiser.num_classes - 1 and not pipeline.spec.class_names:
        assert isinstance(denoiser.net, DiffusersNetwork)
        return denoiser.with_net(pipeline.family.wrap(denoiser.net.model, num_classes, class_dropout=0.1))
    return denoiser
