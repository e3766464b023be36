"""Negative prompts, from a string to a model whose attention steers away from it."""

from dataclasses import replace

from diffdistill.denoiser import Denoiser
from diffdistill.model import ModelSpec, TrainedModel
from diffdistill.networks.negative import NegativePrompt, steer_away, text_attention
from diffdistill.schema import UserError

DEFAULT_SCALE = 0.3
"""Ours: a third of what both texts make of a query is taken away."""


def with_negative_prompt(model: TrainedModel, prompt: str, scale: float = DEFAULT_SCALE) -> TrainedModel:
    """The same model, whose attention steers away from this prompt from now on, and from no other. Raises UserError."""
    spec = replace(model.spec, negative_prompt=prompt, negative_scale=scale)
    steer(model.denoiser, spec)
    return replace(model, spec=spec)


def steer(denoiser: Denoiser, spec: ModelSpec) -> None:
    """Let attention steer away from the spec's negative prompt, if it has one.

    Raises UserError where nothing encodes prompts, or the network has no cross-attention to them.
    """
    from diffdistill.families import open_pipeline

    if spec.negative_prompt is None:
        return
    if spec.pipeline is None:
        raise UserError("negative_prompt: goes with a network of a diffusers pipeline that takes text; leave it out")
    pipeline = open_pipeline(spec.pipeline)
    if not text_attention(denoiser):
        kind = pipeline.index.get("_class_name")
        raise UserError(f"negative_prompt: the network of a {kind} has no cross-attention to a text; leave it out")
    cond = pipeline.encode(pipeline.load_encoder(), [spec.negative_prompt])
    steer_away(denoiser, NegativePrompt(cond, spec.negative_scale))
