"""Teacher and student in one trajectory.  Gandikota & Bau 2025, arXiv:2503.10637.

Images whose first calls are the teacher's, and what each of the two would make of every state on the way
(DT-Visualization).
"""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.diffusion.dx_policy import DXPolicy
from diffdistill.diffusion.guidance.first_calls import FirstCalls, on_path
from diffdistill.diffusion.guidance.policies import Call, Recorder, begin
from diffdistill.diffusion.sampling import OneCall, Sampler
from diffdistill.diffusion.threads import sampling_threads, threads
from diffdistill.inference.image_generator import ImageGenerator, ModelImageGenerator
from diffdistill.settings.schema import UserError


def as_model(imager: ImageGenerator, option: str) -> ModelImageGenerator:
    """Raises UserError for a folder's own pipeline, of which no single call can be taken over, and for a policy, a call
    of which answers for a whole segment."""
    if not isinstance(imager, ModelImageGenerator):
        raise UserError(
            f"{option}: an exported folder with its own code gives no access to single steps; sample the run"
        )
    if isinstance(imager.model.spec.sampler, DXPolicy):
        raise UserError(f"{option}: a call of this student answers for a whole segment, which no teacher's does")
    return imager


def with_first_calls(student: ModelImageGenerator, teacher: ModelImageGenerator, calls: int) -> ModelImageGenerator:
    """The student with its first calls made by the teacher, each under its own guidance. Raises UserError."""
    check_first_calls(calls, student.model.spec.sampler)
    mixed = copy(student)
    mixed.guidance = FirstCalls(calls, teacher.model.denoiser, teacher.guidance, student.guidance)
    return mixed


def check_first_calls(calls: int, sampler: Sampler) -> None:
    """Raise UserError where a sampler has fewer calls, or calls that no teacher can answer."""
    if isinstance(sampler, OneCall) and calls:
        raise UserError(
            "--first-calls: this student treats its input as pure noise at every time, which no teacher can denoise"
        )
    if calls > sampler.num_evaluations:
        raise UserError(f"--first-calls {calls}: the student has {sampler.num_evaluations} NFE; give it more --steps")


@dataclass(frozen=True)
class Estimates:
    """What one model would make of every state of some trajectories.

    of: the model's name; states: whose trajectories.  ratios: the states' noise-to-signal ratios, [calls].
    images: [N, calls, C, H, W] in [-1, 1].
    """

    of: str
    states: str
    ratios: tuple[float, ...]
    images: Tensor

    @property
    def caption(self) -> str:
        low, high = (f"{ratio:.3g}" for ratio in (self.ratios[-1], self.ratios[0]))
        return f"{self.of}'s estimates, {self.states}'s states, sigma / alpha {high} to {low}"


@torch.no_grad()
def estimates_along(
    walker: ModelImageGenerator, asked: dict[str, ModelImageGenerator], *, states: str, count: int, batch: int
) -> list[Estimates]:
    """Of every call of `walker`'s sampler, what each model asked would give as x0, decoded.

    walker: makes the trajectories of images 0 .. count - 1.  states: what to call them.
    """
    made: dict[str, list[Tensor]] = {name: [] for name in asked}
    for index in torch.arange(count).split(batch):
        calls = _trajectory(walker, index)
        path = walker.model.denoiser.path
        ratios = tuple(float(path.ratio(call.t[0])) for call in calls)
        for name, model in asked.items():
            denoiser = model.model.denoiser
            cond = denoiser.class_cond(walker.labels_of(index))
            columns = []
            for call in calls:
                x, t = on_path(call.x, call.t, path, denoiser.path)
                with threads(sampling_threads(denoiser, x.shape[1:])):
                    estimate = begin(model.guidance, denoiser, cond)(x, t).to(x.dtype)
                columns.append(model.decode(estimate).float().cpu())
            made[name].append(torch.stack(columns, 1))
    return [Estimates(name, states, ratios, torch.cat(parts)) for name, parts in made.items()]


def _trajectory(walker: ModelImageGenerator, index: Tensor) -> list[Call]:
    seen = Recorder(walker.guidance)
    walker.before_decoding(index, seen)
    return seen.calls
