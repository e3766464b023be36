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

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.guidance.check import check_guidance
from diffdistill.diffusion.path import expand
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, LogNormal
from diffdistill.distillation.derivatives import along
from diffdistill.distillation.dropout_masks import masks_again
from diffdistill.distillation.first_noise import check_first_noise
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.networks.time_weight import TimeWeight
from diffdistill.settings.schema import NonNegative, Number, Positive, UserError, field, schema


@schema
class SCM(Method):
    """velocity: of the trajectory, by the teacher (distillation) or from data and noise (training).  guidance: of the
    teacher.  time_law: of the ratio, sigma_data tan(tau); the paper's std on ImageNet-64 is 1.6.  tangent: how it is
    bounded.  warmup: iterations over which its second part is faded in."""

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
        tau = angle(student, t)
        estimate = student(x_t, t, cond)
        output = -estimate / expand(student.sigma_data * tau.sin(), estimate)  # F, but for what has no gradient
        error = (output - output.detach() - tangent).square().flatten(1).mean(1)
        weight = players.weight(tau) if self.adaptive_weight else torch.zeros_like(error)
        return Loss((weight.exp() * error - weight).mean(), {"tangent": error.mean().detach()})

    @torch.no_grad()
    def tangent_of(self, players: Players, draw: Draw, batch: Batch, x_t: Tensor) -> Tensor:
        """g = cos(tau) df/dtau along the trajectory, its second part by the ramp, bounded.  Algorithm 1; section 4.1.

        With D* the teacher's estimate or the image, the first part is -cos^2(tau) (D* - D) / sin(tau): it alone makes
        the student denoise as D* does. The second makes f constant along the trajectory.
        """
        student, t, cond = players.generator, draw["t"], batch.cond
        tau = angle(student, t)
        cos, sin = expand(tau.cos(), x_t), expand(tau.sin(), x_t)
        x = x_t * cos / expand(student.path.alpha(t), x_t)
        towards = players.teacher(x_t, t, cond, guidance=self.guidance) if self.keeps_teacher else batch.images
        velocity = (cos * x - towards) / sin
        directions = velocity.to(x.dtype), torch.ones_like(tau)
        estimate, change = along(
            lambda x, tau: consistency(student, x, tau, cond), (x, tau), directions, network=student
        )
        first = -(cos**2) * (towards - estimate) / sin
        return self.bounded(first + draw["ramp"] * (cos * change - first))

    def bounded(self, tangent: Tensor) -> Tensor:
        """g / (||g|| + c), the norm over each sample, or g cut at 1 in every value."""
        if self.tangent == "clip":
            return tangent.clamp(-1, 1)
        norm = tangent.flatten(1).norm(dim=1)
        return tangent / expand(norm + self.tangent_constant, tangent)


def angle(denoiser: Denoiser, t: Tensor) -> Tensor:
    """tau in (0, pi/2), float64 [B], of the path's time t [B]."""
    return torch.atan(denoiser.path.ratio(t) / denoiser.sigma_data)


def consistency(denoiser: Denoiser, x: Tensor, tau: Tensor, cond: Cond) -> Tensor:
    """f(x, tau, c) of TrigFlow's x: [B, ...], by a denoiser on any path."""
    path = denoiser.path
    t = path.time_of_ratio(denoiser.sigma_data * tau.tan())
    estimate: Tensor = denoiser(x * expand(path.alpha(t) / tau.cos(), x), t, cond)
    return estimate
