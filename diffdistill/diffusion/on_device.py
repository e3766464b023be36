"""Numbers of the host on a device, for which the host does not wait: what a GPU's queue of work lives by.

A copy from memory that is not pinned, and every copy to the host, makes the host stand still until the device has done
all it was told. What the host knew before it told the device, it need not ask back: `upload` remembers.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_HOST_COPIES: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, by way of pinned memory where that is a GPU; itself where it is there."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and torch.cuda.is_available() and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    made = tensor.to(device, non_blocking=True)
    return remember(made, tensor) if tensor.device.type == "cpu" else made


def remember(tensor: Tensor, host: Tensor) -> Tensor:
    """Keep the same numbers on the host for as long as the tensor lives. Returns the tensor."""
    if tensor.device.type != "cpu" and not torch.compiler.is_compiling():
        _HOST_COPIES[tensor] = host, _version(tensor)
    return tensor


def known_on_host(tensor: Tensor) -> Tensor | None:
    """A tensor's numbers on the host, where they are there already. None: the host would have to wait for them."""
    if tensor.device.type == "cpu":
        return tensor
    if torch.compiler.is_compiling():  # which knows no weak references
        return None
    host, version = _HOST_COPIES.get(tensor, (None, -1))
    return host if version == _version(tensor) else None


def on_host(tensor: Tensor) -> Tensor:
    """A tensor's numbers on the host, which waits for them only where it did not know them."""
    known = known_on_host(tensor)
    return tensor.cpu() if known is None else known


def _version(tensor: Tensor) -> int:
    """How often it was changed in place; of tensors of inference mode nobody counts it."""
    return 0 if tensor.is_inference() else tensor._version


def cat(parts: Sequence[Tensor]) -> Tensor:
    """torch.cat, of which the host knows what it knew of all the parts."""
    made = torch.cat(list(parts))
    if torch.compiler.is_compiling() or made.device.type == "cpu":
        return made
    hosts = [host for host in map(known_on_host, parts) if host is not None]
    return remember(made, torch.cat(hosts)) if len(hosts) == len(parts) else made


def part(tensor: Tensor, index: slice | Tensor) -> Tensor:
    """Some rows, of which the host knows what it knew of all, where it names them by their places."""
    made = tensor[index]
    host = known_on_host(tensor) if isinstance(index, slice) and made.device.type != "cpu" else None
    return made if host is None else remember(made, host[index])


def filled(count: int, value: int, device: torch.device) -> Tensor:
    """[count] int64 of one value, which the host knows."""
    made = torch.full((count,), value, device=device)
    return remember(made, torch.full((count,), value)) if device.type != "cpu" else made


@lru_cache(maxsize=1024)
def constant(values: tuple[int, ...] | tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """These numbers on a device, copied there once: not to be changed in place."""
    with torch.inference_mode(False):
        return upload(torch.tensor(values, dtype=dtype), device)
