"""rCM: Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency.  arXiv:2510.08431.

Implemented: sCM's tangent on real images with the guided teacher's velocity and rCM's own warm-up, and beside it
DMD2's field on what the student makes of noise in steps at drawn levels, of which the last has a gradient (backward
simulation); a fake score. Matching and fake score begin when the warm-up is over.
Not implemented: a student that steps in every iteration of the warm-up; the released code draws the number of steps in
turn and lets the fake score rest where the student steps, which here is drawn and does not.
The released losses are sums over pixels and these are means, in the same ratio. A normalised tangent is no longer than
1 whatever an image's size, and the matching's field grows with its root: `matching_weight` depends on the size.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.path import expand
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, Karras, LogNormal
from diffdistill.distillation.dropout_masks import masks_again
from diffdistill.distillation.first_noise import check_first_noise
from diffdistill.distillation.levels import DrawnLevels
from diffdistill.distillation.losses import DenoisingWeight, field_loss
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.scales import FakeScale, Scale, scale_in
from diffdistill.distillation.score_distillation import (
    critics_loss,
    draw_step,
    generate,
    guided_field,
    sample_at_hand,
    start_players,
)
from diffdistill.distillation.trigflow import angle, normalised, tangent_error, tangent_parts
from diffdistill.settings.numbers import NonNegativeInt, SamplingSteps
from diffdistill.settings.schema import NonNegative, Positive, field, schema


@schema
class RCM(Method):
    """time_law, fake_time_law: of the matching's noise and of the fake score's; consistency_time_law: of the
    tangent's.  consistency_weight, matching_weight: of mean squares; the second is the paper's lambda."""

    name: Literal["rcm"] = "rcm"
    steps: FewSteps = field(default_factory=lambda: FewSteps(init_ratio=80.0))
    levels: DrawnLevels | None = field(default_factory=lambda: DrawnLevels(order="capped"))  # null: those of `steps`
    guidance: Scale = 1.0  # w of D_u + w (D_c - D_u), of the teacher, in both parts
    consistency_weight: NonNegative = 1.0
    consistency_time_law: AnyTimeDistribution = field(default_factory=lambda: LogNormal(mean=-1.0, std=1.4))
    tangent_constant: Positive = 0.1
    warmup: NonNegativeInt = 1000
    matching_weight: NonNegative = 0.01
    time_law: AnyTimeDistribution = field(default_factory=Karras)
    normaliser_minimum: Positive = 1e-5
    fake_time_law: AnyTimeDistribution = field(default_factory=LogNormal)
    fake_weight: DenoisingWeight = "edm"
    fake_updates: SamplingSteps = 5  # of the fake score to one of the generator

    student = "generator"

    def __post_init__(self) -> None:
        if not (self.consistency_weight or self.matching_weight):
            raise ValueError("matching_weight: with consistency_weight = 0 there is no loss; set one of them")
        if self.warmup and not self.consistency_weight:
            raise ValueError("warmup: is for the consistency loss, whose weight is 0; use 0")

    @property
    def scales(self) -> dict[str, FakeScale]:
        return {"guidance": self.guidance, "fake_guidance": 1.0}

    @property
    def needs_images(self) -> bool:
        return self.consistency_weight > 0

    @property
    def updates(self) -> tuple[Update, ...]:
        if not self.matching_weight:
            return (Update(("generator",), "generator_loss"),)
        fake = Update(("fake",), "fake_loss", start=self.warmup)
        return Update(("generator",), "generator_loss", self.fake_updates), fake

    def sampler(self, problem: Problem) -> FewSteps:
        return self.steps

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        check_first_noise(self.name, self.steps, problem.path)
        players = start_players(problem, guidance=self.guidance)
        return players if self.matching_weight else {"generator": players["generator"]}

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        laws = {"": self.time_law, "fake ": self.fake_time_law}
        laws |= {"data ": self.consistency_time_law} if self.consistency_weight else {}
        numbers = draw_step(rng, problem, self.steps, laws, levels=self.levels, scales=self.scales)
        if self.levels:  # the last of them has the gradient
            numbers["step"] = torch.tensor(numbers["times"].shape[1] - 1)
        numbers["ramp"] = torch.tensor(min(1.0, rng.step / self.warmup) if self.warmup else 1.0)
        numbers["is_matched"] = torch.tensor(int(rng.step >= self.warmup))
        return numbers

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """consistency_weight / N ||F - sg[F + g]||^2 + matching_weight / N ||x - sg[x - v]||^2, v of `dmd2`."""
        total, logs, carry = batch.images.new_zeros(()), dict[str, Tensor](), dict[str, Tensor]()
        if self.consistency_weight:
            error = self.consistency_error(players, draw, batch).mean()
            total, logs["tangent"] = total + self.consistency_weight * error, error.detach()
        if self.matching_weight and int(draw["is_matched"]):
            x = generate(players, draw, self.steps)
            pushed = guided_field(players, draw, x, scales=self.scales, minimum=self.normaliser_minimum)
            matching = 2 * field_loss(x, pushed)
            total, logs["matching"] = total + self.matching_weight * matching, matching.detach()
            carry["x"] = x.detach()
        return Loss(total, logs, carry=carry)

    def consistency_error(self, players: Players, draw: Draw, batch: Batch) -> Tensor:
        """1 / N ||F - sg[F + g]||^2 of each sample, [B], at real images noised."""
        student, t, cond = players.generator, draw["data t"], batch.cond
        x_t = student.path.diffuse(batch.images, draw["data eps"], t)
        with masks_again(x_t):  # F and its derivative have the same dropout
            tangent = self.tangent_of(players, draw, batch, x_t)
        return tangent_error(student, x_t, t, cond, tangent)

    @torch.no_grad()
    def tangent_of(self, players: Players, draw: Draw, batch: Batch, x_t: Tensor) -> Tensor:
        """sCM's g, its first part by sqrt(1 - k^2 sin^2) / cos and its second by the ramp k, normalised."""
        student, t, k = players.generator, draw["data t"], draw["ramp"]
        guidance = scale_in(draw, self.scales, "guidance")
        towards = players.teacher(x_t, t, batch.cond, guidance=guidance)
        first, second = tangent_parts(student, x_t, t, batch.cond, towards)
        tau = angle(student, t)
        share = (1 + (1 - k**2) * tau.tan() ** 2).sqrt()  # of the first part
        return normalised(expand(share, first) * first + k * second, self.tangent_constant)

    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Denoising on the generator's samples."""
        x = sample_at_hand(players, draw, self.steps)
        return critics_loss(players, draw, batch, x, weight=self.fake_weight, gan_weight=None, features="fake")
