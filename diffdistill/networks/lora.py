"""LoRA: a frozen network under small trained factors.  Hu et al. 2021, arXiv:2106.09685.  The layers are peft's.

All players of a run stand over one base. Each has modules of its own, whose weights are the base's very tensors: so no
call has to switch adapters on or off, a switch that activation checkpointing would find in the wrong place when it
computes a block again. What is registered in `LoRA` is what a player owns: to its parameters, its state dict, its
device and its copies the base does not exist.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, Features, Network, Taps
from diffdistill.networks.empty import empty_weights
from diffdistill.networks.quantised import dequantised, is_quantised, stored
from diffdistill.networks.registry import PlainNetwork
from diffdistill.settings.limits import MAX_CHOSEN
from diffdistill.settings.numbers import Width
from diffdistill.settings.schema import Fraction, Positive, UserError, schema

ADAPTER = "default"  # peft's name for the only one
FACTORS = ("lora_A", "lora_B")
FINGERPRINT_NUMBERS = 256  # of each weight
ATTENTION = (
    *("qkv", "project", "query", "key_value"),  # ours
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),  # diffusers'
    "to_qkv_mlp_proj",  # FLUX.2's, which are the MLP's as well
)

Targets = Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_CHOSEN)]


@schema
class LoRASettings:
    """A layer's weight W becomes W + alpha / rank B A.

    rank: columns of B and rows of A.  alpha: null for the rank, a factor of 1.  targets: the layers, by kind (`linear`:
    without convolutions; `all`: with them) or by the ends of their names.  dropout: of the factors' input.
    """

    rank: Width = 64
    alpha: Positive | None = None
    targets: Literal["attention", "linear", "all"] | Targets = "all"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


@schema
class LoRAConfig:
    """Settings of `LoRA`. The base's weights are the teacher's; the checkpoint names it."""

    name: Literal["lora"] = "lora"
    base: PlainNetwork
    lora: LoRASettings

    def build(self, image_shape: tuple[int, int, int], num_classes: int, class_dropout: Fraction) -> "LoRA":
        """The network for images [C, H, W], over a base without weights: `mount` it on one before it is called.

        Raises UserError if the base does not fit the images.
        """
        with empty_weights():
            base = self.base.build(image_shape, num_classes, class_dropout)
        return LoRA(self.lora, base)


"""A network that another may stand around."""


class LoRA(Network):
    """A base that is not its own, and factors that are. Starts as the base."""

    def __init__(self, settings: LoRASettings, base: Network) -> None:
        """Raises UserError if no layer of the base is a target."""
        super().__init__()
        self.settings = settings
        self.accepts = base.accepts
        self.num_classes = base.num_classes
        self.has_null_condition = base.has_null_condition
        self.resolution_multiple = base.resolution_multiple
        self.mount(base)

    def mount(self, base: Network) -> None:
        """Stand over this network, with new factors."""
        tree = _with_factors(_sharing_copy(base), self.settings)
        self._hidden = [tree]  # in a list: not registered
        self.adapters = _factors(tree)

    @property
    def shared_tree(self) -> Network:
        """The base's modules with the factors among them."""
        return self._hidden[0]

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """As the base's."""
        output: Tensor = self.shared_tree(x, time_input, cond)
        return output

    def features(self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None) -> Features:
        """As the base's."""
        return self.shared_tree.features(x, time_input, cond, taps)

    def forward_with_features(
        self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None
    ) -> tuple[Tensor, Features]:
        """As the base's."""
        return self.shared_tree.forward_with_features(x, time_input, cond, taps)

    def train(self, mode: bool = True) -> "LoRA":
        self.shared_tree.train(mode)
        super().train(mode)
        return self

    def base_tensors(self) -> list[Tensor]:
        """The weights and buffers that it shares."""
        own = {id(parameter) for parameter in self.adapters.parameters()}
        return [tensor for tensor in _tensors(self.shared_tree) if id(tensor) not in own]

    def merged(self) -> Network:
        """The base with B A added to its weights: a plain network, with weights of its own, where it has factors also
        in place of quantised ones."""
        quantised = {id(tensor): tensor for tensor in self.base_tensors() if len(stored(tensor)) > 1}
        net = deepcopy(self.shared_tree, quantised)
        for name, layer in _lora_layers(net):
            if is_quantised(layer.get_base_layer()):
                layer.base_layer = dequantised(layer.get_base_layer())
            layer.merge()
            net.set_submodule(name, layer.get_base_layer())
        return net

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoRA":
        for tensor in self.base_tensors():
            memo.setdefault(id(tensor), tensor)
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__setstate__(deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        return copy


def settings_for(player: str, lora: Mapping[str, LoRASettings | None]) -> LoRASettings | None:
    """A player's own, or those under `default`; None where it is trained in full."""
    return lora.get(player, lora.get("default"))


def with_lora(origin: Denoiser, settings: LoRASettings) -> Denoiser:
    """A denoiser over the origin's network, which starts as the origin."""
    return deepcopy(origin, {id(origin.net): LoRA(settings, origin.net)})


def lora_of(module: nn.Module) -> LoRA | None:
    """The LoRA within a denoiser, if there is one."""
    return next((part for part in module.modules() if isinstance(part, LoRA)), None)


def merge_lora(denoiser: Denoiser) -> Denoiser:
    """The same function without factors, in weights of its own; itself where there are none.

    The innermost network is replaced, so that what stands around it (BOOT's, AGD's) stays.
    """
    found = lora_of(denoiser)
    return denoiser if found is None else deepcopy(denoiser, {id(found): found.merged()})


def without_lora(network: Any) -> Any:
    """A network's config with the LoRA in it, if there is one, given up for its base."""
    if isinstance(network, LoRAConfig):
        return network.base
    stands_around = any(setting.name == "base" for setting in fields(network))
    return replace(network, base=without_lora(network.base)) if stands_around else network


def lora_settings_of(network: Any) -> LoRASettings | None:
    """Those of the LoRA in a network's config, if there is one."""
    if network is None or isinstance(network, LoRAConfig):
        return network.lora if network else None
    return lora_settings_of(getattr(network, "base", None))


def with_lora_settings(network: Any, settings: LoRASettings) -> Any:
    """A network's config with other settings of the LoRA in it."""
    if isinstance(network, LoRAConfig):
        return replace(network, lora=settings)
    return replace(network, base=with_lora_settings(network.base, settings))


def fingerprint(base: nn.Module) -> str:
    """The SHA-256 of each weight's name, shape and first numbers: tells a base from another one at little cost."""
    digest = hashlib.sha256()
    for name, tensor in base.state_dict().items():
        first = tensor.detach().flatten()[:FINGERPRINT_NUMBERS].double().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + first.numpy().tobytes())
    return digest.hexdigest()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _sharing_copy(base: Network) -> Network:
    """The same modules anew, with the same tensors in them."""
    return deepcopy(base, {id(tensor): tensor for tensor in _tensors(base)})


