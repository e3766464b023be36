"""Every network by name, and those that can be a teacher's or the inner part of a network that wraps another."""

from typing import TYPE_CHECKING, Annotated, Any, Protocol

from diffdistill.diffusion.denoiser import Network
from diffdistill.settings.registry import OneOf, Registry, schema_class


class NetworkConfig(Protocol):
    """A network's settings, a class with `@schema` and a `name` of its own."""

    @property
    def name(self) -> str: ...

    def build(self, image_shape: tuple[int, int, int], num_classes: int, class_dropout: float) -> Network:
        """A new, untrained network for images [C, H, W]. Raises UserError if they do not fit it."""
        ...


NETWORKS: Registry[type[NetworkConfig]] = Registry(
    "network",
    {
        "unet": "diffdistill.networks.unet:UNetConfig",
        "ddpmpp": "diffdistill.networks.edm_unet:DDPMPP",
        "ncsnpp": "diffdistill.networks.edm_unet:NCSNPP",
        "adm": "diffdistill.networks.edm_unet:ADM",
        "dit": "diffdistill.networks.dit:DiTConfig",
        "mlp": "diffdistill.networks.mlp:MLPConfig",
        "diffusers_unet": "diffdistill.networks.diffusers_unet:DiffusersUNetConfig",
        "diffusers": "diffdistill.networks.diffusers_model:DiffusersConfig",
        "image_table": "diffdistill.networks.image_table:ImageTableConfig",
        "signal": "diffdistill.networks.signal:SignalConfig",
        "guided": "diffdistill.networks.guided:GuidedConfig",
        "two_times": "diffdistill.networks.two_times:TwoTimesConfig",
        "grid": "diffdistill.networks.grid:GridConfig",
        "styled": "diffdistill.networks.styled:StyledConfig",
        "adapted": "diffdistill.networks.adapters:AdaptedConfig",
        "lora": "diffdistill.networks.lora:LoRAConfig",
    },
    group="diffdistill.networks",
    check=schema_class("build"),
    unlisted={"given": "diffdistill.networks.given:GivenNetwork"},
)
"""Every network, by its name in a config."""

PLAIN = ("unet", "ddpmpp", "ncsnpp", "adm", "dit", "mlp", "diffusers_unet", "diffusers")

if TYPE_CHECKING:
    AnyNetwork = NetworkConfig
    PlainNetwork = NetworkConfig
    BaseNetwork = NetworkConfig
    SignalBase = NetworkConfig
else:
    AnyNetwork = Annotated[Any, OneOf(NETWORKS)]
    PlainNetwork = Annotated[Any, OneOf(NETWORKS, PLAIN)]
    BaseNetwork = Annotated[Any, OneOf(NETWORKS, (*PLAIN, "lora"))]
    SignalBase = Annotated[Any, OneOf(NETWORKS, (*PLAIN, "lora", "guided"))]
