"""EDM's non-leaky augmentation: images are moved, and the network is told how.

Karras et al. 2022, arXiv:2206.00364, appendix F.2. Sampling without labels (or with zeros) then gives images that
were not moved. Implemented: flips, scaling, rotation, stretching, translation, with the paper's ranges and labels.
Differs from EDM's released pipe in resampling: bicubic here, twofold supersampling with a wavelet filter there.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.on_device import constant
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.settings.schema import UserError

NUM_LABELS = 9
LOG2_SCALE = 0.2  # standard deviation of log2 of the scale and of the stretch
TRANSLATION = 1 / 8  # standard deviation, in image sides


def check_augmentation(denoiser: Denoiser, name: str, probability: float) -> None:
    """Raise UserError if the setting `name` asks for augmentation and the network takes no labels of it."""
    if probability and "augmentation" not in denoiser.net.accepts:
        raise UserError(
            f"method.{name} = {probability}: this network takes no augmentation labels; use {name}: 0, or a "
            "network ddpmpp or adm with augment_dim: 9"
        )


def draw_motion(rng: StepRandom, probability: float, images: str = "") -> Tensor:
    """What happens to each image, [B, 8] float64: x-flip and y-flip (0 or 1), scale, angle, the angle of the stretch,
    stretch, x- and y-translation. Zero is "nothing".

    probability: of each of the five transforms behind the x-flip, which is a fair coin wherever there is augmentation
    at all. Angles are even in (-pi, pi), but half of the stretches go along the sides; the rest is N(0, 1).
    images: names random numbers of their own, where a step moves two sets of images.
    """
    transforms = ("y-flip", "scale", "rotation", "stretch", "translation")
    names = ("x-flip", *transforms, "y-coin", "angle", "stretch angle", "tilt")
    prefix = f"{images}augment "
    uniform = {k.removeprefix(prefix): v for k, v in rng.uniforms([prefix + name for name in names]).items()}
    is_on = {name: uniform[name] < probability for name in transforms}
    x_flip = (uniform["x-flip"] < 0.5) & (probability > 0)
    y_flip = (uniform["y-coin"] < 0.5) & is_on["y-flip"]
    angle = (2 * uniform["angle"] - 1) * math.pi * is_on["rotation"]
    is_tilted = (uniform["tilt"] < 0.5) & is_on["stretch"]
    stretch_angle = (2 * uniform["stretch angle"] - 1) * math.pi * is_tilted
    scale, stretch, x, y = rng.normal(f"{prefix}sizes", (4,), torch.float64).unbind(1)
    scale, stretch = scale * is_on["scale"], stretch * is_on["stretch"]
    x, y = x * is_on["translation"], y * is_on["translation"]
    return torch.stack([x_flip.double(), y_flip.double(), scale, angle, stretch_angle, stretch, x, y], 1)


def augment(images: Tensor, motion: Tensor) -> tuple[Tensor, Tensor]:
    """Move the images.

    images: [B, C, H, W]; motion: [B, 8], see `draw_motion`.  Returns the moved images, and their labels [B, 9] of the
    images' type, zero for an image that was not moved. Such an image, or one that was only flipped, keeps its bits;
    what comes into view from outside is the mirrored image.
    """
    x_flip, y_flip, scale, angle, stretch_angle, stretch, x, y = motion.double().unbind(1)
    turned = torch.where(_where(x_flip), images.flip(3), images)
    turned = torch.where(_where(y_flip), turned.flip(2), turned)
    is_moved = (motion[:, 2:] != 0).any(1)
    moved = _resample(turned, _inverse_matrix(scale, angle, stretch_angle, stretch), torch.stack([x, y], 1))
    labels = [x_flip, y_flip, scale, angle.cos() - 1, angle.sin()]
    labels += [stretch * stretch_angle.cos(), stretch * stretch_angle.sin(), x, y]
    return torch.where(_where(is_moved), moved, turned), torch.stack(labels, 1).to(images.dtype)


def _inverse_matrix(scale: Tensor, angle: Tensor, stretch_angle: Tensor, stretch: Tensor) -> Tensor:
    """[B, 2, 2]: where a moved pixel was, in pixels from the centre, before it was moved.

    Forwards an image is scaled, turned against the clock, stretched. Rows count downwards, hence the signs.
    """
    length = 2 ** (-LOG2_SCALE * stretch)
    squeeze = torch.diag_embed(torch.stack([length, 1 / length], 1))
    unstretch = _rotation(-stretch_angle) @ squeeze @ _rotation(stretch_angle)
    return 2 ** (-LOG2_SCALE * scale)[:, None, None] * (_rotation(angle) @ unstretch)


def _rotation(angle: Tensor) -> Tensor:
    """[B, 2, 2]."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)


def _resample(images: Tensor, inverse: Tensor, translation: Tensor) -> Tensor:
    """Images under x -> inverse^-1 x + translation.  translation: [B, 2] in units of TRANSLATION sides."""
    height, width = images.shape[2:]
    # affine_grid's sides go from -1 to 1 whatever their length. In float64, which autocast leaves alone.
    sides = constant((width, height), images.device, torch.float64)
    linear = inverse * sides / sides[:, None]
    offset = -linear @ (2 * TRANSLATION * translation)[:, :, None]
    grid = F.affine_grid(torch.cat([linear, offset], 2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), "bicubic", "reflection", align_corners=False)


def _where(flag: Tensor) -> Tensor:
    """[B] -> a condition that fits [B, C, H, W]."""
    return flag.bool()[:, None, None, None]
