"""What one family of diffusers pipelines is: how its network, its noise, its prompts and its latents are read."""

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.guidance_rules import LINEAR, AnyGuidanceRule
from diffdistill.diffusion.path import EDM, AnyPath, Prediction, VPDiscrete
from diffdistill.diffusion.sampling import DDIM, AnySampler
from diffdistill.models.teachers.installed import diffusers_class
from diffdistill.networks.diffusers_model import DiffusersNetwork
from diffdistill.settings.schema import UserError

PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
"""diffusers' names of what a network predicts on a schedule of betas, and ours."""


def edm_noise(scheduler: Mapping[str, Any]) -> tuple[EDM, Prediction]:
    """The path of an EDM scheduler, whose preconditioning is the `edm` of Karras et al. 2022, table 1.

    Raises UserError on another prediction.
    """
    kind = scheduler.get("prediction_type", "epsilon")  # so diffusers calls the raw output of that preconditioning
    if kind != "epsilon":
        raise UserError(f"scheduler: prediction_type = {kind!r}: of an EDM scheduler choose epsilon")
    low, high = (float(scheduler.get(name, default)) for name, default in (("sigma_min", 0.002), ("sigma_max", 80.0)))
    return EDM(sigma_min=low, sigma_max=high), "edm"


BUILDING = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError)
"""What diffusers and transformers raise on a config that they cannot build."""

ImageShape = tuple[int, int, int]

StepsArgument = Literal["timesteps", "sigmas", "num_inference_steps"]
"""The argument by which a pipeline is told its steps."""


