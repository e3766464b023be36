"""Negative prompts, from a string to a model whose attention steers away from it, and to a teacher guided away."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.models.spec import ModelSpec, TrainedModel
from diffdistill.networks.negative_prompts import NegativePrompt, at_scale, steer_away, text_attention
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
        raise UserError(f"negative_scale = {scale:g}: needs a negative prompt, and this model has none")
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
        raise UserError("negative_prompt: is for networks of diffusers pipelines that take text; leave it out")
    pipeline = open_pipeline(spec.pipeline)
    if not text_attention(denoiser):
        kind = pipeline.index.get("_class_name")
        raise UserError(f"negative_prompt: the network of a {kind} has no cross-attention to text; leave it out")
    cond = pipeline.encode(pipeline.load_encoder(), [spec.negative_prompt])
    assert isinstance(denoiser, Denoiser)
    steer_away(denoiser, NegativePrompt(cond, spec.negative_scale))


def guide_away(teacher: Denoiser, student: nn.Module) -> None:
    """Let the teacher's guidance lead away from what the student's attention steers away from: D_- + w (D_c - D_-).

    Nobody else who shares its table of prompts is changed.  Raises UserError where it cannot be guided by two calls.
    Negative-away steer attention in training: Nguyen et al. 2024, arXiv:2412.02687.
    """
    assert isinstance(student, Denoiser)
    negative, table = student.runtime.negative, teacher.conditions
    assert isinstance(negative, NegativePrompt)
    if table is None or not teacher.net.has_null_condition:
        raise UserError('negative_teacher: the teacher is not guided away from "no prompt"; use false')
    teacher.run_with(conditions=table.with_empty(negative.cond))


@contextmanager
def drawn_scale(student: nn.Module, scale: float | tuple[float, float], *, seed: int, step: int) -> Iterator[None]:
    """Within it the student's attention steers away by a number that is drawn from the range, one for a whole step, the
    same on every process; a number that is no range changes nothing."""
    if not isinstance(scale, tuple):
        yield
        return
    low, high = scale
    share = StepRandom(seed, step, torch.zeros(1, dtype=torch.int64)).shared_integer("negative scale", 1 << 32)
    with at_scale(student, low + (high - low) * share / (1 << 32)):
        yield
