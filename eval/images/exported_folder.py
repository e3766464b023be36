"""Exported folders that diffusers' own classes do not load, as images to judge: a LoRA file over its base pipeline, and
a folder with code of its own, which runs only where the user trusts it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.guidance.policies import Guidance
from diffdistill.diffusion.sampling import FreshNoise
from diffdistill.eval.images.encoder_and_vae import EncoderAndVAE
from diffdistill.eval.images.generate import SampledImages
from diffdistill.eval.images.places import SamplingOptions, count_parameters, sampled_images
from diffdistill.eval.protocols.protocol import Protocol
from diffdistill.eval.records.hashes import hash_weights
from diffdistill.eval.records.record import ModelRecord
from diffdistill.export.card import licence_in
from diffdistill.export.record import ExportRecord, read_record
from diffdistill.exported.image_generators import load_exported, load_own_code
from diffdistill.settings.schema import UserError


def record_of(place: FilePath) -> ExportRecord | None:
    """The record of an exported folder that `open_diffusers` does not open; None for anything else."""
    record = read_record(place)
    return None if record is None or record.kind == "stock" else record


def open_exported(place: FilePath, protocol: Protocol, options: SamplingOptions, device: torch.device) -> SampledImages:
    """The images of a folder that has such a record, with the sampler that it was exported with. Raises UserError."""
    record = record_of(place)
    assert record is not None
    if options.ema:
        raise UserError(f"--ema {options.ema}: {place} is an exported folder, which has one set of weights")
    if record.kind != "self-contained":
        model = load_exported(str(place), record)
        made = sampled_images(model, hash_weights(model.denoiser), protocol, options, device)
        licence = licence_in(place).get("license") or made.model.licence
        return replace(made, model=replace(made.model, licence=licence))
    if options.sampler is not None:
        raise UserError(f"--sampler: {place} is sampled by its own code, as it was exported; evaluate the run instead")
    if not isinstance(options.guidance, int | float):
        raise UserError(f"--guidance: {place} is sampled by its own code, which takes a number")
    own = load_own_code(str(place), trusts_code=options.trusts_code, device=device)
    if own.model.sampler.num_evaluations != record.sampler.num_evaluations:
        raise UserError(
            f"{place}: its code samples in {own.model.sampler.num_evaluations} NFE, and its record "
            f"says {record.sampler.num_evaluations}; export the run again"
        )
    around = _around(place, own, options.captions)
    return SampledImages(
        denoiser=own.model._denoiser(None),
        sampler=record.sampler,
        own_sampler=OwnSampler(own, record.sampler.num_evaluations),
        protocol=protocol,
        image_shape=tuple(own.model.image_shape),
        around=around,
        classes=record.classes,
        class_names=record.class_names,
        wanted=options.class_names,
        guidance=options.guidance,
        model=ModelRecord(
            source=str(place),
            sha256=hash_weights(own.model),
            parameters=count_parameters(own.model),
            around_sha256={**(around.sha256 if around else {}), "code": _code_sha256(place)},
            licence=licence_in(place).get("license"),
        ),
    )


@dataclass(frozen=True)
class OwnSampler:
    """The sampler of a folder's own code, around the folder's own model; we give it the noise."""

    pipeline: Any
    num_evaluations: int

    def __call__(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: Guidance = 1.0,
        fresh_noise: FreshNoise | None = None,
    ) -> Tensor:
        """denoiser: not looked at.  cond: of a model that takes text the prompts, encoded by the folder's code."""
        model = self.pipeline.model
        told = (torch.arange(len(noise), device=noise.device), cond) if model.takes_text else (cond.label, None)
        made: Tensor = model(noise, told[0], conditions=told[1], guidance_scale=guidance, fresh_noise=fresh_noise)
        return made


@dataclass(frozen=True)
class OwnParts(EncoderAndVAE):
    """Text encoders and VAE of a folder with code of its own."""

    own: Any = None

    def image_shape(self, made: tuple[int, ...]) -> tuple[int, ...]:
        return whole_shape(self.own)

    def images(self, made: Tensor) -> Tensor:
        images: Tensor = made if self.own.vae is None else self.own.model.source.decode(self.own.vae, made).float()
        return images


def _around(place: FilePath, own: Any, captions: Sequence[str] | None) -> OwnParts | None:
    if own.model.takes_text and captions is None:
        raise UserError(f"{place}: takes captions; choose a protocol with captions (coco2014-fid30k, or your own)")
    parts = {
        name: part for name, part in own.components.items() if name != "model" and isinstance(part, torch.nn.Module)
    }
    if not own.model.takes_text and own.vae is None:
        return None
    hashes = {name: hash_weights(part) for name, part in parts.items()}

    def encode(index: Tensor) -> Any:
        assert captions is not None
        return own.model.source.encode(own.components, [captions[number] for number in index.tolist()])

    taken = encode if own.model.takes_text else None
    return OwnParts(len(captions or ()), taken, None, own.vae, parts, hashes, own)


def whole_shape(own: Any) -> tuple[int, ...]:
    """[C, H, W] of the images that a folder's own code makes, behind its VAE if it has one."""
    return tuple(own.model.image_shape) if own.vae is None else (3, *own.model.source.image_size)


def _code_sha256(place: FilePath) -> str:
    """Of all code in a folder, which decides the images as its weights do."""
    digest = hashlib.sha256()
    for file in sorted(place.rglob("*.py")):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
