"""Weights that are alive: finite, and so are the squares that the next step would take of them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffdistill.distributed.sharded import is_sharded


@torch.no_grad()
def find_dead(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinity, or numbers whose squares are infinite: above
    1e19 in float32, 1e154 in float64.

    Of sharded tensors each process looks at its own.  Whole numbers are never dead.
    """
    norms = {}
    for name, tensor in tensors.items():
        own = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        if own.is_floating_point() and not own.is_meta and own.numel():
            precision = torch.promote_types(own.dtype, torch.float32)
            norms[name] = torch.linalg.vector_norm(own.detach(), dtype=precision)
    return [name for name, norm in norms.items() if not bool(norm.isfinite())]


def name_some(names: list[str]) -> str:
    """A few of the names, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
