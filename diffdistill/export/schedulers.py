"""Which of diffusers' schedulers, called with which times, makes the steps of a student's sampler.

`timesteps` (or `sigmas`, on a flow) fix the times. What differs between schedulers is the noise that they begin with
(unit, or sigma_t times it) and what they do between two steps. Where none does the same, that is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import Flow, VPDiscrete
from diffdistill.diffusion.sampling import DDIM, TCD, AnySampler, FewSteps
from diffdistill.models.teachers.family import PREDICTIONS, StepsArgument
from diffdistill.settings.schema import UserError

NEVER_SKIP = 1e4  # LCM's timestep_scaling: its mix of x_t into x0 is then below float32 at any step but 0
TCD_ETA = 0.3  # diffusers' default


@dataclass(frozen=True)
class StockSteps:
    """scheduler: diffusers', set up.  call: the pipeline's arguments that belong to it."""

    scheduler: Any
    call: Mapping[str, Any] = field(default_factory=dict)


def stock_steps(
    denoiser: Denoiser, sampler: AnySampler, config: Mapping[str, Any], argument: StepsArgument
) -> StockSteps:
    """diffusers' scheduler for a student.

    config: of the teacher's scheduler.  argument: how the pipeline is told its steps.
    Raises UserError that says what does not fit.
    """
    if isinstance(denoiser.path, Flow):
        return _on_flow(denoiser, sampler, config)
    if not isinstance(denoiser.path, VPDiscrete):
        raise UserError(f"diffusers' schedulers do not have the path {type(denoiser.path).__name__}")
    times = [int(t) for t in _times(denoiser, sampler)]
    names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    common = {**_betas(config), "prediction_type": names[denoiser.predicts], "clip_sample": False}
    if argument == "num_inference_steps":
        return _counted(sampler, times, common)
    if isinstance(sampler, TCD):
        return _tcd(sampler, times, common)
    if len(times) > 1 and isinstance(sampler, FewSteps) and sampler.later_noise != "ddim":
        _refuse_unless(sampler.init_noise == "unit", "several steps with fresh noise from another start", "unit")
        return StockSteps(_lcm(common), {"timesteps": times})
    return StockSteps(_euler(common, starts_at_sigma=_starts_at_sigma(sampler)), {"timesteps": times})


def _times(denoiser: Denoiser, sampler: AnySampler) -> Sequence[float]:
    """The times of its calls. Raises UserError for samplers that no scheduler of diffusers knows."""
    if isinstance(sampler, FewSteps) and sampler.later_noise == "fixed":
        raise UserError("no scheduler of diffusers uses the first noise again (later_noise: fixed)")
    if not isinstance(sampler, (FewSteps, TCD, DDIM)):
        raise UserError(f"no scheduler of diffusers makes the steps of {sampler.name}")
    times: list[float] = sampler.times(denoiser.path).tolist()
    return times[:-1] if isinstance(sampler, TCD) else times


def _on_flow(denoiser: Denoiser, sampler: AnySampler, config: Mapping[str, Any]) -> StockSteps:
    """Euler's steps on a rectified flow; with fresh noise between them it is told to be stochastic."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    times = _times(denoiser, sampler)
    _refuse_unless(not _starts_at_sigma(sampler), "this pipeline begins with unit noise: another start", "unit")
    _refuse_unless(denoiser.predicts == "flow", f"a student that predicts {denoiser.predicts} on a flow", None)
    if isinstance(sampler, TCD):
        _refuse_unless(len(times) == 1 or not sampler.eta, "several TCD steps on a flow with noise between them", None)
    is_fresh = isinstance(sampler, FewSteps) and sampler.later_noise == "fresh" and len(times) > 1
    total = int(config.get("num_train_timesteps", 1000))
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=total, shift=1.0, stochastic_sampling=is_fresh)
    sigmas = denoiser.path.sigma(torch.tensor(times, dtype=torch.float64))  # the path's time is before its shift
    return StockSteps(scheduler, {"sigmas": sigmas.tolist()})


