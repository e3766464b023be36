"""What a method is: pure losses on players, and who steps when.

A method is a frozen dataclass, which is also its config. It never steps an optimiser, logs, or asks for a device.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from diffdistill.data.source import ImageSource
from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser, compute_on, device_of
from diffdistill.diffusion.on_device import constant, known_on_host, upload
from diffdistill.diffusion.path import Path, Prediction
from diffdistill.diffusion.router import AnyRouter
from diffdistill.diffusion.sampling import AnySampler
from diffdistill.diffusion.step_random import StepRandom, integer_of
from diffdistill.distillation.rewards import is_judge
from diffdistill.networks.lora import LoRASettings, lora_of, settings_for, with_lora
from diffdistill.settings.registry import OneOf, Registry, modules_of, schema_class
from diffdistill.settings.schema import UserError

Draw = Mapping[str, Tensor]
"""Every random number of one step, by name, and what earlier updates of the step carried over."""


@dataclass(frozen=True)
class Update:
    """One optimiser step: the players that it changes, the method's loss, and every how many iterations.

    start, start_images: the run's iterations and images that pass before the update is first due.  more_from_images:
    those that pass before its loss computes more (a GAN that joins); 0: all of it from the start.
    statistics: a method `(players, draw, batch) -> dict of [B, ...]` for losses that look at the whole batch. Where the
    batch comes in pieces it is asked for each of them first, without gradient, and every piece's draw then holds the
    values of all samples, in order, as "all <name>".
    """

    players: tuple[str, ...]
    loss: str
    every: int = 1
    start_images: int = 0
    statistics: str | None = None
    start: int = 0
    more_from_images: int = 0

    def is_due(self, step: int, images_seen: int) -> bool:
        """Whether the update is taken in the iteration `step`, before which `images_seen` images passed."""
        return step % self.every == 0 and step >= self.start and images_seen >= self.start_images

    def first(self, batch_size: int) -> int:
        """The first iteration that the update may be taken in, whatever `every` is."""
        return max(self.start, math.ceil(self.start_images / batch_size))


def first_with_all(
    updates: Sequence[Update], batch_size: int, *, start: int | None = None, num_steps: int | None = None
) -> int:
    """The first iteration from `start` on that is every update's turn; default: in which all of them are due, and
    compute all that they ever will: what it costs, the run costs from then on.

    num_steps: of the run. Updates that it does not reach are left out, and where it ends before a turn of all the
    others, their last one is taken.
    """
    start = phase_starts(updates, batch_size, num_steps)[-1] if start is None else start
    reached = [update for update in updates if num_steps is None or update.first(batch_size) < num_steps]
    every = math.lcm(*(update.every for update in reached))
    step = math.ceil(start / every) * every
    return step if num_steps is None or step < num_steps else (num_steps - 1) // every * every


def phase_starts(updates: Sequence[Update], batch_size: int, num_steps: int | None = None) -> list[int]:
    """The iterations, 0 first, from which a step costs more than before: an update is due, or computes more.

    num_steps: of the run; default: one that reaches all of them.
    """
    images = {number for update in updates for number in (update.start_images, update.more_from_images)}
    later = {update.start for update in updates} | {math.ceil(number / batch_size) for number in images}
    return sorted({0} | {start for start in later if num_steps is None or start < num_steps})


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
class Problem:
    """What is known before training starts.

    image_shape: [C, H, W]; of a step whose batch has another, that one.  image_shapes: of all batches, where they
    differ.  num_classes: 0 without labels.  teacher: frozen, or None.  data: the run's, maybe of no rows where its
    method needs no images; None where none is told.
    network: a new, untrained student, where the method trains one that is not a copy of its teacher; else None.
    teachers: further frozen ones by name, beside `teacher`; among the players each is "teacher_<name>".
    initial: the players of an earlier run that this one starts from, frozen, by name.
    starts: by player, which of these its copy starts as: "teacher", "teacher_<name>" or "init.<player>"; for those that
    are not named see `copies`.
    classes: the classes that this run is about; empty for all.  num_steps, batch_size: of the run, in iterations and
    images.  at_a_time: images that a process has at a time; 0 where it is not told.  lora: the players that are trained
    as factors over the network that they start from; null: in full.
    """

    image_shape: tuple[int, ...]
    num_classes: int
    path: Path
    teacher: Denoiser | None = None
    network: Denoiser | None = None
    initial: Mapping[str, Denoiser] = field(default_factory=dict)
    classes: tuple[int, ...] = ()
    num_steps: int = 0
    batch_size: int = 0
    at_a_time: int = 0
    lora: Mapping[str, LoRASettings | None] = field(default_factory=dict)
    teachers: Mapping[str, Denoiser] = field(default_factory=dict)
    starts: Mapping[str, str] = field(default_factory=dict)
    image_shapes: tuple[tuple[int, ...], ...] = ()
    data: ImageSource | None = None

    @property
    def least_shape(self) -> tuple[int, ...]:
        """[C, H, W] of which no batch has a shorter side."""
        return tuple(min(sides) for sides in zip(*(self.image_shapes or (self.image_shape,)), strict=True))

    @property
    def all_teachers(self) -> dict[str, Denoiser]:
        """Every teacher by its name among the players."""
        first = {} if self.teacher is None else {"teacher": self.teacher}
        return first | {f"teacher_{name}": teacher for name, teacher in self.teachers.items()}

    def label_of(self, uniform: Tensor) -> Tensor:
        """Uniform numbers [B] in (0, 1) as classes of this run, int64 [B]."""
        known = known_on_host(uniform)
        if (
            known is not None and uniform.device.type != "cpu"
        ):  # what the host knows of them it will know of the classes
            return upload(self.label_of(known), uniform.device)
        if not self.classes:
            return integer_of(uniform, max(self.num_classes, 1))
        return constant(self.classes, uniform.device, torch.int64)[integer_of(uniform, len(self.classes))]

    def copies(self, *names: str, starts: Mapping[str, str] | None = None) -> dict[str, nn.Module]:
        """Trainable copies for players.  starts: what a method says of them, where the problem's `starts` does not.

        A player that neither names starts as its namesake in `initial`, or as the teacher. If `initial` holds a single
        player, a diffusion model, then all of them start as it. A generator is none: the others start as the teacher
        beside it, unless its network is another.
        Raises UserError if there is no teacher, or none of that name, and where LoRA would stand over another one.
        """
        return {name: self._copy(name, self.start_of(name, (starts or {}).get(name))) for name in names}

    def start_of(self, player: str, named: str | None = None) -> Denoiser:
        """What a player's copy is made of, see `copies`.  named: by the method."""
        if self.teacher is None:
            raise UserError("teacher: this method distils a teacher; name a pretrained run")
        named = self.starts.get(player, named)
        if named is not None:
            known = self.all_teachers | {f"init.{name}": network for name, network in self.initial.items()}
            if named not in known:
                raise UserError(f"starts.{player} = {named!r}: no such model; choose from {', '.join(known)}")
            found = known[named]
            if found is not self.teacher and settings_for(player, self.lora) and not lora_of(found):
                raise UserError(f"starts.{player} = {named!r}: LoRA is applied to the teacher; use one of the two")
            return found
        other, lone = self.teacher, self.initial.get("generator")
        if len(self.initial) == 1 and (lone is None or not (lora_of(lone) or shapes_of(lone) == shapes_of(other))):
            [other] = self.initial.values()
        return self.initial.get(player, other)

    def _copy(self, name: str, origin: Denoiser) -> nn.Module:
        settings = settings_for(name, self.lora)
        if settings is None or lora_of(origin):
            copy = deepcopy(origin).to(device_of(origin)).requires_grad_(True)
            compute_on(copy, None)
            return copy
        return with_lora(origin, settings)


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """Of its weights, by name."""
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


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


