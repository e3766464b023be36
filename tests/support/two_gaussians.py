"""Two Gaussian classes whose denoiser is exact."""

import torch

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import Path
from diffdistill.networks.analytic import mixture_denoiser
from support.closed_forms import numbers

MEANS = torch.stack([numbers(-0.5, 0.3, 0.0), numbers(1.0, -2.0, 0.5)])  # without the condition, and with it


VARIANCES = numbers(0.3, 1.2, 0.05)


class TwoGaussians(Denoiser):
    """N(MEANS[1], VARIANCES) with the condition and N(MEANS[0], VARIANCES) without: guided, N(mu_w, VARIANCES)."""

    def __init__(self, path: Path) -> None:
        covariances = torch.diag(VARIANCES).expand(2, 3, 3)
        pair = mixture_denoiser(path, torch.ones(2), MEANS, covariances, torch.tensor([0, 1]))
        super().__init__(pair.net, path, "x0")

    def unconditional(self, cond: Cond) -> Cond:
        assert cond.label is not None
        return Cond(label=torch.zeros_like(cond.label))
