"""What a method is: pure losses on players, and who steps when.

A method is a frozen dataclass, which is also its config. It never steps an optimiser, logs, or asks for a device.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from diffdistill.denoiser import NO_COND, Cond, Denoiser
from diffdistill.draws import Draws
from diffdistill.path import Path
from diffdistill.sampling import AnySampler

REGISTRY = {
    "pretrain": "diffdistill.methods.pretrain:Pretrain",
    "dmd2": "diffdistill.methods.dmd2:DMD2",
}
"""Every method's name and where its class is."""

Draw = Mapping[str, Tensor]
"""Every random number of one step, by name, and what earlier updates of the step carried over."""


@dataclass(frozen=True)
class Update:
    """One optimiser step: the players that it changes, the method's loss, and every how many iterations."""

    players: tuple[str, ...]
    loss: str
    every: int = 1


@dataclass(frozen=True)
class Loss:
    """total: scalar with graph.  logs: detached scalars.  carry: detached tensors for the step's later updates."""

    total: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)
    carry: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """images: [B, ...] real data, empty for data-free methods; cond: its condition; stored: from `prepare`."""

    images: Tensor
    cond: Cond = NO_COND
    stored: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What is known before training starts.

    image_shape: [C, H, W].  num_classes: 0 without labels.  network: the student-to-be, new and untrained (pretrain)
    or None; teacher: frozen, or None.
    """

    image_shape: tuple[int, ...]
    num_classes: int
    path: Path
    teacher: Denoiser | None = None
    network: Denoiser | None = None


class Players(Mapping[str, nn.Module]):
    """The networks of a run by name, also as attributes: players.generator, players.teacher."""

    def __init__(self, **modules: nn.Module) -> None:
        self._modules = modules

    def __getitem__(self, name: str) -> nn.Module:
        return self._modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_modules"][name]
        except KeyError:
            raise AttributeError(f"no player {name!r}; there are {sorted(self.__dict__['_modules'])}") from None


@runtime_checkable
class Method(Protocol):
    """The interface between a paper and the trainer. Each loss named in `updates` is a method
    `(players, draw, batch) -> Loss`."""

    @property
    def name(self) -> str: ...
    @property
    def updates(self) -> tuple[Update, ...]:
        """Who steps, in which order, how often."""
        ...

    @property
    def student(self) -> str:
        """The player that samples are taken from; it gets the EMA."""
        ...

    @property
    def needs_images(self) -> bool:
        """Whether the losses look at real data."""
        ...

    def sampler(self, setting: Setting) -> AnySampler:
        """How the student makes images."""
        ...

    def players(self, setting: Setting) -> dict[str, nn.Module]:
        """The trainable players, at their start. Raises UserError if the method and the setting do not fit."""
        ...

    def draw(self, rng: Draws, setting: Setting) -> dict[str, Tensor]:
        """Every random number of one step."""
        ...

    def prepare(self, setting: Setting, seed: int) -> dict[str, Tensor]:
        """What is made once before training and kept with the run; empty for most."""
        ...


@cache
def registered() -> dict[str, type]:
    """Every method class by name, imported."""
    found = {}
    for name, place in REGISTRY.items():
        module, attribute = place.split(":")
        found[name] = getattr(import_module(module), attribute)
    return found
