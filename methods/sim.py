"""SIM: One-Step Diffusion Distillation through Score Implicit Matching.  Luo et al. 2024, arXiv:2410.16794.

Implemented: the score implicit matching loss through both networks, for the squared, pseudo-Huber and fourth-power
distance of scores; one fake-score step to each generator step, each on samples of its own.
The authors released no training code. Not verified, and taken from SiD: time laws, rates, the order of the updates.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.augmentation import check_augmentation, draw_motion
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, Karras, LogNormal
from diffdistill.distillation.losses import DenoisingWeight, denoising_loss
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.scales import FakeScale, Scale, scale_in
from diffdistill.distillation.score_distillation import (
    SampleWeight,
    check_groups,
    condition,
    draw_step,
    fake_sample,
    judged_sample,
    mean_of_finite,
    start_players,
)
from diffdistill.settings.numbers import SamplingSteps
from diffdistill.settings.schema import Fraction, Positive, PositiveInt, field, schema

Distance = Literal["l2", "pseudo_huber", "l4"]
"""d(y) of one sample's difference y: ||y||^2, sqrt(||y||^2 + c^2) - c, or the sum of y_i^4."""


@schema
class SIM(Method):
    """Settings, in the paper's terms."""

    name: Literal["sim"] = "sim"
    steps: FewSteps = field(default_factory=FewSteps)
    distance: Distance = "pseudo_huber"
    huber_c: Positive = 0.03  # not verified; 0.00054 sqrt(N) of consistency training at N = 3 * 32 * 32
    weight: SampleWeight = "one"
    normaliser_minimum: Positive = 1e-5  # of weight: nu
    samples_per_condition: PositiveInt = 1  # so many samples after one another share their class
    guidance: Scale = 1.0  # w of D_u + w (D_c - D_u), of the teacher
    fake_guidance: FakeScale = 1.0  # of the fake score; the paper has none
    fake_class_dropout: Fraction = 0.1  # in the fake score's loss, where it is guided
    time_law: AnyTimeDistribution = field(default_factory=lambda: Karras(ratio_max=24.41))
    fake_time_law: AnyTimeDistribution = field(default_factory=LogNormal)
    fake_weight: DenoisingWeight = "edm"
    fake_updates: SamplingSteps = 1  # exactly this many to one generator update
    fake_augment: Fraction = 0.0

    student = "generator"
    tells_teacher_class = True
    needs_images = False

    @property
    def scales(self) -> dict[str, FakeScale]:
        return {"guidance": self.guidance, "fake_guidance": self.fake_guidance}

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("fake",), "fake_loss"), Update(("generator",), "generator_loss", self.fake_updates))

    def sampler(self, problem: Problem) -> FewSteps:
        return self.steps

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        players = start_players(problem, **self.scales)
        check_groups(problem, self.samples_per_condition)
        assert problem.teacher is not None
        check_augmentation(problem.teacher, "fake_augment", self.fake_augment)
        return players

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        laws = {"": self.time_law, "fake ": self.fake_time_law}
        numbers = draw_step(
            rng,
            problem,
            self.steps,
            laws,
            samples=("", "fake "),
            scales=self.scales,
            fake_class_dropout=self.fake_class_dropout,
            samples_per_condition=self.samples_per_condition,
        )
        return numbers | ({"fake motion": draw_motion(rng, self.fake_augment)} if self.fake_augment else {})

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Score implicit matching: the gradient of E d(s_generator - s_teacher) with the law of x_t held fixed."""
        guidance, fake_guidance = (scale_in(draw, self.scales, name) for name in self.scales)
        x, x_t, teacher, weights = judged_sample(
            players, draw, self.steps, guidance=guidance, weight=self.weight, minimum=self.normaliser_minimum
        )
        fake = players.fake(x_t, draw["t"], condition(players, draw, role="fake"), guidance=fake_guidance)
        matching = mean_of_finite(weights * implicit_matching(x, teacher, fake, self.distance, c=self.huber_c))
        return Loss(matching, {"matching": matching.detach(), "gap": (teacher - fake).detach().abs().mean()})

    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Denoising on fresh samples of the generator."""
        x, cond = fake_sample(players, draw, self.steps)
        loss = denoising_loss(players.fake, x, draw["fake eps"], draw["fake t"], cond, weight=self.fake_weight)
        return Loss(loss, {"denoising": loss.detach()})


def implicit_matching(x: Tensor, teacher: Tensor, fake: Tensor, distance: Distance, *, c: float) -> Tensor:
    """-d'(y)^T (D_fake - x) of each sample, [B], with y = D_fake - D_teacher.

    All [B, ...], with graph: pseudo-Huber's denominator depends on x_t, and the theorem needs its gradient too.
    Positive factors of time between denoisers and scores are left to the weight.  The paper's score-divergence
    gradient theorem.
    """
    y, residual = (fake - teacher).flatten(1), (fake - x).flatten(1)
    if distance == "l2":
        slope = 2 * y
    elif distance == "pseudo_huber":
        slope = y / torch.sqrt(y.square().sum(1, keepdim=True) + c**2)
    else:
        slope = 4 * y**3
    return -(slope * residual).sum(1)
