"""A frozen network's linear layers in fewer bits, by the layers of bitsandbytes and torchao, which diffusers' own
quantisers put into a model as well. Factors of LoRA over it are trained as QLoRA's: Dettmers et al. 2023,
arXiv:2305.14314.

nf4: blocks of 64 weights share a scale; int8, fp8 (e4m3): a scale a row. Gradients pass through the dequantised
weights; there are none to the weights themselves.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from diffdistill.settings.schema import UserError

Kind = Literal["nf4", "int8", "fp8"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SMALLEST, MULTIPLE = 4096, 32
"""Least weights of a layer, and what its outputs are a multiple of; others, and embeddings of time, are left alone."""

NF4_BLOCK, NF4_LEVELS_BYTES = 64, 16 * 4  # bitsandbytes' defaults

Make = Callable[[nn.Linear, torch.dtype, torch.device], nn.Module]


def quantise(
    base: nn.Module, over: Iterable[nn.Module], kind: Kind, *, dtype: torch.dtype, device: torch.device
) -> dict[str, nn.Module]:
    """Change the large linear layers of a frozen network, in place, and of the networks that share its weights; one
    layer serves them all. Everything of it ends on `device`, layer by layer.

    over: LoRA's trees.  dtype: what is computed in.  Returns the new layers by name.
    Raises UserError if the package is missing, or no layer is large enough.
    """
    old = quantised_layers(base)
    if not old:
        what = f"no linear layer of {SMALLEST:,} weights and a multiple of {MULTIPLE} outputs"
        raise UserError(f"speed.teacher_dtype = {kind!r}: {type(base).__name__} has {what}")
    new = {name: MAKERS[kind](layer, dtype, device).requires_grad_(False) for name, layer in old.items()}
    by_weight = {id(layer.weight): new[name] for name, layer in old.items()}
    for net in (base, *over):
        for name, part in [*net.named_modules()]:
            if isinstance(part, nn.Linear) and id(part.weight) in by_weight:
                net.set_submodule(name, by_weight[id(part.weight)])
        net.to(device)
    return new


def quantised_layers(base: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a network that would be, by name: the large linear ones, but for those of its embeddings of
    time."""
    exempt = {id(part) for embedder in getattr(base, "embedders", ()) for part in embedder.modules()}
    layers = {name: part for name, part in base.named_modules() if type(part) is nn.Linear and id(part) not in exempt}
    return {name: layer for name, layer in layers.items() if _is_large(layer)}


def nf4_bytes(weight: Tensor) -> int:
    """Of a weight in NF4: half a byte each, and a float32 scale for each block, beside the sixteen levels."""
    return math.ceil(weight.numel() / 2) + 4 * math.ceil(weight.numel() / NF4_BLOCK) + NF4_LEVELS_BYTES


def _is_large(layer: nn.Linear) -> bool:
    return layer.weight.numel() >= SMALLEST and layer.out_features % MULTIPLE == 0


def stored(tensor: Tensor) -> list[Tensor]:
    """The plain tensors behind one: packed numbers, and their scales."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return [part for name in names for part in stored(getattr(tensor, name))]
    state = getattr(tensor, "quant_state", None)
    if state is None:
        return [tensor]
    scales = (state.absmax, state.code, state.offset, *(stored_state(state.state2) if state.nested else ()))
    return [tensor, *(part for part in scales if isinstance(part, Tensor))]


def stored_state(state: Any) -> tuple[Any, ...]:
    """Of scales that are quantised themselves."""
    return state.absmax, state.code


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer's own weights are in fewer bits."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and len(stored(weight)) > 1


def dequantised(layer: nn.Module) -> nn.Linear:
    """A quantised layer with plain weights."""
    weight: Any = layer.weight
    plain = weight.dequantize() if getattr(weight, "quant_state", None) is None else dequantise_nf4(weight)
    bias: Any = layer.bias
    with torch.device("meta"):
        made = nn.Linear(plain.shape[1], plain.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(plain, requires_grad=False)
    made.bias = bias
    return made


def dequantise_nf4(weight: Any) -> Tensor:
    """[out, in], of bitsandbytes' parameter."""
    from bitsandbytes.functional import dequantize_4bit

    found: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return found


def _nf4(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(_missing("nf4", "bitsandbytes", "8bit")) from None
    kinds: Any = bitsandbytes.nn
    with torch.device("meta"):
        made: nn.Module = kinds.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=dtype,
            compress_statistics=False,
            quant_type="nf4",
        )
    made.weight = kinds.Params4bit(
        layer.weight.data.contiguous(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=False,
        module=made,
    )
    made.bias = layer.bias
    return made.to(device)


def _torchao(config: str) -> Make:
    def make(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
        try:
            from torchao import quantization
        except ImportError:
            raise UserError(_missing("int8 or fp8", "torchao", "quant")) from None
        with torch.device("meta"):
            made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        made.weight = nn.Parameter(layer.weight.data.to(device, dtype), requires_grad=False)
        made.bias = layer.bias
        quantization.quantize_(made, getattr(quantization, config)())
        return made.to(device)

    return make


MAKERS: Mapping[str, Make] = {
    "nf4": _nf4,
    "int8": _torchao("Int8WeightOnlyConfig"),
    "fp8": _torchao("Float8WeightOnlyConfig"),
}


def _missing(kind: str, package: str, extra: str) -> str:
    return f"speed.teacher_dtype: {kind} needs {package}: pip install 'diffdistill[{extra}]'"
