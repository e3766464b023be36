"""Pairs of noise and the image that a teacher's ODE makes of it."""

import torch
from torch import Tensor

from diffdistill.diffusion.denoiser import device_of
from diffdistill.diffusion.sampling import Sampler
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Problem
from diffdistill.settings.schema import UserError

CHUNK = 256  # noises in the teacher at once


@torch.no_grad()
def teacher_pairs(problem: Problem, seed: int, count: int, sampler: Sampler, *, guidance: float) -> dict[str, Tensor]:
    """noise, unit: [N, ...]; image: [N, ...]; label: [N] int64, of all classes, whatever the run is about.

    sampler: deterministic, so that an image is a function of its noise.  Raises UserError without a teacher.
    """
    teacher = problem.teacher
    if teacher is None:
        raise UserError("teacher: the pairs are made by one; name a pretrained run")
    rng = StepRandom(seed, 0, torch.arange(count, device=device_of(teacher)))
    noise = rng.normal("pair noise", problem.image_shape)
    label = rng.integers("pair label", max(problem.num_classes, 1))
    parts = [
        sampler(teacher, noise[i : i + CHUNK], teacher.class_cond(label[i : i + CHUNK]), guidance=guidance)
        for i in range(0, count, CHUNK)
    ]
    return {"noise": noise, "image": torch.cat(parts), "label": label}
