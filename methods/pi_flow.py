"""pi-Flow: Policy-Based Few-Step Generation via Imitation Distillation.  Chen et al. 2026, arXiv:2510.14974.

Implemented: the DX policy (N estimates of x0 along a segment from one NFE), imitation on the states that the policy
itself comes to, the velocity's mean over a window, the schedule that mixes teacher's steps with the policy's, guidance
of the teacher; segments that start on the student's own way from noise, or at noised data. Any path, in the coordinates
of flow matching's line. No fake score, no discriminator, no derivative by an input.
Not implemented: the GMFlow policy, polynomials, dropout of places. That all N places share the teacher's last layer, to
which each adds one of its own, is ours.
"""

from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.dx_policy import DXPolicy, Segment, line_scale
from diffdistill.diffusion.guidance.check import check_guidance
from diffdistill.diffusion.guidance.policies import begin
from diffdistill.diffusion.line import line_time
from diffdistill.diffusion.on_device import constant
from diffdistill.diffusion.path import Prediction, expand
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.score_distillation import condition
from diffdistill.networks.grid import GridConfig, start_from
from diffdistill.networks.registry import BaseNetwork
from diffdistill.settings.numbers import NonNegativeInt, Places, SamplingSteps
from diffdistill.settings.schema import Number, UserError, field, schema


@schema
class PiFlow(Method):
    """steps: how the student makes its image.  places: N.  states: of a segment, at which the teacher is asked.
    window: substeps over which the velocity is a mean.  mixing_steps: iterations in which the teacher's share of the
    way falls from 1 to 0.  guidance: w of the teacher.  start: where segments start, on the student's own way from
    noise, or at noised images."""

    name: Literal["pi_flow"] = "pi_flow"
    steps: DXPolicy = field(default_factory=DXPolicy)
    places: Places = 10
    states: SamplingSteps = 2
    window: NonNegativeInt = 3
    mixing_steps: NonNegativeInt = 0
    guidance: Number = 1.0
    start: Literal["noise", "data"] = "noise"

    student = "generator"
    updates = (Update(("generator",), "generator_loss"),)

    @property
    def needs_images(self) -> bool:
        return self.start == "data"

    def sampler(self, problem: Problem) -> DXPolicy:
        return self.steps

    def student_model(
        self, network: BaseNetwork, predicts: Prediction, problem: Problem
    ) -> tuple[GridConfig, Prediction]:
        return GridConfig(base=network, places=self.places), predicts

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """The teacher's weights under a wider last layer. Raises UserError where guidance has no meaning to the
        teacher, and where an earlier run's student has no such layer."""
        teacher, student = problem.teacher, problem.network
        if teacher is None or student is None:
            raise UserError("teacher: this method distils one; name a pretrained run")
        check_guidance(teacher, "method.guidance", self.guidance)
        if getattr(student.net, "places", 1) != self.places:
            told = getattr(student.net, "places", 1)
            raise UserError(f"init: its generator gives {told} estimates per NFE, and method.places is {self.places}")
        start_from(student, problem.initial.get("generator", teacher))
        return {"generator": student}

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        """The segments, by their lengths, and the ways of the policy and of the teacher within them."""
        own, teacher = (
            [f"{name} {i}" for i in range(count)]
            for name, count in (("own way", self.states), ("teacher's way", self.states - 1))
        )
        uniforms = rng.uniforms(["segment", "label", *own, *teacher])
        edges = constant(tuple(self.steps.edges(problem.path).tolist()), uniforms["segment"].device, torch.float64)
        below = uniforms["segment"][:, None] * edges[0] < edges[1:-1]  # noise first
        ratio = max(0.0, 1 - rng.step / self.mixing_steps) if self.mixing_steps else 0.0
        zero = torch.zeros_like(uniforms["segment"])
        own_ways = torch.stack([zero, *(uniforms[name] for name in own)], 1).sort(1).values.diff(dim=1)
        ways = torch.stack([zero, *(uniforms[name] for name in teacher), zero + 1], 1).sort(1).values.diff(dim=1)
        return {
            "segment": below.sum(1),
            "own ways": (1 - ratio) * own_ways,
            "teacher's ways": ratio * ways,
            "label": problem.label_of(uniforms["label"]),
            "eps": rng.normal("eps", problem.image_shape),
        }

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """The policy's mean velocity over a window against the teacher's velocity, at states on the policy's own way.

        Algorithm 1. Both are (z - x0) / s at one z, so that what is compared are means of x0, over s^2.
        """
        teacher, cond = players.teacher, self.condition(players, draw, batch)
        number, path = draw["segment"], teacher.path
        z = self.start_of(players, draw, batch, cond)
        student = players.generator
        policy = self.steps.segment(student, begin(1.0, student, cond), z, number)
        window, way = self.lengths(policy)
        raw, losses = policy.high, []
        least = policy.raw_time(line_time(path.ratio(torch.full_like(raw, path.t_min))))
        for own, taught in zip(draw["own ways"].unbind(1), draw["teacher's ways"].unbind(1), strict=True):
            with torch.no_grad():
                after = (raw - own * way).maximum(least)
                z, raw = policy.carry(z, raw, after).to(z.dtype), after
                level = policy.level(raw)
                target = self.estimate(players, z, level, cond)
                end = raw - taught * way
            gap = policy.mean_x0(raw, (end - window).maximum(policy.low)) - target
            losses.append((gap / expand(level, gap)).square().mean())
            z = (target + expand(policy.level(end) / level, z) * (z - target)).to(z.dtype)  # the teacher's step
            raw = end
        total = torch.stack(losses).mean()
        return Loss(total, {"velocity": total.detach()})

    def lengths(self, policy: Segment) -> tuple[Tensor, Tensor]:
        """The window, and what is left of a segment for both ways: raw times [B]."""
        whole = policy.high - policy.low
        substep = whole / (whole * policy.substeps).round().clamp_min(1)
        window = (self.window * substep).minimum(whole)
        return window, whole - window

    @torch.no_grad()
    def start_of(self, players: Players, draw: Draw, batch: Batch, cond: Cond) -> Tensor:
        """z [B, ...] at the start of each sample's segment, as at inference, or of images with the drawn noise."""
        number, path, eps = draw["segment"], players.generator.path, draw["eps"]
        if self.start == "data":
            t = constant(tuple(self.steps.times(path).tolist()), number.device, torch.float64)[number]
            x = path.diffuse(batch.images, eps, t)
            return (x / expand(line_scale(path, t), x)).to(x.dtype)
        starts = list(islice(self.steps.roll_out(players.generator, eps, cond), self.steps.num_steps))
        return torch.stack(starts, 1)[torch.arange(len(number), device=number.device), number]

    def estimate(self, players: Players, z: Tensor, level: Tensor, cond: Cond) -> Tensor:
        """The teacher's x0 at z, which is the velocity (z - x0) / s."""
        path = players.teacher.path
        t = path.time_of_ratio(level / (1 - level)).clamp(path.t_min, path.t_max)
        x = (z * expand(line_scale(path, t), z)).to(z.dtype)
        x0: Tensor = players.teacher(x, t, cond, guidance=self.guidance)
        return x0

    def condition(self, players: Players, draw: Draw, batch: Batch) -> Cond:
        """The images' own, or the drawn classes."""
        return batch.cond if self.start == "data" else condition(players, draw)
