"""The derivative of a network's output along a direction of its inputs, by forward-mode differentiation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from diffdistill.distributed.sharded import is_sharded
from diffdistill.networks.lora import lora_of


def along(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], *, network: nn.Module
) -> tuple[Tensor, Tensor]:
    """The function's value and its derivative along the tangents. To be called without gradient.

    network: what the function asks. Where it is sharded, dual tensors take the place of
    `torch.func.jvp`: that one wraps every tensor which is made meanwhile, gathered weights too, and torch's fully_shard
    needs their storage.
    """
    if not has_shards(network):
        value, change = torch.func.jvp(function, primals, tangents)[:2]
        return value, change
    with forward_ad.dual_level():
        value, moved = forward_ad.unpack_dual(function(*map(forward_ad.make_dual, primals, tangents)))
    return value, torch.zeros_like(value) if moved is None else moved


def has_shards(network: nn.Module) -> bool:
    """Whether its weights are sharded, or those that its LoRA stands over."""
    lora = lora_of(network)
    return any(map(is_sharded, (lora.shared_tree if lora else network).parameters()))
