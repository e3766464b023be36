"""One iteration of a method: random numbers, losses and gradients. Who steps, and when, is the caller's affair."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.on_device import upload
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Loss, Method, Players, Problem, Update
from diffdistill.training.optimizers import trainable


@dataclass
class MicroBatch:
    """A part of the global batch on this process; `draw` gathers what the step's updates carry over."""

    rng: StepRandom
    batch: Batch
    draw: dict[str, Tensor] = field(default_factory=dict)


def seed_own(device: torch.device, seed: int) -> None:
    """Begin torch's own generators, the host's and the device's, as torch.manual_seed does: that one asks every kind of
    device that torch knows, which takes a hundred times as long."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


@dataclass(frozen=True)
class Iteration:
    """A method's losses on its players.

    trained: the players that updates name, with the parameters of each that training may change.  stored: from the
    method's `prepare`.  is_half: whether networks compute in bf16.  compiles: see `StepRandom`.
    """

    method: Method
    problem: Problem
    players: Players
    trained: Mapping[str, list[nn.Parameter]]
    stored: Mapping[str, Tensor]
    seed: int
    device: torch.device
    is_half: bool = False
    compiles: bool = False

    @staticmethod
    def of(
        method: Method,
        problem: Problem,
        players: Players,
        trained: Mapping[str, nn.Module],
        *,
        stored: Mapping[str, Tensor],
        seed: int,
        device: torch.device,
        is_half: bool = False,
        compiles: bool = False,
    ) -> "Iteration":
        """With the parameters that now require a gradient."""
        parameters = {name: trainable(module) for name, module in trained.items()}
        return Iteration(method, problem, players, parameters, stored, seed, device, is_half, compiles)

    def micro_batch(self, step: int, first: int, images: Tensor, cond: Cond, size: int) -> MicroBatch:
        """The samples from number `first` on, with this step's random numbers.  images: [size, ...], or empty."""
        rng = StepRandom(self.seed, step, upload(torch.arange(first, first + size), self.device), self.compiles)
        problem, shape = self.problem, tuple(images.shape[1:])
        if len(images) and shape != problem.image_shape:
            problem = replace(problem, image_shape=shape)
        return MicroBatch(rng, Batch(images, cond, self.stored), self.method.draw(rng, problem))

    def loss(self, update: Update, micro: MicroBatch) -> Loss:
        """An update's loss on a micro-batch, with a graph to the update's players alone; only they have dropout."""
        self.select(update)
        made: Loss = self.ask(update.loss, micro, seed=update.loss)
        return made

    def select(self, update: Update) -> None:
        """Let the update's players learn, and no other."""
        for name, parameters in self.trained.items():
            if self.players[name].training != (name in update.players):
                self.players[name].train(name in update.players)
            for parameter in parameters:
                parameter.requires_grad_(name in update.players)

    def ask(self, function: str, micro: MicroBatch, *, seed: str) -> Any:
        """A function of the method's on a micro-batch.  seed: names the numbers of dropout inside the networks."""
        seed_own(self.device, micro.rng.torch_seed(seed))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_half):
            return self.method.call(function, self.players, micro.draw, micro.batch)
