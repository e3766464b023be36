"""Diffusers pipelines on disk that are one UNet2DModel and a schedule of betas, as denoisers. No pickles are read."""

import json
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import torch

from diffdistill.denoiser import Denoiser, freeze
from diffdistill.eval.generate import SampledImages
from diffdistill.eval.places import SamplingOptions, count_parameters, hash_weights
from diffdistill.eval.protocol import Protocol
from diffdistill.eval.records import ModelRecord
from diffdistill.path import VPDiscrete
from diffdistill.sampling import DDIM
from diffdistill.schema import UserError

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
"""diffusers' names of what a network predicts, and ours."""


def is_diffusers(place: FilePath) -> bool:
    """Whether a folder is a diffusers pipeline's or one of its networks'."""
    return (place / "model_index.json").exists() or _class_name(place / "config.json").endswith("Model")


def open_diffusers(
    place: FilePath, protocol: Protocol, options: SamplingOptions, device: torch.device
) -> SampledImages:
    """The images of a diffusers pipeline with a UNet2DModel and a schedule of betas; by 50 steps of DDIM if no
    sampler is named. Raises UserError for anything else."""
    network, scheduler = _parts(place)
    denoiser = freeze(_denoiser(place, network, scheduler, protocol.labels.num_classes)).to(device)
    assert isinstance(denoiser, Denoiser)
    config: Mapping[str, Any] = denoiser.net.model.config  # type: ignore[union-attr, assignment]
    side = config["sample_size"]
    height, width = (side, side) if isinstance(side, int) else side
    return SampledImages(
        denoiser=denoiser,
        sampler=options.sampler or DDIM(),
        protocol=protocol,
        image_shape=(config["in_channels"], height, width),
        guidance=options.guidance,
        model=ModelRecord(source=str(place), sha256=hash_weights(denoiser), parameters=count_parameters(denoiser)),
    )


def _parts(place: FilePath) -> tuple[FilePath, FilePath]:
    """The folders of a pipeline's network and scheduler."""
    index = _read_json(place / "model_index.json") if (place / "model_index.json").exists() else {}
    network = (index.get("unet") or [None, _class_name(place / "config.json")])[1]
    if network != "UNet2DModel":
        what = index.get("_class_name") or network
        raise UserError(
            f"{place}: a diffusers {what}: only pipelines with a UNet2DModel are read; for others give a "
            "folder of their images"
        )
    if "scheduler" not in index:
        raise UserError(f"{place}: a network without its scheduler; give the pipeline's folder, with model_index.json")
    return place / "unet", place / "scheduler" / "scheduler_config.json"


def _denoiser(place: FilePath, network: FilePath, scheduler: FilePath, num_classes: int) -> Denoiser:
    from diffusers import UNet2DModel

    from diffdistill.networks.diffusers_unet import DiffusersUNet

    try:
        model = UNet2DModel.from_pretrained(str(network), use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"{network}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    if model.config.out_channels != model.config.in_channels:
        raise UserError(
            f"{network}: predicts variances too (out_channels = {model.config.out_channels}); "
            "such networks are not read"
        )
    settings = _read_json(scheduler)
    kind = settings.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise UserError(f"{scheduler}: prediction_type = {kind!r}: choose from {', '.join(PREDICTIONS)}")
    embedded = model.config.num_class_embeds or 0
    # A network trained here has one embedding more, for "no class".
    is_droppable = 0 < num_classes == embedded - 1
    net = DiffusersUNet(model, num_classes if is_droppable else embedded, knows_unconditional=is_droppable)
    return Denoiser(net, VPDiscrete.from_scheduler(settings), PREDICTIONS[kind])  # type: ignore[arg-type]


def _class_name(file: FilePath) -> str:
    return str(_read_json(file).get("_class_name", "")) if file.exists() else ""


def _read_json(file: FilePath) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: must be a JSON object")
    return found
