"""Diversity-Rewarded CFG Distillation: samples of one condition differ.  Cideron et al. 2024, arXiv:2410.06084.

Implemented: around any method whose student makes images in one or a few steps, the reward of pairs of samples of one
condition between embeddings, by its gradient. With a base that is guided it is the paper's objective, quality and
diversity at once. The paper's is for language-style models of music, by reinforcement; ours for images is DERIVED.
The mixing of a student of quality with one of diversity is `diffdistill merge`.
Not implemented: the policy gradient, for embeddings without a derivative. Not verified: every number of the paper.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffdistill.diffusion.sampling import FewSteps, StepSampler
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem
from diffdistill.distillation.pair_rewards import Embedding, pair_diversity
from diffdistill.distillation.score_distillation import check_groups, condition, generate
from diffdistill.distillation.wrapper import Wrapper, default_base, methods_above
from diffdistill.settings.limits import MAX_BATCH
from diffdistill.settings.schema import NonNegative, UserError, field, schema

if TYPE_CHECKING:
    AnyBase = Method
else:
    AnyBase = methods_above("diversity")

SAMPLE = "pair "


@schema
class Diversity(Wrapper):
    """Settings. The base's losses are as they are; the student's has the reward beside it, on samples of its own."""

    name: Literal["diversity"] = "diversity"
    base: AnyBase = field(default_factory=default_base)  # the method that distils
    weight: NonNegative = 1.0  # beta, of the reward; 0 is the base, bit for bit
    samples_per_condition: Annotated[int, Field(ge=2, le=MAX_BATCH)] = 2  # consecutive samples that share a condition
    embedding: Embedding = field(default_factory=Embedding)  # what is compared

    keeps_teacher = True

    @property
    def group(self) -> int:
        return self.samples_per_condition

    @property
    def judges_pixels(self) -> bool:
        return self.base.judges_pixels or self.embedding.features is not None

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """Raises UserError where base, groups or embedding do not fit."""
        if self.weight:
            if not isinstance(_steps(self.base), StepSampler) or self.base.student != "generator":
                raise UserError(
                    f"method.base.name = {self.base.name!r}: its student does not sample in one or a few steps"
                )
            check_groups(problem, self.samples_per_condition)
            self._check_whole(problem.at_a_time)
        made = self.base.players(problem)
        if self.weight:
            assert problem.teacher is not None
            self.embedding.check("method.embedding", problem.image_shape, problem.teacher)
        return made

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        """The base's numbers, and the starts of the samples that are compared: a condition for each group."""
        drawn = self.base.draw(rng, problem)
        if not self.weight:
            return drawn
        label = problem.label_of(rng.grouped(self.samples_per_condition).uniform(f"{SAMPLE}label"))
        noises = [f"{SAMPLE}{noise}" for noise in ("z", "eps", *(f"fresh {i}" for i in range(self._calls - 1)))]
        return drawn | {f"{SAMPLE}label": label, **rng.normals(noises, problem.image_shape)}

    def call(self, function: str, players: Players, draw: Draw, batch: Batch) -> Any:
        """The base's; in the student's loss less weight times the mean reward."""
        made = self.base.call(function, players, draw, batch)
        if not self.weight or not any(u.loss == function and self.student in u.players for u in self.updates):
            return made
        reward = self.reward(players, draw).mean()
        return Loss(made.total - self.weight * reward, {**made.logs, "diversity": reward.detach()}, made.carry)

    def reward(self, players: Players, draw: Draw) -> Tensor:
        """Of each of the samples of its own, [B], with graph."""
        own = {name: value for name, value in draw.items() if name.startswith(SAMPLE)}
        self._check_whole(len(own[f"{SAMPLE}z"]))
        own["step"] = torch.tensor(self._calls - 1)
        x = generate(players, own, _steps(self.base), SAMPLE)
        cond = condition(players, own, SAMPLE)
        return pair_diversity(self.embedding(x, own[f"{SAMPLE}eps"], cond, players.teacher), self.samples_per_condition)

    def _check_whole(self, count: int) -> None:
        """Raise UserError where so many images at a time are no whole groups, whose pairs are compared."""
        if count % self.samples_per_condition:
            raise UserError(
                f"method.samples_per_condition = {self.samples_per_condition}: must divide the images per process and "
                f"micro-batch, {count}: train.micro_batch_size, or the batch over the processes"
            )

    @property
    def _calls(self) -> int:
        return _steps(self.base).num_evaluations


def _steps(method: Any) -> FewSteps:
    """How a method's student makes its image; a wrapper's is its base's."""
    while hasattr(method, "base"):
        method = method.base
    found: FewSteps = getattr(method, "steps", None)  # type: ignore[assignment]
    return found
