"""Bytes while code runs: what autograd keeps for the backward pass, and everything that is alive."""

import math
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffdistill.networks.quantised import stored


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes behind some tensors, each storage once."""
    storages = [part.untyped_storage() for tensor in tensors for part in stored(tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class SavedTensors:
    """While open, counts the bytes that autograd keeps: each storage once, and none of `known`.

    live: now.  peak: the most so far.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self.live = self.peak = 0
        self._uses = {part.untyped_storage().data_ptr(): math.inf for tensor in known for part in stored(tensor)}
        self._hooks = saved_tensors_hooks(partial(_Kept, self), lambda kept: kept.tensor)

    def __enter__(self) -> "SavedTensors":
        self._hooks.__enter__()
        return self

    def __exit__(self, *fault: Any) -> None:
        self._hooks.__exit__(*fault)

    def use(self, tensor: Tensor, change: int) -> None:
        """One more or one less node of the graph keeps this tensor."""
        for part in stored(tensor):
            self._use(part.untyped_storage(), change)

    def _use(self, storage: torch.UntypedStorage, change: int) -> None:
        before = self._uses.get(storage.data_ptr(), 0)
        after = self._uses[storage.data_ptr()] = before + change
        if not before or not after:
            self.live += change * storage.nbytes()
            self.peak = max(self.peak, self.live)


class _Kept:
    """A tensor that a node of the graph keeps, until the node lets go of it."""

    def __init__(self, counter: SavedTensors, tensor: Tensor) -> None:
        self.counter, self.tensor = counter, tensor
        counter.use(tensor, +1)

    def __del__(self) -> None:
        self.counter.use(self.tensor, -1)


class LiveTensors(TorchDispatchMode):
    """While open, counts the bytes of every tensor that is made and still alive; not what an operation needs inside.

    live: now.  peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {_place(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and _place(leaf) not in given | self._known:
                self._add(leaf.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, count = storage.data_ptr(), storage.nbytes()
        self._known.add(place)
        self.live += count
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, place, count)

    def _drop(self, place: int, count: int) -> None:
        self._known.discard(place)
        self.live -= count


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
