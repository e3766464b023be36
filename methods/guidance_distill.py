"""On Distillation of Guided Diffusion Models, stage 1.  Meng et al. 2023, arXiv:2210.03142.

Implemented: a student with w as its input that matches the guided teacher on noised real images, all weights trained.
Beside AGD it is the full student: more weights to train, and the teacher asked twice at each step.
Not implemented: stage 2, progressive distillation to fewer steps.
The paper's w is ours less 1. Its weight of the loss was not seen: the default is that of its stage 2's source.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.guidance.check import check_null_condition
from diffdistill.diffusion.path import Prediction
from diffdistill.diffusion.sampling import AnySampler, Heun
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, LogNormal
from diffdistill.distillation.losses import DenoisingWeight, denoising_error
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.networks.guided import GuidedConfig, take_weights
from diffdistill.networks.registry import BaseNetwork
from diffdistill.settings.numbers import Width
from diffdistill.settings.schema import Number, UserError, field, schema


@schema
class GuidanceDistill(Method):
    """guidance: least and greatest w.  width: of the encoding of w.  steps: the student's sampler."""

    name: Literal["guidance_distill"] = "guidance_distill"
    steps: AnySampler = field(default_factory=Heun)
    guidance: tuple[Number, Number] = (1.0, 5.0)
    width: Width = 64
    time_law: AnyTimeDistribution = field(default_factory=LogNormal)
    weight: DenoisingWeight = "truncated_snr"

    student = "student"
    needs_images = True
    updates = (Update(("student",), "student_loss"),)

    def __post_init__(self) -> None:
        if self.guidance[0] > self.guidance[1]:
            raise ValueError(f"guidance: must be increasing: {list(self.guidance)}")

    def sampler(self, problem: Problem) -> AnySampler:
        return self.steps

    def student_model(
        self, network: BaseNetwork, predicts: Prediction, problem: Problem
    ) -> tuple[GuidedConfig, Prediction]:
        return GuidedConfig(base=network, width=self.width), predicts

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """The teacher's weights and a new input. Raises UserError if w has no meaning to the teacher."""
        teacher, student = problem.teacher, problem.network
        if teacher is None or student is None:
            raise UserError("teacher: this method distils a teacher; name a pretrained run")
        check_null_condition(teacher, "teacher: guidance_distill, which adds w to a network without it,")
        take_weights(student, problem.initial.get("student", teacher))
        return {"student": student}

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        uniforms, (low, high) = rng.uniforms(["t", "w"]), self.guidance
        return {
            "t": self.time_law(uniforms["t"], problem.path),
            "w": (low + uniforms["w"] * (high - low)).float(),
            "eps": rng.normal("eps", problem.image_shape),
        }

    def student_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """w(t) ||D_student(x_t, t, c, w) - [D_u + w (D_c - D_u)](x_t, t)||^2 on real data, equation 4."""
        t, scale = draw["t"], draw["w"]
        x_t = players.teacher.path.diffuse(batch.images, draw["eps"], t)
        with torch.no_grad():
            target = players.teacher(x_t, t, batch.cond, guidance=scale)
        estimate = players.student(x_t, t, replace(batch.cond, guidance_input=scale))
        loss = denoising_error(players.student, estimate, target, t, weight=self.weight)
        return Loss(loss, {"error": loss.detach()})
