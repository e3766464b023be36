"""A preference field, ours: the repair of Distillation-DPO.  After Zhao et al. 2025, arXiv:2504.11447.

Distillation-DPO as published gives its generator no gradient, and as its text reads the teacher's law is no fixed
point: descent moves the mean away from the winners. This is not that method. Ours, for any reward: of two samples of
one condition the reward names the better; two fake scores learn the laws of winners and of losers, and dmd2's field
has one more term, the gradient of the log-odds of having won. At the teacher's law the first part vanishes and the
second moves to the winners; with `strength: 0` it is dmd2 without a GAN. Ties teach neither.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import expand
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, Karras, LogNormal
from diffdistill.distillation.losses import (
    DenoisingWeight,
    denoising_error,
    denoising_loss,
    field_loss,
    sample_normaliser,
    zero_nonfinite,
)
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.preferences import preference
from diffdistill.distillation.rewards import check_reward
from diffdistill.distillation.score_distillation import condition, draw_step, generate, start_players
from diffdistill.settings.numbers import SamplingSteps
from diffdistill.settings.schema import NonNegative, Number, Positive, field, schema


@schema
class PreferenceField(Method):
    """As dmd2's, but for the two critics."""

    name: Literal["preference_field"] = "preference_field"
    steps: FewSteps = field(default_factory=FewSteps)  # the student's sampling steps: one or several
    reward: str = "contrast"  # by name; see [rewards](../library.md)
    strength: NonNegative = 1.0  # c of the winners' part of the field
    guidance: Number = 1.0  # w of D_u + w (D_c - D_u), of the teacher
    fake_updates: SamplingSteps = 5  # updates of the fake scores per update of the generator
    time_law: AnyTimeDistribution = field(default_factory=Karras)  # noise levels at which scores are compared
    fake_time_law: AnyTimeDistribution = field(default_factory=LogNormal)  # noise levels of the fake scores' losses
    fake_weight: DenoisingWeight = "edm"  # of the fake scores' squared errors, as `weight` of `pretrain`
    normaliser_minimum: Positive = 1e-5  # least value of the normaliser nu

    student = "generator"
    needs_images = False

    @property
    def rewards(self) -> tuple[str, ...]:
        return (self.reward,)

    @property
    def critics(self) -> tuple[str, ...]:
        return ("fake", "winners", "losers") if self.strength else ("fake",)

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("generator",), "generator_loss", self.fake_updates), Update(self.critics, "fake_loss"))

    def sampler(self, problem: Problem) -> FewSteps:
        return self.steps

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """Raises UserError for an unknown reward."""
        check_reward(self.reward, problem.teacher)
        players = start_players(problem, guidance=self.guidance)
        if self.strength:
            players |= problem.copies("winners", "losers", starts=dict.fromkeys(("winners", "losers"), "teacher"))
        return players

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        laws = {"": self.time_law, "fake ": self.fake_time_law}
        drawn = draw_step(rng, problem, self.steps, laws, samples=("", "other "))
        return drawn | {"other label": drawn["label"]}  # two samples of one condition

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """dmd2's matching, and the winners' part."""
        x = generate(players, draw, self.steps)
        field_value = self.field(players, draw, x)
        return Loss(field_loss(x, field_value), {"field": field_value.abs().mean()}, carry={"x": x.detach()})

    @torch.no_grad()
    def field(self, players: Players, draw: Draw, x: Tensor) -> Tensor:
        """[(D_fake - D_teacher) - c (D_winners - D_losers)] / nu at x noised."""
        path, t = players.teacher.path, draw["t"]
        x_t, cond = path.diffuse(x, draw["eps"], t), condition(players, draw)
        teacher = players.teacher(x_t, t, cond, guidance=self.guidance)
        gap = players.fake(x_t, t, cond) - teacher
        if self.strength:
            gap = gap - self.strength * (players.winners(x_t, t, cond) - players.losers(x_t, t, cond))
        return zero_nonfinite(gap / sample_normaliser(x, teacher, self.normaliser_minimum))

    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Denoising on the generator's samples: all of them, those that won, those that lost."""
        with torch.no_grad():
            x = draw["x"] if "x" in draw else generate(players, draw, self.steps)
        cond, path = condition(players, draw), players.fake.path
        t, eps = draw["fake t"], draw["fake eps"]
        total = denoising_loss(players.fake, x, eps, t, cond, weight=self.fake_weight)
        logs = {"denoising": total.detach()}
        if self.strength:
            with torch.no_grad():
                other = generate(players, draw, self.steps, "other ")
            sign = preference(self.reward, x, other, cond, players.teacher)
            is_first, counts = expand(sign > 0, x) > 0, expand(sign.abs(), x)
            both = {"winners": torch.where(is_first, x, other), "losers": torch.where(is_first, other, x)}
            for name, sample in both.items():
                critic: Denoiser = getattr(players, name)
                estimate = critic(path.diffuse(sample, eps, t), t, cond)
                target = torch.where(counts > 0, sample, estimate.detach())  # a tie teaches nothing
                loss = denoising_error(critic, estimate, target, t, weight=self.fake_weight)
                total, logs[name] = total + loss, loss.detach()
            logs["ties"] = (sign == 0).float().mean()
        return Loss(total, logs)
