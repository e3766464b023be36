"""Images between their ranges and sizes, on tensors: grey levels, [-1, 1], and resizes as Pillow does them."""

import torch
from torch import Tensor


def levels(images: Tensor) -> Tensor:
    """Grey levels 0 .. 255 as float32.  images: uint8, or float in [-1, 1]."""
    return images.float() if images.dtype == torch.uint8 else images.float() * 127.5 + 127.5


def signed(images: Tensor) -> Tensor:
    """[-1, 1] as float: uint8 as the data sets do it, x / 127.5 - 1 in float32; floats as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
