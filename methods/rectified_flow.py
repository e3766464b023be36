"""Improving the Training of Rectified Flows (RF++).  Lee et al. 2024, arXiv:2405.20320.

Implemented: one reflow on stored pairs of noise and the teacher's image, for a teacher of any family; the U-shaped law;
the student as the teacher in the line's coordinates (an exact change of variables); the pseudo-Huber distance with c
linear in the number of values, and LPIPS beside it; several steps with the first noise again.
Flow matching's line z_s = (1 - s) x + s z may be any path's: s = ratio / (1 + ratio), v = (z_s - D) / s.
Not implemented: real images among the pairs, times beyond the path's greatest ratio (the paper goes to 1e5), a second
reflow, which is a further run with the student as the teacher.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.guidance.check import check_guidance
from diffdistill.diffusion.path import expand
from diffdistill.diffusion.sampling import AnySampler, FewSteps, Heun
from diffdistill.diffusion.step_random import StepRandom, integer_of
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, UShaped
from diffdistill.distillation.distances import LPIPS
from diffdistill.distillation.first_noise import check_first_noise
from diffdistill.distillation.losses import pseudo_huber
from diffdistill.distillation.method import Batch, Draw, Loss, Players, Problem, Update
from diffdistill.distillation.pairs import (
    OnStoredPairs,
    check_deterministic,
    check_teleport,
    memorisation,
    teacher_pairs,
)
from diffdistill.settings.numbers import NonNegativeInt
from diffdistill.settings.schema import NonNegative, Number, Positive, PositiveInt, field, schema


@schema
class RectifiedFlow(OnStoredPairs):
    """steps: the student's sampling steps: one, or several with `later_noise: fixed`."""

    name: Literal["rectified_flow"] = "rectified_flow"
    steps: FewSteps = field(default_factory=lambda: FewSteps(init_ratio=80.0, later_noise="fixed"))
    pairs: PositiveInt = 10_000  # number of pairs, sampled once before training
    pair_sampler: AnySampler = field(default_factory=Heun)  # the teacher's deterministic sampler for them
    pairs_folder: str | None = None  # keeps them in shards, for stopped and further runs; `null`: the run's
    held_out: NonNegativeInt = 64  # further pairs, never trained on: what the signal `memorisation` compares with
    teleport: Positive | None = None  # pairs begin at this sigma / alpha, where a Gaussian of the run's images arrives
    guidance: Number = 1.0  # w of D_u + w (D_c - D_u), of the teacher
    time_law: AnyTimeDistribution = field(default_factory=UShaped)  # noise levels of training
    huber_constant: NonNegative = 0.00054  # c is this times the number of values; 0: the plain norm
    perceptual: LPIPS | None = None  # a second distance, of the images; `null`: none
    perceptual_weight: Literal["1/t", "one"] = "1/t"  # of it; the paper's on CIFAR-10 is 1/t, elsewhere one

    student = "generator"
    keeps_teacher = False
    updates = (Update(("generator",), "generator_loss"),)

    def __post_init__(self) -> None:
        check_deterministic("pair_sampler", self.pair_sampler)

    def sampler(self, problem: Problem) -> FewSteps:
        return self.steps

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        check_first_noise(self.name, self.steps, problem.path)
        players = problem.copies("generator")
        assert problem.teacher is not None
        check_guidance(problem.teacher, "method.guidance", self.guidance)
        check_teleport(problem, self.pair_sampler, self.teleport, self.guidance)
        if self.perceptual:
            self.perceptual.check("method.perceptual", problem.image_shape, problem.teacher)
        return players

    def prepare(self, problem: Problem, seed: int) -> dict[str, Tensor]:
        count, folder, others = self.pairs, self.pairs_folder, self.held_out
        sampler, scale = self.pair_sampler, self.guidance
        return teacher_pairs(
            problem, seed, count, sampler, guidance=scale, folder=folder, held_out=others, teleport=self.teleport
        )

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        t = self.time_law(rng.uniform("t"), problem.path)
        return {"pair": integer_of(rng.uniform("pair"), self.pairs), "t": t}

    def signals(self, players: Players, rng: StepRandom, problem: Problem, batch: Batch) -> dict[str, float]:
        """Whether the pairs are being learnt by heart."""
        return memorisation(self, players, rng, problem, batch, self.pairs)

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """(1 - s) d(v, z - x) / dimension + LPIPS(D, x) / s on the line between stored pairs.  Section 4.2.

        v - (z - x) is (x - D) / s: on the line the velocity's error is the image's.
        """
        student, t = players.generator, draw["t"]
        pair = {name: value[draw["pair"]] for name, value in batch.stored.items()}
        x, ratio = pair["image"], student.path.ratio(t)
        s = (ratio / (1 + ratio)).to(x.device)
        estimate = student(student.path.diffuse(x, pair["noise"], t), t, student.class_cond(pair["label"]))
        size = x[0].numel()
        error = (estimate - x) / expand(s, x)
        distance = pseudo_huber(error, torch.zeros_like(error), self.huber_constant * size)
        total = ((1 - s) * distance / size).mean()
        logs = {"distance": distance.detach().mean() / size}
        if self.perceptual:
            perceptual = self.perceptual.of_each(estimate, x)
            total = total + ((1 / s if self.perceptual_weight == "1/t" else torch.ones_like(s)) * perceptual).mean()
            logs["perceptual"] = perceptual.detach().mean()
        return Loss(total, logs)
