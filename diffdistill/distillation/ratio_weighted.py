"""What methods of f-divergences share: a discriminator beside the fake score, whose ratio weighs each sample's loss.

Without a GAN and with reverse KL there is no discriminator, and no real image is asked for.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, LogNormal, TimeDistribution
from diffdistill.distillation.divergences import WEIGHTS, Divergence, Ratios
from diffdistill.distillation.losses import DenoisingWeight, gan_generator_loss
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.scales import FakeScale, Scale
from diffdistill.distillation.score_distillation import (
    Features,
    GanTaps,
    check_trained,
    critics_loss,
    draw_step,
    fake_with_logits,
    generate,
    sample_at_hand,
    start_players,
    tapped,
)
from diffdistill.networks.discriminator import HeadLosses, make_head
from diffdistill.settings.limits import MAX_SAMPLING_STEPS
from diffdistill.settings.numbers import SamplingSteps
from diffdistill.settings.schema import Fraction, NonNegative, Positive, field, schema


@schema
class RatioWeighted(Method):
    """Players, updates and critics of such a method; the generator's loss is the method's own."""

    divergence: Divergence
    steps: FewSteps = field(default_factory=FewSteps)
    guidance: Scale = 1.0  # w of D_u + w (D_c - D_u), of the teacher
    fake_guidance: FakeScale = 1.0  # of the fake score; the papers have none
    fake_class_dropout: Fraction = 0.1  # in the fake score's loss, where it is guided
    fake_updates: SamplingSteps  # exactly this many to one generator update
    fake_time_law: AnyTimeDistribution = field(default_factory=LogNormal)
    gan_time_law: AnyTimeDistribution  # of the discriminator's own loss
    fake_weight: DenoisingWeight = "edm"
    normaliser_minimum: Positive = 1e-5  # of nu
    gan_weight: NonNegative
    gan_fake_weight: NonNegative = 1e-2
    gan_features: Features = "fake"
    gan_taps: GanTaps = None  # null: the bottleneck
    gan_head_losses: HeadLosses = "of_mean"
    ratio_min: Positive = 0.1
    ratio_max: Positive = 20.0
    ratio_bins: Annotated[int, Field(ge=0, le=MAX_SAMPLING_STEPS)] = 10  # of equal probability in t; 0: none
    ratio_memory: Annotated[float, Field(ge=0, lt=1)] = 0.0  # rho; f-distill on ImageNet-64: 0.5

    student = "generator"
    tells_teacher_class = True

    def __post_init__(self) -> None:
        _ = self.reading  # raises where they do not fit
        why = f"divergence {self.divergence} reads its ratio" if self.reads_ratio else "gan_weight is above 0"
        check_trained(self.gan_fake_weight, is_asked=self.has_discriminator, why=why)

    @property
    def scales(self) -> dict[str, FakeScale]:
        return {"guidance": self.guidance, "fake_guidance": self.fake_guidance}

    @property
    def reading(self) -> Ratios:
        """How the ratio is read off the logits."""
        return Ratios(self.ratio_min, self.ratio_max, self.ratio_bins, self.ratio_memory)

    @property
    def reads_ratio(self) -> bool:
        return self.divergence != "rkl"

    @property
    def has_discriminator(self) -> bool:
        return self.gan_weight > 0 or self.reads_ratio

    @property
    def needs_images(self) -> bool:
        return self.has_discriminator

    @property
    def updates(self) -> tuple[Update, ...]:
        return self.updates_after(0)

    def updates_after(self, start_images: int) -> tuple[Update, ...]:
        """start_images: that the critics see before the generator begins."""
        critics = ("fake", "discriminator") if self.has_discriminator else ("fake",)
        of_all = "ratios" if self.reads_ratio else None
        generator = Update(("generator",), "generator_loss", self.fake_updates, start_images, of_all)
        return (generator, Update(critics, "fake_loss"))

    @property
    def r1(self) -> tuple[float, float]:
        """Weight and noise of the discriminator's approximate R1 penalty."""
        return 0.0, 0.0

    def sampler(self, problem: Problem) -> FewSteps:
        return self.steps

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        players = start_players(problem, **self.scales)
        if self.has_discriminator:
            judge = tapped(problem, players, self.gan_features)
            players["discriminator"] = make_head(judge, problem.least_shape, self.gan_taps, self.gan_head_losses)
        return players | self.reading.players()

    def draw_with(self, law: TimeDistribution, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        """The numbers of a step.  law: of the noise at which the scores are compared."""
        laws = {"": law, "fake ": self.fake_time_law}
        if self.has_discriminator:
            laws |= dict.fromkeys(("gan real ", "gan fake "), self.gan_time_law)
        scales, dropout = self.scales, self.fake_class_dropout
        numbers = draw_step(rng, problem, self.steps, laws, scales=scales, fake_class_dropout=dropout)
        return numbers | self.reading.draw(rng)

    def look(self, players: Players, draw: Draw, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """D_fake at x_t, and the discriminator's logits there (none without one), with a graph to x_t."""
        features = self.gan_features if self.has_discriminator else None
        return fake_with_logits(players, draw, x_t, scales=self.scales, features=features, taps=self.gan_taps)

    def weight_of(
        self, players: Players, draw: Draw, logits: Tensor
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """h [B] over its mean in the batch; the ratios over the mean of their bin, by which it goes, None for reverse
        KL; and those means to keep."""
        if not self.reads_ratio:
            return torch.ones_like(draw["t"]), None, {}
        ratio, everyone, carry = self.reading.normalised(players, draw, self.reading.read(logits))
        h = WEIGHTS[self.divergence]
        return h(ratio) / h(everyone).mean(), ratio, carry

    def with_gan(
        self, matching: Tensor, logs: dict[str, Tensor], weight: Tensor, logits: Tensor, *, values: int = 1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator's loss and logs with the GAN's share.  values: over how many of a sample its loss is a sum."""
        total = matching
        if self.has_discriminator:
            ratio = self.reading.read(logits).detach().mean()
            logs = {**logs, "ratio": ratio, "largest_weight": weight.detach().max()}
        if self.gan_weight:
            adversarial = gan_generator_loss(logits)
            total = total + self.gan_weight * values * adversarial
            logs = {**logs, "gan": adversarial.detach()}
        return total, logs

    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Denoising on the generator's samples, plus the discriminator's share, as in DMD2."""
        x = sample_at_hand(players, draw, self.steps)
        return critics_loss(
            players,
            draw,
            batch,
            x,
            weight=self.fake_weight,
            gan_weight=self.gan_fake_weight if self.has_discriminator else None,
            features=self.gan_features,
            taps=self.gan_taps,
            r1=self.r1,
        )

    def ratios(self, players: Players, draw: Draw, batch: Batch) -> Mapping[str, Tensor]:
        """The ratio and the bin of each sample, by whose means over the whole batch the weight is normalised."""
        x_t = players.teacher.path.diffuse(generate(players, draw, self.steps), draw["eps"], draw["t"])
        return self.reading.statistics(draw, self.look(players, draw, x_t)[1])

    def after_update(self, players: Players, carried: Mapping[str, Tensor]) -> None:
        self.reading.keep(players, carried)
