"""Stable Diffusion 1.x and 2.x, which predict eps or v.  Rombach et al. 2022, arXiv:2112.10752."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.models.teachers.family import Family
from diffdistill.networks.diffusers_model import DiffusersUNetBlocks


class StableDiffusion(Family):
    """The text is CLIP's last hidden state, padding included and without a mask, as in the pipeline."""

    name = "sd"
    pipelines = ("StableDiffusionPipeline",)
    network_classes = ("UNet2DConditionModel",)
    parts: ClassVar = {
        "vae": ("AutoencoderKL",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "text_encoder": ("CLIPTextModel",),
    }
    unread = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
    class_dropout = 0.1

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "StableDiffusionUNet":
        return StableDiffusionUNet(model, accepts=frozenset({"text"}))

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        text, _ = pipeline.encode_prompt(list(prompts), pipeline.device, 1, False)
        return Cond(text=text)


class StableDiffusionUNet(DiffusersUNetBlocks):
    """`UNet2DConditionModel` with cross-attention to the text."""

    def __init__(self, model: nn.Module, accepts: frozenset[str]) -> None:
        super().__init__(
            model,
            accepts=accepts,
            has_null_condition=True,
            resolution_multiple=1,  # on its way up it takes the sizes from its way down
        )

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B] in the schedule's steps.  Returns [B, C, H, W]."""
        self.require(cond)
        output: Tensor = self.model(
            x, time_input, encoder_hidden_states=cond.text, added_cond_kwargs=self.added(cond), return_dict=False
        )[0]
        return output

    def added(self, cond: Cond) -> dict[str, Tensor] | None:
        """What the model takes beside text and time."""
        return None
