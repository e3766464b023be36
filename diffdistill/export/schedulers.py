"""Which of diffusers' schedulers, called with which times, makes the steps of a student's sampler.

`timesteps` (or `sigmas`, on a flow) fix the times. What differs between schedulers is the noise that they begin with
(unit, or sigma_t times it) and what they do between two steps. Where none does the same, that is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffdistill.denoiser import Denoiser
from diffdistill.families.family import PREDICTIONS, StepsArgument
from diffdistill.path import Flow, VPDiscrete
from diffdistill.sampling import DDIM, TCD, AnySampler, FewSteps
from diffdistill.schema import UserError

NEVER_SKIP = 1e4  # LCM's timestep_scaling: its mix of x_t into x0 is then below float32 at any step but 0


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
        raise UserError(f"export: diffusers' schedulers do not have the path {type(denoiser.path).__name__}")
    times = [int(t) for t in _times(denoiser, sampler)]
    names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    common = {**_betas(config), "prediction_type": names[denoiser.predicts], "clip_sample": False}
    if argument == "num_inference_steps":
        return _counted(sampler, times, common, denoiser.path)
    if isinstance(sampler, TCD):
        return _tcd(sampler, times, common)
    if len(times) > 1 and isinstance(sampler, FewSteps) and sampler.later_noise != "ddim":
        _refuse_unless(sampler.init_noise == "unit", "several steps with fresh noise", "init_noise: unit")
        return StockSteps(_lcm(common), {"timesteps": times})
    return StockSteps(_euler(common, starts_at_sigma=_starts_at_sigma(sampler)), {"timesteps": times})


def _times(denoiser: Denoiser, sampler: AnySampler) -> Sequence[float]:
    """The times of its calls. Raises UserError for samplers that no scheduler of diffusers knows."""
    if isinstance(sampler, FewSteps) and sampler.later_noise == "fixed":
        raise UserError("export: no scheduler of diffusers uses the first noise again (later_noise: fixed)")
    if not isinstance(sampler, (FewSteps, TCD, DDIM)):
        raise UserError(f"export: no scheduler of diffusers makes the steps of {sampler.name}")
    times: list[float] = sampler.times(denoiser.path).tolist()
    return times[:-1] if isinstance(sampler, TCD) else times


def _on_flow(denoiser: Denoiser, sampler: AnySampler, config: Mapping[str, Any]) -> StockSteps:
    """Euler's steps on a rectified flow; with fresh noise between them it is told to be stochastic."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    times = _times(denoiser, sampler)
    _refuse_unless(not _starts_at_sigma(sampler), "this pipeline begins with unit noise", "init_noise: unit")
    _refuse_unless(denoiser.predicts == "flow", f"a student that predicts {denoiser.predicts} on a flow", None)
    if isinstance(sampler, TCD):
        _refuse_unless(len(times) == 1 or not sampler.eta, "several TCD steps on a flow", "eta: 0")
    is_fresh = isinstance(sampler, FewSteps) and sampler.later_noise == "fresh" and len(times) > 1
    total = int(config.get("num_train_timesteps", 1000))
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=total, shift=1.0, stochastic_sampling=is_fresh)
    return StockSteps(scheduler, {"sigmas": list(times)})


def _counted(sampler: AnySampler, times: Sequence[int], common: dict[str, Any], path: VPDiscrete) -> StockSteps:
    """For a pipeline that takes a number of steps alone, and begins with unit noise: one step, the schedule's last.

    The schedule is cut off behind it.
    """
    from diffusers import DDPMScheduler

    _refuse_unless(len(times) == 1, "this pipeline takes no list of timesteps: several steps", "one step")
    _refuse_unless(not _starts_at_sigma(sampler), "this pipeline begins with unit noise", "init_noise: unit")
    _refuse_unless(not isinstance(sampler, TCD), "TCD's end in this pipeline", None)
    betas = DDPMScheduler.from_config(common).betas[: times[0] + 1].tolist()
    settings = common | {"trained_betas": betas, "num_train_timesteps": len(betas), "original_inference_steps": 1}
    return StockSteps(_lcm(settings), {"num_inference_steps": 1})


def _tcd(sampler: TCD, times: Sequence[int], common: Mapping[str, Any]) -> StockSteps:
    from diffusers import TCDScheduler

    _refuse_unless(not _starts_at_sigma(sampler), "diffusers' TCD begins with unit noise", "init_noise: unit")
    return StockSteps(TCDScheduler.from_config(common), {"timesteps": list(times), "eta": sampler.eta})


def _lcm(settings: Mapping[str, Any]) -> Any:
    from diffusers import LCMScheduler

    return LCMScheduler.from_config(settings, timestep_scaling=NEVER_SKIP)


def _euler(settings: Mapping[str, Any], *, starts_at_sigma: bool) -> Any:
    from diffusers import EulerDiscreteScheduler

    # Its noise is sigma_t times unit noise with "trailing" times, and unit noise with "leading" ones.
    spacing = "trailing" if starts_at_sigma else "leading"
    return EulerDiscreteScheduler.from_config(settings, timestep_spacing=spacing, steps_offset=0)


def _starts_at_sigma(sampler: AnySampler) -> bool:
    return getattr(sampler, "init_noise", "sigma") == "sigma"


def _betas(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a schedule of betas is made of."""
    names = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps")
    return {name: config[name] for name in names if name in config}


def _refuse_unless(is_met: bool, what: str, remedy: str | None) -> None:
    if not is_met:
        raise UserError(f"export: {what} cannot be had from diffusers" + (f"; use {remedy}" if remedy else ""))
