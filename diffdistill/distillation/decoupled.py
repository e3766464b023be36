"""Guidance apart from matching in a guided field, each term at noise of its own."""

from typing import Literal

import torch
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import Path, expand
from diffdistill.diffusion.sampling import StepSampler, times_on
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, Karras, share_below, shares_between
from diffdistill.distillation.levels import DrawnLevels
from diffdistill.distillation.losses import sample_normaliser, zero_nonfinite
from diffdistill.distillation.method import Draw, Players
from diffdistill.distillation.scales import Scales, scale_in
from diffdistill.distillation.score_distillation import condition
from diffdistill.settings.schema import UserError, field, schema

LOWEST = torch.zeros(1, dtype=torch.float64) + 1e-9
"""The uniform number at which a law's least time is read."""


@schema
class Decoupled:
    """The teacher's guidance as a separate term, at noise levels other than those of the matching.

    time_law: noise levels of guidance.  range: "below_call": below the noise level of the student's step;
    "whole": all levels.  normaliser: the estimate in each term's nu, the conditional one or, as in DMD2, the guided
    one.  Liu et al. 2025, arXiv:2511.22677, eq. 8.
    """

    time_law: AnyTimeDistribution = field(default_factory=Karras)
    range: Literal["below_call", "whole"] = "below_call"
    normaliser: Literal["conditional", "guided"] = "conditional"

    def check(self, steps: StepSampler, path: Path, levels: DrawnLevels | None = None) -> None:
        """Raise UserError if the time distribution has no noise below one of the student's steps.

        levels: if they are drawn.
        """
        if self.range == "whole":
            return
        times = steps.times(path)
        for level in times[:1].tolist() if levels else times.tolist():  # the first is the sampler's in any case
            shares_between(self.time_law, path, path.t_min, level, "method.decoupled.time_law")
        if levels and levels.num_steps[1] > 1:
            drawn, own = (float(path.ratio(law(LOWEST, path))) for law in (levels.time_law, self.time_law))
            if drawn < own:
                raise UserError(
                    f"method.levels.time_law: steps may be at a ratio of {drawn:.3g}, below which "
                    f"method.decoupled.time_law, which starts at {own:.3g}, has no noise level; raise the former, "
                    "lower the latter, or use range: whole"
                )

    def times(self, rng: StepRandom, path: Path, steps: StepSampler, draw: Draw) -> Tensor:
        """Of guidance's noise, [B], float64.  Most time distributions lie wholly below the first step's."""
        uniform, step = rng.uniform("guidance t"), int(draw["step"])
        if self.range == "below_call":
            times = draw["times"] if "times" in draw else times_on(steps, path, uniform.device).expand(len(uniform), -1)
            uniform = uniform * share_below(self.time_law, path, times[:, step])
        return self.time_law(uniform, path)

    @torch.no_grad()
    def field(
        self, players: Players, draw: Draw, x: Tensor, *, scales: Scales, minimum: float, alpha_power: int
    ) -> Tensor:
        """(D_fake - D_c) / nu at one noise, less (D_guided - D_c) / nu at another: linearly (w - 1) (D_c - D_u)."""
        path, guidance = players.teacher.path, scale_in(draw, scales, "guidance")
        told = condition(players, draw, role="teacher")

        def term(call: str, difference: Tensor, plain: Tensor, guided: Tensor) -> Tensor:
            of_whom = guided if self.normaliser == "guided" else plain
            power = path.alpha(draw[f"{call}t"]) ** alpha_power
            return zero_nonfinite(difference / sample_normaliser(x, of_whom, minimum) * expand(power, x))

        x_t, t = path.diffuse(x, draw["eps"], draw["t"]), draw["t"]
        fake_guidance = scale_in(draw, scales, "fake_guidance")
        fake = players.fake(x_t, t, condition(players, draw, role="fake"), guidance=fake_guidance)
        if self.normaliser == "guided":
            plain, guided = both(players.teacher, x_t, t, told, guidance)
        else:
            plain = guided = players.teacher(x_t, t, told)
        matching = term("", fake - plain, plain, guided)
        if isinstance(guidance, (int, float)) and guidance == 1:
            return matching
        x_t, t = path.diffuse(x, draw["guidance eps"], draw["guidance t"]), draw["guidance t"]
        plain, guided = both(players.teacher, x_t, t, told, guidance)
        return matching + term("guidance ", plain - guided, plain, guided)


def both(teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, guidance: float | Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's conditional and its guided estimate, each network evaluated once."""
    plain = teacher(x_t, t, cond)
    if not teacher.net.has_null_condition:  # it is told w
        return plain, teacher(x_t, t, cond, guidance=guidance)
    return plain, teacher.combine(teacher(x_t, t, cond, guidance=0.0), plain, guidance, x_t, t)
