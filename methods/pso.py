"""PSO: Pairwise Sample Optimization for an already distilled generator.  Miao et al. 2024, arXiv:2410.03190.

Implemented: the offline form on pairs of a wanted image and one of the start's own, or of two of the start's that a
reward ranks, compared by the denoising error at the student's levels; the online form on two of the student's own
roll-outs with fresh noise between the steps, by the likelihood of each step, clipped. The reference is the start.
Any reward will do, differentiable or not. A one-step student has no likelihood: it takes the offline form alone.
Not implemented: the DreamBooth form (a hinge without reference), the prior term on the losing image.
"""

import math
from copy import deepcopy
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.sampling import FewSteps, times_on
from diffdistill.diffusion.step_random import StepRandom, integer_of
from diffdistill.distillation.losses import DenoisingWeight, denoising_weight
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.preferences import preference, preference_loss
from diffdistill.distillation.rewards import check_reward
from diffdistill.settings.schema import NonNegative, Positive, field, schema


@schema
class PSO(Method):
    """Settings, in the paper's terms. The student comes from an earlier run (`init`), or is the teacher itself."""

    name: Literal["pso"] = "pso"
    steps: FewSteps = field(default_factory=FewSteps)  # the student's own sampling steps
    form: Literal["offline", "online"] = "offline"  # on pairs of images, or on roll-outs of the student's own
    winners: Literal["images", "reward"] = "images"  # of `offline`: real ones over the start's, or the better of two
    reward: str = "contrast"  # by name, for `online` and `winners: reward`; see [rewards](../library.md)
    beta: Positive = 5.0  # of the margin inside the sigmoid; the paper's scripts: 5 offline, 50 online
    loser_weight: NonNegative = 1.0  # of the losing image's error in the offline margin
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.1  # epsilon: a step's ratio is cut at 1 - epsilon, 1 + epsilon
    weight: DenoisingWeight = "edm"  # of the squared errors of `offline`

    student = "generator"
    updates = (Update(("generator",), "generator_loss"),)

    def __post_init__(self) -> None:
        if self.form == "online" and self.steps.num_evaluations == 1:
            raise ValueError("form: online needs noise between steps; one step has none: use offline")
        if self.form == "online" and self.steps.later_noise != "fresh":
            raise ValueError(f"form: online needs fresh noise between the steps, not {self.steps.later_noise}")

    @property
    def needs_images(self) -> bool:
        return self.form == "offline" and self.winners == "images"

    @property
    def rewards(self) -> tuple[str, ...]:
        return () if self.needs_images else (self.reward,)

    @property
    def keeps_teacher(self) -> bool:
        """For a judge, who asks it about prompts and pixels."""
        return self.judges_pixels

    def sampler(self, problem: Problem) -> FewSteps:
        return self.steps

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """The student, and the reference that it starts as.  Raises UserError for an unknown reward."""
        if not self.needs_images:
            check_reward(self.reward, problem.teacher)
        generator = problem.copies("generator")["generator"]
        return {"generator": generator, "reference": freeze(deepcopy(generator))}

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        names = [f"{who}{part}" for who in ("a ", "b ") for part in ("z", *self._fresh)]
        uniforms = rng.uniforms(["label", "call"])
        return {
            "label": problem.label_of(uniforms["label"]),
            "call": integer_of(uniforms["call"], self.steps.num_evaluations),
            **rng.normals([*names, "eps"], problem.image_shape),
        }

    @property
    def _fresh(self) -> list[str]:
        return [f"fresh {i}" for i in range(self.steps.num_evaluations - 1)]

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """-log sigmoid(beta margin) over pairs; ties have no gradient."""
        margin, logs = (self.offline if self.form == "offline" else self.online)(players, draw, batch)
        loss = preference_loss(self.beta * margin).mean()
        return Loss(loss, {"margin": margin.detach().mean(), **logs})

    def offline(self, players: Players, draw: Draw, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """[e_ref(x_w) - l e_ref(x_l)] - [e(x_w) - l e(x_l)], [B], e the weighted denoising error of a sample."""
        cond = batch.cond if self.needs_images else players.generator.class_cond(draw["label"])
        with torch.no_grad():
            second = self.roll_out(players.reference, draw, cond, "b ")[-1]
            first = batch.images if self.needs_images else self.roll_out(players.reference, draw, cond, "a ")[-1]
            sign = torch.ones(len(first), device=first.device)
            if not self.needs_images:
                sign = self.preferred(players, first, second, cond)
            is_first = (sign > 0).reshape(-1, *[1] * (first.ndim - 1))
            winner, loser = torch.where(is_first, first, second), torch.where(is_first, second, first)
            expected = self.gap(players.reference, draw, winner, loser, cond)
        return sign.abs() * (expected - self.gap(players.generator, draw, winner, loser, cond)), {}

    def preferred(self, players: Players, first: Tensor, second: Tensor, cond: Cond) -> Tensor:
        """The sign of the reward's difference, [B]."""
        return preference(self.reward, first, second, cond, players.teacher if self.keeps_teacher else None)

    def gap(self, denoiser: Denoiser, draw: Draw, winner: Tensor, loser: Tensor, cond: Cond) -> Tensor:
        """e(x_w) - l e(x_l), [B], at one of the student's own levels, both with the same noise."""
        path, errors = denoiser.path, list[Tensor]()
        t = times_on(self.steps, path, winner.device)[draw["call"]]
        scale = denoising_weight(self.weight, path, t, denoiser.sigma_data).to(winner.device)
        for x in (winner, loser):
            estimate = denoiser(path.diffuse(x, draw["eps"], t), t, cond)
            errors.append(scale * (estimate - x).square().flatten(1).mean(1))
        return errors[0] - self.loser_weight * errors[1]

    def online(self, players: Players, draw: Draw, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over steps of h log clip(p / p_ref), [B], of the winning roll-out less the losing one."""
        cond = players.generator.class_cond(draw["label"])
        with torch.no_grad():
            paths = [self.roll_out(players.generator, draw, cond, who) for who in ("a ", "b ")]
            sign = self.preferred(players, paths[0][-1], paths[1][-1], cond)
        ratios = torch.stack([self.log_ratios(players, states, cond) for states in paths], 1)  # [B, 2, steps]
        low, high = math.log(1 - self.clip), math.log(1 + self.clip)
        is_clipped = (ratios < low) | (ratios > high)
        clipped = ratios.clamp(low, high).sum(2)
        return sign * (clipped[:, 0] - clipped[:, 1]), {
            "clipped": is_clipped.double().mean(),
            "ties": (sign == 0).float().mean(),
        }

    def roll_out(self, generator: Denoiser, draw: Draw, cond: Cond, who: str) -> list[Tensor]:
        """The network's input in each step, and the image last."""
        states = self.steps.trajectory(generator, draw[f"{who}z"], cond, fresh_noise=lambda i: draw[f"{who}fresh {i}"])
        return [*(state.x for state in states), generator(states[-1].x, states[-1].t, cond)]

    def log_ratios(self, players: Players, states: list[Tensor], cond: Cond) -> Tensor:
        """log p(x_i+1 | x_i) - log p_ref of each re-noised step, [B, steps], a mean over pixels.

        The step is N(alpha' D(x_i), sigma'^2); the last step adds no noise and has no likelihood.
        """
        path = players.generator.path
        times, ratios = times_on(self.steps, path, states[0].device), []
        for i in range(len(times) - 1):
            t, following = (time.expand(len(states[i])) for time in times[i : i + 2])
            squares = []
            for who in ("generator", "reference"):
                with torch.set_grad_enabled(who == "generator"):
                    mean = path.diffuse(players[who](states[i], t, cond), torch.zeros_like(states[i]), following)
                squares.append((states[i + 1] - mean).square().flatten(1).mean(1))
            ratios.append((squares[1] - squares[0]) / (2 * path.sigma(following).to(states[i].device) ** 2))
        return torch.stack(ratios, 1)
