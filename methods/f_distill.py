"""f-distill: One-step Diffusion Models with f-Divergence Distribution Matching.  Xu et al. 2025, arXiv:2502.15681.

Implemented: distribution matching under eight f-divergences, the density ratio from the discriminator at the same
noised image, its normalisation in two stages, the GAN of DMD2. With reverse KL the weight is one and this is DMD2.
The approximate R1 penalty is that of the released code. Differs from that in the bins: equal shares of the time law
here, equal widths in raw sigma there, of which the first holds most samples.
"""

from typing import Literal

import torch
from torch import Tensor

from diffdistill.diffusion.path import expand
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, Karras
from diffdistill.distillation.divergences import Divergence
from diffdistill.distillation.losses import field_loss, zero_nonfinite
from diffdistill.distillation.method import Batch, Draw, Loss, Players, Problem
from diffdistill.distillation.ratio_weighted import RatioWeighted
from diffdistill.distillation.scales import scale_in
from diffdistill.distillation.score_distillation import condition, generate, matching_field
from diffdistill.settings.numbers import SamplingSteps
from diffdistill.settings.schema import NonNegative, Positive, field, schema


@schema
class FDistill(RatioWeighted):
    """Settings, in the paper's terms. Without a GAN and with reverse KL there is no discriminator."""

    name: Literal["f_distill"] = "f_distill"
    divergence: Divergence = "js"
    fake_updates: SamplingSteps = 5
    generator_time_law: AnyTimeDistribution = field(default_factory=Karras)
    gan_time_law: AnyTimeDistribution = field(default_factory=Karras)
    alpha_power: Literal[0, 1] = 0  # 1: the paper's equation; 0: the released code
    gan_weight: NonNegative = 3e-3
    gan_r1_weight: NonNegative = 0.0  # of the approximate R1 penalty in the discriminator's loss
    gan_r1_noise: Positive = 0.1  # by which it moves real images

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gan_r1_weight and not self.has_discriminator:
            raise ValueError("gan_r1_weight: is for the discriminator, and rkl with gan_weight 0 has none; use 0")

    @property
    def r1(self) -> tuple[float, float]:
        return self.gan_r1_weight, self.gan_r1_noise

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        numbers = self.draw_with(self.generator_time_law, rng, problem)
        return numbers | ({"gan r1": rng.normal("gan r1", problem.image_shape)} if self.gan_r1_weight else {})

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Distribution matching weighted by h(r), plus the GAN's share at the same noised image."""
        x = generate(players, draw, self.steps)
        seen = x if self.gan_weight else x.detach()
        fake, logits = self.look(players, draw, players.teacher.path.diffuse(seen, draw["eps"], draw["t"]))
        weight, carry = self._weight(players, draw, logits)
        field_value = self.field(players, draw, x, fake, weight)
        matching = field_loss(x, field_value)
        logs = {"matching": matching.detach(), "field": field_value.abs().mean()}
        total, logs = self.with_gan(matching, logs, weight, logits)
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

    @torch.no_grad()
    def _weight(self, players: Players, draw: Draw, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """h [B] over its mean in the batch, from ratios over the mean ratio of their bin; and those means to keep."""
        weight, _, carry = self.weight_of(players, draw, logits)
        return weight, carry
