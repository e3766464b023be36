"""CPU threads: as many as a run's config says, and one for a tiny network that is sampled.

More threads than a tiny network has work for wait for one another: on a busy machine it is then many times slower.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import nn

from diffdistill.diffusion.denoiser import Denoiser, device_of

TINY = 10**9
"""Weights times pixels, about the multiplications of one network evaluation: up to here one thread is fastest."""
OF_THE_USER = "OMP_NUM_THREADS"


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute on so many CPU threads, afterwards on as many as before; None: no change, nor of what others set within
    (accelerate shares a machine's cores out among its processes)."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sampling_threads(model: nn.Module, image_shape: Sequence[int]) -> int:
    """The CPU threads on which a model is sampled.

    model: a Denoiser, or a network of any other kind.  image_shape: [C, H, W] of what it makes.
    Returns torch's number where the user sets OMP_NUM_THREADS, which torch follows. Else what the model's run was
    trained on (`train.num_threads`), or one where the network is tiny; never more than torch's number.
    """
    now = torch.get_num_threads()
    if OF_THE_USER in os.environ or device_of(model).type != "cpu":
        return now
    own = model.runtime.num_threads if isinstance(model, Denoiser) else None
    return min(own or (1 if is_tiny(model, image_shape) else now), now)


def is_tiny(model: nn.Module, image_shape: Sequence[int]) -> bool:
    """Whether one evaluation on one image is so little work that one thread is fastest."""
    return sum(weight.numel() for weight in model.parameters()) * prod(image_shape[1:]) <= TINY
