"""What two or more methods share. Pure functions of tensors; reductions in float32 or wider."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import Path, expand

DenoisingWeight = Literal["edm", "x0", "eps", "v", "flow", "snr5", "truncated_snr"]
"""The weight on ||D - x0||^2, named after the loss that it equals: EDM's, or the MSE in x0, eps, v or flow."""


def denoising_weight(weight: DenoisingWeight, path: Path, t: Tensor, sigma_data: float) -> Tensor:
    """w(t) of w ||D - x0||^2, [B] float64.

    edm: (r^2 + sigma_data^2) / (r sigma_data)^2 with r = sigma/alpha; eps: 1/r^2; v: 1/sigma^2 (VP);
    flow: ((alpha + sigma)/sigma)^2, which is 1/t^2 on Flow; snr5: min(1/r^2, 5);
    truncated_snr: max(1/r^2, 1), of Salimans & Ho 2022, arXiv:2202.00512, section 4.
    Identities: D4 to D6 of the tests.
    """
    squared = path.ratio(t) ** 2
    if weight == "x0":
        return torch.ones_like(squared)
    if weight == "edm":
        return 1 / squared + 1 / sigma_data**2
    if weight == "eps":
        return 1 / squared
    if weight == "v":
        return (path.alpha(t) ** 2 / path.sigma(t) + path.sigma(t)) ** 2
    if weight == "flow":
        return ((path.alpha(t) + path.sigma(t)) / path.sigma(t)) ** 2
    if weight == "truncated_snr":
        return (1 / squared).clamp_min(1)
    return (1 / squared).clamp_max(5)


def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Cond,
    *,
    weight: DenoisingWeight,
    guidance: float = 1.0,
) -> Tensor:
    """Mean over batch and pixels of w(t) ||D(x_t, t, c) - x0||^2. x0 is taken as data: no gradient reaches it.

    x0, eps: [B, ...]; t: [B]; guidance: of the D that is trained.  Returns a scalar.
    """
    x0 = x0.detach()
    estimate = denoiser(denoiser.path.diffuse(x0, eps, t), t, cond, guidance=guidance)
    return denoising_error(denoiser, estimate, x0, t, weight=weight)


def denoising_error(denoiser: Denoiser, estimate: Tensor, x0: Tensor, t: Tensor, *, weight: DenoisingWeight) -> Tensor:
    """Mean over batch and pixels of w(t) ||estimate - x0||^2, for an estimate of `denoiser` that is at hand."""
    scale = denoising_weight(weight, denoiser.path, t, denoiser.sigma_data)
    return (expand(scale, x0) * (estimate - x0) ** 2).mean()


def field_loss(x: Tensor, field: Tensor) -> Tensor:
    """Push a field through a generator: 0.5 mean (x - sg[x - v])^2, so that dL/dx = v / (B N).

    x: [B, ...] with graph; field: [B, ...], of which no gradient is taken.  Its value is 0.5 mean v^2.
    Poole et al. 2022 (DreamFusion) eq. 3; this form: Yin et al. 2024, arXiv:2311.18828, eq. 7.
    """
    x = widen(x)
    return 0.5 * F.mse_loss(x, (x - field).detach().to(x.dtype))


def sample_normaliser(x: Tensor, estimate: Tensor, minimum: float = 1e-5) -> Tensor:
    """nu = mean over one sample of |x - estimate|, at least `minimum`, detached.

    x, estimate: [B, ...].  Returns [B, 1, ...], float32 or wider.  Yin et al. 2024, arXiv:2311.18828, eq. 8.
    """
    gap = (widen(x.detach()) - widen(estimate.detach())).abs()
    return gap.mean(dim=tuple(range(1, gap.ndim)), keepdim=True).clamp_min(minimum)


def zero_nonfinite(field: Tensor) -> Tensor:
    """A sample whose field is not finite in every pixel pushes nothing.  field: [B, ...].

    Zeroed as a whole: torch.nan_to_num's default would make +-3.4e38 of an infinity. If no sample is finite, the
    field stays as it is, for the trainer's guard to name: a broken network must not look like a finished one.
    """
    is_finite = field.isfinite().flatten(1).all(1).reshape(-1, *[1] * (field.ndim - 1))
    return torch.where(is_finite | ~is_finite.any(), field, 0.0)


def gan_generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating: mean softplus(-l).  At the optimal l = log(p/q) its gradient is softened reverse KL's."""
    return F.softplus(-widen(fake_logits)).mean()


def gan_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(-l_real) + mean softplus(l_fake), minimal at l = log(p/q).  Goodfellow et al. 2014."""
    return F.softplus(-widen(real_logits)).mean() + F.softplus(widen(fake_logits)).mean()


def pseudo_huber(x: Tensor, target: Tensor, c: float) -> Tensor:
    """sqrt(||x - target||^2 + c^2) - c of each sample, [B]; with c = 0 the norm, whose gradient at x = target is zero.

    x, target: [B, ...].  The norm is of the whole sample, not of an element.
    Song & Dhariwal 2023, arXiv:2310.14189, section 3.3.
    """
    squared = (widen(x) - widen(target)).square().flatten(1).sum(1)
    return (squared + max(c**2, 1e-24)).sqrt() - c


def widen(x: Tensor) -> Tensor:
    """x in float32, or in its own type if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
