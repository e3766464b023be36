"""Teacher and student in one trajectory.  Gandikota & Bau 2025, arXiv:2503.10637.

Images whose first steps are the teacher's, and the estimates of both at every state of the trajectory
(DT-Visualization).
"""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.diffusion.dx_policy import DXPolicy
from diffdistill.diffusion.guidance.first_steps import FirstSteps, on_path
from diffdistill.diffusion.guidance.policies import Evaluation, Recorder, begin
from diffdistill.diffusion.sampling import OneCall, Sampler
from diffdistill.diffusion.threads import sampling_threads, threads
from diffdistill.inference.image_generator import ImageGenerator, ModelImageGenerator
from diffdistill.settings.schema import UserError


def as_model(imager: ImageGenerator, option: str) -> ModelImageGenerator:
    """Raises UserError for a folder's own pipeline, whose single steps cannot be replaced, and for a policy, one
    evaluation of which covers a whole segment."""
    if not isinstance(imager, ModelImageGenerator):
        raise UserError(
            f"{option}: an exported folder with its own code gives no access to single steps; sample the run"
        )
    if isinstance(imager.model.spec.sampler, DXPolicy):
        raise UserError(f"{option}: one NFE of this student covers a whole segment, which no teacher's does")
    return imager


def with_first_steps(student: ModelImageGenerator, teacher: ModelImageGenerator, steps: int) -> ModelImageGenerator:
    """The student with its first steps made by the teacher, each with its own guidance. Raises UserError."""
    check_first_steps(steps, student.model.spec.sampler)
    mixed = copy(student)
    mixed.guidance = FirstSteps(steps, teacher.model.denoiser, teacher.guidance, student.guidance)
    return mixed


def check_first_steps(steps: int, sampler: Sampler) -> None:
    """Raise UserError if a sampler has fewer NFE, or inputs that no teacher can denoise."""
    if isinstance(sampler, OneCall) and steps:
        raise UserError(
            "--first-steps: this student treats its input as pure noise at every time, which no teacher can denoise"
        )
    if steps > sampler.num_evaluations:
        raise UserError(f"--first-steps {steps}: the student has {sampler.num_evaluations} NFE; give it more --steps")


@dataclass(frozen=True)
class Estimates:
    """One model's estimates of x0 at every state of some trajectories.

    of: the model's name; states: whose trajectories.  ratios: the states' noise-to-signal ratios, [NFE].
    images: [N, NFE, C, H, W] in [-1, 1].
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
    """The decoded x0 estimates of each model asked, at every evaluation of `walker`'s sampler.

    walker: makes the trajectories of images 0 .. count - 1.  states: what to call them.
    """
    made: dict[str, list[Tensor]] = {name: [] for name in asked}
    for index in torch.arange(count).split(batch):
        visited = _trajectory(walker, index)
        path = walker.model.denoiser.path
        ratios = tuple(float(path.ratio(state.t[0])) for state in visited)
        for name, model in asked.items():
            denoiser = model.model.denoiser
            cond = denoiser.class_cond(walker.labels_of(index))
            columns = []
            for state in visited:
                x, t = on_path(state.x, state.t, path, denoiser.path)
                with threads(sampling_threads(denoiser, x.shape[1:])):
                    estimate = begin(model.guidance, denoiser, cond)(x, t).to(x.dtype)
                columns.append(model.decode(estimate).float().cpu())
            made[name].append(torch.stack(columns, 1))
    return [Estimates(name, states, ratios, torch.cat(parts)) for name, parts in made.items()]


def _trajectory(walker: ModelImageGenerator, index: Tensor) -> list[Evaluation]:
    seen = Recorder(walker.guidance)
    walker.before_decoding(index, seen)
    return seen.evaluations
