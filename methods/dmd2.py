"""DMD2: Improved Distribution Matching Distillation for Fast Image Synthesis.  Yin et al. 2024, arXiv:2405.14867.

Implemented: the normalised field with the guided teacher, `fake_updates` fake-score steps to each generator step,
the GAN on diffused bottleneck features, several steps by backward simulation, and the original DMD's regression on
stored teacher pairs (arXiv:2311.18828), by squares or LPIPS; guidance and matching at noise of their own (Decoupled
DMD, arXiv:2511.22677); a fake score that follows the student's weights (SenseFlow). `gan_features: fake` is the paper;
`teacher` is what some others do.  Not implemented: a discriminator on clean images.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.sampling import AnySampler, FewSteps, Heun
from diffdistill.diffusion.step_random import StepRandom, integer_of
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, Karras, LogNormal
from diffdistill.distillation.decoupled import Decoupled
from diffdistill.distillation.distances import PairDistance, SquaredError
from diffdistill.distillation.levels import DrawnLevels
from diffdistill.distillation.losses import DenoisingWeight, field_loss, gan_generator_loss
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.pairs import check_deterministic, teacher_pairs
from diffdistill.distillation.scales import FakeScale, Scale, other_than_one
from diffdistill.distillation.score_distillation import (
    Features,
    GanTaps,
    check_followed,
    check_trained,
    condition,
    critics_loss,
    draw_step,
    follow,
    generate,
    guided_field,
    head_logits,
    sample_at_hand,
    start_players,
    tapped,
)
from diffdistill.networks.discriminator import HeadLosses, make_head
from diffdistill.settings.numbers import SamplingSteps
from diffdistill.settings.schema import Fraction, NonNegative, Positive, PositiveInt, field, schema


@schema
class DMD2(Method):
    """Settings, in the paper's terms. A weight of 0 switches a term off, and its networks are not built."""

    name: Literal["dmd2"] = "dmd2"
    steps: FewSteps = field(default_factory=FewSteps)
    levels: DrawnLevels | None = None  # of the steps in training; null: those of `steps`
    guidance: Scale = 1.0  # w of D_u + w (D_c - D_u), of the teacher
    fake_guidance: FakeScale = 1.0  # of the fake score; the paper has none
    fake_class_dropout: Fraction = 0.1  # in the fake score's loss, where it is guided
    fake_updates: SamplingSteps = 5  # exactly this many to one generator update
    generator_time_law: AnyTimeDistribution = field(default_factory=Karras)
    fake_time_law: AnyTimeDistribution = field(default_factory=LogNormal)
    gan_time_law: AnyTimeDistribution = field(default_factory=Karras)
    fake_weight: DenoisingWeight = "edm"
    alpha_power: Literal[0, 1] = 0  # 1: the paper's equation; 0: every released code
    normaliser_minimum: Positive = 1e-5
    gan_weight: NonNegative = 3e-3  # lambda_g, in the generator's loss
    gan_fake_weight: NonNegative = 1e-2  # lambda_d, in the fake score's loss
    gan_features: Features = "fake"
    gan_taps: GanTaps = None  # null: the paper's bottleneck
    gan_head_losses: HeadLosses = "of_mean"
    decoupled: Decoupled | None = None  # guidance at noise of its own; null: DMD2's guided field
    fake_follows: Fraction = 0.0  # of the student's weights, into the fake score's after each of its updates
    regression_weight: NonNegative = 0.0
    regression_pairs: PositiveInt = 1000
    regression_sampler: AnySampler = field(default_factory=Heun)
    regression_distance: PairDistance = field(default_factory=SquaredError)

    student = "generator"
    tells_teacher_class = True

    def __post_init__(self) -> None:
        check_trained(self.gan_fake_weight, is_asked=self.gan_weight > 0, why="gan_weight is above 0")
        if self.decoupled and other_than_one(self.guidance) is None:
            raise ValueError("decoupled: separates guidance from matching; set `guidance` to a scale other than 1")
        if self.regression_weight and isinstance(self.guidance, tuple):
            raise ValueError("regression_weight: stored pairs have one scale; set `guidance` to a number, not a range")
        if self.regression_weight:
            check_deterministic("regression_sampler", self.regression_sampler)

    @property
    def scales(self) -> dict[str, FakeScale]:
        return {"guidance": self.guidance, "fake_guidance": self.fake_guidance}

    @property
    def needs_images(self) -> bool:
        return self.gan_weight > 0

    @property
    def updates(self) -> tuple[Update, ...]:
        critics = ("fake", "discriminator") if self.gan_weight else ("fake",)
        return (Update(("generator",), "generator_loss", self.fake_updates), Update(critics, "fake_loss"))

    def sampler(self, problem: Problem) -> FewSteps:
        return self.steps

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        players = start_players(problem, **self.scales)
        if self.decoupled:
            self.decoupled.check(self.steps, problem.path, self.levels)
        if self.fake_follows:
            check_followed(players)
        if self.regression_weight and problem.teacher:
            self.regression_distance.check("method.regression_distance", problem.image_shape, problem.teacher)
        if self.gan_weight:
            judge = tapped(problem, players, self.gan_features)
            players["discriminator"] = make_head(judge, problem.least_shape, self.gan_taps, self.gan_head_losses)
        return players

    @property
    def one_shape(self) -> str | None:
        return "with regression_weight its stored pairs are of one size" if self.regression_weight else None

    def prepare(self, problem: Problem, seed: int) -> dict[str, Tensor]:
        """Teacher pairs for the regression: noise, image, label."""
        if not self.regression_weight or isinstance(self.guidance, tuple):
            return {}
        sampler, count = self.regression_sampler, self.regression_pairs
        return teacher_pairs(problem, seed, count, sampler, guidance=self.guidance)

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        laws = {"": self.generator_time_law, "fake ": self.fake_time_law}
        if self.gan_weight:
            laws |= dict.fromkeys(("gan ", "gan real ", "gan fake "), self.gan_time_law)
        laws |= {"guidance ": self.decoupled.time_law} if self.decoupled else {}
        scales, dropout = self.scales, self.fake_class_dropout
        numbers = draw_step(
            rng, problem, self.steps, laws, levels=self.levels, scales=scales, fake_class_dropout=dropout
        )
        if self.decoupled:
            numbers["guidance t"] = self.decoupled.times(rng, problem.path, self.steps, numbers)
        if self.regression_weight:
            numbers["pair"] = integer_of(rng.uniform("pair"), self.regression_pairs)
        return numbers

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Distribution matching, plus the GAN's and the regression's share.  Equations 1, 4 and section 4.2."""
        x = generate(players, draw, self.steps)
        field_value = self.field(players, draw, x)
        matching = field_loss(x, field_value)
        total, logs = matching, {"matching": matching.detach(), "field": field_value.abs().mean()}
        if self.gan_weight:
            judged = condition(players, draw, role=self.gan_features)
            logits = head_logits(players, draw, self.gan_features, x, ("gan ",), judged, taps=self.gan_taps)
            adversarial = gan_generator_loss(logits)
            total = total + self.gan_weight * adversarial
            logs["gan"] = adversarial.detach()
        if self.regression_weight:
            pair = {name: value[draw["pair"]] for name, value in batch.stored.items()}
            start = self.steps.roll_out(players.generator, pair["noise"], step=0)
            estimate = players.generator(start.x, start.t, players.teacher.class_cond(pair["label"]))
            regression = self.regression_distance(estimate, pair["image"])
            total = total + self.regression_weight * regression
            logs["regression"] = regression.detach()
        return Loss(total, logs, carry={"x": x.detach()})

    @torch.no_grad()
    def field(self, players: Players, draw: Draw, x: Tensor) -> Tensor:
        """(D_fake - D_teacher) / nu at x noised: down it, the samples' law moves to the teacher's."""
        scales, minimum, alpha_power = self.scales, self.normaliser_minimum, self.alpha_power
        of = self.decoupled.field if self.decoupled else guided_field
        return of(players, draw, x, scales=scales, minimum=minimum, alpha_power=alpha_power)

    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Denoising on the generator's samples, plus the discriminator's share.  Equation 2 and section 4.2."""
        x = sample_at_hand(players, draw, self.steps)
        gan_weight = self.gan_fake_weight if self.gan_weight else None
        features, taps = self.gan_features, self.gan_taps
        return critics_loss(
            players, draw, batch, x, weight=self.fake_weight, gan_weight=gan_weight, features=features, taps=taps
        )

    def after_update(self, players: Players, carried: Mapping[str, Tensor]) -> None:
        if self.fake_follows and "x" in carried:  # the generator's
            follow(players, self.fake_follows)