class Method(ABC):
    """The interface between a paper and the trainer. Each loss named in `updates` is a method
    `(players, draw, batch) -> Loss`. What stands here with a body is what most methods leave as it is.
    """

    name: str

    @property
    def keeps_teacher(self) -> bool:
        """Whether the losses ask the teacher. If not it leaves memory after `prepare`."""
        return True

    @property
    def takes_teachers(self) -> bool:
        """Whether the losses ask `problem.teachers`. If not they leave memory once players have started as them."""
        return False

    @property
    def tells_teacher_class(self) -> bool:
        """Whether the teacher is asked the draw's "<sample>label for teacher" where there is one, and each class that
        the losses see is a label of the draw."""
        return False

    @property
    def trains_network(self) -> bool:
        """Whether the student is the config's `model`, new and untrained, although there is a teacher."""
        return False

    @property
    def one_shape(self) -> str | None:
        """Why batches must all be of one shape; None where each may have its own."""
        return None

    @property
    def judges_pixels(self) -> bool:
        """Whether a loss looks at the student's images as pixels. Then the VAE stays in memory."""
        return any(is_judge(name) for name in self.rewards)

    @property
    def rewards(self) -> tuple[str, ...]:
        """The names of those that losses ask."""
        return ()

    @property
    def group(self) -> int:
        """The samples that belong together: of so many, or a multiple, a micro-batch is made."""
        return 1

    @property
    @abstractmethod
    def updates(self) -> tuple[Update, ...]:
        """Who steps, in which order, how often."""

    @property
    @abstractmethod
    def student(self) -> str:
        """The player that samples are taken from; it gets the EMA."""

    @property
    @abstractmethod
    def needs_images(self) -> bool:
        """Whether the losses look at real data."""

    @abstractmethod
    def sampler(self, problem: Problem) -> AnySampler:
        """How the student makes images."""

    @abstractmethod
    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """The players at their start. Those that no update names are saved with the run, but not trained.

        Raises UserError if the method and the problem do not fit.
        """

    @abstractmethod
    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        """Every random number of one step."""

    def student_model(self, network: Any, predicts: Prediction, problem: Problem) -> tuple[Any, Prediction]:
        """The student's network config and prediction, from the teacher's. A changed one comes as problem.network."""
        return network, predicts

    def classes(self, problem: Problem, source: ImageSource) -> tuple[int, ...]:
        """The classes that this run is about; empty for all. Real images and drawn labels are of these alone."""
        return ()

    def router(self, problem: Problem) -> AnyRouter | None:
        """Whose a condition is among the students of several runs, where classes do not say it."""
        return None

    def prepare(self, problem: Problem, seed: int) -> dict[str, Tensor]:
        """What is made once before training and kept with the run, as `batch.stored`."""
        return {}

    def initialise(self, players: Players, stored: Mapping[str, Tensor]) -> None:
        """Change players before the first step of a new run, by what was prepared."""

    def after_update(self, players: Players, carried: Mapping[str, Tensor]) -> None:
        """Keep what a loss carried in players that no update names; called when its optimiser step was taken."""

    def after_step(self, players: Players, stored: Mapping[str, Tensor], step: int) -> None:
        """Move the players that no update names (averages, earlier stages).  step: iterations done; no gradient."""

    @property
    def has_signals(self) -> bool:
        """Whether `signals` says anything."""
        return type(self).signals is not Method.signals

    def signals(self, players: Players, rng: StepRandom, problem: Problem, batch: Batch) -> dict[str, float]:
        """Health signals of the method's own, by name, each with a band.  rng: of 8 samples or more, of the health's.

        batch: without images, of what was prepared. Asked without gradient; players are in eval mode.
        """
        return {}

    def call(self, function: str, players: Players, draw: Draw, batch: Batch) -> Any:
        """A loss or statistics that `updates` names."""
        return getattr(self, function)(players, draw, batch)


WRAPPERS = ("ddk", "forget", "diversity", "disback", "msd")
"""Ours that hold another method: any of those before it here, and any that holds none."""

_FILES = modules_of("diffdistill.methods")
REGISTRY = {name: _FILES[name] for name in (*(name for name in _FILES if name not in WRAPPERS), *WRAPPERS)}
"""Our methods: their names and where their classes are, a file each. One that holds another can hold those above it."""

METHODS: Registry[type[Method]] = Registry(
    "method", REGISTRY, group="diffdistill.methods", check=schema_class(base=lambda: Method)
)
"""Every method, by its name in a config."""

if TYPE_CHECKING:
    AnyMethod = Method
else:
    AnyMethod = Annotated[Any, OneOf(METHODS)]
