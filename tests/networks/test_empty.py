"""Networks without weights are what they are with them, but for the numbers."""

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

from diffdistill.networks.diffusers_unet import DiffusersUNetConfig
from diffdistill.networks.dit import DiTConfig
from diffdistill.networks.edm_unet import ADM, DDPMPP
from diffdistill.networks.empty import empty_weights
from diffdistill.networks.mlp import MLPConfig
from diffdistill.networks.unet import UNetConfig

DIFFUSERS = DiffusersUNetConfig(
    options={
        "block_out_channels": (32, 32),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }
)
CONFIGS = (UNetConfig(), DDPMPP(), ADM(), DiTConfig(), MLPConfig(), DIFFUSERS)


def told(module: nn.Module) -> dict[str, object]:
    parameters = {name: (type(p), p.shape, p.dtype, p.requires_grad, p.device) for name, p in module.named_parameters()}
    return parameters | {name: (buffer.tolist(), buffer.dtype) for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("config", CONFIGS, ids=[config.name for config in CONFIGS])
def test_an_empty_network_is_accelerates(config: UNetConfig) -> None:
    with init_empty_weights():
        expected = config.build((3, 32, 32), 10, 0.0)
    with empty_weights():
        found = config.build((3, 32, 32), 10, 0.0)
    assert told(found) == told(expected)
    assert {p.device.type for p in found.parameters()} == {"meta"}


def test_numbers_are_drawn_as_before_once_it_is_closed() -> None:
    before = nn.Module.register_parameter
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="in_channels"), empty_weights():
        nn.Sequential(nn.Linear(3, 4), nn.Conv2d(3, 4, 1, groups=2))
    assert nn.Module.register_parameter is before
    assert torch.equal(torch.get_rng_state(), state)
    assert nn.Linear(3, 4).weight.abs().sum() > 0


def test_what_is_computed_meanwhile_on_the_cpu_is_computed() -> None:
    with empty_weights():
        assert torch.zeros(3).add_(2).tolist() == [2, 2, 2]
