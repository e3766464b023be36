"""CDM: distribution matching on schedules that are drawn and off the student's own trajectory.  arXiv:2605.06376.

Implemented: the number and the levels of the student's steps drawn in every iteration, a deterministic roll-out,
guidance and matching at noise of their own (Decoupled DMD, arXiv:2511.22677), matching once more from a point beside
the trajectory, a fake score that follows the student's weights; and the anchor of DP-DMD (arXiv:2602.03139): the first
step learns where the teacher's own ODE leads, and is not matched.
Not implemented: DP-DMD's gradient through several steps; here only the drawn step has one, as in DMD2.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.diffusion.on_device import upload
from diffdistill.diffusion.path import Path, expand
from diffdistill.diffusion.sampling import DDIM, FewSteps, transfer
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, Karras, LogNormal
from diffdistill.distillation.decoupled import Decoupled
from diffdistill.distillation.first_noise import check_first_noise
from diffdistill.distillation.levels import DrawnLevels
from diffdistill.distillation.losses import DenoisingWeight, field_loss, zero_nonfinite
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.scales import FakeScale, Scale, scale_in
from diffdistill.distillation.score_distillation import (
    call_input,
    check_followed,
    condition,
    critics_loss,
    draw_step,
    follow,
    matching_field,
    sample_at_hand,
    start_players,
)
from diffdistill.settings.numbers import SamplingSteps
from diffdistill.settings.schema import Fraction, NonNegative, Positive, UserError, field, schema


@schema
class CDM(Method):
    """Settings. A weight of 0 switches a term off."""

    name: Literal["cdm"] = "cdm"
    steps: FewSteps = field(
        default_factory=lambda: FewSteps(init_ratio=80.0, later_ratios=(8.0, 2.0, 0.5), later_noise="ddim")
    )
    levels: DrawnLevels | None = field(default_factory=DrawnLevels)  # of the steps in training; null: `steps`'
    guidance: Scale = 1.0  # w of D_u + w (D_c - D_u), of the teacher
    decoupled: Decoupled = field(default_factory=Decoupled)
    time_law: AnyTimeDistribution = field(default_factory=Karras)  # of the matching's noise, both times
    fake_time_law: AnyTimeDistribution = field(default_factory=LogNormal)
    fake_weight: DenoisingWeight = "edm"
    fake_updates: SamplingSteps = 2
    fake_follows: Fraction = 0.0  # the released code: 0.001 after each of the fake score's updates
    normaliser_minimum: Positive = 0.1
    off_trajectory_weight: NonNegative = 1.0
    off_trajectory_law: AnyTimeDistribution = field(default_factory=Karras)  # of the level beside the trajectory
    anchor_weight: NonNegative = 0.0  # DP-DMD: 0.05
    anchor_sampler: DDIM = field(default_factory=lambda: DDIM(num_steps=30))  # the teacher's
    anchor_steps: SamplingSteps = 10  # so many of its steps lead to the first step's target

    student = "generator"
    tells_teacher_class = True
    needs_images = False

    def __post_init__(self) -> None:
        if self.steps.later_noise != "ddim":
            raise ValueError("steps.later_noise: the trajectory is deterministic; use ddim")
        if self.anchor_weight and self.anchor_steps >= self.anchor_sampler.num_steps:
            raise ValueError(
                "anchor_steps: must be fewer than anchor_sampler.num_steps, the last of which ends at the image"
            )

    @property
    def scales(self) -> dict[str, FakeScale]:
        return {"guidance": self.guidance, "fake_guidance": 1.0}

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("generator",), "generator_loss", self.fake_updates), Update(("fake",), "fake_loss"))

    def sampler(self, problem: Problem) -> FewSteps:
        return self.steps

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        check_first_noise(self.name, self.steps, problem.path)
        players = start_players(problem, guidance=self.guidance)
        self.decoupled.check(self.steps, problem.path, self.levels)
        if self.fake_follows:
            check_followed(players)
        if self.anchor_weight:
            self.anchor_times(problem.path)
        return players

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        laws = {"": self.time_law, "fake ": self.fake_time_law, "guidance ": self.decoupled.time_law}
        laws |= {"beside ": self.time_law} if self.off_trajectory_weight else {}
        numbers = draw_step(rng, problem, self.steps, laws, levels=self.levels, scales=self.scales)
        numbers["guidance t"] = self.decoupled.times(rng, problem.path, self.steps, numbers)
        if self.off_trajectory_weight:
            numbers["point t"] = self.off_trajectory_law(rng.uniform("point t"), problem.path)
        return numbers

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Matching at the drawn step, once more off its trajectory, and the first step's anchor."""
        cond, path = condition(players, draw), players.teacher.path
        start = call_input(players, draw, self.steps, cond=cond)
        x = players.generator(start.x, start.t, cond)
        is_anchored = self.anchor_weight > 0 and int(draw["step"]) == 0
        if is_anchored:
            total = self.anchor_weight * F.mse_loss(x, self.anchor(players, draw, start.x))
            logs = {"anchor": total.detach()}
        else:
            minimum = self.normaliser_minimum
            pushed = self.decoupled.field(players, draw, x, scales=self.scales, minimum=minimum, alpha_power=0)
            total = field_loss(x, pushed)
            logs = {"matching": total.detach(), "field": pushed.abs().mean()}
        if self.off_trajectory_weight:
            point = transfer(path, start.x, x.detach(), start.t, draw["point t"])
            made = players.generator(point, draw["point t"], cond)
            beside = field_loss(made, self.field(players, draw, made))
            total, logs = total + self.off_trajectory_weight * beside, logs | {"beside": beside.detach()}
        return Loss(total, logs, carry={"x": x.detach()})

    @torch.no_grad()
    def field(self, players: Players, draw: Draw, x: Tensor) -> Tensor:
        """(D_fake - D_c) / nu at noise of its own, for what is made beside the trajectory: it is not guided."""
        t = draw["beside t"]
        x_t = players.teacher.path.diffuse(x, draw["beside eps"], t)
        fake = players.fake(x_t, t, condition(players, draw, role="fake"))
        teacher = players.teacher(x_t, t, condition(players, draw, role="teacher"))
        return zero_nonfinite(matching_field(x, fake, teacher, minimum=self.normaliser_minimum))

    @torch.no_grad()
    def anchor(self, players: Players, draw: Draw, noise: Tensor) -> Tensor:
        """The image whose straight way from the first step's input meets the teacher's guided ODE after its steps."""
        teacher, path = players.teacher, players.teacher.path
        told, guidance = condition(players, draw, role="teacher"), scale_in(draw, self.scales, "guidance")
        times = [time.expand(len(noise)) for time in upload(self.anchor_times(path), noise.device)]
        reached = noise
        for t, following in pairwise(times):
            reached = transfer(path, reached, teacher(reached, t, told, guidance=guidance), t, following)
        ratio = path.sigma(times[-1]) / path.sigma(times[0])
        signal = path.alpha(times[-1]) - ratio * path.alpha(times[0])
        return (reached - expand(ratio, noise) * noise) / expand(signal, noise)

    def anchor_times(self, path: Path) -> Tensor:
        """The first step's level and the next of the sampler's below it, [anchor_steps + 1].  Raises UserError."""
        first, grid = self.steps.times(path)[:1], self.anchor_sampler.times(path)
        below = grid[grid < first]
        if len(below) < self.anchor_steps:
            raise UserError(f"method.anchor_steps = {self.anchor_steps}: only {len(below)} are below the first step")
        return torch.cat([first, below[: self.anchor_steps]])

    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Denoising on the drawn step's images."""
        x = sample_at_hand(players, draw, self.steps)
        return critics_loss(players, draw, batch, x, weight=self.fake_weight, gan_weight=None, features="fake")

    def after_update(self, players: Players, carried: Mapping[str, Tensor]) -> None:
        if self.fake_follows and "x" in carried:  # the generator's
            follow(players, self.fake_follows)
