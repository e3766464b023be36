"""Qwen-Image: a rectified flow on packed latents of a VAE for videos, Qwen2.5-VL's text.  Wu et al. 2025,
arXiv:2508.02324.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.guidance_rules import AnyGuidanceRule, Renormalised
from diffdistill.models.teachers.family import channel_statistics
from diffdistill.models.teachers.flow_family import FlowFamily, PackedTransformer
from diffdistill.models.teachers.packing import PATCH, pack, padded, texts_of, trimmed, unpack

LENGTH = 512  # tokens of a prompt at most, the default of the pipeline's call


class QwenImage(FlowFamily):
    """Guidance is the pipeline's `true_cfg_scale` away from a negative prompt, scaled to the norm of each token's
    conditional estimate. Without a negative prompt it guides nowhere; the empty one of its model card is one space.
    """

    name = "qwen_image"
    pipelines = ("QwenImagePipeline",)
    variants: ClassVar = dict.fromkeys(("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"), "QwenImagePipeline")
    network_classes = ("QwenImageTransformer2DModel",)
    parts: ClassVar = {
        "vae": ("AutoencoderKLQwenImage",),
        "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
    }
    class_dropout = 0.1
    plain_call: ClassVar = {"true_cfg_scale": 1.0}
    is_packed = True

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "QwenImageNetwork":
        return QwenImageNetwork(model)

    def guidance_rule(self, index: Mapping[str, Any]) -> AnyGuidanceRule:
        return Renormalised(over="patch")

    def check_options(self, options: Mapping[str, Any]) -> None:
        """The network makes latents of `out_channels`, and takes tokens of `in_channels`. Without the first it makes
        patches of as many channels as it takes, as diffusers builds it."""
        full = self.full_options(options)
        made = full["out_channels"] or full["in_channels"]
        super().check_options({**options, "out_channels": PATCH**2 * made})

    def vae_factor(self, vae: Mapping[str, Any]) -> int:
        return 2 ** len(vae.get("temperal_downsample", (False, True, True)))

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        text, mask = pipeline.encode_prompt(list(prompts), pipeline.device, max_sequence_length=LENGTH)
        found = Cond(text=text, text_mask=text.new_ones(text.shape[:2]) if mask is None else mask)
        return padded(texts_of(found), LENGTH)

    def encode_empty(self, pipeline: Any, image_size: tuple[int, int], options: Mapping[str, Any]) -> Cond:
        return self.encode(pipeline, [" "], image_size, options)

    def to_latents(self, vae: nn.Module, images: Tensor, eps: Tensor) -> Tensor:
        """As a video of one frame."""
        mean, std = self.vae_statistics(vae, images)
        found = vae.encode(images.unsqueeze(2)).latent_dist  # type: ignore[operator]
        return ((found.mean + found.std * eps.unsqueeze(2)).squeeze(2) - mean) / std

    def to_images(self, vae: nn.Module, latents: Tensor) -> Tensor:
        mean, std = self.vae_statistics(vae, latents)
        video: Tensor = vae.decode((latents * std + mean).unsqueeze(2), return_dict=False)[0]  # type: ignore[operator]
        return video.squeeze(2)

    def vae_statistics(self, vae: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
        found = channel_statistics(vae, like)
        assert found is not None
        return found


class QwenImageNetwork(PackedTransformer):
    """`QwenImageTransformer2DModel`."""

    cuts_text = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, accepts=frozenset({"text", "text_mask"}))

    @property
    def embedders(self) -> list[nn.Module]:
        return [self.model.time_text_embed]  # type: ignore[list-item]

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B], a thousand times sigma.  Returns [B, C, H, W]."""
        self.require(cond)
        text, mask = trimmed(cond)
        rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH
        output: Tensor = self.model(
            hidden_states=pack(x),
            timestep=time_input / 1000,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, rows, columns)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(output, rows, columns)
