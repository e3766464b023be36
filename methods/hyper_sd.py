"""Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis.  Ren et al. 2024, arXiv:2404.13686.

Implemented: trajectory-segmented consistency distillation (TSCD) in stages of fewer and fewer segments, with MSE and
adversarial losses, guidance in the teacher's step, the one-step stage by score distillation, and feedback by rewards.
`ends: fixed` is phased consistency (PCM, Wang et al. 2024, arXiv:2405.18407).
LoRAs trained apart: `diffdistill merge`. Not implemented: the perceptual loss by segmentation, noise perturbation.
Unknown from the paper, so settings with defaults of ours: every weight, grid, threshold and `target_decay`.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.sampling import DDIM, TCD, transfer
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, Karras, LogNormal
from diffdistill.distillation.averages import follow
from diffdistill.distillation.first_noise import check_first_noise
from diffdistill.distillation.losses import (
    DenoisingWeight,
    field_loss,
    gan_discriminator_loss,
    gan_generator_loss,
    zero_nonfinite,
)
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.rewards import Feedback, check_feedback
from diffdistill.distillation.score_distillation import (
    condition,
    critics_loss,
    draw_step,
    generate,
    matching_field,
    start_players,
    tapped,
)
from diffdistill.distillation.segments import Ends, Stage, Stages, draw_jump, stage_at, stage_starts
from diffdistill.networks.discriminator import make_head
from diffdistill.settings.schema import Fraction, Number, Positive, field, schema

STAGES = (
    Stage(segments=8),
    Stage(segments=4, grid_steps=16, adversarial_weight=0.1),
    Stage(segments=2, grid_steps=8, mse_weight=0.5, adversarial_weight=0.5),
    Stage(segments=1, grid_steps=4, mse_weight=0.1, adversarial_weight=1.0),
)
"""The paper's numbers of segments, and of steps in its figure 2; weights and the first grid are ours."""


