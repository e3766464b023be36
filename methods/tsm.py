"""Teacher score matching: a smaller network learns its teacher's denoiser.  Song et al. 2024, arXiv:2410.23274.

The first of three stages for students smaller than their teacher (see msd.py): generator and fake score of a later run
begin as this network (`init`). Implemented: the loss on noised real images. lambda_t is not given there; it is EDM's
by default.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.path import expand
from diffdistill.diffusion.sampling import AnySampler, Heun
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, LogNormal
from diffdistill.distillation.losses import DenoisingWeight, denoising_weight
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.settings.schema import Fraction, UserError, field, schema


@schema
class TSM(Method):
    """time_law: noise levels; weight: lambda_t, of ||D - D_teacher||^2.

    class_dropout: share of samples without their class, if the teacher is trained for it; student_sampler: of
    the student, which is still a diffusion model.
    """

    name: Literal["tsm"] = "tsm"
    time_law: AnyTimeDistribution = field(default_factory=LogNormal)
    weight: DenoisingWeight = "edm"
    class_dropout: Fraction = 0.1
    student_sampler: AnySampler = field(default_factory=Heun)

    student = "student"
    needs_images = True
    trains_network = True
    updates = (Update(("student",), "student_loss"),)

    def sampler(self, problem: Problem) -> AnySampler:
        return self.student_sampler

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        if problem.network is None:
            raise UserError("model: tsm needs the student's network")
        return {"student": problem.network}

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        return {
            "t": self.time_law(rng.uniform("t"), problem.path),
            "eps": rng.normal("eps", problem.image_shape),
            "is_dropped": rng.uniform("class dropout") < self.class_dropout,
        }

    def student_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """lambda_t ||D(x_t, t, c) - D_teacher(x_t, t, c)||^2, x_t from noised real images."""
        student, teacher, t, cond = players.student, players.teacher, draw["t"], batch.cond
        if cond.label is not None and teacher.net.has_null_condition:
            cond = teacher.drop_condition(cond, draw["is_dropped"])
        x_t = teacher.path.diffuse(batch.images, draw["eps"], t)
        with torch.no_grad():
            target = teacher(x_t, t, cond)
        scale = denoising_weight(self.weight, teacher.path, t, teacher.sigma_data)
        loss = (expand(scale, x_t) * (student(x_t, t, cond) - target) ** 2).mean()
        return Loss(loss, {"matching": loss.detach()})