def _with_factors(net: Network, settings: LoRASettings) -> Network:
    """Wrap the targets in place; the factors are in float32 or wider.  Raises UserError if there is no target."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("lora: needs peft: pip install 'diffdistill[hf]'") from None
    options = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or settings.rank,
        target_modules=_pattern(_target_names(net, settings.targets)),
        lora_dropout=settings.dropout,
    )
    inject_adapter_in_model(options, net, ADAPTER)
    del net.peft_config  # which would warn of a second adapter where the merged network gets factors again
    for parameter in _factors(net).parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return net


def _lora_layers(net: nn.Module) -> list[tuple[str, Any]]:
    """peft's layers, by name."""
    from peft.tuners.lora import LoraLayer

    return [(name, part) for name, part in net.named_modules() if isinstance(part, LoraLayer)]


def _factors(net: nn.Module) -> nn.Module:
    """The factors alone, under the names that peft gives them in a file: "<layer>.lora_A.weight"."""
    root = nn.Module()
    for name, layer in _lora_layers(net):
        for factor in FACTORS:
            _place(root, f"{name}.{factor}", getattr(layer, factor)[ADAPTER])
    return root


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(last, module)


def _target_names(net: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The layers to change; grouped convolutions have no low rank to speak of.  Raises UserError if there are none."""
    kinds = nn.Linear if targets == "linear" else (nn.Linear, nn.Conv2d)
    layers = [name for name, part in net.named_modules() if isinstance(part, kinds) and getattr(part, "groups", 1) == 1]
    if targets in ("linear", "all"):
        found = layers
    else:
        ends = ATTENTION if isinstance(targets, str) else targets
        found = [name for name in layers if any(f".{name}".endswith(f".{end}") for end in ends)]
    if not found:
        listed = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
        raise UserError(
            f"lora.targets = {targets!r}: no such layer in {type(net).__name__}, whose layers are: {listed}"
        )
    return found


def _pattern(names: Sequence[str]) -> str:
    """A regular expression that matches these names and no other, as peft compares the ends of listed ones."""
    return "|".join(re.escape(name) for name in names)
