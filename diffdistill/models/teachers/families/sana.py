"""Sana: a rectified flow on the latents of a deep-compression autoencoder, Gemma's text.  Xie et al. 2024,
arXiv:2410.10629.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.path import AnyPath, Prediction
from diffdistill.models.teachers.family import Family
from diffdistill.models.teachers.flow import flow_path
from diffdistill.networks.diffusers_model import DiffusersTransformer


class Sana(Family):
    """Prompts stand behind the pipeline's own instruction to Gemma, and the empty prompt, which it guides away from,
    stands alone. Its DPM-Solver tells the network sigma rounded down to a thousandth; here it is told sigma.
    """

    name = "sana"
    pipelines = ("SanaPipeline",)
    variants: ClassVar = {"SanaPAGPipeline": "SanaPipeline"}
    network = "transformer"
    network_classes = ("SanaTransformer2DModel",)
    learns_variance = True
    parts: ClassVar = {
        "vae": ("AutoencoderDC",),
        "tokenizer": ("GemmaTokenizer", "GemmaTokenizerFast"),
        "text_encoder": ("Gemma2Model",),
    }
    class_dropout = 0.1
    steps_argument = "sigmas"
    plain_call: ClassVar = {"guidance_scale": 1.0, "use_resolution_binning": False}
    names_size = True

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "SanaNetwork":
        return SanaNetwork(model)

    def noise(self, scheduler: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[AnyPath, Prediction]:
        _, height, width = self.image_shape(options)
        return flow_path(scheduler, height * width // int(options.get("patch_size", 1)) ** 2), "flow"

    def vae_factor(self, vae: Mapping[str, Any]) -> int:
        return 2 ** (len(vae.get("encoder_block_out_channels", ())) - 1)

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        return _encode(pipeline, prompts, _instruction(pipeline))

    def encode_empty(self, pipeline: Any, image_size: tuple[int, int], options: Mapping[str, Any]) -> Cond:
        return _encode(pipeline, [""], None)

    def to_latents(self, vae: nn.Module, images: Tensor, eps: Tensor) -> Tensor:
        """This autoencoder has no posterior: eps does nothing."""
        mean, std = self.vae_statistics(vae, images)
        latents: Tensor = vae.encode(images, return_dict=False)[0]  # type: ignore[operator]
        return (latents - mean) / std


class SanaNetwork(DiffusersTransformer):
    """`SanaTransformer2DModel`."""

    last_layer = None  # what comes behind it counts on the batch of the input

    def __init__(self, model: nn.Module) -> None:
        super().__init__(
            model,
            accepts=frozenset({"text", "text_mask"}),
            has_null_condition=True,
            resolution_multiple=int(model.config.patch_size),  # type: ignore[union-attr, arg-type]
        )

    @property
    def embedders(self) -> list[nn.Module]:
        return [self.model.time_embed.emb]  # type: ignore[union-attr, list-item]

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B], a thousand times sigma.  Returns [B, C, H, W]; learned variances go."""
        self.require(cond)
        output: Tensor = self.model(
            x,
            encoder_hidden_states=cond.text,
            encoder_attention_mask=cond.text_mask,
            timestep=time_input * self.model.config.timestep_scale,  # type: ignore[union-attr, operator]
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]


def _instruction(pipeline: Any) -> Any:
    """The default of the pipeline's own call."""
    return inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default


def _encode(pipeline: Any, prompts: Sequence[str], instruction: Any) -> Cond:
    text, mask, _, _ = pipeline.encode_prompt(
        list(prompts), False, device=pipeline.device, complex_human_instruction=instruction
    )
    return Cond(text=text, text_mask=mask)
