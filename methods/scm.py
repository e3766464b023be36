"""Simplifying, Stabilizing & Scaling Continuous-Time Consistency Models (sCM).  Lu & Song 2024, arXiv:2410.11081.

Implemented: consistency distillation and training in TrigFlow, x = cos(tau) x0 + sin(tau) sigma_data z, the tangent by
forward-mode differentiation, its normalisation and clipping, its warm-up, the adaptive weight, guidance of the teacher.
Teacher and student may live on any path: TrigFlow is one more name for its noise levels, tan(tau) = ratio / sigma_data.
With F = (cos(tau) x - D) / (sigma_data sin(tau)), the network of EDM's frame with its sign turned, D is the paper's f.
Not implemented: changes to the network (positional embedding of time, double normalisation), guidance as an input.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.guidance.check import check_guidance
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, LogNormal
from diffdistill.distillation.dropout_masks import masks_again
from diffdistill.distillation.first_noise import check_first_noise
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.trigflow import angle, normalised, tangent_error, tangent_parts
from diffdistill.networks.time_weight import TimeWeight
from diffdistill.settings.schema import NonNegative, Number, Positive, UserError, field, schema


@schema
class SCM(Method):
    """velocity: of the trajectory, by the teacher (distillation) or from data and noise (training).  guidance: of the
    teacher.  time_law: of the ratio, sigma_data tan(tau); the paper's std on ImageNet-64 is 1.6.  tangent: how it is
    bounded.  warmup: of its second part, in iterations."""

    name: Literal["scm"] = "scm"
    steps: FewSteps = field(default_factory=lambda: FewSteps(init_ratio=80.0))
    velocity: Literal["teacher", "data"] = "teacher"
    guidance: Number = 1.0
    time_law: AnyTimeDistribution = field(default_factory=lambda: LogNormal(mean=-1.0, std=1.4))
    tangent: Literal["normalise", "clip"] = "normalise"
    tangent_constant: Positive = 0.1
    warmup: NonNegative = 10_000
    adaptive_weight: bool = True

    student = "generator"
    needs_images = True

    @property
    def keeps_teacher(self) -> bool:
        return self.velocity == "teacher"

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("generator", *(("weight",) if self.adaptive_weight else ())), "generator_loss"),)

    def sampler(self, problem: Problem) -> FewSteps:
        return self.steps

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """Raises UserError where guidance has no meaning to the teacher."""
        check_first_noise(self.name, self.steps, problem.path)
        players = problem.copies("generator")
        assert problem.teacher is not None
        if self.guidance != 1 and not self.keeps_teacher:
            raise UserError(f"method.guidance: {self.guidance} needs velocity: teacher, which it guides; use 1")
        check_guidance(problem.teacher, "method.guidance", self.guidance)
        return players | ({"weight": TimeWeight()} if self.adaptive_weight else {})

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        return {
            "t": self.time_law(rng.uniform("t"), problem.path),
            "eps": rng.normal("eps", problem.image_shape),
            "ramp": torch.tensor(min(1.0, rng.step / self.warmup) if self.warmup else 1.0),
        }

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """e^w / N ||F_theta - sg[F_theta + g]||^2 - w, equation 8: F is to follow the tangent g, w(tau) is learned."""
        student, t, cond = players.generator, draw["t"], batch.cond
        x_t = student.path.diffuse(batch.images, draw["eps"], t)
        with masks_again(x_t):  # F and its derivative have the same dropout
            tangent = self.tangent_of(players, draw, batch, x_t)
        error = tangent_error(student, x_t, t, cond, tangent)
        weight = players.weight(angle(student, t)) if self.adaptive_weight else torch.zeros_like(error)
        return Loss((weight.exp() * error - weight).mean(), {"tangent": error.mean().detach()})

    @torch.no_grad()
    def tangent_of(self, players: Players, draw: Draw, batch: Batch, x_t: Tensor) -> Tensor:
        """g = cos(tau) df/dtau along the trajectory, its second part by the ramp, bounded."""
        student, t, cond = players.generator, draw["t"], batch.cond
        towards = players.teacher(x_t, t, cond, guidance=self.guidance) if self.keeps_teacher else batch.images
        first, second = tangent_parts(student, x_t, t, cond, towards)
        return self.bounded(first + draw["ramp"] * second)

    def bounded(self, tangent: Tensor) -> Tensor:
        """g / (||g|| + c), the norm over each sample, or g cut at 1 in every value."""
        return tangent.clamp(-1, 1) if self.tangent == "clip" else normalised(tangent, self.tangent_constant)
