"""A residual MLP denoiser for small images and points: cheap, so that long runs fit on a CPU."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Features, Network, Taps
from diffdistill.networks.recompute import Recomputable
from diffdistill.networks.taps import Tapped
from diffdistill.settings.numbers import Depth, Width
from diffdistill.settings.schema import Fraction, schema


@schema
class MLPConfig:
    """Settings of `MLP`."""

    name: Literal["mlp"] = "mlp"
    width: Width = 512
    blocks: Depth = 3

    def build(self, image_shape: tuple[int, ...], num_classes: int, class_dropout: Fraction) -> "MLP":
        """The network for data [*image_shape]."""
        return MLP(self, image_shape, num_classes, has_null_condition=num_classes > 0 and class_dropout > 0)


class MLP(Network):
    """Residual MLP over the flattened image; the tap is the state after half of the blocks."""

    def __init__(self, config: MLPConfig, image_shape: tuple[int, ...], num_classes: int, *, has_null_condition: bool):
        super().__init__()
        self.accepts = frozenset({"label"} if num_classes else ())
        self.num_classes = num_classes
        self.has_null_condition = has_null_condition
        self.resolution_multiple = 1
        self.frequencies = 32
        size = math.prod(image_shape)
        self.embed = nn.Linear(2 * self.frequencies + num_classes, config.width)
        self.input = nn.Linear(size, config.width)
        self.blocks = nn.ModuleList(MLPBlock(config.width) for _ in range(config.blocks))
        self.output = nn.Linear(config.width, size)
        nn.init.normal_(self.output.weight, std=1e-4)

    @property
    def time_layer(self) -> nn.Module:
        """The last layer of what it makes of time, before the non-linearity."""
        return self.embed

    @property
    def last_layer(self) -> nn.Module:
        """The layer that makes the output."""
        return self.output

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, ...]; time_input: [B].  Returns x's shape."""
        return self.forward_with_features(x, time_input, cond)[0]

    def features(self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None) -> Features:
        """The state after half of the blocks, [B, width, 1, 1], or the taps; the rest does not run."""
        tapped = self._tapped(taps)
        self._run(x, self._embed(time_input, cond), tapped, tapped.count)
        return tapped.features(_as_map)

    def forward_with_features(
        self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None
    ) -> tuple[Tensor, Features]:
        """Output and `features` from one pass."""
        tapped = self._tapped(taps)
        h = self._run(x, self._embed(time_input, cond), tapped, len(self.blocks))
        return self.output(F.silu(h)).reshape(-1, *x.shape[1:]), tapped.features(_as_map)

    def _tapped(self, taps: Taps | None) -> Tapped:
        return Tapped(taps, [f"blocks.{i}" for i in range(len(self.blocks))], (len(self.blocks) - 1) // 2)

    def _run(self, x: Tensor, embedding: Tensor, tapped: Tapped, count: int) -> Tensor:
        """The state behind the first `count` blocks."""
        h = self.input(x.flatten(1))
        for number, block in enumerate(self.blocks[:count]):
            h = tapped.seen(number, block(h, embedding))
        return h

    def _embed(self, time_input: Tensor, cond: Cond) -> Tensor:
        scale = torch.logspace(-3, 1, self.frequencies, device=time_input.device, dtype=time_input.dtype)
        angles = time_input[:, None] * scale
        parts = [angles.cos(), angles.sin()]
        if self.num_classes:
            label = torch.full_like(time_input, self.num_classes, dtype=torch.int64)
            label = label if cond.label is None else cond.label
            parts.append(F.one_hot(label, self.num_classes + 1)[:, : self.num_classes].to(angles.dtype))
        return F.silu(self.embed(torch.cat(parts, 1)))


class MLPBlock(Recomputable):
    """h + W2 silu(W1 norm(h) + embedding)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channels = width
        self.norm = nn.LayerNorm(width)
        self.first, self.modulate, self.second = (nn.Linear(width, width) for _ in range(3))
        nn.init.normal_(self.second.weight, std=1e-3)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """h, embedding: [B, width]."""
        changed: Tensor = h + self.second(F.silu(self.first(self.norm(h)) + self.modulate(embedding)))
        return changed


def _as_map(h: Tensor) -> Tensor:
    return h[:, :, None, None]
