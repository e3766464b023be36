"""The networks that can be a teacher's, and the inner part of a network that wraps another."""

from typing import Annotated

from pydantic import Field

from diffdistill.networks.diffusers_model import DiffusersConfig
from diffdistill.networks.diffusers_unet import DiffusersUNetConfig
from diffdistill.networks.dit import DiTConfig
from diffdistill.networks.edm_unet import ADM, DDPMPP, NCSNPP
from diffdistill.networks.mlp import MLPConfig
from diffdistill.networks.unet import UNetConfig

PlainNetwork = Annotated[
    UNetConfig | DDPMPP | NCSNPP | ADM | DiTConfig | MLPConfig | DiffusersUNetConfig | DiffusersConfig,
    Field(discriminator="name"),
]
"""The networks that stand by themselves."""
