"""A sampler with another number of NFE than it was made for."""

from dataclasses import replace

import torch

from diffdistill.diffusion.dx_policy import DXPolicy
from diffdistill.diffusion.path import Path
from diffdistill.diffusion.sampling import DDIM, TCD, FewSteps, Heun, Sampler
from diffdistill.settings.schema import UserError


def with_steps(sampler: Sampler, path: Path, num_steps: int) -> Sampler:
    """`sampler` with `num_steps` NFE, as nearly as it can: Heun has 2 steps - 1.

    FewSteps begins where it did, and re-noises to levels even in ratio^(1/7) from there down to the path's least
    (Karras et al. 2022, eq. 5), unless `num_steps` is its own.
    Raises UserError if it cannot take so many.
    """
    if num_steps < 1:
        raise UserError(f"num_steps = {num_steps}: must be at least 1")
    if num_steps == sampler.num_evaluations:
        return sampler
    if isinstance(sampler, Heun):
        return replace(sampler, num_steps=max(2, (num_steps + 1) // 2))
    if isinstance(sampler, TCD) and num_steps > sampler.grid.num_steps:
        raise UserError(f"num_steps = {num_steps}: the student was trained at {sampler.grid.num_steps} times")
    if isinstance(sampler, (DDIM, TCD)):
        return replace(sampler, num_steps=num_steps)
    if isinstance(sampler, FewSteps):
        first, last = sampler.init_ratio, float(path.ratio(torch.tensor(path.t_min, dtype=torch.float64)))
        roots = torch.linspace(first ** (1 / 7), last ** (1 / 7), num_steps + 1, dtype=torch.float64)
        return replace(sampler, later_ratios=tuple((roots[1:-1] ** 7).tolist()))
    if isinstance(sampler, DXPolicy):
        raise UserError(f"num_steps = {num_steps}: this student was trained for {sampler.num_steps} segments")
    raise UserError(f"num_steps = {num_steps}: this student has 1 NFE")
