"""Regression on pairs of noise and image: the baseline to beat.  Luhman & Luhman 2021, arXiv:2101.02388.

The student learns, in one step, what the teacher's ODE makes of each noise. The pairs are made once, before training;
then the teacher leaves memory. Implemented: the mean squared error in pixels, and LPIPS, which Liu et al. 2023
(arXiv:2209.03003, section 3) prefer.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.guidance.check import check_guidance
from diffdistill.diffusion.sampling import AnySampler, FewSteps, Heun
from diffdistill.diffusion.step_random import StepRandom, integer_of
from diffdistill.distillation.distances import PairDistance, SquaredError
from diffdistill.distillation.method import Batch, Draw, Loss, Players, Problem, Update
from diffdistill.distillation.pairs import (
    OnStoredPairs,
    check_deterministic,
    check_teleport,
    memorisation,
    teacher_pairs,
)
from diffdistill.settings.numbers import NonNegativeInt
from diffdistill.settings.schema import Number, Positive, PositiveInt, field, schema


@schema
class Regression(OnStoredPairs):
    """pairs: how many.  pair_sampler: the teacher's, deterministic.  guidance: w of D_u + w (D_c - D_u), its own."""

    name: Literal["regression"] = "regression"
    steps: FewSteps = field(default_factory=FewSteps)
    pairs: PositiveInt = 10_000
    pair_sampler: AnySampler = field(default_factory=Heun)
    guidance: Number = 1.0
    distance: PairDistance = field(default_factory=SquaredError)  # of the student's image from the pair's
    pairs_folder: str | None = None  # keeps them in shards, for stopped and further runs; `null`: the run's
    held_out: NonNegativeInt = 64  # further pairs, never trained on: what the signal `memorisation` compares with
    teleport: Positive | None = None  # pairs begin at this sigma / alpha, where a Gaussian of the run's images arrives

    student = "generator"
    keeps_teacher = False
    updates = (Update(("generator",), "generator_loss"),)

    def __post_init__(self) -> None:
        check_deterministic("pair_sampler", self.pair_sampler)
        if self.steps.num_evaluations > 1:
            raise ValueError("steps: pairs have one step; use a single step")

    def sampler(self, problem: Problem) -> FewSteps:
        return self.steps

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        players = problem.copies("generator")
        assert problem.teacher is not None
        check_guidance(problem.teacher, "method.guidance", self.guidance)
        check_teleport(problem, self.pair_sampler, self.teleport, self.guidance)
        self.distance.check("method.distance", problem.image_shape, problem.teacher)
        return players

    def prepare(self, problem: Problem, seed: int) -> dict[str, Tensor]:
        count, folder, others = self.pairs, self.pairs_folder, self.held_out
        sampler, scale = self.pair_sampler, self.guidance
        return teacher_pairs(
            problem, seed, count, sampler, guidance=scale, folder=folder, held_out=others, teleport=self.teleport
        )

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        return {"pair": integer_of(rng.uniform("pair"), self.pairs)}

    def signals(self, players: Players, rng: StepRandom, problem: Problem, batch: Batch) -> dict[str, float]:
        """Whether the pairs are being learnt by heart."""
        return memorisation(self, players, rng, problem, batch, self.pairs)

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """The distance of G(z, c) from x over stored pairs (z, x) of class c."""
        pair = {name: value[draw["pair"]] for name, value in batch.stored.items()}
        with torch.no_grad():
            start = self.steps.roll_out(players.generator, pair["noise"], step=0)
        made = players.generator(start.x, start.t, players.generator.class_cond(pair["label"]))
        loss = self.distance(made, pair["image"])
        return Loss(loss, {"distance": loss.detach()})
