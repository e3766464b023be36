"""Which of diffusers' schedulers, called with which times, makes the steps of a student's sampler.

`timesteps` (or `sigmas`, on a flow) fix the times. What differs between schedulers is the noise that they begin with
(unit, or sigma_t times it) and what they do between two steps. Where none does the same, that is said.

Each is set up so that the calls of habit, `num_inference_steps=N` and nothing at all, make the same steps, or are
refused by the scheduler, where it can be: the schedule ends behind the first step, and what a number of steps chooses
from it are the trained times. What they really do is told by `habits`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import Flow, VPDiscrete
from diffdistill.diffusion.sampling import DDIM, TCD, AnySampler, FewSteps
from diffdistill.diffusion.scheduler_betas import read_betas
from diffdistill.models.teachers.family import PREDICTIONS, StepsArgument
from diffdistill.settings.schema import UserError

NEVER_SKIP = 1e4  # LCM's timestep_scaling: its mix of x_t into x0 is then below float32 at any step but 0
TCD_ETA = 0.3  # diffusers' default
SAME_SIGMAS = 1e-6  # by which float32's differ, as a share


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
        return _on_flow(denoiser, denoiser.path, sampler, config)
    if not isinstance(denoiser.path, VPDiscrete):
        raise UserError(f"no scheduler of diffusers has the path {type(denoiser.path).__name__}")
    times = [int(t) for t in _times(denoiser, sampler)]
    names = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    common = {**_betas(config), "prediction_type": names[denoiser.predicts], "clip_sample": False}
    settings = _up_to(times[0], common)
    if argument == "num_inference_steps":
        return _counted(sampler, times, settings)
    if isinstance(sampler, TCD):  # one step as well: its end is time 0, where there is noise left
        return _tcd(sampler, times, settings)
    is_fresh = len(times) > 1 and isinstance(sampler, FewSteps) and sampler.later_noise != "ddim"
    if is_fresh:
        _refuse_unless(not _starts_at_sigma(sampler), "several steps with fresh noise from another start", "unit")
    if _starts_at_sigma(sampler):
        return StockSteps(_euler(settings), {"timesteps": times})
    if is_fresh or len(times) == 1:
        return StockSteps(_lcm(settings, times), {"timesteps": times})
    return _ddim_from_unit(settings, times)


def _times(denoiser: Denoiser, sampler: AnySampler) -> Sequence[float]:
    """The times of its steps. Raises UserError for samplers that no scheduler of diffusers knows."""
    if isinstance(sampler, FewSteps) and sampler.later_noise == "fixed":
        raise UserError("no scheduler of diffusers reuses the first noise (later_noise: fixed)")
    if not isinstance(sampler, (FewSteps, TCD, DDIM)):
        raise UserError(f"no scheduler of diffusers makes the steps of {sampler.name}")
    times: list[float] = sampler.times(denoiser.path).tolist()
    return times[:-1] if isinstance(sampler, TCD) else times


def _on_flow(denoiser: Denoiser, path: Flow, sampler: AnySampler, config: Mapping[str, Any]) -> StockSteps:
    """Euler's steps on a rectified flow, or with fresh noise between them."""
    times = _times(denoiser, sampler)
    _refuse_unless(not _starts_at_sigma(sampler), "this pipeline begins with unit noise: another start", "unit")
    _refuse_unless(denoiser.predicts == "flow", f"a student that predicts {denoiser.predicts} on a flow", None)
    if isinstance(sampler, TCD):
        _refuse_unless(len(times) == 1 or not sampler.eta, "several TCD steps on a flow with noise between them", None)
    total = int(config.get("num_train_timesteps", 1000))
    is_fresh = isinstance(sampler, FewSteps) and sampler.later_noise == "fresh" and len(times) > 1
    if path.network_time == "time":
        told = [round(1000 * t) for t in times]
        return StockSteps(_told_scheduler(path, told, total, is_fresh=is_fresh), {"timesteps": told})
    sigmas = path.sigma(torch.tensor(times, dtype=torch.float64)).tolist()  # its time is before its shift
    return StockSteps(_flow_scheduler(sigmas, total, is_fresh=is_fresh), {"sigmas": sigmas})


