"""Stable Diffusion XL: two text encoders, a pooled text, and sizes.  Podell et al. 2023, arXiv:2307.01952."""

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.guidance_rules import LINEAR, AnyGuidanceRule, Rescaled
from diffdistill.models.teachers.families.sd import StableDiffusionUNet, scale_width, told_one
from diffdistill.models.teachers.family import Family, channel_statistics, uncropped_sizes
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import validate


class StableDiffusionXL(Family):
    """size: original height and width, top and left crop, target height and width; none are cropped."""

    name = "sdxl"
    pipelines = ("StableDiffusionXLPipeline",)
    variants: ClassVar = dict.fromkeys(
        (
            *("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline", "StableDiffusionXLPAGPipeline"),
            *("StableDiffusionXLPAGImg2ImgPipeline", "StableDiffusionXLPAGInpaintPipeline"),
        ),
        "StableDiffusionXLPipeline",
    )
    network_classes = ("UNet2DConditionModel",)
    parts: ClassVar = {
        "vae": ("AutoencoderKL",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
    }
    told: ClassVar = {"addition_embed_type": ("text_time",)}
    class_dropout = 0.1
    config_sizes = "square"

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "StableDiffusionXLUNet":
        return StableDiffusionXLUNet(model, accepts=frozenset({"text", "pooled_text", "size"}))

    def check_index(self, index: Mapping[str, Any], file: FilePath) -> None:
        if index.get("requires_aesthetics_score"):
            raise UserError(
                f"{file}: requires_aesthetics_score = true: a refiner, which takes a score and refines the images of "
                "another network; name the base model"
            )

    def check_options(self, options: Mapping[str, Any]) -> None:
        super().check_options(options)
        scale_width(options)

    def stock_network(self, model: nn.Module) -> nn.Module:
        """As Stable Diffusion's."""
        return told_one(model) if model.config.time_cond_proj_dim else model  # type: ignore[union-attr]

    def call(self, image_size: tuple[int, int]) -> dict[str, Any]:
        """Of images that are no squares the pipeline has to be told the size."""
        height, width = image_size
        return super().call(image_size) | ({"height": height, "width": width} if height != width else {})

    def guidance_rule(self, index: Mapping[str, Any]) -> AnyGuidanceRule:
        """Rescaled where model_index.json holds `guidance_rescale`, an argument of the pipeline's call."""
        share = index.get("guidance_rescale", 0.0)
        return validate(Rescaled, {"share": share}, origin="model_index.json: guidance_rescale") if share else LINEAR

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        text, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), device=pipeline.device, do_classifier_free_guidance=False
        )
        return Cond(text=text, pooled_text=pooled, size=uncropped_sizes(len(prompts), image_size, text))

    def encode_empty(self, pipeline: Any, image_size: tuple[int, int], options: Mapping[str, Any]) -> Cond:
        """Zeros where the pipeline's `force_zeros_for_empty_prompt` says so, and else the encoded empty prompt."""
        _, text, _, pooled = pipeline.encode_prompt("", device=pipeline.device, do_classifier_free_guidance=True)
        return Cond(text=text, pooled_text=pooled, size=uncropped_sizes(1, image_size, text))

    def told_size(self, image_size: tuple[int, int], options: Mapping[str, Any]) -> Tensor:
        return uncropped_sizes(1, image_size, torch.empty(0))

    def vae_statistics(self, vae: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
        """Some VAEs of this family name them by channel."""
        mean, std = super().vae_statistics(vae, like)
        named = channel_statistics(vae, like)
        return (mean, std) if named is None else (named[0], std * named[1])


class StableDiffusionXLUNet(StableDiffusionUNet):
    """`UNet2DConditionModel` with the pooled text and the sizes added to its embedding of time."""

    @property
    def embedders(self) -> list[nn.Module]:
        return [self.model.time_embedding, self.model.add_embedding]  # type: ignore[list-item]

    def added(self, cond: Cond) -> dict[str, Tensor]:
        assert cond.pooled_text is not None
        assert cond.size is not None
        return {"text_embeds": cond.pooled_text, "time_ids": cond.size.to(cond.pooled_text.dtype)}