@schema
class HyperSD(Method):
    """Settings, in the paper's terms. A critic is trained from the first stage on that has a weight for it."""

    name: Literal["hyper_sd"] = "hyper_sd"
    stages: Stages = STAGES
    steps: TCD = field(default_factory=lambda: TCD(num_steps=1, grid=DDIM(num_steps=64)))
    stage_teacher: Literal["previous", "base"] = "previous"
    ends: Ends = "random"
    distance: Literal["mse", "huber"] = "mse"
    huber_width: Positive = 1e-3
    guidance: tuple[Number, Number] = (1.0, 1.0)
    target_decay: Fraction = 0.95
    score_time_law: AnyTimeDistribution = field(default_factory=Karras)
    fake_time_law: AnyTimeDistribution = field(default_factory=LogNormal)
    fake_weight: DenoisingWeight = "edm"
    normaliser_minimum: Positive = 1e-5
    feedback: tuple[Feedback, ...] = ()

    student = "generator"
    needs_images = True

    def __post_init__(self) -> None:
        if self.guidance[0] > self.guidance[1]:
            raise ValueError(f"guidance: must be increasing: {list(self.guidance)}")
        for stage in self.stages:
            stage.check(self.steps.grid)

    @property
    def updates(self) -> tuple[Update, ...]:
        critics = {"discriminator": self._start("adversarial_weight"), "fake": self._start("score_weight")}
        return (
            Update(("generator",), "generator_loss"),
            *(Update((n,), f"{n}_loss", start=first) for n, first in critics.items() if first is not None),
        )

    @property
    def rewards(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.reward for one in self.feedback))

    def sampler(self, problem: Problem) -> TCD:
        return self.steps

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        check_first_noise(self.name, self.steps, problem.path)
        players = start_players(problem, guidance=next((w for w in self.guidance if w != 1), 1.0))
        check_feedback(self.feedback, problem.teacher)
        if self._start("score_weight") is None:
            del players["fake"]
        if self._start("adversarial_weight") is not None:
            players["discriminator"] = make_head(tapped(problem, players, "teacher"), problem.least_shape)
        copies = ("target", "solver") if self.stage_teacher == "previous" else ("target",)
        return players | {name: deepcopy(players["generator"]) for name in copies}

    def after_step(self, players: Players, stored: Mapping[str, Tensor], step: int) -> None:
        """theta- follows theta; a new stage's solver is what the stage before has learned."""
        follow(players.target, players.generator, 1 - self.target_decay)
        if "solver" in players and step in stage_starts(self.stages):
            players.solver.load_state_dict(players.target.state_dict())

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        index, (low, high) = stage_at(rng.step, self.stages), self.guidance
        return {
            "stage": torch.tensor(index),
            "asks student": torch.tensor(index > 0 or "generator" in problem.initial),
            **draw_jump(rng, problem.path, self.stages[index], self.steps.grid, self.ends),
            **({"w": low + rng.uniform("w") * (high - low)} if self.guidance != (1, 1) else {}),
            **rng.normals(["data eps", "gan eps", "gan real eps"], problem.image_shape),
            **draw_step(rng, problem, self.steps, {"": self.score_time_law, "fake ": self.fake_time_law}),
        }

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Consistency along the segment, plus the shares of discriminator, score distillation and feedback."""
        stage = self.stages[int(draw["stage"])]
        jump, target = self.jumps(players, draw, batch)
        consistency = self._distance(jump - target)
        total, logs = stage.mse_weight * consistency, {"consistency": consistency.detach()}
        carry = {"jump": jump.detach(), "target": target}
        if stage.adversarial_weight:
            adversarial = gan_generator_loss(self._logits(players, draw, jump, "gan eps", batch.cond))
            total = total + stage.adversarial_weight * adversarial
            logs["gan"] = adversarial.detach()
        if self.feedback or any(begun.score_weight for begun in self.stages[: int(draw["stage"]) + 1]):
            x = generate(players, draw, self.steps)
            if stage.score_weight:
                push = self.field(players, draw, x)
                total = total + stage.score_weight * field_loss(x, push)
                logs["field"] = push.abs().mean()
            for feedback in self.feedback:
                loss = feedback.loss(x, condition(players, draw), players.teacher)
                total, logs[feedback.reward] = total + loss, loss.detach()
            carry["x"] = x.detach()
        return Loss(total, logs, carry)

    def jumps(self, players: Players, draw: Draw, batch: Batch) -> tuple[Tensor, Tensor]:
        """From x_t_n to t_e: the student's one jump, and the solver's step and theta-'s jump after it.

        Equations 4, 5 and 12.  Each is a denoiser's x0 carried by DDIM; no network is told where it jumps to.
        """
        path, cond, (t, after, end) = players.teacher.path, batch.cond, (draw[i] for i in ("start", "next", "end"))
        x = path.diffuse(batch.images, draw["data eps"], t)
        jump = transfer(path, x, players.generator(x, t, cond), t, end)
        is_student = self.stage_teacher == "previous" and bool(draw["asks student"])
        solver, w = (players.solver, 1.0) if is_student else (players.teacher, draw.get("w", 1.0))
        with torch.no_grad():
            x_after = transfer(path, x, solver(x, t, cond, guidance=w), t, after).to(x.dtype)
            # Where the step has arrived nothing is left to jump over, and there may be no network for time 0.
            asked = torch.where(after > end, after, t)
            jumped = transfer(path, x_after, players.target(x_after, asked, cond), asked, end)
        has_arrived = (after == end).reshape(-1, *[1] * (x.ndim - 1))
        return jump, torch.where(has_arrived, x_after, jumped)

    @torch.no_grad()
    def field(self, players: Players, draw: Draw, x: Tensor) -> Tensor:
        """DMD's gradient on the images of the student's own steps.  Section 3.3."""
        t, x_t = draw["t"], players.teacher.path.diffuse(x, draw["eps"], draw["t"])
        asked, told = (condition(players, draw, role=role) for role in ("teacher", "fake"))
        real, fake = players.teacher(x_t, t, asked, guidance=draw.get("w", 1.0)), players.fake(x_t, t, told)
        return zero_nonfinite(matching_field(x, fake, real, minimum=self.normaliser_minimum))

    def discriminator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Tell the student's jumps from their targets, which stand for the real ones."""
        real, fake = (
            self._logits(players, draw, x, eps, batch.cond)
            for x, eps in ((draw["target"], "gan real eps"), (draw["jump"], "gan eps"))
        )
        accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return Loss(gan_discriminator_loss(real, fake), {"accuracy": accuracy})

    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Denoising on the images of the student's own steps."""
        return critics_loss(players, draw, batch, draw["x"], weight=self.fake_weight, gan_weight=None, features="fake")

    def _logits(self, players: Players, draw: Draw, x: Tensor, noise: str, cond: Cond) -> Tensor:
        """The head on the teacher's bottleneck, at a level of the same segment, as PCM does it."""
        noised = players.teacher.path.renoise(x, draw[noise], draw["end"], draw["judged"])
        return players.discriminator(players.teacher.features(noised, draw["judged"], cond))

    def _distance(self, gap: Tensor) -> Tensor:
        """Mean square, or PCM's Huber distance of every value."""
        square, width = gap**2, self.huber_width
        return (square if self.distance == "mse" else (square + width**2).sqrt() - width).mean()

    def _start(self, weight: str) -> int | None:
        """The iteration at which the first stage with this weight begins."""
        starts = zip(self.stages, stage_starts(self.stages), strict=True)
        return next((start for stage, start in starts if getattr(stage, weight)), None)
