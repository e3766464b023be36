"""Quantisation-aware training of a student, by torchao's own layers: weights are rounded to few bits at every call, and
gradients pass as if they were not.

The linear layers within a network's blocks; its first and last layers, embeddings, norms and convolutions stay as they
are. A checkpoint holds the weights that are trained; what is loaded from it has them on the grid of their bits, in
plain layers, so that it is sampled, exported and distilled as any other, without torchao's layers.
What transfers of arXiv:2501.06218, whose own loss is over token logits: distillation as the way to few bits.
"""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from diffdistill.networks.diffusers_model import DiffusersNetwork
from diffdistill.networks.recompute import parts_of, recomputable_blocks
from diffdistill.settings.numbers import Width
from diffdistill.settings.schema import UserError, schema

SCALE_BYTES = 4


@schema
class QuantisedTraining:
    """bits: of a weight, signed and symmetric.  group: number of weights of a row that share a scale; null: the row."""

    bits: Annotated[int, Field(ge=2, le=8)] = 8
    group: Width | None = None


def quantised_layers(net: nn.Module, settings: QuantisedTraining) -> dict[str, nn.Linear]:
    """The layers whose weights are rounded, by name. Raises UserError if there are none, or a group does not fit."""
    within = {id(part) for block in _blocks(net) for part in block.modules() if isinstance(part, nn.Linear)}
    found = {name: part for name, part in net.named_modules() if isinstance(part, nn.Linear) and id(part) in within}
    if not found:
        raise UserError(f"qat: {type(net).__name__} has no linear layer in its blocks")
    for name, layer in found.items():
        if settings.group and layer.in_features % settings.group:
            raise UserError(f"qat.group = {settings.group}: does not divide the {layer.in_features} inputs of {name}")
    return found


def fake_quantise(net: nn.Module, settings: QuantisedTraining) -> None:
    """Put torchao's layers in the place of those, in place; weights keep their names and values.

    Raises UserError as `quantised_layers`, and without torchao.
    """
    kind, config = _torchao(settings)
    for name, layer in quantised_layers(net, settings).items():
        made = kind.from_linear(layer, None, config)
        made.train(layer.training)
        net.set_submodule(name, made)


@torch.no_grad()
def on_grid(net: nn.Module, settings: QuantisedTraining) -> None:
    """Round the weights of plain layers once, to what `fake_quantise` computes with; in place."""
    kind, config = _torchao(settings)
    for layer in quantised_layers(net, settings).values():
        rounded = kind.from_linear(layer, None, config).weight_fake_quantizer(layer.weight)
        layer.weight.copy_(rounded)


def stored_bytes(net: nn.Module, settings: QuantisedTraining | None) -> int:
    """Of all parameters, those of these layers packed in their bits, with a scale of four bytes a row or group."""
    layers = quantised_layers(net, settings).values() if settings else ()
    rounded = {id(layer.weight) for layer in layers}
    total = sum(p.numel() * p.element_size() for p in net.parameters() if id(p) not in rounded)
    for layer in layers:
        assert settings is not None
        groups = layer.out_features * (layer.in_features // settings.group if settings.group else 1)
        total += (layer.weight.numel() * settings.bits + 7) // 8 + groups * SCALE_BYTES
    return total


def _blocks(net: nn.Module) -> Iterator[nn.Module]:
    for part in parts_of(net):
        if isinstance(part, DiffusersNetwork):
            yield from part.blocks
    yield from recomputable_blocks(net)


def _torchao(settings: QuantisedTraining) -> tuple[Any, Any]:
    """Its layer, and how the weight is rounded. Raises UserError if it is not there."""
    try:
        from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig
    except ImportError as error:
        raise UserError(f"qat: needs torchao: pip install 'diffdistill[quant]' ({error})") from None
    how = {"group_size": settings.group} if settings.group else {"granularity": "per_channel"}
    return FakeQuantizedLinear, IntxFakeQuantizeConfig(getattr(torch, f"int{settings.bits}"), **how, is_symmetric=True)
