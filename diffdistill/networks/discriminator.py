"""Discriminator heads on a denoiser's features: its bottleneck, or several of its blocks."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.denoiser import Denoiser, Taps, device_of
from diffdistill.settings.schema import UserError

HeadLosses = Literal["of_mean", "of_each"]


class Head(nn.Module):
    """DMD2's head: halve to 4 x 4, then to one logit a sample.  Yin et al. 2024, arXiv:2405.14867, section 4.3.

    channels, side: shape [channels, side, side] of the features; of others `side` is the shorter one.
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


def _map_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Channels and the shorter side of features [C, h, w], or [C]."""
    channels, *sides = shape
    return channels, min(sides, default=1)


class Heads(nn.Module):
    """A head on each of several feature maps, behind several blocks of the teacher.

    shapes: [C, h, w] of each map.  loss: of what the adversarial losses are. "of_mean": of the heads' mean logit, which
    stays one estimate of log(p_real / p_fake). "of_each": of each head's logit, then their mean; Sauer et al. 2024,
    arXiv:2403.12015, section 3.2, and FastGen.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], loss: HeadLosses = "of_mean") -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(*_map_of(shape)) for shape in shapes)
        self.loss = loss

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """features: a map [B, C, h, w] for each head.  Returns logits [B], or of each head, [B, heads]."""
        logits = [head(tapped) for head, tapped in zip(self.heads, features, strict=True)]
        return torch.stack(logits).mean(0) if self.loss == "of_mean" else torch.stack(logits, 1)


def make_head(
    denoiser: Denoiser, image_shape: tuple[int, ...], taps: Taps | None = None, loss: HeadLosses = "of_mean"
) -> Head | Heads:
    """A head that fits the denoiser's bottleneck, or heads for these taps: what `denoiser.features` gives.

    loss: as of `Heads`.  Raises UserError if its network has no features, or no such blocks.
    """
    shapes = features_shapes(denoiser, image_shape, taps)
    if taps is not None:
        return Heads(shapes, loss)
    return Head(*_map_of(shapes[0]))


@torch.no_grad()
def features_shapes(
    denoiser: Denoiser, image_shape: tuple[int, ...], taps: Taps | None = None
) -> tuple[tuple[int, ...], ...]:
    """[C, h, w] of the denoiser's bottleneck for images of this shape, or of each tap.

    Raises UserError if its network has no features, or no such blocks.
    """
    device = device_of(denoiser)
    x = torch.zeros(1, *image_shape, device=device)
    t = torch.full((1,), denoiser.path.t_max, device=device, dtype=torch.float64)
    label = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        found = denoiser.features(x, t, denoiser.class_cond(label), taps=taps)
    except ValueError as error:
        raise UserError(f"gan: {error}") from error
    return tuple(tuple(tapped.shape[1:]) for tapped in (found if isinstance(found, tuple) else (found,)))
