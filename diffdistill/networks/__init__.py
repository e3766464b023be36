"""Networks: what a config may name under `network`."""

from typing import Annotated

from pydantic import Field

from diffdistill.networks.adapters import AdaptedConfig
from diffdistill.networks.diffusers_model import DiffusersConfig
from diffdistill.networks.diffusers_unet import DiffusersUNetConfig
from diffdistill.networks.dit import DiTConfig
from diffdistill.networks.edm_unet import ADM, DDPMPP, NCSNPP
from diffdistill.networks.guided import GuidedConfig
from diffdistill.networks.lora import LoRAConfig
from diffdistill.networks.mlp import MLPConfig
from diffdistill.networks.signal import SignalConfig
from diffdistill.networks.two_times import TwoTimesConfig
from diffdistill.networks.unet import UNetConfig

AnyNetwork = Annotated[
    UNetConfig
    | DDPMPP
    | NCSNPP
    | ADM
    | DiTConfig
    | MLPConfig
    | DiffusersUNetConfig
    | DiffusersConfig
    | SignalConfig
    | GuidedConfig
    | TwoTimesConfig
    | AdaptedConfig
    | LoRAConfig,
    Field(discriminator="name"),
]
"""The networks that a config may name."""
