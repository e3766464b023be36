"""Uni-Instruct: Unified Diffusion Divergence Instruction.  Wang et al. 2025, arXiv:2505.20755.

Implemented: the gradient of an f-divergence of the images themselves, for eight divergences, as SiD's loss whose weight
and alpha follow the density ratio at each x_t; the ratio with its graph; the GAN of DMD2; guidance on both sides;
several steps.  Derived here: the paper states a mixture of two losses, and its released code computes another thing.
Not implemented: the schedule of the released code, which brings in the GAN later.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, Karras, log_ratio_slope
from diffdistill.distillation.divergences import SLOPES, Divergence
from diffdistill.distillation.method import Batch, Draw, Loss, Players, Problem, Update
from diffdistill.distillation.ratio_weighted import RatioWeighted
from diffdistill.distillation.scales import scale_in
from diffdistill.distillation.score_distillation import SampleWeight, judged_sample, mean_of_finite, score_identity
from diffdistill.settings.numbers import NonNegativeInt, SamplingSteps
from diffdistill.settings.schema import NonNegative, UserError, field, schema

EVENLY = torch.linspace(0.005, 0.995, 100, dtype=torch.float64)


@schema
class UniInstruct(RatioWeighted):
    """Settings, in the paper's terms. Without a GAN and with reverse KL there is no discriminator."""

    name: Literal["uni_instruct"] = "uni_instruct"
    divergence: Divergence = "kl"
    fake_updates: SamplingSteps = 1
    weight: Literal["exact"] | SampleWeight = "exact"  # exact: d(ratio^2) / ratio^4, whatever the law of time
    time_law: AnyTimeDistribution = field(default_factory=lambda: Karras(ratio_max=24.41))
    gan_time_law: AnyTimeDistribution = field(default_factory=lambda: Karras(ratio_max=24.41))
    gan_weight: NonNegative = 1e-2
    generator_start_images: NonNegativeInt = 0  # the released script: 100_000

    @property
    def updates(self) -> tuple[Update, ...]:
        return self.updates_after(self.generator_start_images)

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        players = super().players(problem)
        if self.weight == "exact" and len(self.time_law(EVENLY, problem.path).unique()) == 1:
            raise UserError(
                "method.weight = exact: integrates over noise levels, and time_law has a single one; use snr"
            )
        return players

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        numbers = self.draw_with(self.time_law, rng, problem)
        if self.weight == "exact":
            numbers["slope"] = log_ratio_slope(self.time_law, rng.uniform("t"), problem.path)
        return numbers

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Half the divergence's gradient over the mean h of the batch, plus the GAN's share at the same x_t."""
        x, x_t, teacher, time_weight = self._judged(players, draw)
        fake, logits = self.look(players, draw, x_t)
        h, alpha, carry = self._weight(players, draw, logits)
        identity = mean_of_finite(time_weight * h * score_identity(x, teacher, fake, fake, alpha=alpha))
        logs = {"identity": identity.detach(), "gap": (teacher - fake).detach().abs().mean()}
        total, logs = self.with_gan(identity, logs, h, logits, values=x[0].numel())  # the identity sums over pixels
        return Loss(total, logs, carry={"x": x.detach(), **carry})

    def _judged(self, players: Players, draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        guidance, minimum = scale_in(draw, self.scales, "guidance"), self.normaliser_minimum
        weight: SampleWeight = "snr" if self.weight == "exact" else self.weight
        x, x_t, teacher, factor = judged_sample(
            players, draw, self.steps, guidance=guidance, weight=weight, minimum=minimum
        )
        return x, x_t, teacher, factor * draw["slope"] if self.weight == "exact" else factor

    def _weight(self, players: Players, draw: Draw, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """h over its mean in the batch and alpha = (1 + d ln h / d ln r) / 2, both [B] with graph; the means to keep.

        Clamps and bins make another convex f of the ratio, for which both remain exact: where a clamp holds it, h does
        not change with r, and alpha is reverse KL's.
        """
        h, ratio, carry = self.weight_of(players, draw, logits)
        if ratio is None:
            return h, torch.full_like(h, 0.5), carry
        slope = SLOPES[self.divergence](ratio) * self.reading.is_free(logits)
        return h, (1 + slope) / 2, carry
