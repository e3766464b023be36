"""Flow matching's line z = (1 - t) x0 + t eps, one more name for any path's noise levels: t = ratio / (1 + ratio)."""

from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import expand


def line_time(ratio: Tensor) -> Tensor:
    """t in (0, 1) of z = (1 - t) x0 + t eps at a noise-to-signal ratio, float64."""
    return ratio / (1 + ratio)


def line(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z at t: [B]."""
    return ((1 - expand(t, x0)) * x0 + expand(t, x0) * eps).to(x0.dtype)


def on_path(denoiser: Denoiser, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The denoiser's x and time at the line's z and t."""
    time = denoiser.path.time_of_ratio(t / (1 - t))
    scale = denoiser.path.alpha(time) / (1 - t)
    return z * expand(scale, z), time


def line_velocity(denoiser: Denoiser, z: Tensor, t: Tensor, cond: Cond, *, guidance: float | Tensor = 1.0) -> Tensor:
    """dz/dt = (z - D(z, t, c)) / t along the line, [B, ...].  guidance: one, or each sample's, [B]."""
    x, time = on_path(denoiser, z, t)
    estimate: Tensor = denoiser(x, time, cond, guidance=guidance)
    return (z - estimate) / expand(t, z)
