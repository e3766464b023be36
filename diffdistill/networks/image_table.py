"""Images as parameters: a table of them, one row a class, which noise picks from as it would feed a generator."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Features, Network, Taps
from diffdistill.settings.numbers import NonNegative, PositiveInt
from diffdistill.settings.schema import Fraction, UserError, schema


@schema
class ImageTableConfig:
    """Settings of `ImageTable`."""

    name: Literal["image_table"] = "image_table"
    particles: PositiveInt = 1  # images of each class
    init_std: NonNegative = 0.5  # standard deviation of what they start as, normal

    def build(self, image_shape: tuple[int, ...], num_classes: int, class_dropout: Fraction) -> "ImageTable":
        """A table for images [*image_shape]. Raises UserError where noise is too small to tell particles apart."""
        if math.prod(image_shape) == 1 and self.particles > 1:
            raise UserError("model.network.particles: an image of one value has one particle")
        return ImageTable(self, image_shape, num_classes)


class ImageTable(Network):
    """D(noise, t, c) is an image of the table, whatever t is: `predicts` must be x0.

    Which of a class's particles it is, the direction of the noise's first two numbers says: each is as likely, on any
    scale of the noise, and the same noise is always the same image. With prompts all of them share the table.
    """

    def __init__(self, config: ImageTableConfig, image_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.accepts = frozenset({"label"} if num_classes else ())
        self.num_classes, self.has_null_condition, self.resolution_multiple = num_classes, False, 1
        self.particles = config.particles
        self.images = nn.Parameter(config.init_std * torch.randn(max(num_classes, 1), config.particles, *image_shape))

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, ...], noise; time_input is not looked at.  Returns x's shape."""
        row = cond.label
        if row is None or not self.num_classes:
            row = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        chosen: Tensor = self.images[row, particle_of(x, self.particles)]
        return chosen

    def features(self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None) -> Features:
        """There are none. Raises ValueError."""
        raise ValueError("an image table has no features")

    def forward_with_features(
        self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None
    ) -> tuple[Tensor, Features]:
        """There are none. Raises ValueError."""
        return self.forward(x, time_input, cond), self.features(x, time_input, cond)


def particle_of(noise: Tensor, count: int) -> Tensor:
    """[B] int64 in 0 .. count - 1, each as likely.  noise: [B, ...] normal, of any scale, at least two numbers each."""
    if count == 1:
        return torch.zeros(len(noise), dtype=torch.int64, device=noise.device)
    first, second = noise.flatten(1)[:, :2].double().unbind(1)
    turn = torch.atan2(first, second) / (2 * math.pi) + 0.5
    return (turn * count).long().clamp(0, count - 1)
