"""Diff-Protect: an image changed within a ball, so that a latent diffusion model misreads it.

Xue et al. 2023, arXiv:2311.12832. The field is SDS's on the latent, carried back through the encoder alone; the step
is its sign. Descending it, the authors' choice, makes the image smoother and more likely to the model; rising, noisier.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import Uniform
from diffdistill.distillation.losses import field_loss
from diffdistill.distillation.method import Players
from diffdistill.methods.score_field import ScoreField

SDS = ScoreField(subtract="noise", weight="one", time_law=Uniform())


def protect(
    image: Tensor,
    encode: Callable[[Tensor], Tensor],
    teacher: Denoiser,
    *,
    num_steps: int = 100,
    radius: float = 2 * 16 / 255,
    step_size: float = 2 * 1 / 255,
    direction: float = -1.0,
    seed: int = 0,
) -> Tensor:
    """The image, [B, C, H, W] in [-1, 1], within `radius` of what was given in every value.

    encode: images to the teacher's latents, with a gradient.  direction: -1 descends the field, 1 rises.
    """
    x = image
    for step in range(num_steps):
        rng = StepRandom(seed, step, torch.arange(len(x)))
        t = SDS.time_law(rng.uniform("t"), teacher.path)
        eps = rng.normal("eps", tuple(encode(x).shape[1:]))
        x = x + direction * step_size * slope(x, encode, teacher, t, eps).sign()
        x = torch.minimum(torch.maximum(x, image - radius), image + radius).clamp(-1, 1)
    return x


def slope(x: Tensor, encode: Callable[[Tensor], Tensor], teacher: Denoiser, t: Tensor, eps: Tensor) -> Tensor:
    """SDS's field at the noised latent, times the encoder's Jacobian: the gradient by the image, in x's shape."""
    x = x.detach().requires_grad_()
    latent = encode(x)
    draw = {"t": t, "eps": eps, "label": torch.zeros(len(x), dtype=torch.int64)}
    field = SDS.field(Players(teacher=teacher), draw, latent.detach())
    (gradient,) = torch.autograd.grad(field_loss(latent, field), x)
    return gradient