class Family(ABC):
    """One adapter. It reads only the classes that it names, and none of a pipeline's other parts is loaded."""

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    """The classes of diffusers in model_index.json that are of this family."""
    variants: ClassVar[Mapping[str, str]] = {}
    """Further classes (image to image, other guidance) of the same parts, with the one of `pipelines` that each is read
    as."""
    network: ClassVar[str] = "unet"
    """The part of a pipeline that is the network."""
    network_classes: ClassVar[tuple[str, ...]]
    """The classes of diffusers that the network may be."""
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """The other parts that are loaded, and the classes of diffusers or transformers that each may be: "vae", and
    those that encode prompts. A pipeline may lack them."""
    told: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    """Options of the network that say what it is told, with the values at which this family tells it all."""
    learns_variance: ClassVar[bool] = False
    """Whether the second half of the output may be a variance, which is not used."""
    class_dropout: ClassVar[float] = 0.0
    """The share of its training samples that had no condition; 0 if it was never trained so."""
    stock_pipeline: ClassVar[str | None] = None
    """The class of diffusers that an exported student is loaded by; None for the teacher's own."""
    steps_argument: ClassVar[StepsArgument] = "timesteps"
    plain_call: ClassVar[Mapping[str, Any]] = {"guidance_scale": 1.0}
    """The pipeline's arguments that turn off what a student does without: guidance, and changes to size or prompt."""
    guides_above: ClassVar[float] = 1.0
    """The greatest `guidance_scale` with which the pipeline does not guide."""
    names_size: ClassVar[bool] = False
    """Whether the pipeline must be told `height` and `width`, for it does not take them from its network."""

    default_side: ClassVar[int] = 0
    """Of the latents that such a pipeline makes where it is not told, if its call has no default of its own."""
    fixed_size: ClassVar[str | None] = None
    """Why its images are of one size, its network's; None where they may be of others."""

    config_sizes: ClassVar[Literal["none", "square", "any"]] = "none"
    """Which sizes of images the pipeline takes from the network's `sample_size`, where that changes nothing else."""

    names_sigmas: ClassVar[bool] = False
    """Whether the pipeline itself tells the scheduler even sigmas, for a number of steps."""
    sets_begin: ClassVar[bool] = False
    """Whether it tells it where to begin. The scheduler of a flow looks for that otherwise, and takes the second of two
    equal times."""

    rewrites_prompts: ClassVar[bool] = False
    """Whether it has a language model write each prompt anew, unless `plain_call` turns that off."""

    hands_on_generator: ClassVar[bool] = True
    """Whether the noise between a pipeline's steps is of the generator that it is given, not of torch's own."""

    def call(self, image_size: tuple[int, int]) -> dict[str, Any]:
        """The pipeline's arguments for an exported student.  image_size: height and width in pixels."""
        size = {"height": image_size[0], "width": image_size[1]} if self.names_size else {}
        return {**self.plain_call, **size}

    def told_steps(self, steps: Mapping[str, Any], length: int) -> dict[str, Any]:
        """What the pipeline tells its scheduler's `set_timesteps`.  steps: its own arguments that name steps.
        length: the scheduler's `num_train_timesteps`."""
        count = steps.get("num_inference_steps") if self.names_sigmas else None
        return dict(steps) if count is None else {"sigmas": [1 - index / count for index in range(count)]}

    def later_noise(self, draw: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...]) -> Tensor:
        """The noise between a pipeline's steps, [B, C, H, W], in the layout that it draws it in.

        draw: gives unit noise of a shape.
        """
        return draw(shape)

    def stock_network(self, model: nn.Module) -> nn.Module:
        """A student's model of diffusers as an exported pipeline holds it: what it is always told may be part of it."""
        return model

    def has_stock_pipeline(self, options: Mapping[str, Any]) -> bool:
        """Whether the pipeline gives a network with these options all that it takes."""
        return True

    @property
    def takes_text(self) -> bool:
        """Whether the network is conditioned on encoded prompts."""
        return any(part.startswith("text_encoder") for part in self.parts)

    @property
    def text_parts(self) -> tuple[str, ...]:
        """The parts that encode prompts."""
        return tuple(part for part in self.parts if part.startswith(("text_encoder", "tokenizer")))

    @property
    def sampler(self) -> AnySampler:
        """How the teacher samples unless told otherwise."""
        return DDIM()

    def guidance_rule(self, index: Mapping[str, Any]) -> AnyGuidanceRule:
        """How the pipeline combines its two estimates.  index: its model_index.json.  Raises UserError."""
        return LINEAR

    @abstractmethod
    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> DiffusersNetwork:
        """The model of diffusers as a `Network`."""

    def model_class(self, options: Mapping[str, Any]) -> str:
        """The class of a network with these options, where there are several."""
        return self.network_classes[0]

    def full_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json with the defaults of what it leaves out, as those of earlier versions of diffusers do."""
        arguments = inspect.signature(diffusers_class(self.model_class(options)).__init__).parameters.values()
        defaults = {one.name: one.default for one in arguments if one.default is not one.empty}
        return {**json.loads(json.dumps(defaults)), **options}  # its tuples are JSON's lists

    def build(
        self, options: Mapping[str, Any], image_shape: tuple[int, ...], num_classes: int, class_dropout: float
    ) -> DiffusersNetwork:
        """A new network from its config.json. Raises UserError on what diffusers refuses, and on another shape."""
        kind = diffusers_class(self.model_class(options))
        try:
            model = kind.from_config(dict(options))
        except BUILDING as error:
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"network.options: {kind.__name__}: {said}") from error
        net = self.wrap(model, num_classes, class_dropout)
        channels = net.channels
        if image_shape[0] != channels or any(side % net.resolution_multiple for side in image_shape[1:]):
            wanted = f"{channels} channels and sides that are multiples of {net.resolution_multiple}"
            raise UserError(f"network.options: this network is for {wanted}, not for images {list(image_shape)}")
        return net

    def image_shape(self, options: Mapping[str, Any]) -> ImageShape:
        """[C, H, W] of what the network denoises, from its config.json. Raises UserError."""
        side = options.get("sample_size")
        height, width = side if isinstance(side, (list, tuple)) and len(side) == 2 else (side, side)
        channels = options.get("in_channels")
        if not all(isinstance(n, int) and n > 0 for n in (channels, height, width)):
            raise UserError(f"network: in_channels = {channels!r}, sample_size = {side!r}: must be whole numbers")
        return channels, height, width  # type: ignore[return-value]

    def sized(self, options: Mapping[str, Any], latents: list[int]) -> dict[str, Any]:
        """Options for `image_shape` and `noise` alone, of latents of this height and width. No network is built by
        them: to some, `sample_size` says more."""
        return {**options, "sample_size": latents}

    def most_side(self, options: Mapping[str, Any]) -> int | None:
        """Of latents that the network has positions for; None for any."""
        return None

    def check_index(self, index: Mapping[str, Any], file: FilePath) -> None:
        """Raise UserError on a model_index.json whose pipeline tells the network more than this family does."""

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise UserError, naming the option, on a network that is told more than this family tells it."""
        for name, values in self.told.items():
            if options.get(name) not in values:
                raise UserError(f"{name} = {options.get(name)!r}: a network with other conditions than supported here")
        taken: Any = options.get("in_channels")
        made = options.get("out_channels")
        if None not in (taken, made) and made not in ((taken, 2 * taken) if self.learns_variance else (taken,)):
            raise UserError(
                f"in_channels = {taken!r}, out_channels = {made!r}: a network that also takes an image or a mask "
                "(inpainting, editing), which is not supported"
            )

    def num_classes(self, options: Mapping[str, Any]) -> int:
        """How many classes the network knows; 0 for one that takes none, or text."""
        return 0

    def noise(self, scheduler: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[AnyPath, Prediction]:
        """The path and the prediction, from the scheduler's config and the network's.

        Raises UserError if the scheduler is of another kind.
        """
        if str(scheduler.get("_class_name")).startswith("EDM"):
            return edm_noise(scheduler)
        if not {"beta_schedule", "trained_betas"} & scheduler.keys():
            raise UserError(f"scheduler: {scheduler.get('_class_name')}: has no schedule of betas")
        kind = scheduler.get("prediction_type", "epsilon")
        if kind not in PREDICTIONS:
            raise UserError(f"scheduler: prediction_type = {kind!r}: choose from {', '.join(PREDICTIONS)}")
        return VPDiscrete.from_scheduler(scheduler), PREDICTIONS[kind]

    def vae_factor(self, vae: Mapping[str, Any]) -> int:
        """Pixels for one of the latents, on each side, from the VAE's config.json."""
        return 2 ** (len(vae.get("block_out_channels", ())) - 1)

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        """Prompts as what the network is given, [N, ...] each part.

        pipeline: diffusers' own, with `text_parts` alone, on one device.  image_size: height and width in pixels.
        options: the network's, from its config.json.
        """
        raise NotImplementedError(f"{self.name} takes no text")

    def told_size(self, image_size: tuple[int, int], options: Mapping[str, Any]) -> Tensor | None:
        """`Cond.size` for images of this height and width in pixels, [1, ...]; None where the network is told none."""
        return None

    def encode_empty(self, pipeline: Any, image_size: tuple[int, int], options: Mapping[str, Any]) -> Cond:
        """What the pipeline guides away from, [1, ...] each part."""
        return self.encode(pipeline, [""], image_size, options)

    def to_latents(self, vae: nn.Module, images: Tensor, eps: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] as what the network denoises, [B, C, h, w].

        eps: unit noise for the sample of the VAE's posterior, of the result's shape; zero for its mean.
        """
        mean, std = self.vae_statistics(vae, images)
        found = vae.encode(images).latent_dist  # type: ignore[operator]
        return (found.mean + found.std * eps - mean) / std

    def to_images(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """The inverse: [B, 3, H, W], about in [-1, 1]."""
        mean, std = self.vae_statistics(vae, latents)
        images: Tensor = vae.decode(latents * std + mean, return_dict=False)[0]  # type: ignore[operator]
        return images

    def vae_statistics(self, vae: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation that the network's latents are normalised by, of the VAE's own; [1, C or 1, 1, 1] each."""
        config: Any = vae.config
        mean = like.new_full((1, 1, 1, 1), float(getattr(config, "shift_factor", None) or 0.0))
        return mean, like.new_full((1, 1, 1, 1), 1 / float(config.scaling_factor))


def uncropped_sizes(count: int, image_size: tuple[int, int], like: Tensor) -> Tensor:
    """SDXL's sizes of `count` images as large as they were: [count, 6] int64."""
    return torch.tensor([[*image_size, 0, 0, *image_size]], device=like.device).expand(count, 6)


def channel_statistics(vae: nn.Module, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation of each channel, [1, C, 1, 1], where the VAE's config names both."""
    config: Any = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return None
    return like.new_tensor(mean).reshape(1, -1, 1, 1), like.new_tensor(std).reshape(1, -1, 1, 1)
