"""Which backend attention takes, for the length of a `with` block, also inside networks that know nothing of us."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from diffdistill.attention.backends import Backend, check_backend, was_measured
from diffdistill.attention.state import _state, current_backend, is_dual


def reaching(*inputs: Tensor) -> AbstractContextManager[Any]:
    """For a call, on these inputs, of a network whose attention is torch's: it goes through the entry as well.

    Only where that may make a difference, for it costs a call of Python at every operation: where an input has a
    tangent, and on a GPU on which our kernels were measured. `use_attention` around it does it always.
    """
    may_differ = was_measured(inputs[0].device) or any(map(is_dual, inputs))
    return use_attention(current_backend()) if may_differ else nullcontext()


class use_attention(TorchFunctionMode):  # noqa: N801 - a context, as torch's own are named
    """Within it every `F.scaled_dot_product_attention` of any network goes through `diffdistill.attention`.

    backend: by name.  What is recomputed in the backward pass, by torch's checkpoint without re-entrance, takes the
    backend of the forward pass, wherever `backward` is called.  A layer that cuda or xformers cannot
    compute, torch computes, and that is said once. Raises UserError for an unknown name.
    """

    def __init__(self, backend: Backend = "auto") -> None:
        super().__init__()
        self.backend = check_backend(backend)
        self._before: list[tuple[Backend, Any]] = []

    def __enter__(self) -> "use_attention":
        self._before.append((_state.backend, _capture_in_checkpoints(self.backend)))
        _state.backend = self.backend
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)  # type: ignore[no-untyped-call]
        _state.backend, generator = self._before.pop()
        torch.utils.checkpoint._checkpoint_without_reentrant_generator = generator

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and not _state.inside:
            return _rerouted(*args, **(kwargs or {}))
        if func is F.group_norm and args:
            args = (_dense(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def _dense(x: Tensor) -> Tensor:
    """A dual tensor with dense parts: torch's rule for group_norm raises on others, as attention over images makes."""
    primal, tangent = forward_ad.unpack_dual(x)
    return x if tangent is None else forward_ad.make_dual(primal.contiguous(), tangent.contiguous())


def _rerouted(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's signature on our entry."""
    from diffdistill.attention.entry import attention

    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
    three = query.dim() == 3  # [H, N, D]
    if three:
        query, key, value = (x[None] for x in (query, key, value))
    options: dict[str, Any] = {"mask": attn_mask, "dropout": dropout_p, "causal": is_causal, "scale": scale}
    out = attention(query, key, value, **options)
    return out[0] if three else out


def _capture_in_checkpoints(backend: Backend) -> Any:
    """Let torch's checkpoint recompute under the same backend. Returns what it did before."""
    before = torch.utils.checkpoint._checkpoint_without_reentrant_generator

    def generator(function: Any, preserve: bool, context_fn: Any, *others: Any, **kwargs: Any) -> Any:
        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            first, second = context_fn()
            return first, _both(second, use_attention(backend))

        return before(function, preserve, contexts, *others, **kwargs)

    torch.utils.checkpoint._checkpoint_without_reentrant_generator = generator  # type: ignore[assignment]
    return before


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer or nullcontext(), inner:
        yield
