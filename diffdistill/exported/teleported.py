"""`sample --teleport`: the noisiest of Heun's steps in closed form, by a Gaussian of the images that a run saw."""

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from diffdistill.data import AnyData
from diffdistill.data.classes import with_teachers_classes
from diffdistill.data.gaussian import gaussian_of
from diffdistill.diffusion.teleport import LowRankGaussian, Teleport, rest_of_grid
from diffdistill.inference.image_generator import ModelImageGenerator
from diffdistill.models.spec import TrainedModel
from diffdistill.settings.schema import UserError, schema
from diffdistill.settings.values import validate
from diffdistill.storage.checkpoint import STATE, read_state


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
    rest, start = rest_of_grid(model.spec.sampler, model.denoiser.path, ratio, "--teleport")
    made = copy(imager)
    spec = Teleported(model.spec, Teleport(rest, start, fitted(model)))
    made.model, made.num_evaluations = replace(model, spec=spec), rest.num_evaluations  # type: ignore[arg-type]
    return made


def fitted(model: TrainedModel) -> LowRankGaussian:
    """Of the images of the run's config, with a mean for each class that the model knows, by its own number.

    Raises UserError where there are none, or their classes are not the model's.
    """
    if model.spec.pipeline is not None or not (model.source / STATE).is_file():
        raise UserError(
            f"--teleport: needs a run whose network makes pixels or latents of its images; {model.source} does not"
        )
    config = read_state(model.source).get("config") or {}
    if "data" not in config:
        raise UserError(f"--teleport: {model.source} does not say which images it was trained on")
    held = validate(_DataHolder, {"data": config["data"]}, origin=f"{model.source}/{STATE}", is_saved=True)
    source, _ = with_teachers_classes(held.data.load(), model.spec.class_names, num_classes=model.spec.num_classes)
    shape = tuple(source.image_shape)
    if shape != model.spec.image_shape:
        raise UserError(f"--teleport: its images are {list(shape)}, and not {list(model.spec.image_shape)}")
    return gaussian_of(source, by_class=bool(model.spec.num_classes))
