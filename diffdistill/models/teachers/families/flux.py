"""Flux: a rectified flow on packed latents; its `dev` network takes the guidance scale as input.  Black Forest Labs
2024; its architecture is diffusers' `FluxTransformer2DModel`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.path import AnyPath, Prediction
from diffdistill.models.teachers.family import Family, ImageShape
from diffdistill.models.teachers.flow import flow_path
from diffdistill.networks.diffusers_model import DiffusersTransformer

PATCH = 2  # sides of the latents' patches that become one token, and 4 times as many channels
SIDE = 128  # of the pipeline's latents; the network names none


class Flux(Family):
    """The text is T5's, without a mask; the pooled text CLIP's. Guidance is what the network is told: no second call is
    made, and at scale 1 it is told 1. A network without that input (`schnell`) knows no guidance.
    """

    name = "flux"
    pipelines = ("FluxPipeline",)
    variants: ClassVar = dict.fromkeys(("FluxImg2ImgPipeline", "FluxInpaintPipeline"), "FluxPipeline")
    network = "transformer"
    network_classes = ("FluxTransformer2DModel",)
    parts: ClassVar = {
        "vae": ("AutoencoderKL",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast"),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("T5EncoderModel",),
    }
    steps_argument = "sigmas"
    hands_on_generator = False
    names_size = True
    names_sigmas = True
    default_side = SIDE

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "FluxNetwork":
        return FluxNetwork(model)

    def image_shape(self, options: Mapping[str, Any]) -> ImageShape:
        """Of the pipeline's latents, unless the config has a `sample_size` after all."""
        channels = int(options.get("in_channels", 64)) // PATCH**2
        return super().image_shape({"sample_size": SIDE, **options, "in_channels": channels})

    def noise(self, scheduler: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[AnyPath, Prediction]:
        _, height, width = self.image_shape(options)
        return flow_path(scheduler, height * width // PATCH**2), "flow"

    def later_noise(self, draw: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...]) -> Tensor:
        batch, channels, height, width = shape
        rows, columns = height // PATCH, width // PATCH
        return _unpack(draw((batch, rows * columns, channels * PATCH**2)), rows, columns)

    def stock_network(self, model: nn.Module) -> nn.Module:
        """Without the input for guidance, of which a student is always told 1."""
        return _told_one(model) if model.config.guidance_embeds else model  # type: ignore[union-attr]

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        text, pooled, _ = pipeline.encode_prompt(list(prompts), None, device=pipeline.device)
        return Cond(text=text, pooled_text=pooled)


class FluxNetwork(DiffusersTransformer):
    """`FluxTransformer2DModel`."""

    def __init__(self, model: nn.Module) -> None:
        is_told = model.config.guidance_embeds  # type: ignore[union-attr]
        super().__init__(
            model,
            accepts=frozenset({"text", "pooled_text"} | ({"guidance_input"} if is_told else set())),
            has_null_condition=False,
            resolution_multiple=PATCH,
        )

    @property
    def channels(self) -> int:
        return super().channels // PATCH**2

    @property
    def patch(self) -> int:
        return PATCH

    @property
    def blocks(self) -> list[nn.Module]:
        return [*super().blocks, *self.model.single_transformer_blocks]  # type: ignore[misc]

    @property
    def embedders(self) -> list[nn.Module]:
        return [self.model.time_text_embed]  # type: ignore[list-item]

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B], a thousand times sigma.  Returns [B, C, H, W]."""
        self.require(cond)
        assert cond.text is not None
        rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH
        output: Tensor = self.model(
            hidden_states=_pack(x),
            timestep=time_input / 1000,
            guidance=cond.guidance_input,
            encoder_hidden_states=cond.text,
            pooled_projections=cond.pooled_text,
            txt_ids=x.new_zeros(cond.text.shape[1], 3),
            img_ids=_positions(rows, columns, x),
            return_dict=False,
        )[0]
        return _unpack(output, rows, columns)


@torch.no_grad()
def _told_one(model: Any) -> nn.Module:
    """The same network for guidance 1: what that adds to the embeddings of time and text, is always added."""
    embedders = model.time_text_embed
    told = embedders.guidance_embedder(embedders.time_proj(torch.full((1,), 1000.0)).to(model.dtype))[0]
    with torch.device("meta"):
        made: nn.Module = type(model).from_config({**model.config, "guidance_embeds": False})
    weights = {name: weight for name, weight in model.state_dict().items() if ".guidance_embedder." not in name}
    weights["time_text_embed.text_embedder.linear_2.bias"] = embedders.text_embedder.linear_2.bias + told
    made.load_state_dict(weights, assign=True)
    return made


def _pack(x: Tensor) -> Tensor:
    """[B, C, H, W] as tokens [B, H/2 W/2, 4 C]."""
    patches = x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [B, C, h, 2, w, 2]
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `_pack`."""
    patches = tokens.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (rows, columns))  # [B, h, w, C, 2, 2]
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _positions(rows: int, columns: int, like: Tensor) -> Tensor:
    """Zero, row and column of each token, [N, 3]."""
    row, column = torch.meshgrid(
        torch.arange(rows, device=like.device), torch.arange(columns, device=like.device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1).to(like.dtype)
