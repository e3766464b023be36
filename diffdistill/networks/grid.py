"""A network with its last layer N times: N outputs from one evaluation, around any base network.

What the base's last layer is given goes to a further layer of N times its outputs, which adds to each of them. It
starts at nothing, so that all N start as the base's own; together they are a last layer of N times the width.
Chen et al. 2026 (pi-Flow), arXiv:2510.14974, whose students' estimates of x0 along a segment these are.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, Features, Network, Taps
from diffdistill.networks.lora import LoRA
from diffdistill.networks.recompute import parts_of
from diffdistill.networks.registry import BaseNetwork
from diffdistill.settings.numbers import Places
from diffdistill.settings.schema import Fraction, UserError, schema


@schema
class GridConfig:
    """Settings of `Grid`.  places: N, how many outputs."""

    name: Literal["grid"] = "grid"
    base: BaseNetwork
    places: Places = 10

    def build(self, image_shape: tuple[int, int, int], num_classes: int, class_dropout: Fraction) -> "Grid":
        """The network for images [C, H, W]. Raises UserError if the base does not fit them, or cannot be widened."""
        return Grid(self.base.build(image_shape, num_classes, class_dropout), image_shape[0], self.places)


class Grid(Network):
    """N outputs for one input. As a Denoiser's network it is given N equal images, one after another in the channels,
    and answers with one estimate for each; of one image it gives the last, which is that of the image's own time."""

    def __init__(self, base: Network, channels: int, places: int) -> None:
        super().__init__()
        self.base = base
        self.channels = channels
        self.places = places
        self.accepts = base.accepts
        self.num_classes = base.num_classes
        self.has_null_condition = base.has_null_condition
        self.resolution_multiple = base.resolution_multiple
        self.head = _head(last_layer(base), places)

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W], or [B, N C, H, W] of N equal images; time_input: [B].  Returns x's shape."""
        handle = last_layer(self.base).register_forward_hook(self._widen)
        try:
            stacked: Tensor = self.base(x[:, : self.channels], time_input, cond)
        finally:
            handle.remove()
        made = stacked.unflatten(0, (self.places, len(x))).transpose(0, 1)
        return made[:, -1] if x.shape[1] == self.channels else made.flatten(1, 2)

    def features(self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None) -> Features:
        """The base's."""
        return self.base.features(x[:, : self.channels], time_input, cond, taps)

    def forward_with_features(
        self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None
    ) -> tuple[Tensor, Features]:
        """The outputs, and the base's features, of two passes."""
        return self(x, time_input, cond), self.features(x, time_input, cond, taps)

    def _widen(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """N outputs in the place of one, in the batch: what comes behind the layer does the same to each sample."""
        weight = self.head.weight
        added = self.head(inputs[0].to(weight.dtype)).to(output.dtype)
        return torch.cat([output + part for part in added.chunk(self.places, 1 if weight.ndim == 4 else -1)])


def start_from(student: Denoiser, origin: Denoiser) -> None:
    """Give a grid its teacher's weights, under a head of its own, or all of another grid's."""
    net, other = student.net, origin.net
    assert isinstance(net, Grid)
    if isinstance(other, Grid):
        net.load_state_dict(other.state_dict())
    elif not isinstance(net.base, LoRA):  # which stands over these weights
        net.base.load_state_dict(other.state_dict())


def last_layer(base: nn.Module) -> nn.Module:
    """The linear layer or convolution that ends a network. Raises UserError if it names none."""
    found = next((layer for part in parts_of(base) if (layer := getattr(part, "last_layer", None)) is not None), None)
    if found is None:
        raise UserError(f"network.base: {type(base).__name__} names no last layer that could be widened")
    assert isinstance(found, nn.Module)
    return found


def _head(layer: Any, places: int) -> nn.Linear | nn.Conv2d:
    """A layer of N times the outputs, at nothing.  layer: may be peft's around one."""
    inner = getattr(layer, "base_layer", layer)
    made: nn.Linear | nn.Conv2d
    if isinstance(inner, nn.Conv2d):
        size, stride, padding = inner.kernel_size, inner.stride, inner.padding
        made = nn.Conv2d(inner.in_channels, places * inner.out_channels, size, stride, padding)  # type: ignore[arg-type]
    else:
        made = nn.Linear(inner.in_features, places * inner.out_features)
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    return made
