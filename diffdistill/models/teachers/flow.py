"""Schedulers of rectified flows as paths: their shift towards noise is part of what is even in the path's time."""

import math
from collections.abc import Mapping
from typing import Any

from diffdistill.diffusion.path import Flow
from diffdistill.settings.schema import UserError

STEPS = 1000  # num_train_timesteps, by which diffusers multiplies the time that a network is told
UNREAD = ("invert_sigmas", "shift_terminal")


def flow_path(scheduler: Mapping[str, Any], num_tokens: int, *, max_shift: float = 1.15) -> Flow:
    """The path of a scheduler's config.

    num_tokens: of the image, which a dynamic shift depends on.  max_shift: the pipeline's, where the config has none.
    Raises UserError if the scheduler is of no flow, or does what a path cannot say.
    """
    name = scheduler.get("_class_name")
    is_flow = "shift" in scheduler or (
        scheduler.get("use_flow_sigmas") and scheduler.get("prediction_type") == "flow_prediction"
    )
    if not is_flow:
        raise UserError(f"scheduler: {name}: is not one of a flow")
    for key in UNREAD:
        if scheduler.get(key):
            raise UserError(f"scheduler: {key} = {scheduler[key]!r}: is not read; use a scheduler without it")
    if scheduler.get("num_train_timesteps", STEPS) != STEPS:
        raise UserError(f"scheduler: num_train_timesteps = {scheduler['num_train_timesteps']!r}: must be {STEPS}")
    if scheduler.get("use_dynamic_shifting"):
        return Flow(shift=_dynamic_shift(scheduler, num_tokens, max_shift))
    return Flow(shift=float(scheduler.get("shift", scheduler.get("flow_shift", 1.0))))


def _dynamic_shift(scheduler: Mapping[str, Any], num_tokens: int, max_shift: float) -> float:
    """mu linear in the number of tokens, as in the pipelines; the shift is exp(mu), or mu itself."""
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    least, most = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", max_shift)
    mu = float(least + (most - least) / (high - low) * (num_tokens - low))
    return mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)
