"""f-distill: One-step Diffusion Models with f-Divergence Distribution Matching.  Xu et al. 2025, arXiv:2502.15681.

Implemented: distribution matching under eight f-divergences, the density ratio from the discriminator at the same
noised image, its normalisation in two stages, the GAN of DMD2. With reverse KL the weight is one and this is DMD2.
The approximate R1 penalty is that of the released code. Differs from that in the bins: equal shares of the time law
here, equal widths in raw sigma there, of which the first holds most samples.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffdistill.diffusion.path import expand
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, Karras, LogNormal
from diffdistill.distillation.divergences import WEIGHTS, Divergence, Ratios
from diffdistill.distillation.losses import DenoisingWeight, field_loss, gan_generator_loss, zero_nonfinite
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.scales import FakeScale, Scale, scale_in
from diffdistill.distillation.score_distillation import (
    Features,
    GanTaps,
    condition,
    critics_loss,
    draw_step,
    fake_with_logits,
    generate,
    matching_field,
    sample_at_hand,
    start_players,
    tapped,
)
from diffdistill.networks.discriminator import make_head
from diffdistill.settings.limits import MAX_SAMPLING_STEPS
from diffdistill.settings.numbers import SamplingSteps
from diffdistill.settings.schema import Fraction, NonNegative, Positive, field, schema

Bins = Annotated[int, Field(ge=0, le=MAX_SAMPLING_STEPS)]


@schema
class FDistill(Method):
    """Settings, in the paper's terms. Without a GAN and with reverse KL there is no discriminator."""

    name: Literal["f_distill"] = "f_distill"
    divergence: Divergence = "js"
    steps: FewSteps = field(default_factory=FewSteps)
    guidance: Scale = 1.0  # w of D_u + w (D_c - D_u), of the teacher
    fake_guidance: FakeScale = 1.0  # of the fake score; the paper has none
    fake_class_dropout: Fraction = 0.1  # in the fake score's loss, where it is guided
    fake_updates: SamplingSteps = 5  # exactly this many to one generator update
    generator_time_law: AnyTimeDistribution = field(default_factory=Karras)
    fake_time_law: AnyTimeDistribution = field(default_factory=LogNormal)
    gan_time_law: AnyTimeDistribution = field(default_factory=Karras)  # of the discriminator's own loss
    fake_weight: DenoisingWeight = "edm"
    alpha_power: Literal[0, 1] = 0  # 1: the paper's equation; 0: the released code
    normaliser_minimum: Positive = 1e-5
    gan_weight: NonNegative = 3e-3
    gan_fake_weight: NonNegative = 1e-2
    gan_features: Features = "fake"
    gan_taps: GanTaps = None  # null: the paper's bottleneck
    gan_r1_weight: NonNegative = 0.0  # of the approximate R1 penalty in the discriminator's loss
    gan_r1_noise: Positive = 0.1  # by which it moves real images
    ratio_min: Positive = 0.1
    ratio_max: Positive = 20.0
    ratio_bins: Bins = 10  # of equal probability in t; 0: the ratio is taken as it is
    ratio_memory: Annotated[float, Field(ge=0, lt=1)] = 0.0  # rho; ImageNet-64: 0.5

    student = "generator"
    tells_teacher_class = True

    def __post_init__(self) -> None:
        _ = self._ratios  # raises where they do not fit
        if self.gan_r1_weight and not self.has_discriminator:
            raise ValueError(
                "gan_r1_weight: is the discriminator's, and with rkl and gan_weight 0 there is none; use 0"
            )

    @property
    def scales(self) -> dict[str, FakeScale]:
        return {"guidance": self.guidance, "fake_guidance": self.fake_guidance}

    @property
    def has_discriminator(self) -> bool:
        return self.gan_weight > 0 or self.divergence != "rkl"

    @property
    def needs_images(self) -> bool:
        return self.has_discriminator

    @property
    def updates(self) -> tuple[Update, ...]:
        critics = ("fake", "discriminator") if self.has_discriminator else ("fake",)
        of_all = "ratios" if self.divergence != "rkl" else None
        generator = Update(("generator",), "generator_loss", self.fake_updates, statistics=of_all)
        return (generator, Update(critics, "fake_loss"))

    def sampler(self, problem: Problem) -> FewSteps:
        return self.steps

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        players = start_players(problem, **self.scales)
        if self.has_discriminator:
            judge = tapped(problem, players, self.gan_features)
            players["discriminator"] = make_head(judge, problem.least_shape, self.gan_taps)
        return players | self._ratios.players()

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        laws = {"": self.generator_time_law, "fake ": self.fake_time_law}
        if self.has_discriminator:
            laws |= dict.fromkeys(("gan real ", "gan fake "), self.gan_time_law)
        scales, dropout = self.scales, self.fake_class_dropout
        numbers = draw_step(rng, problem, self.steps, laws, scales=scales, fake_class_dropout=dropout)
        numbers |= {"gan r1": rng.normal("gan r1", problem.image_shape)} if self.gan_r1_weight else {}
        return numbers | self._ratios.draw(rng)

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Distribution matching weighted by h(r), plus the GAN's share at the same noised image."""
        x = generate(players, draw, self.steps)
        fake, logits = self._look(players, draw, x if self.gan_weight else x.detach())
        weight, carry = self._weight(players, draw, logits)
        field_value = self.field(players, draw, x, fake, weight)
        matching = field_loss(x, field_value)
        total, logs = matching, {"matching": matching.detach(), "field": field_value.abs().mean()}
        if self.has_discriminator:
            logs |= {"ratio": self._ratios.read(logits).detach().mean(), "largest_weight": weight.max()}
        if self.gan_weight:
            adversarial = gan_generator_loss(logits)
            total = total + self.gan_weight * adversarial
            logs["gan"] = adversarial.detach()
        return Loss(total, logs, carry={"x": x.detach(), **carry})

    @torch.no_grad()
    def field(self, players: Players, draw: Draw, x: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
        """h (D_fake - D_teacher) / nu at x noised.

        x: samples [B, ...]; fake: the fake score's estimate there; weight: h [B].
        """
        path, t = players.teacher.path, draw["t"]
        x_t = path.diffuse(x, draw["eps"], t)
        guidance = scale_in(draw, self.scales, "guidance")
        teacher = players.teacher(x_t, t, condition(players, draw, role="teacher"), guidance=guidance)
        matching = matching_field(x, fake, teacher, minimum=self.normaliser_minimum)
        return zero_nonfinite(expand(weight, x) * (matching * expand(path.alpha(t) ** self.alpha_power, x)))

    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Denoising on the generator's samples, plus the discriminator's share, as in DMD2."""
        x = sample_at_hand(players, draw, self.steps)
        gan_weight = self.gan_fake_weight if self.has_discriminator else None
        return critics_loss(
            players,
            draw,
            batch,
            x,
            weight=self.fake_weight,
            gan_weight=gan_weight,
            features=self.gan_features,
            taps=self.gan_taps,
            r1=(self.gan_r1_weight, self.gan_r1_noise),
        )

    def ratios(self, players: Players, draw: Draw, batch: Batch) -> Mapping[str, Tensor]:
        """The ratio and the bin of each sample, by whose means over the whole batch the weight is normalised."""
        _, logits = self._look(players, draw, generate(players, draw, self.steps))
        return self._ratios.statistics(draw, logits)

    def after_update(self, players: Players, carried: Mapping[str, Tensor]) -> None:
        self._ratios.keep(players, carried)

    @property
    def _ratios(self) -> Ratios:
        return Ratios(self.ratio_min, self.ratio_max, self.ratio_bins, self.ratio_memory)

    def _look(self, players: Players, draw: Draw, x: Tensor) -> tuple[Tensor, Tensor]:
        """D_fake at x noised, and the discriminator's logits [B] there (none without one), with a graph to x."""
        x_t = players.teacher.path.diffuse(x, draw["eps"], draw["t"])
        features = self.gan_features if self.has_discriminator else None
        return fake_with_logits(players, draw, x_t, scales=self.scales, features=features, taps=self.gan_taps)

    @torch.no_grad()
    def _weight(self, players: Players, draw: Draw, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """h [B] over its mean in the batch, from ratios over the mean ratio of their bin; and those means to keep."""
        if self.divergence == "rkl":
            return torch.ones_like(draw["t"]), {}
        ratio, everyone, carry = self._ratios.normalised(players, draw, self._ratios.read(logits))
        h = WEIGHTS[self.divergence]
        return h(ratio) / h(everyone).mean(), carry