def _flow_scheduler(sigmas: Sequence[float], total: int, *, is_fresh: bool) -> Any:
    """A flow's schedule begins at sigma = 1, and shifts leave that as it is, but for those between two ends of its
    config, `sigma_max` and `sigma_min`: even in the logarithm, as any one or two steps are, or Karras'. More steps have
    such a schedule where they were trained on one.

    Of one step all are the same: whatever the number of steps, the last one makes the image; pipelines that do not say
    where they begin run out of steps before.
    """
    settings: dict[str, Any] = {"num_train_timesteps": total, "shift": 1.0}
    wanted = torch.tensor(sigmas, dtype=torch.float64)
    for spacing in ("use_exponential_sigmas", "use_karras_sigmas"):
        scheduler = _flow_class({**settings, spacing: True}, len(sigmas), is_fresh=is_fresh)
        scheduler.register_to_config(sigma_max=sigmas[0], sigma_min=sigmas[-1])
        scheduler.set_timesteps(len(sigmas))
        if torch.allclose(scheduler.sigmas[:-1].double(), wanted, rtol=SAME_SIGMAS, atol=0):
            return scheduler
    return _flow_class(settings, len(sigmas), is_fresh=is_fresh)


def _told_scheduler(path: Flow, told: Sequence[int], total: int, *, is_fresh: bool) -> Any:
    """For a network that is told the time. By a number of steps alone its pipeline tells times from the schedule's
    length down to 1: that is the trained one where it is one step, on a schedule that ends there. Its shift would still
    make sigma 1 of that, and is passed over by sigmas that are even between two equal ends."""
    if len(told) > 1:
        return _flow_class({"num_train_timesteps": total, "shift": path.shift}, len(told), is_fresh=is_fresh)
    settings = {"num_train_timesteps": told[0], "shift": path.shift, "use_exponential_sigmas": True}
    scheduler = _flow_class(settings, 1, is_fresh=is_fresh)
    sigma = float(path.sigma(torch.tensor(told[0] / 1000)))
    scheduler.register_to_config(sigma_max=sigma, sigma_min=sigma)
    return scheduler


def _flow_class(settings: Mapping[str, Any], count: int, *, is_fresh: bool) -> Any:
    import diffusers

    if is_fresh and hasattr(diffusers, "FlowMatchLCMScheduler"):
        # It scales images between steps by these factors, and refuses another number of steps than it has factors for.
        factors = {"scale_factors": [1.0] * (count - 1), "upscale_mode": "nearest"}
        return diffusers.FlowMatchLCMScheduler(**settings, **factors)
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings, stochastic_sampling=is_fresh)


def _counted(sampler: AnySampler, times: Sequence[int], settings: dict[str, Any]) -> StockSteps:
    """For a pipeline that takes a number of steps alone, and begins with unit noise.

    The grid that diffusers takes an even choice of is one where that choice is these times. One step can always be had
    so, several only where they are even.
    """
    from diffusers import DDIMScheduler

    _refuse_unless(not _starts_at_sigma(sampler), "this pipeline begins with unit noise: another start", "unit")
    count, call = len(times), {"num_inference_steps": len(times)}
    if isinstance(sampler, TCD):
        # The pipeline does not hand on eta, whose default is this; one step has no use for it.
        _refuse_unless(count == 1 or sampler.eta == TCD_ETA, f"this pipeline's TCD has eta {TCD_ETA}: another", None)
    elif count > 1 and getattr(sampler, "later_noise", "ddim") == "ddim":
        scheduler = DDIMScheduler.from_config(settings, timestep_spacing="trailing", set_alpha_to_one=True)
        scheduler.set_timesteps(count)
        _refuse_unless(scheduler.timesteps.tolist() == list(times), f"this pipeline takes no timesteps: {times}", None)
        return StockSteps(scheduler, call)
    grid = _grid(times)
    _refuse_unless(grid is not None, f"this pipeline takes no timesteps: the steps {list(times)}", None)
    made = _tcd(sampler, times, settings).scheduler if isinstance(sampler, TCD) else _lcm(settings, times)
    return StockSteps(made, call)


