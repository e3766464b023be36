"""Score fields of one sample: what denoisers say of an image, noised, as a direction in which to move it.

All are differences of two estimates of the noise, w(t) (eps_P - eps_S): descended, a field pulls the image to what P
denoises and away from what S does. `matching_field` of score_distillation.py is the one of these that dmd2 takes.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import Path, expand
from diffdistill.diffusion.sampling import transfer
from diffdistill.diffusion.time_distributions import even_position, even_times
from diffdistill.distillation.losses import sample_normaliser

FieldWeight = Literal["sigma^2", "sigma/alpha", "alpha", "one", "nu"]
"""w(t) of eps_P - eps_S. sigma/alpha makes it the plain difference D_S - D_P, nu the normalised one."""

_WEIGHT_POWERS = {"sigma^2": (0, 2), "sigma/alpha": (-1, 1), "alpha": (1, 0), "one": (0, 0), "nu": (-1, 1)}
"""The powers of alpha_t and sigma_t in each."""


def noise_of(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, *, guidance: float | Tensor | None = 1.0
) -> Tensor:
    """eps = (x_t - alpha D(x_t, t, c)) / sigma, [B, ...].  guidance: None for the estimate of "no class"."""
    return denoiser.convert(estimate_of(denoiser, x_t, t, cond, guidance=guidance), "eps", x_t, t)


def estimate_of(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, *, guidance: float | Tensor | None) -> Tensor:
    """D(x_t, t, c).  guidance: None for the estimate of "no class", which one without classes has always."""
    if guidance is None:
        guidance = 0.0 if denoiser.num_classes else 1.0
    return denoiser(x_t, t, cond, guidance=guidance)


def inverted(denoiser: Denoiser, x: Tensor, times: Sequence[Tensor], cond: Cond) -> Tensor:
    """x at times[0] carried to the noisier times[-1] by DDIM steps of the estimate of "no class".

    x: [B, ...]; times: [B] each, cleaner first.  Returns [B, ...].
    """
    for t, s in pairwise(times):
        x = transfer(denoiser.path, x, estimate_of(denoiser, x, t, cond, guidance=None), t, s)
    return x


def noisier_time(path: Path, t: Tensor, share: Tensor) -> Tensor:
    """A time beyond t, by a share [B] of what lies before it; at most the path's last.  t: [B]."""
    return _time_at(path, even_position(path, t) * (1 + share))


def way_from_clean(path: Path, t: Tensor, *, gap: float, num_steps: int, stride: float) -> list[Tensor]:
    """num_steps + 1 times on the way from a nearly clean image to `gap` before t, cleaner first, [B] each.

    gap, stride: shares of the path's range.  Steps are of one stride, or where the path begins before, shorter.
    """
    end = (even_position(path, t) - gap).clamp_min(0)
    begin = (end - num_steps * stride).clamp_min(0)
    times = [_time_at(path, begin + (end - begin) * (step / num_steps)) for step in range(num_steps)]
    return [*times, _time_at(path, end) if gap else t]


def _time_at(path: Path, position: Tensor) -> Tensor:
    return path.whole(even_times(path)(position.clamp(0, 1), path))


def shortest_mix(first: Tensor, second: Tensor) -> Tensor:
    """The shortest of a first + (1 - a) second, a in 0 .. 1, of each sample: down it, neither rises.

    first, second: [B, ...].  Returns [B, ...]: zero where they are opposed, and `second` itself where `first` agrees
    with it and is much longer.  Huang et al. 2024, arXiv:2407.13976; Sener & Koltun 2018, arXiv:1810.04650.
    """
    gap = (second - first).flatten(1)
    square = gap.square().sum(1)
    share = (gap * second.flatten(1)).sum(1) / torch.where(square > 0, square, 1)
    a = expand(share.clamp(0, 1), first).to(first.dtype)
    return a * first + (1 - a) * second


def weighted(weight: FieldWeight, path: Path, field: Tensor, t: Tensor, *, x: Tensor, pull: Tensor) -> Tensor:
    """The field times w(t).  field: [B, ...]; x: the sample and pull: D_P, of which nu is made."""
    alpha_power, sigma_power = _WEIGHT_POWERS[weight]
    scale = expand(path.alpha(t) ** alpha_power * path.sigma(t) ** sigma_power, field).to(field.dtype)
    return scale * field if weight != "nu" else scale * field / sample_normaliser(x, pull)


def limit_pixels(field: Tensor, limit: float | None) -> Tensor:
    """No pixel's change in any channel above the limit; all its channels shrink alike.  field: [B, C, ...].

    Dreamer-XL, arXiv:2405.11252.
    """
    if limit is None:
        return field
    return field * (limit / field.abs().amax(1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
