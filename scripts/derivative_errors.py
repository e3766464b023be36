"""Errors of a derivative of small networks along a direction of image and time, for docs/scaling.md: of forward
differentiation and of central differences at nine steps, relative to forward differentiation in float64.

    python scripts/derivative_errors.py
"""

import torch
from torch import Tensor

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.distillation.derivatives import along
from diffdistill.networks.dit import DiTConfig
from diffdistill.networks.unet import UNetConfig

NETWORKS: dict[str, DiTConfig | UNetConfig] = {
    "dit": DiTConfig(width=16, depth=2, heads=2),
    "unet": UNetConfig(channels=(8, 16)),
}
STEPS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SHAPE = (1, 8, 8)


def denoiser_of(network: DiTConfig | UNetConfig, dtype: torch.dtype) -> Denoiser:
    """All weights random: the layers that start at zero would make the derivative simpler than a trained one's."""
    torch.manual_seed(0)
    net = network.build(SHAPE, 3, 0.1)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return Denoiser(net, EDM(sigma_min=0.02, sigma_max=20.0), "edm").to(dtype)


def asked(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Images [3, *SHAPE], a direction of them, and times [3]; the direction of the times is 1."""
    x, direction = torch.randn(2, 3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.to(dtype), direction.to(dtype), torch.linspace(0.5, 2, 3, dtype=torch.float64).to(dtype)


def exact(denoiser: Denoiser, dtype: torch.dtype) -> Tensor:
    x, direction, t = asked(dtype)
    cond = denoiser.class_cond(torch.arange(3))
    tangents = (direction, torch.ones_like(t))
    return along(lambda x, t: denoiser(x, t, cond), (x, t), tangents, network=denoiser)[1]


def central(denoiser: Denoiser, dtype: torch.dtype, step: float) -> Tensor:
    x, direction, t = asked(dtype)
    cond = denoiser.class_cond(torch.arange(3))
    ahead, behind = (denoiser(x + h * direction, t + h, cond) for h in (step, -step))
    return (ahead - behind) / (2 * step)


@torch.no_grad()
def main() -> None:
    print(f"{'':24}{'forward':>10}" + "".join(f"{step:>10.0e}" for step in STEPS))
    for name, network in NETWORKS.items():
        wanted = exact(denoiser_of(network, torch.float64), torch.float64)
        for dtype in (torch.float64, torch.float32):
            denoiser = denoiser_of(network, dtype)
            found = [exact(denoiser, dtype), *(central(denoiser, dtype, step) for step in STEPS)]
            errors = [float((one.double() - wanted).norm() / wanted.norm()) for one in found]
            print(f"{name + ', ' + str(dtype):24}" + "".join(f"{error:>10.1e}" for error in errors))


if __name__ == "__main__":
    main()
