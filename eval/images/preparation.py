"""From what a network makes, or a file holds, to the image that is judged: quantised, cropped, resized."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffdistill.eval.protocols.protocol import Preparation

FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC, "box": Image.Resampling.BOX}


def prepare(images: Tensor, preparation: Preparation) -> Tensor:
    """[B, C, H, W] as the protocol judges them.

    images: float in [-1, 1], or uint8, which is quantised already.  Returns uint8, on the images' device; float for a
    quantiser "none" without a resize, which is Pillow's own on uint8, on the CPU.
    """
    images = quantise(images, preparation)
    if preparation.crop == "centre_square":
        images = centre_square(images)
    if preparation.side is None or images.shape[-2:] == (preparation.side, preparation.side):
        return images
    if images.dtype != torch.uint8:
        images = quantise(images, Preparation())
    resized = [_resize(image, preparation.side, FILTERS[preparation.filter]) for image in images.cpu()]
    return torch.stack(resized).to(images.device)


def quantise(images: Tensor, preparation: Preparation) -> Tensor:
    """Grey levels as the protocol's quantiser takes them; uint8 stays as it is."""
    if images.dtype == torch.uint8 or preparation.quantiser == "none":
        return images
    # round: EDM's x * 127.5 + 128 cut to whole numbers.  floor: DMD2's (x + 1) * 127.5, half a level darker.
    shift = 128.0 if preparation.quantiser == "round" else 127.5
    return (images.float() * 127.5 + shift).clamp(0, 255).to(torch.uint8)


def centre_square(images: Tensor) -> Tensor:
    """The largest square in the middle of [..., H, W]; of an odd rest the smaller half is cut off before."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def picture(image: Tensor) -> Image.Image:
    """[C, H, W] uint8, 1 or 3 channels, as Pillow's."""
    array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def _resize(image: Tensor, side: int, how: Image.Resampling) -> Tensor:
    resized = np.array(picture(image).resize((side, side), how))
    return torch.from_numpy(resized[None] if resized.ndim == 2 else resized.transpose(2, 0, 1).copy())
