"""PixArt-alpha and PixArt-Sigma: T5's text under a mask, learned variances.  Chen et al. 2023, arXiv:2310.00426; 2024,
arXiv:2403.04692.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.models.teachers.family import Family
from diffdistill.networks.diffusers_model import DiffusersTransformer


class PixArt(Family):
    """size: height and width, for the networks that take them (alpha's for 1024 pixels). The variance half of the
    output is not used. Prompts are not cleaned of links and HTML, which would depend on the packages that are there.
    """

    name = "pixart"
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    variants: ClassVar = {"PixArtSigmaPAGPipeline": "PixArtSigmaPipeline"}
    network = "transformer"
    network_classes = ("PixArtTransformer2DModel", "Transformer2DModel")  # the second: of diffusers before 0.29
    learns_variance = True
    parts: ClassVar = {
        "vae": ("AutoencoderKL",),
        "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
        "text_encoder": ("T5EncoderModel",),
    }
    class_dropout = 0.1
    plain_call: ClassVar = {"guidance_scale": 1.0, "clean_caption": False, "use_resolution_binning": False}

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "PixArtNetwork":
        return PixArtNetwork(model)

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        text, mask, _, _ = pipeline.encode_prompt(list(prompts), False, device=pipeline.device)
        told = self.told_size(image_size, options)
        size = None if told is None else told.to(text.device).expand(len(text), 2)
        return Cond(text=text, text_mask=mask, size=size)

    def told_size(self, image_size: tuple[int, int], options: Mapping[str, Any]) -> Tensor | None:
        return torch.tensor([image_size]) if _takes_size(options) else None


class PixArtNetwork(DiffusersTransformer):
    """`PixArtTransformer2DModel`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(
            model,
            accepts=frozenset({"text", "text_mask"} | ({"size"} if model.use_additional_conditions else set())),
            has_null_condition=True,
            resolution_multiple=int(model.config.patch_size),  # type: ignore[union-attr, arg-type]
        )

    @property
    def embedders(self) -> list[nn.Module]:
        return [self.model.adaln_single.emb]  # type: ignore[union-attr, list-item]

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B] in the schedule's steps.  Returns [B, C, H, W]."""
        self.require(cond)
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if cond.size is not None:
            size = cond.size.to(x.dtype)
            added = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
        output: Tensor = self.model(
            x,
            encoder_hidden_states=cond.text,
            encoder_attention_mask=cond.text_mask,
            timestep=time_input,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]


def _takes_size(options: Mapping[str, Any]) -> bool:
    """diffusers' own rule where the config does not say."""
    said = options.get("use_additional_conditions")
    return bool(options.get("sample_size", 128) == 128 if said is None else said)
