"""Small trainable players of a method on random numbers, what was asked of them, and who may learn."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Method, Players, Problem
from diffdistill.methods.dmd2 import DMD2
from diffdistill.networks.mlp import MLPConfig
from support.closed_forms import random

PATH = EDM()
SHAPE = (1, 4, 4)
CLASSES = 3
BATCH = 6
EVERYTHING = DMD2(guidance=2.0, regression_weight=0.25, regression_pairs=5, gan_weight=1.0, gan_fake_weight=1.0)
MULTI_STEP = FewSteps(init_ratio=20.0, later_ratios=(5.0, 1.0))
BASE = MLPConfig(width=16, blocks=2)


def small_teacher(num_classes: int = CLASSES) -> Denoiser:
    """An MLP of random weights in float64, so that every input matters."""
    net = BASE.build(SHAPE, num_classes, 0.1)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return freeze(Denoiser(net.double(), PATH, "edm"))


def scene(method: Method, step: int = 0, seed: int = 0) -> tuple[Players, dict[str, Tensor], Batch]:
    """Players, one step's numbers and real images, all float64; the players differ from one another."""
    teacher = small_teacher()
    problem = Problem(SHAPE, CLASSES, PATH, teacher=deepcopy(teacher).float())  # heads are built in float32
    config, predicts = method.student_model(BASE, teacher.predicts, problem)
    if config != BASE:
        problem = replace(problem, network=Denoiser(config.build(SHAPE, CLASSES, 0.1), PATH, predicts))
    made = {name: module.double() for name, module in method.players(problem).items()}
    generator = torch.Generator().manual_seed(1)
    for module in made.values():
        for parameter in module.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    players = Players(teacher=teacher, **made)
    rng = StepRandom(seed, step, torch.arange(BATCH))
    draw = {
        name: value.double() if value.is_floating_point() else value
        for name, value in method.draw(rng, problem).items()
    }
    stored = method.prepare(problem, seed=0)
    stored = {name: value.double() if value.is_floating_point() else value for name, value in stored.items()}
    return players, draw, Batch(random(BATCH, *SHAPE, seed=9), Cond(label=torch.tensor([0, 1, 2, 0, 1, 2])), stored)


def watch(players: Players) -> list[tuple[str, bytes]]:
    """Every later call of a network inside a player, as (player, its inputs)."""
    calls: list[tuple[str, bytes]] = []
    open_calls: list[str] = []  # a network's forward may be made of its other entries

    def watched(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(x: Tensor, *rest) -> object:
            if not open_calls:
                parts = [x, *rest[:1], *rest[1].parts().values()] if rest else [x]
                calls.append((name, b"".join(part.detach().numpy().tobytes() for part in parts)))
            open_calls.append(name)
            try:
                return original(x, *rest)
            finally:
                open_calls.pop()

        return call

    for name, module in players.items():
        net = module.net if isinstance(module, Denoiser) else module
        for entry in ("forward", "features", "forward_with_features"):
            if hasattr(net, entry):
                setattr(net, entry, watched(name, getattr(net, entry)))
    return calls


def due(players: Players, *names: str) -> None:
    """Let exactly these players learn, as the trainer does before an update."""
    for name, module in players.items():
        module.requires_grad_(name in names)


def learned(players: Players) -> set[str]:
    """The players that have any gradient but zero."""
    return {
        name
        for name, module in players.items()
        if any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
    }
