"""A pipeline's own run, step by step, beside our denoiser: what every family is compared by."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser

TOLERANCE = 1e-4  # of unit-variance latents, in float32: the pipeline's arithmetic is in float32, ours in float64
ROUNDING = 2e-6  # of float32, where random weights say an x0 of hundreds at the noisiest step


@dataclass(frozen=True)
class Step:
    """One call of the scheduler: what it was given and gave, and the scheduler as it was before."""

    output: Tensor
    time: float
    x: Tensor
    following: Tensor
    repeat: Callable[[Tensor], Tensor]


def watched_steps(pipeline: Any, **asked: Any) -> list[Step]:
    """Every step of `pipeline(**asked)`."""
    scheduler, steps = pipeline.scheduler, []
    step = scheduler.step

    def watch(output: Tensor, t: Tensor, x: Tensor, *args: Any, **options: Any) -> Any:
        del scheduler.step
        before, rng = copy.deepcopy(scheduler), options.pop("generator", None)
        state = {} if rng is None else {"generator": rng.clone_state()}

        def repeat(own: Tensor) -> Tensor:
            return _first(before.step(own, t, x, *args, **state, **options))

        made = step(output, t, x, *args, **options, **({} if rng is None else {"generator": rng}))
        steps.append(Step(output.clone(), float(t), x.clone(), _first(made).clone(), repeat))
        scheduler.step = watch
        return made

    scheduler.step = watch
    pipeline.set_progress_bar_config(disable=True)
    pipeline(**asked)
    return steps


@dataclass(frozen=True)
class Layout:
    """How a pipeline holds its latents: functions to [B, C, H, W] and back."""

    read: Callable[[Tensor], Tensor] = lambda x: x
    write: Callable[[Tensor], Tensor] = lambda x: x


def packed(channels: int, height: int, width: int) -> Layout:
    """Flux's own."""
    return Layout(
        lambda x: diffusers.FluxPipeline._unpack_latents(x, height, width, 1),
        lambda x: diffusers.FluxPipeline._pack_latents(x, len(x), channels, height, width),
    )


def as_tokens(height: int, width: int) -> Layout:
    """FLUX.2's: each of the latents is a token."""
    return Layout(lambda x: x.mT.unflatten(2, (height, width)), lambda x: x.flatten(2).mT)


def layout_of(family: str, shape: tuple[int, int, int]) -> Layout:
    """How the pipeline of a family holds latents [C, H, W]."""
    if family == "flux2":
        return as_tokens(*shape[1:])
    return packed(*shape) if family in ("flux", "qwen_image", "chroma", "longcat_image") else Layout()


def assert_steps_agree(
    denoiser: Denoiser, steps: list[Step], cond: Cond, *, guidance: float, layout: Layout | None = None
) -> float:
    """Our denoiser's x0 is the pipeline's, and the scheduler's step with our prediction leads where the pipeline went.

    Returns the greatest difference of an x0 over all steps, as a share of that step's greatest value.
    Predictions are not compared as such: eps read back from x0 in float32 has its rounding times alpha / sigma.
    """
    layout, greatest = layout or Layout(), 0.0
    assert steps
    path, predicts = denoiser.path, denoiser.predicts
    for step in steps:
        copies = _copies(step.x, cond)
        x, output = (layout.read(part[: len(part) // copies]) for part in (step.x, step.output))
        t = path.time_of_input(torch.full((len(x),), step.time, dtype=torch.float64))
        with torch.no_grad():
            x0 = denoiser(x, t, cond, guidance=guidance)
        theirs = path.to_x0(output, predicts, x, t)
        greatest = max(greatest, float((x0 - theirs).abs().max() / theirs.abs().max()))
        torch.testing.assert_close(x0, theirs, atol=TOLERANCE, rtol=ROUNDING)
        own = path.from_x0(x0, predicts, x, t).repeat(copies, *[1] * (x.ndim - 1))
        torch.testing.assert_close(step.repeat(layout.write(own)), step.following, atol=TOLERANCE, rtol=ROUNDING)
    return greatest


def _copies(x: Tensor, cond: Cond) -> int:
    """Some pipelines hold the batch twice under guidance."""
    sizes = [len(part) for part in cond.parts().values()]
    return len(x) // sizes[0] if sizes else 1


def _first(made: Any) -> Tensor:
    found: Tensor = made[0]
    return found
