"""A model in a run's config: its network, its noise levels, and what it predicts."""

from dataclasses import dataclass
from math import prod
from pathlib import Path as FilePath
from typing import Annotated

from pydantic import Field

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.guidance_rules import LINEAR, AnyGuidanceRule
from diffdistill.diffusion.path import EDM, AnyPath, Prediction
from diffdistill.diffusion.router import AnyRouter
from diffdistill.diffusion.sampling import AnySampler
from diffdistill.networks import AnyNetwork
from diffdistill.networks.empty import empty_weights
from diffdistill.networks.image_table import ImageTableConfig
from diffdistill.networks.parameter_limit import limited_parameters
from diffdistill.networks.qat import QuantisedTraining
from diffdistill.settings.limits import MAX_CLASSES, MAX_VALUES
from diffdistill.settings.numbers import Classes, Number, Resolution
from diffdistill.settings.schema import Fraction, Positive, field, schema


@schema
class ModelConfig:
    """A new model. sigma_data: the data's standard deviation, for predicts: edm.

    guidance_rule: how classifier-free guidance combines its two estimates.
    """

    network: AnyNetwork
    path: AnyPath = field(default_factory=EDM)
    predicts: Prediction = "edm"
    sigma_data: Positive = 0.5
    guidance_rule: AnyGuidanceRule = LINEAR

    def __post_init__(self) -> None:
        if isinstance(self.network, ImageTableConfig) and self.predicts != "x0":
            raise ValueError(f"predicts = {self.predicts!r}: an image_table holds images; use x0")


@schema
class ModelSpec:
    """Enough to build a network again: its config, the images it was made for, and how to sample from it."""

    model: ModelConfig
    image_shape: Annotated[tuple[Resolution, ...], Field(max_length=4)]
    num_classes: Classes
    class_dropout: Fraction
    sampler: AnySampler
    classes: Annotated[tuple[Classes, ...], Field(max_length=MAX_CLASSES)] = ()  # that it was trained on; empty for all
    class_names: Annotated[tuple[str, ...], Field(max_length=MAX_CLASSES)] = ()  # by number; empty where nothing says
    pipeline: str | None = None  # diffusers' pipeline that it came from: its VAE, text encoders and scheduler
    base: str | None = None  # the fingerprint of what LoRA's factors stand over, where the run has some
    negative_prompt: str | None = None  # that its attention steers away from
    negative_scale: Number = 0.0
    qat: QuantisedTraining | None = None  # the bits that its weights were rounded to in training
    router: AnyRouter | None = None  # of prompts, between this student and those of other runs
    text_encoder: str | None = None  # the folder of what encodes prompts, where that is no pipeline's

    def __post_init__(self) -> None:
        if prod(self.image_shape) > MAX_VALUES:
            raise ValueError(f"image_shape = {list(self.image_shape)}: more than {MAX_VALUES:,} values an image")

    def build_empty(self) -> Denoiser:
        """The same without weights, for others to be put in: a network is then in memory only once."""
        with empty_weights():
            return self.build()

    def build(self) -> Denoiser:
        """A new, untrained Denoiser. Raises UserError if network and images do not fit, or it is too large."""
        with limited_parameters():
            net = self.model.network.build(self.image_shape, self.num_classes, self.class_dropout)  # type: ignore[arg-type]
        denoiser = Denoiser(net, self.model.path, self.model.predicts, sigma_data=self.model.sigma_data)
        denoiser.run_with(guidance_rule=self.model.guidance_rule)
        return denoiser


@schema
class PlayerKind:
    """What a saved player is beside its network, where it is not as its run's student: one that started as a teacher of
    another kind."""

    predicts: Prediction
    sigma_data: Positive


@dataclass(frozen=True)
class TrainedModel:
    """denoiser: frozen.  spec: what it is.  source: the checkpoint it came from."""

    denoiser: Denoiser
    spec: ModelSpec
    source: FilePath
