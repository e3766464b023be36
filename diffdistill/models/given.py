"""A teacher that a program gives as an object, by a place that stands where a run's folder would."""

from copy import deepcopy
from pathlib import Path as FilePath
from typing import Any

from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.sampling import DDIM, AnySampler
from diffdistill.models.spec import ModelConfig, ModelSpec, TrainedModel
from diffdistill.networks.given import given, keep
from diffdistill.networks.lora import merge_lora
from diffdistill.settings.schema import UserError

PREFIX = "object:"
_SPECS: dict[str, ModelSpec] = {}


def give_teacher(denoiser: Any, *, image_shape: tuple[int, ...], sampler: AnySampler | None = None) -> str:
    """Keep a Denoiser until this process ends, and return the place by which configs and `load_model` find it.

    image_shape: [C, H, W].  sampler: how images are drawn from it; default DDIM(num_steps=50).
    The same weights have the same place, so that a run can be resumed and its student loaded by a program that gives
    the same again. Runs work on a copy.  Raises UserError for what is no Denoiser, and for one that takes prompts.
    """
    if not isinstance(denoiser, Denoiser):
        raise UserError(
            f"teacher: {type(denoiser).__name__} is not a Denoiser; use dd.as_denoiser(module, path, predicts) first"
        )
    others = sorted(denoiser.net.accepts - {"label"})
    if others or denoiser.conditions is not None or denoiser.runtime.negative is not None:
        raise UserError(
            f"teacher: the network takes {', '.join(others) or 'prompts'}, which an object lacks; name its folder"
        )
    denoiser = merge_lora(denoiser)
    network = keep(denoiser)
    place = f"{PREFIX}{network.key}"
    _SPECS[place] = ModelSpec(
        model=ModelConfig(
            network=network,
            path=denoiser.path,
            predicts=denoiser.predicts,
            sigma_data=denoiser.sigma_data,
            guidance_rule=denoiser.runtime.guidance_rule,
        ),
        image_shape=image_shape,
        num_classes=denoiser.net.num_classes,
        class_dropout=0.1 if denoiser.net.has_null_condition else 0.0,
        sampler=sampler or DDIM(),
    )
    return place


def is_given(place: object) -> bool:
    """Whether a place is an object's, known to this process or not."""
    return str(place).startswith(PREFIX)


def describe_given(place: str | FilePath) -> ModelSpec:
    """What an object's place stands for. Raises UserError where this process has not been given it."""
    if str(place) not in _SPECS:
        raise UserError(
            f"teacher = {str(place)!r}: is an object from a Python program, which is not on the disk; resume from "
            "Python, with dd.Trainer(config, teacher=..., resume=True), or after dd.give_teacher(...)"
        )
    return _SPECS[str(place)]


def load_given(place: str | FilePath) -> TrainedModel:
    """A frozen copy of what was given."""
    spec = describe_given(place)
    denoiser = deepcopy(given(str(place).removeprefix(PREFIX)))
    assert denoiser is not None
    freeze(denoiser)
    return TrainedModel(denoiser, spec, FilePath(str(place)))
