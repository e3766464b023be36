"""CogView4: a rectified flow, GLM's text without positions, and SDXL's sizes.  Z.ai 2025; its architecture is
diffusers' `CogView4Transformer2DModel`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.path import AnyPath, Prediction
from diffdistill.models.teachers.family import StepsArgument, uncropped_sizes
from diffdistill.models.teachers.flow import flow_path
from diffdistill.models.teachers.flow_family import FlowFamily
from diffdistill.models.teachers.packing import PATCH, padded, trimmed
from diffdistill.networks.diffusers_model import DiffusersTransformer

LENGTH = 1024  # tokens of a prompt at most, the default of the pipeline's call
PAD = 16  # of which the pipeline fills a prompt to a multiple, with tokens that count


class CogView4(FlowFamily):
    """The pipeline tells its network the time before the scheduler's shift, in whole thousandths. Several prompts of
    one call are filled to one length there, as if they were longer; here each is as it is alone.
    """

    name = "cogview4"
    pipelines = ("CogView4Pipeline",)
    network_classes = ("CogView4Transformer2DModel",)
    parts: ClassVar = {
        "vae": ("AutoencoderKL",),
        "tokenizer": ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend"),
        "text_encoder": ("GlmModel",),
    }
    class_dropout = 0.1
    steps_argument: ClassVar[StepsArgument] = "timesteps"
    names_size = False
    config_sizes = "square"
    names_sigmas = False
    sets_begin = False

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "CogView4Network":
        return CogView4Network(model)

    def noise(self, scheduler: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[AnyPath, Prediction]:
        """A dynamic shift grows with the root of the number of tokens."""
        least, most = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        mu = least + most * math.sqrt(self.num_tokens(options) / scheduler.get("base_image_seq_len", 256))
        return replace(flow_path(scheduler, self.num_tokens(options), mu=mu), network_time="time"), "flow"

    def told_steps(self, steps: Mapping[str, Any], length: int) -> dict[str, Any]:
        times = steps.get("timesteps")
        if times is None:
            last = steps["num_inference_steps"] - 1
            times = [int(length - index * ((length - 1) / max(last, 1))) for index in range(last)]
            times.append(1 if last else length)
        return {"timesteps": times, "sigmas": [time / length for time in times]}

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        """Those of one length together, and so as each alone."""
        ids = pipeline.tokenizer(list(prompts), max_length=LENGTH, truncation=True).input_ids
        lengths = [-len(tokens) // PAD for tokens in ids]
        texts: dict[int, Tensor] = {}
        for length in set(lengths):
            places = [place for place, own in enumerate(lengths) if own == length]
            found, _ = pipeline.encode_prompt([prompts[place] for place in places], None, False, device=pipeline.device)
            texts |= dict(zip(places, found, strict=True))
        cond = padded([texts[place] for place in range(len(prompts))], LENGTH)
        assert cond.text is not None
        return replace(cond, size=uncropped_sizes(len(prompts), image_size, cond.text))

    def told_size(self, image_size: tuple[int, int], options: Mapping[str, Any]) -> Tensor:
        return uncropped_sizes(1, image_size, torch.empty(0))


class CogView4Network(DiffusersTransformer):
    """`CogView4Transformer2DModel`."""

    cuts_text = True
    last_layer = None  # what comes behind it counts on the batch of the input

    def __init__(self, model: nn.Module) -> None:
        super().__init__(
            model, accepts=frozenset({"text", "text_mask", "size"}), has_null_condition=True, resolution_multiple=PATCH
        )
        for block in self.blocks:
            block.attn1.set_processor(_MaskedAttention())  # type: ignore[union-attr, operator]

    @property
    def embedders(self) -> list[nn.Module]:
        return [self.model.time_condition_embed]  # type: ignore[list-item]

    def read_tap(self, output: Any, x: Tensor, cond: Cond) -> Tensor:
        """Its blocks give the image's tokens first."""
        return super().read_tap(output[0], x, cond)

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B], a thousand times the time before the shift.  Returns [B, C, H, W]."""
        self.require(cond)
        assert cond.size is not None
        text, mask = trimmed(cond)
        seen = F.pad(mask, (0, x.shape[2] * x.shape[3] // PATCH**2), value=True)
        original, corner, target = cond.size.to(x.dtype).split(2, 1)
        output: Tensor = self.model(
            hidden_states=x,
            encoder_hidden_states=text,
            timestep=time_input,
            original_size=original,
            target_size=target,
            crop_coords=corner,
            attention_mask=seen[:, None, None],
            return_dict=False,
        )[0]
        return output


class _MaskedAttention:
    """The blocks' attention under a mask of what is seen, [B, 1, 1, tokens], bool. Diffusers' own adds a mask to the
    scores as numbers, so that texts of other lengths could not share a batch.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states, encoder_hidden_states: of the image [B, N, C] and the text [B, L, C].  Returns them so."""
        from diffusers.models.embeddings import apply_rotary_emb

        length = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], 1)
        query, key, value = (
            layer(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )

        def placed(normed: Tensor) -> Tensor:
            """Turned by the place in the image; a text has none."""
            image = apply_rotary_emb(normed[:, :, length:], image_rotary_emb, use_real_unbind_dim=-2)
            return torch.cat([normed[:, :, :length], image], 2).to(value.dtype)

        made = F.scaled_dot_product_attention(
            placed(attn.norm_q(query)), placed(attn.norm_k(key)), value, attn_mask=attention_mask
        )
        made = attn.to_out[1](attn.to_out[0](made.transpose(1, 2).flatten(2)))
        return made[:, length:], made[:, :length]
