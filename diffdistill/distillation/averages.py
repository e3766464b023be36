"""Averages of weights."""

import torch
from torch import nn


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, share: float) -> None:
    """average <- (1 - share) average + share weights; buffers are copied. Both may be on devices of their own."""
    mine = [p.data for p in average.parameters()]
    theirs = [p.data.to(own.device) for own, p in zip(mine, module.parameters(), strict=True)]
    torch._foreach_lerp_(mine, theirs, share)
    for own, other in zip(average.buffers(), module.buffers(), strict=True):
        own.copy_(other)
