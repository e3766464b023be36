"""Models on disk that can be judged: runs and checkpoints. Diffusers' folders are in diffusers_folder.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import torch

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.guidance.policies import AnyPolicy
from diffdistill.diffusion.sampling import AnySampler
from diffdistill.eval.images.encoder_and_vae import open_around
from diffdistill.eval.images.generate import SampledImages
from diffdistill.eval.protocols.protocol import Protocol
from diffdistill.eval.records.hashes import hash_weights
from diffdistill.eval.records.record import Cost, ModelRecord
from diffdistill.models.load import ROUTER, load_model
from diffdistill.models.spec import TrainedModel
from diffdistill.settings.reading import read_json
from diffdistill.settings.schema import schema
from diffdistill.settings.values import parse_yaml, validate
from diffdistill.storage.checkpoint import MANIFEST, STATE
from diffdistill.training.reports.curves import read_reports
from diffdistill.training.reports.log import METRICS


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a model is sampled.  sampler: instead of its own.  ema: one of the run's `more_emas` by its name.
    captions: one an image, where the protocol has some.  class_names: of the classes that the protocol draws, where
    it or its reference says them.  trusts_code: whether code of an exported folder's own may run."""

    guidance: float | AnyPolicy = 1.0
    sampler: AnySampler | None = None
    ema: str | None = None
    captions: Sequence[str] | None = None
    class_names: tuple[str, ...] = ()
    trusts_code: bool = False


@schema
class _SamplerHolder:
    sampler: AnySampler


def parse_sampler(text: str) -> AnySampler:
    """A sampler as YAML, as in "{name: ddim, num_steps: 10}". Raises UserError."""
    return validate(_SamplerHolder, {"sampler": parse_yaml(text, origin="--sampler")}, origin="--sampler").sampler


def is_run(place: FilePath) -> bool:
    """Whether a folder is a run's, a checkpoint's, or that of several students."""
    return (place / "checkpoints").is_dir() or any((place / name).exists() for name in (STATE, MANIFEST, ROUTER))


def open_run(place: FilePath, protocol: Protocol, options: SamplingOptions, device: torch.device) -> SampledImages:
    """The images of a run's newest checkpoint, of one checkpoint, or of several students. Raises UserError."""
    model = load_model(place, ema=options.ema)
    file = model.source / STATE
    state = read_json(file) if file.exists() else None  # several students have none
    if state and not state["config"]:
        state = None  # imported, not trained here
    sha256 = weights_sha256(model.source, options.ema) if state else hash_weights(model.denoiser)
    made = sampled_images(model, sha256, protocol, options, device, place=place)
    if not state:
        return made
    return replace(
        made,
        model=replace(made.model, teacher=state.get("teacher")),
        method=state["config"]["method"]["name"],
        seed=state["config"]["train"]["seed"],
        cost=_cost(model, state),
    )


def sampled_images(
    model: TrainedModel,
    sha256: str,
    protocol: Protocol,
    options: SamplingOptions,
    device: torch.device,
    *,
    place: FilePath | None = None,
) -> SampledImages:
    """The images of a model.  sha256: of its weights.  place: what the user called it; default its source."""
    place = place or model.source
    denoiser = model.denoiser.to(device)
    around = open_around(model.spec, denoiser, options.captions, device, origin=str(place))
    return SampledImages(
        denoiser=denoiser,
        around=around,
        sampler=options.sampler or model.spec.sampler,
        protocol=protocol,
        image_shape=model.spec.image_shape,
        classes=model.spec.classes,
        class_names=model.spec.class_names,
        wanted=options.class_names,
        guidance=options.guidance,
        model=ModelRecord(
            source=str(place),
            sha256=sha256,
            parameters=count_parameters(denoiser),
            around_sha256=dict(around.sha256) if around else {},
            licence=licence_of(model.spec.pipeline),
        ),
    )


def weights_sha256(checkpoint: FilePath, ema: str | None = None) -> str:
    """Of the file of weights that is sampled from, which the checkpoint's manifest vouches for."""
    files: Mapping[str, str] = read_json(checkpoint / MANIFEST)["files"]
    wanted = f"ema-{ema}.safetensors" if ema else "ema.safetensors"
    return files.get(wanted) or files["players.safetensors"]


def licence_of(pipeline: str | None) -> str | None:
    """What the card of a diffusers pipeline names as its licence; None where it names none."""
    from diffdistill.export.card import teacher_licence

    return teacher_licence(pipeline).get("license")


def count_parameters(denoiser: Denoiser) -> int:
    """Of what runs when it samples."""
    return sum(parameter.numel() for parameter in denoiser.parameters())


def _cost(model: TrainedModel, state: Mapping[str, Any]) -> Cost:
    """Steps and images of the checkpoint, and the seconds from the run's reports: the clock's and the CPU's."""
    step, run = int(state["step"]), model.source.resolve().parent.parent
    return Cost(
        train_steps=step,
        train_images=step * int(state["config"]["train"]["global_batch_size"]),
        train_seconds=seconds_until(run, step),
        train_cpu_seconds=seconds_until(run, step, clock="cpu_seconds"),
    )


def seconds_until(run: FilePath, step: int, *, clock: str = "seconds") -> float | None:
    """From a run's reports until `step`, evaluations while training included; None if they do not say.

    clock: seconds, or cpu_seconds, of all threads of the process and with what was prepared before the first step.
    Both start anew when a run is resumed.
    """
    total = last = 0.0
    for report in read_reports(run / METRICS):
        if report["step"] <= step and clock in report:
            total += report[clock] - (last if report[clock] >= last else 0)
            last = report[clock]
    return round(total, 3) or None
