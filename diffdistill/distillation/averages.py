"""Averages of weights."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, share: float) -> None:
    """average <- (1 - share) average + share weights; buffers are copied. Both may be on devices of their own."""
    mine = [p.data for p in average.parameters()]
    kept, buffers = list(average.buffers()), list(module.buffers())
    theirs = near([*(p.data for p in module.parameters()), *buffers], [*mine, *kept])
    torch._foreach_lerp_(mine, theirs[: len(mine)], share)
    for own, other in zip(kept, theirs[len(mine) :], strict=True):
        own.copy_(other)


def near(tensors: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Each tensor on the device of its fellow; from a GPU to the host all at once, which waits for the last alone."""
    on_host = all(own.device.type == "cpu" for own in like)
    gpu = next((tensor.device for tensor in tensors if tensor.is_cuda), None) if on_host else None
    if gpu is None or any(type(tensor) is not Tensor for tensor in tensors):  # parts of a tensor go each by themselves
        return [tensor.to(own.device) for tensor, own in zip(tensors, like, strict=True)]
    pinned = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for place, tensor in zip(pinned, tensors, strict=True):
        place.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(gpu).synchronize()
    return pinned
