"""Networks: what a config may name under `network`."""

from diffdistill.networks.adapters import AdaptedConfig
from diffdistill.networks.diffusers_model import DiffusersConfig
from diffdistill.networks.diffusers_unet import DiffusersUNetConfig
from diffdistill.networks.dit import DiTConfig
from diffdistill.networks.edm_unet import ADM, DDPMPP, NCSNPP
from diffdistill.networks.grid import GridConfig
from diffdistill.networks.guided import GuidedConfig
from diffdistill.networks.image_table import ImageTableConfig
from diffdistill.networks.lora import LoRAConfig
from diffdistill.networks.mlp import MLPConfig
from diffdistill.networks.registry import NETWORKS, AnyNetwork, NetworkConfig
from diffdistill.networks.signal import SignalConfig
from diffdistill.networks.styled import StyledConfig
from diffdistill.networks.two_times import TwoTimesConfig
from diffdistill.networks.unet import UNetConfig

__all__ = [
    "ADM",
    "DDPMPP",
    "NCSNPP",
    "NETWORKS",
    "AdaptedConfig",
    "AnyNetwork",
    "DiTConfig",
    "DiffusersConfig",
    "DiffusersUNetConfig",
    "GridConfig",
    "GuidedConfig",
    "ImageTableConfig",
    "LoRAConfig",
    "MLPConfig",
    "NetworkConfig",
    "SignalConfig",
    "StyledConfig",
    "TwoTimesConfig",
    "UNetConfig",
]