def _counted(sampler: AnySampler, times: Sequence[int], common: dict[str, Any]) -> StockSteps:
    """For a pipeline that takes a number of steps alone, and begins with unit noise.

    The schedule is cut off behind the first step, and the grid that diffusers takes an even choice of is one where
    that choice is these times. One step can always be had so, several only where they are even.
    """
    from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler, TCDScheduler

    _refuse_unless(not _starts_at_sigma(sampler), "this pipeline begins with unit noise: another start", "unit")
    count, call = len(times), {"num_inference_steps": len(times)}
    betas = DDPMScheduler.from_config(common).betas[: times[0] + 1].tolist()
    settings = common | {"trained_betas": betas, "num_train_timesteps": len(betas)}
    if isinstance(sampler, TCD):
        # The pipeline does not hand on eta, whose default is this.
        _refuse_unless(count == 1 or sampler.eta == TCD_ETA, f"this pipeline's TCD has eta {TCD_ETA}: another", None)
    elif count > 1 and getattr(sampler, "later_noise", "ddim") == "ddim":
        scheduler = DDIMScheduler.from_config(settings, timestep_spacing="trailing", set_alpha_to_one=True)
        scheduler.set_timesteps(count)
        _refuse_unless(scheduler.timesteps.tolist() == list(times), f"this pipeline takes no timesteps: {times}", None)
        return StockSteps(scheduler, call)
    kind = TCDScheduler if isinstance(sampler, TCD) else LCMScheduler
    grid = next(
        (size for size in range(count, len(betas) + 1) if _choice(len(betas), size, count) == list(times)), None
    )
    _refuse_unless(grid is not None, f"this pipeline takes no timesteps: the steps {list(times)}", None)
    settings |= {"original_inference_steps": grid}
    return StockSteps(kind.from_config(settings) if kind is TCDScheduler else _lcm(settings), call)


def _choice(total: int, grid: int, count: int) -> list[int]:
    """The times that diffusers' LCM and TCD schedulers choose for `count` steps on a grid of so many."""
    return [(grid - index * grid // count) * (total // grid) - 1 for index in range(count)]


def _tcd(sampler: TCD, times: Sequence[int], common: Mapping[str, Any]) -> StockSteps:
    from diffusers import TCDScheduler

    _refuse_unless(not _starts_at_sigma(sampler), "diffusers' TCD begins with unit noise: another start", "unit")
    return StockSteps(TCDScheduler.from_config(common), {"timesteps": list(times), "eta": sampler.eta})


def _lcm(settings: Mapping[str, Any]) -> Any:
    from diffusers import LCMScheduler

    return LCMScheduler.from_config(settings, timestep_scaling=NEVER_SKIP)


def _euler(settings: Mapping[str, Any], *, starts_at_sigma: bool) -> Any:
    from diffusers import EulerDiscreteScheduler

    # Its noise is sigma_t times unit noise with "trailing" times, and unit noise with "leading" ones. The offset does
    # nothing where timesteps are given, and pipelines warn of any other.
    spacing = "trailing" if starts_at_sigma else "leading"
    return EulerDiscreteScheduler.from_config(settings, timestep_spacing=spacing, steps_offset=1)


def _starts_at_sigma(sampler: AnySampler) -> bool:
    return getattr(sampler, "init_noise", "sigma") == "sigma"


def _betas(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a schedule of betas is made of."""
    names = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps")
    return {name: config[name] for name in names if name in config}


def _refuse_unless(is_met: bool, what: str, init_noise: str | None) -> None:
    """Raise UserError that says what no scheduler of diffusers does.  init_noise: the setting with which it can."""
    if not is_met:
        remedy = f"; train with init_noise: {init_noise}" if init_noise else ""
        raise UserError(f"{what} cannot be had from diffusers' schedulers{remedy}")
