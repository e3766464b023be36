"""What continuous-time consistency models share: TrigFlow's angle, their tangent, and its loss.

TrigFlow is x = cos(tau) x0 + sin(tau) sigma_data z, one more name for any path's noise levels: tan(tau) = ratio /
sigma_data. F = (cos(tau) x - D) / (sigma_data sin(tau)) is a denoiser's network.  Lu & Song 2024, arXiv:2410.11081.
"""

import torch
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import expand
from diffdistill.distillation.derivatives import along


def angle(denoiser: Denoiser, t: Tensor) -> Tensor:
    """tau in (0, pi/2), float64 [B], of the path's time t [B]."""
    return torch.atan(denoiser.path.ratio(t) / denoiser.sigma_data)


def consistency(denoiser: Denoiser, x: Tensor, tau: Tensor, cond: Cond) -> Tensor:
    """f(x, tau, c) of TrigFlow's x: [B, ...], by a denoiser on any path."""
    path = denoiser.path
    t = path.time_of_ratio(denoiser.sigma_data * tau.tan())
    estimate: Tensor = denoiser(x * expand(path.alpha(t) / tau.cos(), x), t, cond)
    return estimate


@torch.no_grad()
def tangent_parts(student: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, towards: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of g = cos(tau) df/dtau along the trajectory, each [B, ...].  Algorithm 1; section 4.1.

    x_t: on the student's path at t [B]; towards: D*, the teacher's estimate or the image. The first part is
    -cos^2(tau) (D* - D) / sin(tau): it alone makes the student denoise as D* does. The second makes f constant along
    the trajectory.
    """
    tau = angle(student, t)
    cos, sin = expand(tau.cos(), x_t), expand(tau.sin(), x_t)
    x = x_t * cos / expand(student.path.alpha(t), x_t)
    velocity = (cos * x - towards) / sin
    directions = velocity.to(x.dtype), torch.ones_like(tau)
    estimate, change = along(lambda x, tau: consistency(student, x, tau, cond), (x, tau), directions, network=student)
    first = -(cos**2) * (towards - estimate) / sin
    return first, cos * change - first


def normalised(tangent: Tensor, constant: float) -> Tensor:
    """g / (||g|| + c), the norm over each sample."""
    norm = tangent.flatten(1).norm(dim=1)
    return tangent / expand(norm + constant, tangent)


def tangent_error(student: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, tangent: Tensor) -> Tensor:
    """1 / N ||F_theta - sg[F_theta + g]||^2 of each sample, [B]: F is to follow the tangent g.  Equation 8."""
    estimate = student(x_t, t, cond)
    sine = expand(student.sigma_data * angle(student, t).sin(), estimate)
    output = -estimate / sine  # F, but for what has no gradient
    error: Tensor = (output - output.detach() - tangent).square().flatten(1).mean(1)
    return error
