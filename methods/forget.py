"""SFD: Score Forgetting Distillation, unlearning while distilling.  Chen et al. 2024, arXiv:2409.11219.

Implemented: around a base method without data, a share of its samples is of classes that the student must not know; of
these the teacher is asked another class and the fake score their own, so that they become what the teacher shows for
the other. What that is: one class, or any of those that stay. The base's losses are as they are.
Not implemented: other classes by a classifier's view of the fake score's estimate; weights for the two parts, which are
the shares of samples here; a base with a GAN or real images, which would know nothing of what forgotten classes become.
"""

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffdistill.data.source import ImageSource
from diffdistill.diffusion.on_device import constant
from diffdistill.diffusion.step_random import StepRandom, integer_of
from diffdistill.distillation.method import METHODS, Method, Problem
from diffdistill.distillation.wrapper import Wrapper, default_base, methods_above
from diffdistill.settings.limits import MAX_CHOSEN
from diffdistill.settings.numbers import NonNegativeInt
from diffdistill.settings.schema import Fraction, UserError, field, schema

if TYPE_CHECKING:
    AnyBase = Method
else:
    AnyBase = methods_above("forget")


@schema
class Forget(Wrapper):
    """Settings. A class of a teacher that takes prompts is a prompt by its number."""

    name: Literal["forget"] = "forget"
    base: AnyBase = field(default_factory=default_base)  # the method that distils
    forgotten: Annotated[tuple[NonNegativeInt, ...], Field(max_length=MAX_CHOSEN)] = ()  # the classes, by number
    becomes: NonNegativeInt | None = None  # the class that replaces them; null: any class that is kept
    share: Fraction = 0.1  # of samples that are of forgotten classes

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """Raises UserError where classes or the base do not fit."""
        if self.forgotten:
            self._check(problem)
        return self.base.players(problem)

    def _check(self, problem: Problem) -> None:
        unknown = [c for c in self.forgotten if c >= problem.num_classes]
        if unknown or len(set(self.forgotten)) >= problem.num_classes:
            raise UserError(f"method.forgotten = {list(self.forgotten)}: the teacher has {problem.num_classes} classes")
        if self.becomes is not None and (self.becomes >= problem.num_classes or self.becomes in self.forgotten):
            raise UserError(f"method.becomes = {self.becomes}: must be a class that is kept, or null for any")
        if not self.base.tells_teacher_class:
            telling = ", ".join(sorted(n for n in METHODS.own if _tells(METHODS.find(n))))
            said = "tells its teacher no class of its own, so that nothing would be forgotten"
            raise UserError(f"method.base.name = {self.base.name!r}: {said}; choose from {telling}")
        if weight := getattr(self.base, "regression_weight", 0):
            raise UserError(f"method.base.regression_weight = {weight}: the pairs include forgotten classes; use 0")
        if self.base.needs_images:
            raise UserError("method.base: forget wraps a method without real images; set its gan_weight to 0")

    def classes(self, problem: Problem, source: ImageSource) -> tuple[int, ...]:
        """Those that stay; the others are drawn beside them."""
        every = self.base.classes(problem, source)
        if not self.forgotten:
            return every
        return tuple(c for c in every or range(problem.num_classes) if c not in self.forgotten)

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        """The base's numbers, some labels replaced; the teacher is told what they become."""
        drawn = self.base.draw(rng, problem)
        if not self.forgotten:
            return drawn
        of_groups = rng.grouped(getattr(self.base, "samples_per_condition", 1))  # which share a condition
        for name in [name for name in drawn if name.endswith("label")]:
            uniforms = of_groups.uniforms([f"{name} is forgotten", f"{name} forgotten", f"{name} becomes"])
            is_forgotten = uniforms[f"{name} is forgotten"] < self.share
            forgotten = self._one_of(self.forgotten, uniforms[f"{name} forgotten"])
            stays = problem.label_of(uniforms[f"{name} becomes"])
            becomes = stays if self.becomes is None else torch.full_like(stays, self.becomes)
            label = torch.where(is_forgotten, forgotten, drawn[name])
            told = {f"{name} for teacher": torch.where(is_forgotten, becomes, drawn[name])}
            for role in [other for other in drawn if other.startswith(f"{name} for ")]:  # dropped stays dropped
                told[role] = torch.where(drawn[role] == drawn[name], label, drawn[role])
            drawn |= {name: label, **told}
        return drawn

    @staticmethod
    def _one_of(classes: tuple[int, ...], uniform: Tensor) -> Tensor:
        return constant(classes, uniform.device, torch.int64)[integer_of(uniform, len(classes))]


def _tells(method: type[Method]) -> bool:
    return True in (vars(kind).get("tells_teacher_class") for kind in method.__mro__)
