"""`sample --teleport`: the noisiest of Heun's steps in closed form, by a Gaussian of the images that a run saw."""

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffdistill.data import AnyData
from diffdistill.data.classes import with_teachers_classes
from diffdistill.diffusion.path import Path
from diffdistill.diffusion.sampling import Heun
from diffdistill.diffusion.teleport import LowRankGaussian, Teleport
from diffdistill.inference.image_generator import ModelImageGenerator
from diffdistill.models.spec import TrainedModel
from diffdistill.settings.schema import UserError, schema
from diffdistill.settings.values import validate
from diffdistill.storage.checkpoint import STATE, read_state

FITTED_ON = 10_000
"""Images at most: what a mean and a covariance of low rank need."""


@schema
class _DataHolder:
    data: AnyData


@dataclass(frozen=True)
class Teleported:
    """What a model's description stands for, with another sampler.  spec: the description."""

    spec: Any
    sampler: Teleport

    def __getattr__(self, name: str) -> Any:
        return getattr(self.spec, name)


def with_teleport(imager: ModelImageGenerator, ratio: float) -> ModelImageGenerator:
    """The same without Heun's levels above a noise-to-signal ratio: where they end, the Gaussian's ODE arrives.

    Raises UserError for other samplers, a ratio that leaves nothing out or no step, and where a run's images are not
    what its network makes.
    """
    model = imager.model
    sampler = model.spec.sampler
    if not isinstance(sampler, Heun):
        raise UserError(f"--teleport {ratio:g}: leaves out Heun's steps, and {model.source} samples by {sampler.name}")
    rest, start = left_of(sampler, model.denoiser.path, ratio)
    made = copy(imager)
    spec = Teleported(model.spec, Teleport(rest, start, fitted(model)))
    made.model, made.num_evaluations = replace(model, spec=spec), rest.num_evaluations  # type: ignore[arg-type]
    return made


def left_of(sampler: Heun, path: Path, ratio: float) -> tuple[Heun, float]:
    """The rest of Heun's grid from its first level at this ratio or below, and that level's ratio."""
    levels = path.ratio(path.karras_times(sampler.num_steps, sampler.rho)[: sampler.num_steps]).tolist()
    left_out = sum(level > ratio * (1 + 1e-9) for level in levels)
    if not 0 < left_out <= sampler.num_steps - 2:
        low, high = levels[-2], levels[0]
        raise UserError(f"--teleport {ratio:g}: leaves out {left_out} steps; take one from {low:.3g}, below {high:.3g}")
    return replace(sampler, num_steps=sampler.num_steps - left_out), levels[left_out]


def fitted(model: TrainedModel) -> LowRankGaussian:
    """Of the images of the run's config, with a mean for each class that the model knows, by its own number.

    Raises UserError where there are none, or their classes are not the model's.
    """
    if model.spec.pipeline is not None or not (model.source / STATE).is_file():
        raise UserError(f"--teleport: needs a run whose images are its network's; {model.source} is none")
    config = read_state(model.source).get("config") or {}
    if "data" not in config:
        raise UserError(f"--teleport: {model.source} does not say which images it was trained on")
    held = validate(_DataHolder, {"data": config["data"]}, origin=f"{model.source}/{STATE}", is_saved=True)
    source, _ = with_teachers_classes(held.data.load(), model.spec.class_names, num_classes=model.spec.num_classes)
    count = min(len(source), FITTED_ON)
    index = torch.arange(count) * len(source) // count  # from all over: folders have one class after another
    images = source.rows(index)
    if images.shape[1:] != model.spec.image_shape:
        raise UserError(f"--teleport: its images are {list(images.shape[1:])}, and not {list(model.spec.image_shape)}")
    labels = source.labels.cpu()[index] if source.labels is not None and model.spec.num_classes else None
    return LowRankGaussian.fit(images.cpu(), labels)
