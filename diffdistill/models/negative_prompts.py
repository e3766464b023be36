"""Negative prompts, from a string to a model whose attention steers away from it."""

from dataclasses import replace

from torch import nn

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.models.spec import ModelSpec, TrainedModel
from diffdistill.networks.negative_prompts import NegativePrompt, steer_away, text_attention
from diffdistill.settings.schema import UserError

DEFAULT_SCALE = 0.3
"""Ours: a third of what both texts make of a query is taken away."""


def with_negative_prompt(model: TrainedModel, prompt: str | None, scale: float | None = None) -> TrainedModel:
    """The same model, whose attention steers away from this prompt from now on, and from no other.

    prompt, scale: None for the model's own, and without that `DEFAULT_SCALE`.  Raises UserError.
    """
    own = model.spec
    if prompt is None and scale is None:
        return model
    if prompt is None and own.negative_prompt is None:
        raise UserError(f"negative_scale = {scale:g}: goes with a negative prompt, and this model has none of its own")
    prompt = own.negative_prompt if prompt is None else prompt
    scale = (own.negative_scale or DEFAULT_SCALE) if scale is None else scale
    spec = replace(own, negative_prompt=prompt, negative_scale=scale)
    steer(model.denoiser, spec)
    return replace(model, spec=spec)


def steer(denoiser: nn.Module, spec: ModelSpec) -> None:
    """Let attention steer away from the spec's negative prompt, if it has one.

    Raises UserError where nothing encodes prompts, or the network has no cross-attention to them.
    """
    from diffdistill.models.teachers import open_pipeline

    if spec.negative_prompt is None:
        return
    if spec.pipeline is None:
        raise UserError("negative_prompt: goes with a network of a diffusers pipeline that takes text; leave it out")
    pipeline = open_pipeline(spec.pipeline)
    if not text_attention(denoiser):
        kind = pipeline.index.get("_class_name")
        raise UserError(f"negative_prompt: the network of a {kind} has no cross-attention to a text; leave it out")
    cond = pipeline.encode(pipeline.load_encoder(), [spec.negative_prompt])
    assert isinstance(denoiser, Denoiser)
    steer_away(denoiser, NegativePrompt(cond, spec.negative_scale))
