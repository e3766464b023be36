"""A method that holds another: it changes a part of the run, and the losses stay the other's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diffdistill.data.source import ImageSource
from diffdistill.diffusion.draws import Draws
from diffdistill.diffusion.path import Prediction
from diffdistill.diffusion.sampling import AnySampler
from diffdistill.distillation.method import Batch, Draw, Method, Players, Setting, Update, registered
from diffdistill.settings.schema import any_of


def methods_above(name: str) -> Any:
    """The type of `base` in the method `name`: any that stands above it in the registry, so that none holds itself."""
    return any_of(registered(above=name).values())


def default_base() -> Method:
    """DMD2 with its defaults."""
    made: Method = registered(above="disback")["dmd2"]()
    return made


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

    def sampler(self, setting: Setting) -> AnySampler:
        return self.base.sampler(setting)

    def players(self, setting: Setting) -> dict[str, nn.Module]:
        return self.base.players(setting)

    def draw(self, rng: Draws, setting: Setting) -> dict[str, Tensor]:
        return self.base.draw(rng, setting)

    def student_model(self, network: Any, predicts: Prediction, setting: Setting) -> tuple[Any, Prediction]:
        return self.base.student_model(network, predicts, setting)

    def classes(self, setting: Setting, source: ImageSource) -> tuple[int, ...]:
        return self.base.classes(setting, source)

    def prepare(self, setting: Setting, seed: int) -> dict[str, Tensor]:
        return self.base.prepare(setting, seed)

    def begin(self, players: Players, stored: Mapping[str, Tensor]) -> None:
        self.base.begin(players, stored)

    def remember(self, players: Players, carried: Mapping[str, Tensor]) -> None:
        self.base.remember(players, carried)

    def after_step(self, players: Players, stored: Mapping[str, Tensor], step: int) -> None:
        self.base.after_step(players, stored, step)

    def call(self, function: str, players: Players, draw: Draw, batch: Batch) -> Any:
        return self.base.call(function, players, draw, batch)
