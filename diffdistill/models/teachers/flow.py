"""Schedulers of rectified flows as paths: their shift towards noise is part of what is even in the path's time."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffdistill.diffusion.path import Flow
from diffdistill.settings.schema import UserError

STEPS = 1000  # num_train_timesteps, by which diffusers multiplies the time that a network is told
UNREAD = ("invert_sigmas",)


def flow_path(
    scheduler: Mapping[str, Any], num_tokens: int, *, max_shift: float = 1.15, mu: float | None = None
) -> Flow:
    """The path of a scheduler's config.

    num_tokens: of the image, which a dynamic shift depends on.  max_shift: the pipeline's, where the config has none.
    mu: of pipelines that do not ask the config for the dynamic shift.
    `shift_terminal` stretches the steps of a run so that the last has this sigma: a choice of steps, none of the path.
    Raises UserError if the scheduler is of no flow, or does what a path cannot say.
    """
    name = scheduler.get("_class_name")
    is_flow = "shift" in scheduler or (
        scheduler.get("use_flow_sigmas") and scheduler.get("prediction_type") == "flow_prediction"
    )
    if not is_flow:
        raise UserError(f"scheduler: {name}: not a flow-matching scheduler")
    for key in UNREAD:
        if scheduler.get(key):
            raise UserError(f"scheduler: {key} = {scheduler[key]!r}: not supported; use a scheduler without it")
    if scheduler.get("num_train_timesteps", STEPS) != STEPS:
        raise UserError(f"scheduler: num_train_timesteps = {scheduler['num_train_timesteps']!r}: must be {STEPS}")
    if scheduler.get("use_dynamic_shifting"):
        mu = _linear_mu(scheduler, num_tokens, max_shift) if mu is None else mu
        return Flow(shift=mu if scheduler.get("time_shift_type") == "linear" else _exp(mu))
    return Flow(shift=float(scheduler.get("shift", scheduler.get("flow_shift", 1.0))))


def reversed_time(time_input: Tensor) -> Tensor:
    """The time of networks that count from the noise, 1 - sigma, [B]; what they predict is minus the flow.

    time_input: [B], a thousand times sigma.
    """
    return 1 - time_input / STEPS


def _linear_mu(scheduler: Mapping[str, Any], num_tokens: int, max_shift: float) -> float:
    """mu linear in the number of tokens, as in most pipelines; the shift is exp(mu), or mu itself."""
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    least, most = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", max_shift)
    if low == high:
        raise UserError(f"scheduler: base_image_seq_len = max_image_seq_len = {low!r}: must differ")
    return float(least + (most - least) / (high - low) * (num_tokens - low))


def _exp(mu: float) -> float:
    """Raises UserError where it is no number."""
    try:
        return math.exp(mu)
    except OverflowError:
        raise UserError(f"scheduler: base_shift, max_shift: a dynamic shift of exp({mu:g}) is too great") from None
