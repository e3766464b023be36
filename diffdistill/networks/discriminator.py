"""Discriminator heads on a denoiser's bottleneck features."""

import math

import torch
from torch import Tensor, nn

from diffdistill.diffusion.denoiser import Denoiser, device_of
from diffdistill.settings.schema import UserError


class Head(nn.Module):
    """DMD2's head: halve to 4 x 4, then to one logit a sample.  Yin et al. 2024, arXiv:2405.14867, section 4.3.

    channels, side: shape [channels, side, side] of the features.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while side > 4:
            layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), *_norm_act(channels)]
            side //= 2
        layers += [nn.Conv2d(channels, channels, side), *_norm_act(channels), nn.Conv2d(channels, 1, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """features: [B, C, h, w].  Returns logits [B], an estimate of log(p_real / p_fake)."""
        logits: Tensor = self.layers(features.to(torch.promote_types(features.dtype, torch.float32))).flatten(1)
        return logits.mean(1)


def _norm_act(channels: int) -> list[nn.Module]:
    """At most 32 groups, as the paper's, of at least 8 channels: on a 1 x 1 map a group of one is always zero."""
    return [nn.GroupNorm(math.gcd(32, channels, max(1, channels // 8)), channels), nn.SiLU()]


def make_head(denoiser: Denoiser, image_shape: tuple[int, ...]) -> Head:
    """A head that fits the denoiser's features. Raises UserError if its network has none."""
    channels, side, *_ = features_shape(denoiser, image_shape)
    return Head(channels, side)


@torch.no_grad()
def features_shape(denoiser: Denoiser, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """[C, h, w] of the denoiser's bottleneck for images of this shape. Raises UserError if its network has none."""
    device = device_of(denoiser)
    x = torch.zeros(1, *image_shape, device=device)
    t = torch.full((1,), denoiser.path.t_max, device=device, dtype=torch.float64)
    label = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        features: Tensor = denoiser(x, t, denoiser.class_cond(label), want="features")
    except ValueError as error:
        raise UserError(f"gan: {error}") from error
    return tuple(features.shape[1:])
