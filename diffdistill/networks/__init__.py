"""Networks: what a config may name under `network`."""

from typing import Annotated

from pydantic import Field

from diffdistill.networks.diffusers_unet import DiffusersUNetConfig
from diffdistill.networks.mlp import MLPConfig
from diffdistill.networks.unet import UNetConfig

AnyNetwork = Annotated[UNetConfig | MLPConfig | DiffusersUNetConfig, Field(discriminator="name")]
"""The networks that a config may name."""
