"""Z-Image: a rectified flow by one stream of image and text, Qwen3's text.  Cai et al. 2025, arXiv:2511.22699."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.models.teachers.flow import reversed_time
from diffdistill.models.teachers.flow_family import FlowFamily, RefinedTransformer
from diffdistill.models.teachers.packing import PATCH, padded, texts_of

LENGTH = 512  # tokens of a prompt at most, the default of the pipeline's call


class ZImage(FlowFamily):
    """The pipeline's guidance_scale is ours less 1: it adds that much of the difference to the conditional estimate,
    and 0 turns guidance off. Prompts stand in the tokenizer's chat template, the empty one too.
    """

    name = "z_image"
    pipelines = ("ZImagePipeline",)
    variants: ClassVar = dict.fromkeys(("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"), "ZImagePipeline")
    network_classes = ("ZImageTransformer2DModel",)
    parts: ClassVar = {
        "vae": ("AutoencoderKL",),
        "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
        "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    }
    class_dropout = 0.1
    plain_call: ClassVar = {"guidance_scale": 0.0}
    guides_above = 0.0

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "ZImageNetwork":
        return ZImageNetwork(model)

    def most_side(self, options: Mapping[str, Any]) -> int:
        return PATCH * int(min(self.full_options(options)["axes_lens"][1:]))

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        texts, _ = pipeline.encode_prompt(list(prompts), pipeline.device, do_classifier_free_guidance=False)
        return padded(texts, LENGTH)


class ZImageNetwork(RefinedTransformer):
    """`ZImageTransformer2DModel`."""

    cuts_text = True

    @property
    def embedders(self) -> list[nn.Module]:
        return [self.model.t_embedder]  # type: ignore[list-item]

    def image_tokens(self, tokens: Tensor, count: int, cond: Cond) -> Tensor:
        """The image's come first, then what fills them up to a multiple of 32."""
        return tokens[:, :count]

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B], a thousand times sigma.  Returns [B, C, H, W]."""
        self.require(cond)
        images = list(x.unsqueeze(2))  # of one frame each
        outputs = self.model(images, reversed_time(time_input), texts_of(cond), return_dict=False)[0]
        return -torch.stack(outputs).squeeze(2)
