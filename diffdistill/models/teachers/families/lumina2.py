"""Lumina-Image 2.0: a rectified flow by one stream of text and image, Gemma's text.  Qin et al. 2025,
arXiv:2503.21758.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.guidance_rules import AnyGuidanceRule, Renormalised
from diffdistill.models.teachers.flow import reversed_time
from diffdistill.models.teachers.flow_family import FlowFamily, RefinedTransformer
from diffdistill.models.teachers.packing import PATCH, trimmed


class Lumina2(FlowFamily):
    """Guidance keeps the norm of each row of a channel, and goes through all steps, as the pipeline's call by default.
    Prompts stand behind the pipeline's own instruction to Gemma, and the empty prompt, which it guides away from,
    stands alone.
    """

    name = "lumina2"
    pipelines = ("Lumina2Pipeline",)
    variants: ClassVar = {"Lumina2Text2ImgPipeline": "Lumina2Pipeline"}  # its name in old folders
    network_classes = ("Lumina2Transformer2DModel",)
    parts: ClassVar = {
        "vae": ("AutoencoderKL",),
        "tokenizer": ("GemmaTokenizer", "GemmaTokenizerFast"),
        "text_encoder": ("Gemma2Model",),
    }
    class_dropout = 0.1

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "Lumina2Network":
        return Lumina2Network(model)

    def guidance_rule(self, index: Mapping[str, Any]) -> AnyGuidanceRule:
        return Renormalised(over="row")

    def most_side(self, options: Mapping[str, Any]) -> int:
        return PATCH * int(min(self.full_options(options)["axes_lens"][1:]))

    def num_tokens(self, options: Mapping[str, Any]) -> int:
        """The pipeline takes the second side of [B, C, H, W] for it."""
        return self.image_shape(options)[0]

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        text, mask, _, _ = pipeline.encode_prompt(list(prompts), False, device=pipeline.device)
        return Cond(text=text, text_mask=mask)

    def encode_empty(self, pipeline: Any, image_size: tuple[int, int], options: Mapping[str, Any]) -> Cond:
        _, _, text, mask = pipeline.encode_prompt("", True, device=pipeline.device)
        return Cond(text=text, text_mask=mask)


class Lumina2Network(RefinedTransformer):
    """`Lumina2Transformer2DModel`."""

    cuts_text = True

    def image_tokens(self, tokens: Tensor, count: int, cond: Cond) -> Tensor:
        """Behind as many of the text as its mask counts."""
        assert cond.text_mask is not None
        first = cond.text_mask.sum(1)
        places = first[:, None] + torch.arange(count, device=first.device)
        return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B], a thousand times sigma.  Returns [B, C, H, W]."""
        self.require(cond)
        text, mask = trimmed(cond)
        output: Tensor = self.model(x, reversed_time(time_input), text, mask, return_dict=False)[0]
        return -output