def _grid(times: Sequence[int]) -> int | None:
    """The smallest `original_inference_steps` with which so many steps of diffusers' LCM and TCD are these times, on a
    schedule that ends at the first; None if there is none."""
    total, count = times[0] + 1, len(times)

    def choice(size: int) -> list[int]:
        return [(size - index * size // count) * (total // size) - 1 for index in range(count)]

    return next((size for size in range(count, total + 1) if choice(size) == list(times)), None)


def _original_steps(times: Sequence[int]) -> int:
    """The size of the grid. Where none fits, so small a one that this number of steps is refused, unless its times are
    given."""
    return _grid(times) or max(1, len(times) - 1)


def _tcd(sampler: TCD, times: Sequence[int], settings: Mapping[str, Any]) -> StockSteps:
    from diffusers import TCDScheduler

    _refuse_unless(not _starts_at_sigma(sampler), "diffusers' TCD begins with unit noise: another start", "unit")
    scheduler = TCDScheduler.from_config(settings, original_inference_steps=_original_steps(times))
    return StockSteps(scheduler, {"timesteps": list(times), "eta": sampler.eta})


def _lcm(settings: Mapping[str, Any], times: Sequence[int]) -> Any:
    from diffusers import LCMScheduler

    steps = _original_steps(times)
    return LCMScheduler.from_config(settings, timestep_scaling=NEVER_SKIP, original_inference_steps=steps)


def _euler(settings: Mapping[str, Any]) -> Any:
    """From sigma_t times unit noise."""
    from diffusers import EulerDiscreteScheduler

    # The offset does nothing with "trailing" times, and pipelines warn of any other.
    return EulerDiscreteScheduler.from_config(settings, timestep_spacing="trailing", steps_offset=1)


def _ddim_from_unit(settings: Mapping[str, Any], times: Sequence[int]) -> StockSteps:
    """TCD's steps with eta = 0 are DDIM's, but that they end at time 0, which is therefore made the image itself; this
    scheduler refuses more steps, and where these times are not even their number. Of the first order DPM-Solver's steps
    are DDIM's too: they round even times otherwise.
    """
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, TCDScheduler

    order = {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
    solver = DPMSolverMultistepScheduler.from_config(settings, timestep_spacing="trailing", steps_offset=1, **order)
    solver.set_timesteps(len(times))
    is_trailing = solver.timesteps.tolist() == list(times)
    if times[-1] > 0 and (_grid(times) is not None or not is_trailing):
        first, second, *rest = DDPMScheduler.from_config(settings).betas.tolist()
        betas = [0.0, 1 - (1 - first) * (1 - second), *rest]
        scheduler = TCDScheduler.from_config(
            settings, trained_betas=betas, original_inference_steps=_original_steps(times)
        )
        return StockSteps(scheduler, {"timesteps": list(times), "eta": 0.0})
    return StockSteps(solver, {"timesteps": list(times)})


def _starts_at_sigma(sampler: AnySampler) -> bool:
    return getattr(sampler, "init_noise", "sigma") == "sigma"


def _betas(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a schedule of betas is made of."""
    if config.get("rescale_betas_zero_snr"):  # with what is left of the signal at its end
        betas = read_betas(config).tolist()
        return {"trained_betas": betas, "num_train_timesteps": len(betas)}
    names = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps")
    return {name: config[name] for name in names if name in config}


def _up_to(time: int, common: Mapping[str, Any]) -> dict[str, Any]:
    """The same schedule, cut off behind a time."""
    from diffusers import DDPMScheduler

    betas = DDPMScheduler.from_config(common).betas
    if time + 1 == len(betas):
        return dict(common)
    return {**common, "trained_betas": betas[: time + 1].tolist(), "num_train_timesteps": time + 1}


def _refuse_unless(is_met: bool, what: str, init_noise: str | None) -> None:
    """Raise UserError that says what no scheduler of diffusers does.  init_noise: the setting with which it can."""
    if not is_met:
        remedy = f"; train with init_noise: {init_noise}" if init_noise else ""
        raise UserError(f"{what} is not possible with diffusers' schedulers{remedy}")
