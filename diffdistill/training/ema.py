"""Exponential moving averages of weights, with a half-life in images and a ramp-up."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from diffdistill.diffusion.denoiser import freeze
from diffdistill.distillation.averages import follow
from diffdistill.distillation.method import Update
from diffdistill.settings.schema import NonNegative, Positive, schema


@schema
class EMAConfig:
    """halflife_images: half-life of a weight in the average, in images.  ramp: the half-life is at most this share of
    the images seen; 0 switches the ramp-up off."""

    halflife_images: Positive = 500_000
    ramp: NonNegative = 0.05


def share_of_start(config: EMAConfig, update: Update, *, num_steps: int, batch_images: int) -> float:
    """How much of the average after `num_steps` iterations is still what it began as: 0 .. 1, ramp included.

    update: the one that trains the module followed.  batch_images: of an iteration.  Exact if no update is skipped.
    """
    seen = _due(update, num_steps, batch_images).double() * batch_images
    halflives = torch.full_like(seen, config.halflife_images)
    if config.ramp:
        halflives = halflives.minimum(config.ramp * seen)
    return 0.5 ** float((batch_images * update.every / halflives.clamp_min(1e-8)).sum())


def images_followed(update: Update, *, num_steps: int, batch_images: int) -> int:
    """How many images the average after `num_steps` iterations has moved by, as its half-life counts them."""
    return len(_due(update, num_steps, batch_images)) * batch_images * update.every


def _due(update: Update, num_steps: int, batch_images: int) -> Tensor:
    """The iterations in which an update is due."""
    steps = torch.arange(0, num_steps, update.every)
    return steps[(steps >= update.start) & (steps * batch_images >= update.start_images)]


class EMA:
    """A frozen copy of a module that follows it.  device: where it lives; None: where the module is."""

    def __init__(self, module: nn.Module, config: EMAConfig, device: str | torch.device | None = None) -> None:
        self.module = freeze(deepcopy(module)).to(device)
        self.config = config

    def on(self, device: torch.device) -> nn.Module:
        """The average on a device: itself where it lives there, else a copy."""
        has_to_move = any(p.device.type != device.type for p in self.module.parameters())
        return deepcopy(self.module).to(device) if has_to_move else self.module

    def copy_from(self, module: nn.Module) -> None:
        """Begin anew from these weights."""
        self.module.load_state_dict(module.state_dict())

    @torch.no_grad()
    def update(self, module: nn.Module, *, images_seen: int, batch_images: int) -> None:
        """average <- beta average + (1 - beta) weights, beta = 0.5^(batch / half-life).  At 0 images seen: a copy.

        Karras et al. 2022, training loop: the half-life is ramped up to its full value with the images seen.
        """
        halflife = self.config.halflife_images
        if self.config.ramp:
            halflife = min(halflife, self.config.ramp * images_seen)
        beta = 0.5 ** (batch_images / max(halflife, 1e-8))
        follow(self.module, module, 1 - beta)
