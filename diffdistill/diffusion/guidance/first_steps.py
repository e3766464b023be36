"""Diversity kept: a few-step student whose first steps are its teacher's.  Gandikota & Bau 2025, arXiv:2503.10637.

A distilled model settles an image's layout in its first step, where a diffusion model is still undecided. With the
teacher in that step and the student in the others the layouts are as many as the teacher's, at the student's cost.
"""

from dataclasses import dataclass
from itertools import count

from torch import Tensor

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.guidance.policies import Guidance, Guided, begin
from diffdistill.diffusion.path import Path, expand


@dataclass(frozen=True)
class FirstSteps:
    """A policy: `teacher` makes the first `num_evaluations` NFE of a sampling run, the sampler's denoiser the others.

    guidance: of the teacher.  rest: of the denoiser.  The sampler stays the student's. A teacher on
    another path is evaluated at the same noise-to-signal ratio, of the state scaled as it is there.
    """

    num_evaluations: int
    teacher: Denoiser
    guidance: Guidance = 1.0
    rest: Guidance = 1.0

    def begin(self, denoiser: Denoiser, cond: Cond) -> Guided:
        told = NO_COND if cond.label is None else self.teacher.class_cond(cond.label)
        first, rest = begin(self.guidance, self.teacher, told), begin(self.rest, denoiser, cond)
        paths, number = (denoiser.path, self.teacher.path), count()

        def estimate(x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
            if next(number) >= self.num_evaluations:
                return rest(x, t, s)
            (there, time), following = on_path(x, t, *paths), s if s is None else on_path(x, s, *paths)[1]
            return first(there, time, following).to(x.dtype)

        return estimate


def on_path(x: Tensor, t: Tensor, path: Path, other: Path) -> tuple[Tensor, Tensor]:
    """x [B, ...] at t [B] of one path as another has it, at the same noise-to-signal ratio or the nearest that it has.

    The identity where the paths are the same.
    """
    if path == other:
        return x, t
    time = other.whole(other.time_of_ratio(path.ratio(t)).clamp(other.t_min, other.t_max))
    return (x * expand(other.sigma(time) / path.sigma(t), x)).to(x.dtype), time
