"""FreeFlow: between Gaussians the exact map is its own target, on every path, and its correction is DMD2's field."""

import pytest
import torch
from support.closed_forms import on_every_path, random
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.path import Path, expand
from diffdistill.distillation.method import Players
from diffdistill.methods.free_flow import FreeFlow, line_time
from diffdistill.networks.analytic import gaussian_denoiser

MEAN, STD = 0.7, 0.5


class ExactMap(nn.Module):
    """y of f(z, d) = d m + sqrt(d^2 c^2 + (1 - d)^2) z, the flow map of the Gaussian teacher."""

    def __init__(self, path: Path, factor: float = 1.0) -> None:
        super().__init__()
        self.path, self.factor = path, factor

    def forward(self, z: Tensor, time: Tensor, cond: Cond = NO_COND) -> Tensor:
        d = 1 - line_time(self.path, time)
        reached = expand(d, z) * MEAN + expand((d**2 * STD**2 + (1 - d) ** 2).sqrt(), z) * z
        return self.factor * (reached - expand(1 - d, z) * z) / expand(d, z)


@on_every_path
@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_the_exact_map_is_its_own_target_and_another_one_is_not(path: Path, factor: float) -> None:
    size = 12
    teacher = gaussian_denoiser(path, torch.full((1,), MEAN, dtype=torch.float64), STD**2 * torch.eye(1).double())
    ratio = torch.logspace(-1, 1, size, dtype=torch.float64)
    draw = {"z": random(size, 1), "label": torch.zeros(size, dtype=torch.int64)}
    draw["prediction t"] = path.time_of_ratio(ratio)
    student = ExactMap(path, factor)
    target = FreeFlow().target(Players(teacher=teacher, generator=student), draw)
    off = (student(draw["z"], draw["prediction t"]) - target).abs().max()
    assert off < 1e-13 if factor == 1 else off > 1e-2
