"""Dropout where one loss asks a network more than once."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn


def masks_again(like: Tensor) -> AbstractContextManager[None]:
    """While open, random numbers are drawn that come once more afterwards: the next pass has the masks of this one.

    like: a tensor where the network computes.
    """
    return torch.random.fork_rng(devices=[like.device] if like.is_cuda else [])


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """The module as it is when images are made, while open."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
