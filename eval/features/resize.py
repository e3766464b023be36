"""Images between their ranges and sizes, on tensors: grey levels, [-1, 1], and the resize that Pillow does."""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.settings.numbers import Number

Triple = tuple[Number, Number, Number]
Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "squash"]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's CLIP, and of those that went on from its recipe."""


def levels(images: Tensor) -> Tensor:
    """Grey levels 0 .. 255 in float32.  images: uint8, or float in [-1, 1]."""
    return images.float() if images.dtype == torch.uint8 else images.float() * 127.5 + 127.5


def signed(images: Tensor) -> Tensor:
    """[-1, 1] as float: uint8 as the data sets do it, x / 127.5 - 1 in float32; floats as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def clean_resize(values: Tensor, size: int | tuple[int, int], interpolation: Interpolation = "bicubic") -> Tensor:
    """Pillow's resize of each channel as floats, cut to 0 .. 255: bicubic is what clean-fid does, on any device.

    values: [B, C, H, W] float grey levels.  size: of a square, or (height, width).  Returns [B, C, *size], channels
    last.  The filter widens when an image shrinks, which keeps it free of aliasing.
    Within 0.0001 levels of Pillow.  Parmar et al. 2022, arXiv:2104.11222.
    """
    height, width = size if isinstance(size, tuple) else (size, size)
    if values.shape[-2:] == (height, width):
        return values
    if values.device.type != "cpu":
        return interpolated(values, (height, width), interpolation)
    images = [_resized(image, height, width, interpolation) for image in values]
    return (torch.stack(images) if len(images) > 1 else images[0][None]).permute(0, 3, 1, 2)


def interpolated(values: Tensor, size: int | tuple[int, int], interpolation: Interpolation = "bicubic") -> Tensor:
    """`clean_resize` by torch, a batch at once: fast on a GPU.

    In float64, since in float32 torch's weights are off by up to 0.01 levels.
    """
    target = size if isinstance(size, tuple) else (size, size)
    wide = F.interpolate(values.double(), target, mode=interpolation, antialias=True)
    return wide.clamp_(0, 255).to(values.dtype, memory_format=torch.channels_last)


def _resized(image: Tensor, to_height: int, to_width: int, interpolation: Interpolation) -> Tensor:
    """`clean_resize` of one image [C, H, W] on a CPU, as [to_height, to_width, C]: first across, then down, as Pillow
    does it, each a sum of a few rows, so that all of it stays in the cache."""
    channels, height, width = image.shape
    across = _filter(width, to_width, image.dtype, interpolation)
    down = _filter(height, to_height, image.dtype, interpolation)
    rows = torch.sparse.mm(across, image.permute(2, 1, 0).reshape(width, -1)).view(to_width, height, channels)
    columns = torch.sparse.mm(down, rows.transpose(0, 1).reshape(height, -1))
    return columns.view(to_height, to_width, channels).clamp_(0, 255)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept serves gradients, too
def _filter(length: int, size: int, dtype: torch.dtype, interpolation: Interpolation) -> Tensor:
    """Pillow's weights from `length` pixels to `size`, [size, length], sparse, computed in float64.

    bicubic: Keys 1981 with a = -1/2; bilinear: a triangle. As wide as the image shrinks, of the pixels inside alone,
    and of sum 1.
    """
    scale = length / size
    wide = max(scale, 1.0)
    centres = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * scale
    pixels = torch.arange(length, dtype=torch.float64)
    x = ((pixels + 0.5 - centres) / wide).abs()
    if interpolation == "bicubic":
        near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights, reach = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)), 2
    else:
        weights, reach = (1 - x).clamp(min=0), 1
    first, end = (centres - reach * wide + 0.5).trunc(), (centres + reach * wide + 0.5).trunc()
    weights = weights * ((pixels >= first) & (pixels < end))
    return (weights / weights.sum(1, keepdim=True)).to(dtype).to_sparse()


def framed(values: Tensor, size: int, *, side: int, mode: ResizeMode, interpolation: Interpolation) -> Tensor:
    """The middle size x size of images resized to `side`: what libraries say of their weights' input.

    values: [B, C, H, W] float grey levels.  mode: shortest, the shorter side to `side` and the other in proportion;
    squash, both sides.
    """
    height, width = values.shape[-2:]
    short = min(height, width)
    target = (side, side) if mode == "squash" else (side * height // short, side * width // short)
    resized = clean_resize(values, target, interpolation)
    top, left = (round((have - size) / 2) for have in resized.shape[-2:])
    return resized[..., top : top + size, left : left + size]


def letterboxed(values: Tensor, size: int) -> Tensor:
    """[B, C, size, size]: all of each image, its longer side resized to `size`, in the middle of black.

    values: [B, C, H, W] float grey levels.  Bicubic and free of aliasing, not cut to 0 .. 255, as torchvision resizes
    tensors.
    """
    height, width = values.shape[-2:]
    scale = size / max(height, width)
    rows, columns = round(height * scale), round(width * scale)
    if (rows, columns) != (height, width):
        wide = F.interpolate(values.double(), (rows, columns), mode="bicubic", antialias=True)
        values = wide.to(values.dtype)
    top, left = (size - rows) // 2, (size - columns) // 2
    return F.pad(values, (left, size - columns - left, top, size - rows - top))


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

    mean, std: in units of the full range.  The resize runs before the normalisation, on grey levels. Images that
    require a gradient get one.
    """

    def prepare(images: Tensor) -> Tensor:
        """On a CPU one by one: what an image needs then stays in the cache."""
        shift, scale = (torch.tensor(triple, device=images.device).view(3, 1, 1) * 255 for triple in (mean, std))
        if images.requires_grad and torch.is_grad_enabled():
            return (resize(levels(colours(images)), size) - shift) / scale
        made = torch.empty((len(images), 3, size, size), device=images.device, memory_format=torch.channels_last)
        for place in range(0, len(images), step := 1 if images.device.type == "cpu" else max(len(images), 1)):
            values = resize(levels(colours(images[place : place + step])), size)
            torch.div(values.sub_(shift), scale, out=made[place : place + step])
        return made

    return prepare
