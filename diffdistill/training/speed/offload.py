"""A frozen network in the machine's memory, whose layers come to the GPU one at a time, for the length of a call.

Slower by the copies. Where a gradient passes through the network, autograd keeps the layers on the GPU until the
backward pass: there recomputed blocks (`speed.activation_checkpointing`) are needed for it to save anything.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from diffdistill.diffusion.denoiser import compute_on

AWAY = "_weights_at_home"


def offload(module: nn.Module, device: torch.device) -> None:
    """Keep a frozen module's weights on the CPU, pinned for a GPU; each layer computes on `device`.

    Buffers live on the device. A layer has to be called as a module for its weights to come.
    """
    compute_on(module, device)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
        if not part._parameters:
            continue
        for parameter in part._parameters.values():
            if parameter is not None:
                if parameter.device.type != "cpu":
                    parameter.data = parameter.data.cpu()
                if device.type == "cuda" and torch.cuda.is_available():
                    parameter.data = parameter.data.pin_memory()
        part.register_forward_pre_hook(partial(_fetch, device))
        part.register_forward_hook(_release, always_call=True)


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's weights are elsewhere than its computation."""
    return getattr(module, "offload_device", None) is not None


def _fetch(device: torch.device, layer: nn.Module, *_: Any) -> None:
    # New parameters, not new data in the old ones: autograd may have to find these again in the backward pass.
    home = {name: p for name, p in layer._parameters.items() if p is not None and _is_elsewhere(p, device)}
    layer.__dict__[AWAY] = home
    for name, parameter in home.items():
        layer._parameters[name] = nn.Parameter(parameter.to(device, non_blocking=True), requires_grad=False)


def _is_elsewhere(parameter: nn.Parameter, device: torch.device) -> bool:
    return parameter.device != device


def _release(layer: nn.Module, *_: Any) -> None:
    home: Mapping[str, nn.Parameter] = layer.__dict__.pop(AWAY, {})
    layer._parameters.update(home)
