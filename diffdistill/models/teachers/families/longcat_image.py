"""LongCat-Image: a rectified flow on packed latents, Qwen2.5-VL's text.  Meituan 2025; its architecture is diffusers'
`LongCatImageTransformer2DModel`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.guidance_rules import AnyGuidanceRule, Renormalised
from diffdistill.models.teachers.flow_family import FlowFamily, PackedTransformer
from diffdistill.models.teachers.packing import PATCH, pack, positions, unpack

LENGTH = 512  # tokens of each prompt, which are filled up to that many; where the image's positions begin


class LongCatImage(FlowFamily):
    """Guidance keeps the norm of each token's conditional estimate where it would grow. A prompt is taken as it is: the
    pipeline has its text encoder write it anew first, unless it is told `enable_prompt_rewrite=False`. What fills a
    prompt up counts as the prompt does.
    """

    name = "longcat_image"
    pipelines = ("LongCatImagePipeline",)
    network_classes = ("LongCatImageTransformer2DModel",)
    parts: ClassVar = {
        "vae": ("AutoencoderKL",),
        "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
        "text_processor": ("Qwen2VLProcessor", "Qwen2_5_VLProcessor"),  # of the rewriting; its pipeline needs one
    }
    class_dropout = 0.1
    plain_call: ClassVar = {"guidance_scale": 1.0, "enable_prompt_rewrite": False}
    rewrites_prompts = True
    is_packed = True
    sets_begin = False

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "LongCatImageNetwork":
        return LongCatImageNetwork(model, accepts=frozenset({"text"}))

    def guidance_rule(self, index: Mapping[str, Any]) -> AnyGuidanceRule:
        return Renormalised(over="patch", only_shrinks=True)

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        text, _ = pipeline.encode_prompt(list(prompts))
        return Cond(text=text)


class LongCatImageNetwork(PackedTransformer):
    """`LongCatImageTransformer2DModel`."""

    @property
    def embedders(self) -> list[nn.Module]:
        return [self.model.time_embed]  # type: ignore[list-item]

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B], a thousand times sigma.  Returns [B, C, H, W]."""
        self.require(cond)
        assert cond.text is not None
        rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH
        word = torch.arange(cond.text.shape[1], device=x.device, dtype=torch.float32)
        begin = word.new_tensor([1, LENGTH, LENGTH])
        output: Tensor = self.model(
            hidden_states=pack(x),
            timestep=time_input / 1000,
            encoder_hidden_states=cond.text,
            txt_ids=torch.stack([torch.zeros_like(word), word, word], -1),
            img_ids=positions(rows, columns, word) + begin,
            return_dict=False,
        )[0]
        return unpack(output, rows, columns)
