"""A scene of Gaussian splats in two dimensions, moved by a score field through its renderer.

    diffdistill pretrain pretrain/digits run=runs/digits-teacher
    python examples/splats.py

A renderer is a network like any other: parameters (the splats) to an image, with a gradient. The noise that a generator
would turn into an image chooses the camera here. The text-to-3-D systems are this with another scene and renderer.
"""

from typing import Literal

import torch
from torch import Tensor, nn

import diffdistill as dd
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.time_distributions import Karras
from diffdistill.methods.score_field import ScoreField
from diffdistill.models.spec import ModelConfig
from diffdistill.settings.numbers import PositiveInt
from diffdistill.settings.schema import schema
from diffdistill.training.config import OptimizerConfig, RunConfig, TrainConfig
from diffdistill.training.trainer import Trainer


@dd.register_network
@schema
class SplatsConfig:
    """splats: of the scene of each class."""

    name: Literal["splats"] = "splats"
    splats: PositiveInt = 24

    def build(self, image_shape: tuple[int, int, int], num_classes: int, class_dropout: float) -> "Splats":
        return Splats(max(num_classes, 1), self.splats, image_shape)


class Splats(nn.Module):
    """A scene a class: each splat has a place, the logarithm of its size, and a brightness in each channel."""

    accepts, has_null_condition, resolution_multiple = frozenset({"label"}), False, 1

    def __init__(self, num_classes: int, splats: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.num_classes, (channels, height, width) = num_classes, image_shape
        self.place = nn.Parameter(0.4 * torch.randn(num_classes, splats, 2))
        self.size = nn.Parameter(torch.full((num_classes, splats), -1.6))
        self.colour = nn.Parameter(0.1 * torch.randn(num_classes, splats, channels))
        sides = [torch.linspace(-1, 1, side) for side in (height, width)]
        self.register_buffer("pixels", torch.stack(torch.meshgrid(*sides, indexing="ij"), -1))

    def forward(self, noise: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """noise: [B, C, H, W], of which the first two numbers move the camera, by an eighth of the image at most."""
        scene = torch.zeros(len(noise), dtype=torch.int64) if cond.label is None else cond.label
        camera = 0.25 * torch.tanh(noise.flatten(1)[:, None, :2] / noise.flatten(1).std(1)[:, None, None])
        gaps = self.pixels[None, None] - (self.place[scene] + camera)[:, :, None, None]
        seen = torch.exp(-0.5 * gaps.square().sum(-1) / self.size[scene].exp().square()[..., None, None])
        image: Tensor = torch.einsum("bkhw,bkc->bchw", seen, self.colour[scene]) - 1  # black where there is no splat
        return image


levels = Karras(ratio_min=0.1, ratio_max=3)
field = ScoreField(generator="model", subtract="fake", weight="nu", guidance=2.0, time_law=levels)
config = RunConfig(
    run="runs/splats",
    teacher="runs/digits-teacher",
    method=ScoreField(
        generator="model", subtract="fake", weight="nu", guidance=2.0, time_law=Karras(ratio_min=0.1, ratio_max=3.0)
    ),
    model=ModelConfig(network=SplatsConfig(), path=EDM(sigma_min=0.02, sigma_max=20), predicts="x0"),
    optimizers={"default": OptimizerConfig(lr=1e-3), "generator": OptimizerConfig(lr=2e-2)},
    train=TrainConfig(steps=600, global_batch_size=64),
)

if __name__ == "__main__":
    print(Trainer(config).run())
