"""Stable Diffusion 1.x and 2.x, which predict eps or v.  Rombach et al. 2022, arXiv:2112.10752."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.models.teachers.family import Family
from diffdistill.networks.diffusers_model import DiffusersUNetBlocks
from diffdistill.settings.schema import UserError


class StableDiffusion(Family):
    """The text is CLIP's last hidden state, padding included and without a mask, as in the pipeline.

    A network that was distilled to be told its guidance scale (`time_cond_proj_dim`, as LCM's) is told it here too, in
    one call: Luo et al. 2023, arXiv:2310.04378.
    """

    name = "sd"
    pipelines = ("StableDiffusionPipeline",)
    variants: ClassVar = dict.fromkeys(
        (
            *("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionPAGPipeline"),
            *("StableDiffusionPAGImg2ImgPipeline", "StableDiffusionPAGInpaintPipeline"),
            *("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
        ),
        "StableDiffusionPipeline",
    )
    network_classes = ("UNet2DConditionModel",)
    parts: ClassVar = {
        "vae": ("AutoencoderKL",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "text_encoder": ("CLIPTextModel",),
    }
    told: ClassVar = {"addition_embed_type": (None, "text")}
    class_dropout = 0.1
    config_sizes = "any"

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "StableDiffusionUNet":
        return StableDiffusionUNet(model, accepts=frozenset({"text"}))

    def check_options(self, options: Mapping[str, Any]) -> None:
        super().check_options(options)
        scale_width(options)

    def stock_network(self, model: nn.Module) -> nn.Module:
        """Without the input for guidance, of which a student is always told 1."""
        return told_one(model) if model.config.time_cond_proj_dim else model  # type: ignore[union-attr]

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        text, _ = pipeline.encode_prompt(list(prompts), pipeline.device, 1, False)
        return Cond(text=text)


class StableDiffusionUNet(DiffusersUNetBlocks):
    """`UNet2DConditionModel` with cross-attention to the text."""

    def __init__(self, model: nn.Module, accepts: frozenset[str]) -> None:
        width = scale_width(model.config)  # type: ignore[arg-type]
        super().__init__(
            model,
            accepts=accepts | ({"guidance_input"} if width else set()),
            has_null_condition=not width,
            resolution_multiple=1,  # on its way up it takes the sizes from its way down
        )
        self.scale_width = width

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B] in the schedule's steps.  Returns [B, C, H, W]."""
        self.require(cond)
        output: Tensor = self.model(
            x,
            time_input,
            encoder_hidden_states=cond.text,
            timestep_cond=None if cond.guidance_input is None else embed_scale(cond.guidance_input, self.scale_width),
            added_cond_kwargs=self.added(cond),
            return_dict=False,
        )[0]
        return output

    def added(self, cond: Cond) -> dict[str, Tensor] | None:
        """What the model takes beside text and time."""
        return None


def scale_width(options: Mapping[str, Any]) -> int:
    """Of the embedding of a guidance scale, from the network's config; 0 for a network that is not told it.

    Raises UserError for one that holds no two frequencies.
    """
    width = options.get("time_cond_proj_dim") or 0
    if not isinstance(width, int) or (width and width < 4):
        raise UserError(f"time_cond_proj_dim = {width!r}: must be a whole number of at least 4")
    return width


def embed_scale(scale: Tensor, width: int) -> Tensor:
    """A guidance scale [B] as sines and cosines of a thousand times what it is beyond 1, [B, width].  As the pipelines'
    `get_guidance_scale_embedding`."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=scale.device, dtype=scale.dtype) * -(math.log(10000) / (half - 1)))
    angle = 1000 * (scale - 1)[:, None] * frequency
    return nn.functional.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, width % 2))


@torch.no_grad()
def told_one(model: Any) -> nn.Module:
    """The same network for guidance 1: what that adds to the embedding of time, is always added."""
    embedding, first = model.time_embedding, model.time_embedding.linear_1
    scale = embed_scale(torch.ones(1, device=first.weight.device), model.config.time_cond_proj_dim)
    told = first.weight @ embedding.cond_proj(scale.to(first.weight.dtype))[0]
    with torch.device("meta"):
        made: nn.Module = type(model).from_config({**model.config, "time_cond_proj_dim": None})
    weights = {
        name: weight for name, weight in model.state_dict().items() if not name.startswith("time_embedding.cond_proj.")
    }
    weights["time_embedding.linear_1.bias"] = first.bias + told
    made.load_state_dict(weights, assign=True)
    return made
