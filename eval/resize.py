"""Images between their ranges and sizes, on tensors: grey levels, [-1, 1], and the resize that Pillow does."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Triple = tuple[float, float, float]


def levels(images: Tensor) -> Tensor:
    """Grey levels 0 .. 255 in float32.  images: uint8, or float in [-1, 1]."""
    return images.float() if images.dtype == torch.uint8 else images.float() * 127.5 + 127.5


def signed(images: Tensor) -> Tensor:
    """[-1, 1] as float: uint8 as the data sets do it, x / 127.5 - 1 in float32; floats as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def clean_resize(values: Tensor, size: int) -> Tensor:
    """Pillow's bicubic resize of each channel as floats, cut to 0 .. 255: what clean-fid does, on any device.

    values: [B, C, H, W] float grey levels.  Returns [B, C, size, size], channels last.
    The filter widens when an image shrinks, which keeps it free of aliasing.
    Within 0.0001 levels of Pillow: in float64, since in float32 torch's weights are off by up to 0.01 levels.
    Parmar et al. 2022, arXiv:2104.11222.
    """
    if values.shape[-2:] == (size, size):
        return values
    wide = F.interpolate(values.double(), (size, size), mode="bicubic", antialias=True)
    return wide.clamp_(0, 255).to(values.dtype, memory_format=torch.channels_last)


def bilinear_resize(values: Tensor, size: int) -> Tensor:
    """[B, C, size, size] by the nearest four pixels, whatever the scale: pytorch-fid's, which aliases."""
    return F.interpolate(values, (size, size), mode="bilinear", align_corners=False)


def colours(images: Tensor) -> Tensor:
    """[B, 3, H, W]: grey in all three channels.  images: [B, 1 or 3, H, W]."""
    return images.expand(-1, 3, -1, -1)


def network_input(
    size: int, *, mean: Triple, std: Triple, resize: Callable[[Tensor, int], Tensor] = clean_resize
) -> Callable[[Tensor], Tensor]:
    """How images become a network's input: [B, 3, size, size], (x / 255 - mean) / std, channels last.

    mean, std: in units of the full range.  The resize runs before the normalisation, on grey levels.
    """

    def prepare(images: Tensor) -> Tensor:
        values = resize(levels(colours(images)), size)
        shift, scale = (torch.tensor(triple, device=values.device).view(3, 1, 1) * 255 for triple in (mean, std))
        return values.sub(shift).div_(scale).contiguous(memory_format=torch.channels_last)

    return prepare
