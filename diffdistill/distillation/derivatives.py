"""The derivative of a network's output along a direction of its inputs, by forward-mode differentiation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from diffdistill.distributed.parts import has_parts


@torch.no_grad()
def along(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], *, network: nn.Module
) -> tuple[Tensor, Tensor]:
    """The function's value and its derivative along the tangents, both without gradient.

    network: what the function asks. Where the processes hold parts of it, dual tensors take the place of
    `torch.func.jvp`: that one wraps every tensor which is made meanwhile, gathered weights too, and torch's fully_shard
    needs their storage.
    """
    if not any(map(has_parts, network.parameters())):
        value, change = torch.func.jvp(function, primals, tangents)[:2]
        return value, change
    with forward_ad.dual_level():
        value, moved = forward_ad.unpack_dual(function(*map(forward_ad.make_dual, primals, tangents)))
    return value, torch.zeros_like(value) if moved is None else moved
