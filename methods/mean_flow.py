"""Mean Flows for One-step Generative Modeling (MeanFlow).  Geng et al. 2025, arXiv:2505.13447.

Implemented: the MeanFlow identity with its tangent by forward-mode differentiation, the adaptive loss, the share of
r = t, guidance inside the target (omega and kappa, on an interval of t); the velocity from data, or from a teacher;
EDM's non-leaky augmentation. u and its derivative have the same dropout; estimates inside the target have none.
Flow matching's line z = (1 - t) x0 + t eps may be any path's: t = ratio / (1 + ratio). The student is a denoiser that
is told r besides, u(z, r, t) = (z - D(z, r, t)) / t, so that r = t leaves it E[x0 | z] and r = 0 is the image.
Not implemented: several steps along the line, schedules of the share.
"""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffdistill.diffusion.augmentation import augment, check_augmentation, draw_motion
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.guidance.check import check_guidance, check_null_condition
from diffdistill.diffusion.line import line, line_time, line_velocity
from diffdistill.diffusion.path import Prediction, expand
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, LogNormal
from diffdistill.distillation.derivatives import along
from diffdistill.distillation.dropout_masks import masks_again, without_dropout
from diffdistill.distillation.first_noise import check_first_noise
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.networks.guided import take_weights
from diffdistill.networks.registry import BaseNetwork
from diffdistill.networks.two_times import TwoTimesConfig
from diffdistill.settings.numbers import Width
from diffdistill.settings.schema import Fraction, NonNegative, Number, Positive, UserError, field, schema


@schema
class MeanFlow(Method):
    """velocity: of the line, by the teacher (distillation) or from data and noise.  guidance, kappa: omega and kappa.
    guidance_interval: of t, where they hold.  class_dropout: share of samples that train the student's
    unconditional estimate.  share_equal: of samples with r = t; on CIFAR-10 the paper has 0.25.  power,
    constant: of the loss.  augment: probability of each of EDM's transforms; the paper's on CIFAR-10 is 0.12."""

    name: Literal["mean_flow"] = "mean_flow"
    steps: FewSteps = field(default_factory=lambda: FewSteps(init_ratio=80.0))
    velocity: Literal["teacher", "data"] = "teacher"
    guidance: Number = 1.0
    kappa: Annotated[float, Field(ge=0, lt=1)] = 0.0
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    class_dropout: Fraction = 0.1
    time_law: AnyTimeDistribution = field(default_factory=lambda: LogNormal(mean=-0.4, std=1.0))
    share_equal: Fraction = 0.75
    power: NonNegative = 1.0
    constant: Positive = 0.01
    augment: Fraction = 0.0
    width: Width = 64

    student = "generator"
    needs_images = True
    updates = (Update(("generator",), "generator_loss"),)

    @property
    def keeps_teacher(self) -> bool:
        return self.velocity == "teacher"

    @property
    def mixes(self) -> bool:
        """Whether the target holds the student's own estimates."""
        return self.velocity == "data" and (self.guidance, self.kappa) != (1, 0)

    def sampler(self, problem: Problem) -> FewSteps:
        return self.steps

    def student_model(
        self, network: BaseNetwork, predicts: Prediction, problem: Problem
    ) -> tuple[TwoTimesConfig, Prediction]:
        return TwoTimesConfig(base=network, width=self.width), predicts

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """The teacher's weights and a new input. Raises UserError where guidance has no meaning to the teacher."""
        check_first_noise(self.name, self.steps, problem.path)
        teacher, student = problem.teacher, problem.network
        if teacher is None or student is None:
            raise UserError("teacher: this method starts from a teacher; name a pretrained run")
        if self.mixes:
            check_null_condition(teacher, f"method.guidance: {self.guidance} with velocity: data")
        else:
            check_guidance(teacher, "method.guidance", self.guidance)
        check_augmentation(teacher, "augment", self.augment)
        take_weights(student, problem.initial.get("generator", teacher))
        return {"generator": student}

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        """t and r by the same law, the greater is t."""
        uniforms, path = rng.uniforms(["s", "t", "equal"]), problem.path
        times = torch.stack([line_time(path.ratio(self.time_law(uniforms[name], path))) for name in ("s", "t")])
        last = times.amax(0)
        return {
            "t": last,
            "r": torch.where(uniforms["equal"] < self.share_equal, last, times.amin(0)),
            "eps": rng.normal("eps", problem.image_shape),
            **({"is_dropped": rng.uniform("class dropout") < self.class_dropout} if self.mixes else {}),
            **({"motion": draw_motion(rng, self.augment)} if self.augment else {}),
        }

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """sg[(||e||^2 + c)^-p] ||e||^2 with e = u - sg[u_target], equation 22."""
        if self.augment:
            images, labels = augment(batch.images, draw["motion"])
            batch = replace(batch, images=images, cond=replace(batch.cond, augmentation=labels))
        z = line(batch.images, draw["eps"], draw["t"])
        if self.mixes:
            batch = replace(batch, cond=players.generator.drop_condition(batch.cond, draw["is_dropped"]))
        with masks_again(z):
            mean = self.mean_velocity(players, z, draw["r"], draw["t"], batch.cond)
        error = (mean - self.target(players, draw, batch, z)).square().flatten(1).sum(1)
        weight = (error.detach() + self.constant) ** -self.power
        return Loss((weight * error).mean(), {"error": error.mean().detach()})

    @torch.no_grad()
    def target(self, players: Players, draw: Draw, batch: Batch, z: Tensor) -> Tensor:
        """v - (t - r) du/dt, the derivative along z' = v, t' = 1: the MeanFlow identity, equations 10 and 11."""
        r, t = draw["r"], draw["t"]
        velocity = self.velocity_at(players, draw, batch, z).to(z.dtype)
        directions, student = (velocity, torch.ones_like(t)), players.generator
        _, change = along(
            lambda z, t: self.mean_velocity(players, z, r, t, batch.cond), (z, t), directions, network=student
        )
        return velocity - expand(t - r, z) * change

    def velocity_at(self, players: Players, draw: Draw, batch: Batch, z: Tensor) -> Tensor:
        """eps - x0, or the teacher's expectation of it, guided on the interval: equation 19 with kappa, appendix."""
        t, cond = draw["t"], batch.cond
        low, high = self.guidance_interval
        is_guided = (t >= low) & (t <= high)
        if self.velocity == "teacher":
            w = torch.where(is_guided, self.guidance, 1.0) if self.guidance != 1 else 1.0
            return line_velocity(players.teacher, z, t, cond, guidance=w)
        plain = draw["eps"] - batch.images
        if not self.mixes:
            return plain
        null = players.generator.unconditional(cond)
        with without_dropout(players.generator):
            free, own = (self.mean_velocity(players, z, t, t, c) for c in (null, cond))
        mixed = self.guidance * plain + (1 - self.guidance - self.kappa) * free + self.kappa * own
        is_guided = is_guided & ~draw["is_dropped"]
        return torch.where(is_guided.reshape(-1, *[1] * (z.ndim - 1)), mixed, plain)

    def mean_velocity(self, players: Players, z: Tensor, r: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """u(z, r, t, c), the velocity's mean from r to t.  z: [B, ...]; r, t: [B]."""
        return line_velocity(players.generator, z, t, replace(cond, end_time=r))
