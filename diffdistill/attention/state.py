"""Which backend attention takes now, and whether a call of torch's attention is our own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from torch.autograd import forward_ad

from diffdistill.attention.backends import Backend


@dataclass
class _State:
    """backend: of the innermost `use_attention`.  inside: whether a call of torch's attention is our own."""

    backend: Backend = "auto"
    inside: bool = False


_state = _State()


def current_backend() -> Backend:
    """The backend of the innermost `use_attention`; auto outside of all."""
    return _state.backend


def is_dual(x: Tensor) -> bool:
    """Whether a tensor has a tangent."""
    return forward_ad.unpack_dual(x).tangent is not None


@contextmanager
def inside() -> Iterator[None]:
    """Calls of torch's attention from here are our own, and stay torch's."""
    before, _state.inside = _state.inside, True
    try:
        yield
    finally:
        _state.inside = before
