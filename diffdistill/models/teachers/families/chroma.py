"""Chroma: Flux without the pooled text and the input for guidance, under a mask.  Lodestone Rock 2025; its architecture
is diffusers' `ChromaTransformer2DModel`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.models.teachers.flow_family import FlowFamily, PackedTransformer
from diffdistill.models.teachers.packing import PATCH, pack, positions, unpack


class Chroma(FlowFamily):
    """The mask counts a prompt's tokens and the first behind them. Diffusers adds it to the scores of attention, as
    numbers: what it does not count is seen as well, by a factor of e less. So the text keeps its 512 tokens.
    """

    name = "chroma"
    pipelines = ("ChromaPipeline",)
    variants: ClassVar = dict.fromkeys(("ChromaImg2ImgPipeline", "ChromaInpaintPipeline"), "ChromaPipeline")
    network_classes = ("ChromaTransformer2DModel",)
    parts: ClassVar = {
        "vae": ("AutoencoderKL",),
        "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
        "text_encoder": ("T5EncoderModel",),
    }
    class_dropout = 0.1
    is_packed = True

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "ChromaNetwork":
        return ChromaNetwork(model, accepts=frozenset({"text", "text_bias"}))

    def encode(
        self, pipeline: Any, prompts: Sequence[str], image_size: tuple[int, int], options: Mapping[str, Any]
    ) -> Cond:
        text, _, mask, *_ = pipeline.encode_prompt(
            list(prompts), device=pipeline.device, do_classifier_free_guidance=False
        )
        return Cond(text=text, text_bias=mask)


class ChromaNetwork(PackedTransformer):
    """`ChromaTransformer2DModel`."""

    @property
    def embedders(self) -> list[nn.Module]:
        return [self.model.distilled_guidance_layer.out_proj]  # type: ignore[union-attr, list-item]

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B], a thousand times sigma.  Returns [B, C, H, W]."""
        self.require(cond)
        assert cond.text is not None
        assert cond.text_bias is not None
        rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH
        mask = torch.cat([cond.text_bias.to(x.dtype), x.new_ones(len(x), rows * columns)], 1)
        with _recomputed_with(self.model, mask):
            output: Tensor = self.model(
                hidden_states=pack(x),
                timestep=time_input / 1000,
                encoder_hidden_states=cond.text,
                txt_ids=x.new_zeros(cond.text.shape[1], 3),
                img_ids=positions(rows, columns, x),
                attention_mask=mask,
                return_dict=False,
            )[0]
        return unpack(output, rows, columns)


@contextmanager
def _recomputed_with(model: Any, mask: Tensor) -> Iterator[None]:
    """Diffusers does not hand the mask to the blocks of one stream where they are recomputed."""
    run = getattr(model, "_gradient_checkpointing_func", None)
    if run is None:
        yield
        return

    def with_mask(block: nn.Module, *inputs: Any) -> Any:
        return run(block, *inputs, *([mask] if block in alone else []))

    alone = set(model.single_transformer_blocks)
    model._gradient_checkpointing_func = with_mask
    try:
        yield
    finally:
        model._gradient_checkpointing_func = run
