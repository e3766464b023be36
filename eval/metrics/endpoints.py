"""How closely a student that takes the guidance scale as input follows its guided teacher, noise by noise."""

import torch
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.sampling import Sampler


@torch.no_grad()
def endpoint_error(
    student: Denoiser, teacher: Denoiser, sampler: Sampler, noise: Tensor, cond: Cond, *, scale: float
) -> float:
    """RMS distance from the student's images to the guided teacher's, over that from the unguided teacher's to them.

    All start from the same noise [B, ...]; the sampler is deterministic.  0: guidance reproduced; 1: what doing
    nothing scores.  Raises ValueError if guidance by `scale` changes nothing.
    """
    guided, unguided = (sampler(teacher, noise, cond, guidance=w).double() for w in (scale, 1.0))
    apart = (unguided - guided).square().mean().sqrt()
    if not apart > 0:
        raise ValueError(f"scale = {scale}: the guided teacher makes the unguided one's images")
    made = sampler(student, noise, cond, guidance=scale).double()
    return float((made - guided).square().mean().sqrt() / apart)
