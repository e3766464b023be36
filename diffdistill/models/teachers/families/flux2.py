"""FLUX.2 klein: a rectified flow on latents normalised by a batch norm's statistics, Qwen3's text.  Black Forest Labs
2026; its architecture is diffusers' `Flux2Transformer2DModel`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.path import AnyPath, Prediction
from diffdistill.models.teachers.family import ImageShape
from diffdistill.models.teachers.flow import flow_path
from diffdistill.models.teachers.flow_family import SIDE, FlowFamily
from diffdistill.models.teachers.packing import PATCH, positions
from diffdistill.networks.diffusers_model import DiffusersTransformer
from diffdistill.settings.schema import UserError

NUM_STEPS = 50  # of the pipeline's call, on whose number its shift depends


class Flux2(FlowFamily):
    """Klein's base, with guidance by two calls. Its latents are 2 x 2 patches of the VAE's, of four times as many
    channels. The text is three of Qwen3's layers side by side, without a mask.
    """

    name = "flux2"
    pipelines = ("Flux2KleinPipeline",)
    network_classes = ("Flux2Transformer2DModel",)
    parts: ClassVar = {
        "vae": ("AutoencoderKLFlux2",),
        "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
        "text_encoder": ("Qwen3ForCausalLM",),
    }
    class_dropout = 0.1
    default_side = SIDE // PATCH

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "Flux2Network":
        return Flux2Network(model)

    def check_index(self, index: Mapping[str, Any], file: FilePath) -> None:
        if index.get("is_distilled"):
            raise UserError(
                f"{file}: is_distilled = true: a student already, which takes no guidance; name the base model"
            )

    def image_shape(self, options: Mapping[str, Any]) -> ImageShape:
        return super().image_shape({"sample_size": self.default_side, **options})

    def noise(self, scheduler: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[AnyPath, Prediction]:
        _, height, width = self.image_shape(options)
        return flow_path(scheduler, height * width, mu=_mu(height * width, NUM_STEPS)), "flow"

    def later_noise(self, draw: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...]) -> Tensor:
        batch, channels, height, width = shape
        return draw((batch, height * width, channels)).mT.unflatten(2, (height, width))

    def vae_factor(self, vae: Mapping[str, Any]) -> int:
        return PATCH * super().vae_factor(vae)

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        return Cond(text=pipeline.encode_prompt(list(prompts), pipeline.device)[0])

    def to_latents(self, vae: nn.Module, images: Tensor, eps: Tensor) -> Tensor:
        mean, std = self.vae_statistics(vae, images)
        found = vae.encode(images).latent_dist  # type: ignore[operator]
        return (F.pixel_unshuffle(found.mean + found.std * F.pixel_shuffle(eps, PATCH), PATCH) - mean) / std

    def to_images(self, vae: nn.Module, latents: Tensor) -> Tensor:
        mean, std = self.vae_statistics(vae, latents)
        images: Tensor = vae.decode(F.pixel_shuffle(latents * std + mean, PATCH), return_dict=False)[0]  # type: ignore[operator]
        return images

    def vae_statistics(self, vae: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of its batch norm, which does nothing else."""
        norm: Any = vae.bn
        mean, variance = (part.to(like).reshape(1, -1, 1, 1) for part in (norm.running_mean, norm.running_var))
        return mean, (variance + norm.eps).sqrt()


class Flux2Network(DiffusersTransformer):
    """`Flux2Transformer2DModel`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, accepts=frozenset({"text"}), has_null_condition=True, resolution_multiple=1)

    @property
    def blocks(self) -> list[nn.Module]:
        return [*super().blocks, *self.model.single_transformer_blocks]  # type: ignore[misc]

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B], a thousand times sigma.  Returns [B, C, H, W]."""
        self.require(cond)
        assert cond.text is not None
        order = torch.arange(cond.text.shape[1], device=x.device, dtype=x.dtype)
        output: Tensor = self.model(
            hidden_states=x.flatten(2).mT,
            timestep=time_input / 1000,
            encoder_hidden_states=cond.text,
            txt_ids=F.pad(order[:, None], (3, 0)),  # time, row, column, place in the text
            img_ids=F.pad(positions(x.shape[2], x.shape[3], x), (0, 1)),
            return_dict=False,
        )[0]
        return output.mT.unflatten(2, x.shape[2:])


def _mu(num_tokens: int, num_steps: int) -> float:
    """The pipeline's: linear in the steps, between one line in the tokens for 10 of them and another for 200."""
    of_200 = 0.00016927 * num_tokens + 0.45666666
    of_10 = 8.73809524e-05 * num_tokens + 1.89833333
    return of_200 if num_tokens > 4300 else of_200 + (of_10 - of_200) * (200 - num_steps) / 190
