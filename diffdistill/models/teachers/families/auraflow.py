"""AuraFlow: a rectified flow, UMT5's text beside a few learned tokens.  Fal 2024; its architecture is diffusers'
`AuraFlowTransformer2DModel`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.models.teachers.family import ImageShape
from diffdistill.models.teachers.flow_family import SIDE, FlowFamily
from diffdistill.networks.diffusers_model import DiffusersTransformer


class AuraFlow(FlowFamily):
    """The text has the pipeline's 256 tokens; those behind a prompt are zeros, which attention sees."""

    name = "auraflow"
    pipelines = ("AuraFlowPipeline",)
    network_classes = ("AuraFlowTransformer2DModel",)
    parts: ClassVar = {
        "vae": ("AutoencoderKL",),
        "tokenizer": ("LlamaTokenizer", "LlamaTokenizerFast", "T5Tokenizer", "T5TokenizerFast"),
        "text_encoder": ("UMT5EncoderModel",),
    }
    class_dropout = 0.1
    names_sigmas = False

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "AuraFlowNetwork":
        return AuraFlowNetwork(model)

    def image_shape(self, options: Mapping[str, Any]) -> ImageShape:
        """The pipeline's 1024 pixels, or as many as the network has positions for; its `sample_size` is not asked."""
        is_asked = isinstance(options.get("sample_size"), list)  # see `sized`
        sized = {} if is_asked else {"sample_size": min(SIDE, self.most_side(options))}
        return super().image_shape({**options, **sized})

    def most_side(self, options: Mapping[str, Any]) -> int:
        given = self.full_options(options)
        return int(given["patch_size"] * math.isqrt(given["pos_embed_max_size"]))

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        text, *_ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, device=pipeline.device)
        return Cond(text=text)


class AuraFlowNetwork(DiffusersTransformer):
    """`AuraFlowTransformer2DModel`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(
            model,
            accepts=frozenset({"text"}),
            has_null_condition=True,
            resolution_multiple=int(model.config.patch_size),  # type: ignore[union-attr, arg-type]
        )

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.model.joint_transformer_blocks, *self.model.single_transformer_blocks]  # type: ignore[misc]

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B], a thousand times sigma.  Returns [B, C, H, W]."""
        self.require(cond)
        output: Tensor = self.model(x, encoder_hidden_states=cond.text, timestep=time_input / 1000, return_dict=False)[
            0
        ]
        return output
