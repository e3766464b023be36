"""Stable Diffusion 3 and 3.5: a rectified flow, two CLIPs and, where there is one, a T5.  Esser et al. 2024,
arXiv:2403.03206.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.path import AnyPath, Prediction
from diffdistill.models.teachers.family import Family
from diffdistill.models.teachers.flow import flow_path
from diffdistill.networks.diffusers_model import DiffusersTransformer

MAX_SHIFT = 1.16  # of this pipeline, where its scheduler does not say


class StableDiffusion3(Family):
    """The text is CLIP's tokens, then T5's, or zeros for them; no mask, as in the pipeline."""

    name = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    variants: ClassVar = dict.fromkeys(
        (
            *("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline", "StableDiffusion3PAGPipeline"),
            "StableDiffusion3PAGImg2ImgPipeline",
        ),
        "StableDiffusion3Pipeline",
    )
    network = "transformer"
    network_classes = ("SD3Transformer2DModel",)
    parts: ClassVar = {
        "vae": ("AutoencoderKL",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_3": ("T5Tokenizer", "T5TokenizerFast"),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "text_encoder_3": ("T5EncoderModel",),
    }
    class_dropout = 0.1
    config_sizes = "square"  # its positions are among its weights
    steps_argument = "sigmas"
    hands_on_generator = False

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "StableDiffusion3Network":
        return StableDiffusion3Network(model)

    def most_side(self, options: Mapping[str, Any]) -> int:
        given = self.full_options(options)
        return int(given["patch_size"] * given["pos_embed_max_size"])

    def noise(self, scheduler: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[AnyPath, Prediction]:
        _, height, width = self.image_shape(options)
        num_tokens = height * width // int(options.get("patch_size", 2)) ** 2
        return flow_path(scheduler, num_tokens, max_shift=MAX_SHIFT), "flow"

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        if pipeline.text_encoder_3 is None:  # then it asks its network how wide T5's zeros are
            width = int(options.get("joint_attention_dim", 4096))
            pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=width))
        text, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), None, None, device=pipeline.device, do_classifier_free_guidance=False
        )
        return Cond(text=text, pooled_text=pooled)


class StableDiffusion3Network(DiffusersTransformer):
    """`SD3Transformer2DModel`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(
            model,
            accepts=frozenset({"text", "pooled_text"}),
            has_null_condition=True,
            resolution_multiple=int(model.config.patch_size),  # type: ignore[union-attr, arg-type]
        )

    @property
    def embedders(self) -> list[nn.Module]:
        return [self.model.time_text_embed]  # type: ignore[list-item]

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B], a thousand times sigma.  Returns [B, C, H, W]."""
        self.require(cond)
        output: Tensor = self.model(
            hidden_states=x,
            timestep=time_input,
            encoder_hidden_states=cond.text,
            pooled_projections=cond.pooled_text,
            return_dict=False,
        )[0]
        return output
