"""Improved Techniques for Training Consistency Models (iCT).  Song & Dhariwal 2023, arXiv:2310.14189.

Implemented: consistency training and distillation between two discrete noise levels, the target by the student itself
and no average of it, the curriculum of doubling grids with its erf law, the pseudo-Huber distance on a sample's norm,
guidance of the teacher; Easy Consistency Tuning (ECT, Geng et al. 2024, arXiv:2406.14548) with `curriculum: nearing`.
No derivative of a network by its inputs is taken, unlike in `scm`, so that the weights may be shared out.
Not implemented: LPIPS as the distance, which the paper gives up; Fourier features of a small scale. The paper's
settings of its optimiser and dropout were not to be had: those of the configs are ours.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.guidance.check import check_guidance
from diffdistill.diffusion.path import expand
from diffdistill.diffusion.sampling import FewSteps, transfer
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, LogNormal
from diffdistill.distillation.curricula import Curriculum, Doubling
from diffdistill.distillation.dropout_masks import masks_again
from diffdistill.distillation.first_noise import check_first_noise
from diffdistill.distillation.losses import pseudo_huber
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.settings.schema import NonNegative, Number, UserError, field, schema


@schema
class Consistency(Method):
    """steps: the student's sampling steps: one, or several with fresh noise between them.
    velocity: from the noisier to the cleaner level, by the teacher (iCD) or from data and noise (iCT, ECT)
    guidance: w of the teacher's estimates
    time_law: noise levels of training, the noisier of each pair
    curriculum: how near the cleaner level is, by the step: `doubling` grids (iCT), or `nearing` it in stages (ECT)
    huber_constant: c is this times the root of the number of values; 0: the plain norm"""

    name: Literal["consistency"] = "consistency"
    steps: FewSteps = field(default_factory=lambda: FewSteps(init_ratio=80.0))
    velocity: Literal["teacher", "data"] = "teacher"
    guidance: Number = 1.0
    time_law: AnyTimeDistribution = field(default_factory=lambda: LogNormal(mean=-1.1, std=2.0))
    curriculum: Curriculum = field(default_factory=Doubling)
    huber_constant: NonNegative = 0.00054

    student = "generator"
    needs_images = True
    updates = (Update(("generator",), "generator_loss"),)

    @property
    def keeps_teacher(self) -> bool:
        return self.velocity == "teacher"

    def sampler(self, problem: Problem) -> FewSteps:
        return self.steps

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """Raises UserError where guidance has no meaning."""
        check_first_noise(self.name, self.steps, problem.path)
        players = problem.copies("generator")
        assert problem.teacher is not None
        if self.guidance != 1 and not self.keeps_teacher:
            raise UserError(f"method.guidance: {self.guidance} needs velocity: teacher, which it guides; use 1")
        check_guidance(problem.teacher, "method.guidance", self.guidance)
        return players

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        drawn = self.time_law(rng.uniform("t"), problem.path)
        t, r = self.curriculum.pair(drawn, problem.path, rng.step, problem.num_steps)
        return {"t": t, "r": r, "eps": rng.normal("eps", problem.image_shape)}

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """d(f(x_t, t), sg f(x_r, r)) / (t - r), t and r as ratios.  Equation 9 and section 3.3."""
        student, t, cond = players.generator, draw["t"], batch.cond
        x_t = student.path.diffuse(batch.images, draw["eps"], t)
        with masks_again(x_t):  # both calls have the same dropout
            target = self.target(players, draw, batch, x_t)
        distance = pseudo_huber(student(x_t, t, cond), target, self.huber_constant * math.sqrt(x_t[0].numel()))
        weight = 1 / (student.path.ratio(t) - student.path.ratio(draw["r"]))
        return Loss((weight.to(distance.device) * distance).mean(), {"distance": distance.detach().mean()})

    @torch.no_grad()
    def target(self, players: Players, draw: Draw, batch: Batch, x_t: Tensor) -> Tensor:
        """f(x_r, r) by the student, x_r the image with the same noise, or one step of the teacher's from x_t.

        At the path's least noise f is x_r / alpha itself: the boundary condition, which no network is asked for.
        """
        student, t, r, cond = players.generator, draw["t"], draw["r"], batch.cond
        if self.keeps_teacher:
            x_r = transfer(student.path, x_t, players.teacher(x_t, t, cond, guidance=self.guidance), t, r).to(x_t.dtype)
        else:
            x_r = student.path.diffuse(batch.images, draw["eps"], r)
        is_least = expand((r <= student.path.t_min).double(), x_t)
        at_least = x_r / expand(student.path.alpha(r), x_r)
        return torch.where(is_least.bool(), at_least, student(x_r, r, cond))
