"""DDPM and DDIM pipelines of one `UNet2DModel`, on pixels.  Ho et al. 2020, arXiv:2006.11239; no VAE, no text."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from diffdistill.models.teachers.family import Family
from diffdistill.networks.diffusers_unet import DiffusersUNet


class DDPM(Family):
    """All class embeddings are taken for classes: pipelines do not say whether one stands for "no class"."""

    name = "ddpm"
    pipelines = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
    network_classes = ("UNet2DModel",)
    learns_variance = True
    stock_pipeline = "DDPMPipeline"  # DDIMPipeline would put a scheduler of its own in the place of any
    steps_argument = "num_inference_steps"
    plain_call: ClassVar = {}
    config_sizes = "any"

    def has_stock_pipeline(self, options: Mapping[str, Any]) -> bool:
        return not self.num_classes(options)

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> DiffusersUNet:
        return DiffusersUNet(model, num_classes, has_null_condition=num_classes > 0 and class_dropout > 0)

    def num_classes(self, options: Mapping[str, Any]) -> int:
        return int(options.get("num_class_embeds") or 0)
