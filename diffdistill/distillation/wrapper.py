"""A method that holds another: it changes a part of the run, and the losses stay the other's."""

from collections.abc import Mapping
from itertools import takewhile
from typing import Annotated, Any

from torch import Tensor, nn

from diffdistill.data.source import ImageSource
from diffdistill.diffusion.path import Prediction
from diffdistill.diffusion.sampling import AnySampler
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import METHODS, Batch, Draw, Method, Players, Problem, Update
from diffdistill.settings.registry import OneOf


def methods_above(name: str) -> Any:
    """The type of `base` in the method `name`: of ours any that stands above it in the registry, of others' any.

    None holds itself, however deep.
    """
    above = list(takewhile(lambda other: other != name, METHODS.own))
    return Annotated[Any, OneOf(METHODS, above, holder=name)]


def default_base() -> Method:
    """DMD2 with its defaults."""
    return METHODS.find("dmd2")()


class Wrapper(Method):
    """A method with a field `base`, the method that it holds. What stands here is the base's own answer."""

    base: Method

    @property
    def updates(self) -> tuple[Update, ...]:
        return self.base.updates

    @property
    def student(self) -> str:
        return self.base.student

    @property
    def needs_images(self) -> bool:
        return self.base.needs_images

    @property
    def keeps_teacher(self) -> bool:
        return self.base.keeps_teacher

    @property
    def trains_network(self) -> bool:
        return self.base.trains_network

    @property
    def differentiates_forward(self) -> bool:
        return self.base.differentiates_forward

    def sampler(self, problem: Problem) -> AnySampler:
        return self.base.sampler(problem)

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        return self.base.players(problem)

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        return self.base.draw(rng, problem)

    def student_model(self, network: Any, predicts: Prediction, problem: Problem) -> tuple[Any, Prediction]:
        return self.base.student_model(network, predicts, problem)

    def classes(self, problem: Problem, source: ImageSource) -> tuple[int, ...]:
        return self.base.classes(problem, source)

    def prepare(self, problem: Problem, seed: int) -> dict[str, Tensor]:
        return self.base.prepare(problem, seed)

    def initialise(self, players: Players, stored: Mapping[str, Tensor]) -> None:
        self.base.initialise(players, stored)

    def after_update(self, players: Players, carried: Mapping[str, Tensor]) -> None:
        self.base.after_update(players, carried)

    def after_step(self, players: Players, stored: Mapping[str, Tensor], step: int) -> None:
        self.base.after_step(players, stored, step)

    def call(self, function: str, players: Players, draw: Draw, batch: Batch) -> Any:
        return self.base.call(function, players, draw, batch)
