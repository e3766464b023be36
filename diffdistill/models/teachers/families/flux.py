"""Flux: a rectified flow on packed latents; its `dev` network takes the guidance scale as input.  Black Forest Labs
2024; its architecture is diffusers' `FluxTransformer2DModel`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.models.teachers.flow_family import FlowFamily, PackedTransformer
from diffdistill.models.teachers.packing import PATCH, pack, positions, unpack
from diffdistill.networks.taps import fastgen_transformer


class Flux(FlowFamily):
    """The text is T5's, without a mask; the pooled text CLIP's. Guidance is what the network is told: no second call is
    made, and at scale 1 it is told 1. A network without that input (`schnell`) knows no guidance.
    """

    name = "flux"
    pipelines = ("FluxPipeline",)
    variants: ClassVar = dict.fromkeys(("FluxImg2ImgPipeline", "FluxInpaintPipeline"), "FluxPipeline")
    network_classes = ("FluxTransformer2DModel",)
    parts: ClassVar = {
        "vae": ("AutoencoderKL",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast"),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("T5EncoderModel",),
    }
    is_packed = True

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "FluxNetwork":
        return FluxNetwork(model)

    def stock_network(self, model: nn.Module) -> nn.Module:
        """Without the input for guidance, of which a student is always told 1."""
        return _told_one(model) if model.config.guidance_embeds else model  # type: ignore[union-attr]

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        text, pooled, _ = pipeline.encode_prompt(list(prompts), None, device=pipeline.device)
        return Cond(text=text, pooled_text=pooled)


class FluxNetwork(PackedTransformer):
    """`FluxTransformer2DModel`."""

    def __init__(self, model: nn.Module) -> None:
        is_told = model.config.guidance_embeds  # type: ignore[union-attr]
        accepts = frozenset({"text", "pooled_text"} | ({"guidance_input"} if is_told else set()))
        super().__init__(model, accepts=accepts, has_null_condition=False)

    @property
    def embedders(self) -> list[nn.Module]:
        return [self.model.time_text_embed]  # type: ignore[list-item]

    @property
    def fastgen_taps(self) -> tuple[int, ...]:
        return fastgen_transformer(len(self.blocks), published=57)

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B], a thousand times sigma.  Returns [B, C, H, W]."""
        self.require(cond)
        assert cond.text is not None
        rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH
        output: Tensor = self.model(
            hidden_states=pack(x),
            timestep=time_input / 1000,
            guidance=cond.guidance_input,
            encoder_hidden_states=cond.text,
            pooled_projections=cond.pooled_text,
            txt_ids=x.new_zeros(cond.text.shape[1], 3),
            img_ids=positions(rows, columns, x),
            return_dict=False,
        )[0]
        return unpack(output, rows, columns)


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
