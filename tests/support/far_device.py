"""A device that the host has to wait for, simulated on a CPU: what a training step would make it wait for on a GPU.

Its tensors compute with real numbers, so that a run on it ends as one on the CPU does, and say that they are elsewhere.
So no reader has to judge which tensor would lie on a GPU: each crossing between the host and the device is seen, and
whatever a GPU could not do (numbers of both in one operation) is an error here as there.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import diffdistill
from diffdistill.distributed.processes import Processes

FAR = torch.device("meta")
"""How the simulated device is named: torch runs backward passes of this one, too, without a GPU."""

HOMES = tuple({Path(diffdistill.__path__[0]).resolve(), *(Path(p).resolve() for p in diffdistill.__path__)})
SIZE_BY_NUMBERS = ("nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount")
"""Operations whose result is as large as the numbers say, which the host has to know."""
READS = ("_local_scalar_dense", "equal", "is_nonzero", "allclose")
HOST_INDEX = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
NO_LAUNCH = (
    *("view", "_unsafe_view", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "select"),
    *("split", "split_with_sizes", "unbind", "detach", "alias", "as_strided", "lift_fresh", "_local_scalar_dense"),
    *("_reshape_alias", "unfold", "diagonal", "view_as_real", "chunk", "empty", "empty_like", "new_empty"),
)


class Far(Tensor):
    """A tensor on the device.  inner: its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Far":
        made: Far = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=FAR,
        )
        return made

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class Crossings:
    """What crossed between host and device, each by the line that did it.

    waits: for which the host stands still until the device has done all it was told.  uploads: copies of pinned
    memory, for which it does not.  launches: operations on the device.
    """

    now: ClassVar["Crossings | None"] = None

    def __init__(self) -> None:
        self.waits, self.uploads, self.launches = Counter[str](), Counter[str](), Counter[str]()

    @property
    def num_waits(self) -> int:
        return self.waits.total()

    def table(self) -> str:
        return "\n".join(f"{count:5d} {line}" for line, count in self.waits.most_common())


@contextmanager
def counted() -> Iterator[Crossings]:
    """While open, crossings are counted."""
    Crossings.now = made = Crossings()
    try:
        yield made
    finally:
        Crossings.now = None


@contextmanager
def far_device() -> Iterator[torch.device]:
    """While open, `FAR` computes, and runs that are planned are on it."""
    autocast = torch.autocast
    with ExitStack() as opened:
        opened.enter_context(_Factories())
        opened.enter_context(_Device())
        found = "diffdistill.training.plan.find_processes"
        opened.enter_context(mock.patch(found, return_value=Processes(FAR)))
        opened.enter_context(mock.patch("torch.autocast", lambda kind, *a, **k: autocast("cpu", *a, **k)))
        opened.enter_context(mock.patch("torch.func.jvp", _jvp))
        opened.enter_context(mock.patch("torch.optim.adam._device_dtype_check_for_fused"))
        yield FAR


def near(tensor: Tensor) -> Tensor:
    """A tensor's numbers, uncounted."""
    return tensor.inner if isinstance(tensor, Far) else tensor


def _jvp(function: Callable[..., Tensor], primals: Sequence[Tensor], _: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The value, and zero in the place of the derivative, which torch has not for tensors such as these."""
    made = function(*primals)
    return made, torch.zeros_like(made)


class _Device(TorchDispatchMode):
    """Operations that make tensors where none was given."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Factories(TorchFunctionMode):
    """Tensors of Python's numbers, of which torch makes none on a `meta` device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        made: Any
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            is_far = torch.device(kwargs["device"]) == FAR
            if is_far and not isinstance(args[0], Far):
                _note("waits", f"{function.__name__} on the device")
                kwargs["device"] = "cpu"
                return Far(function(*args, **kwargs))
        if function is torch.nn.functional.one_hot and isinstance(args[0], Far):  # on a GPU nothing is checked
            made = Far(function(args[0].inner, *args[1:], **kwargs))
            return made
        if function is Tensor.tolist and isinstance(args[0], Far):
            _note("waits", "tolist")
            return args[0].inner.tolist()
        return function(*args, **kwargs)


def _run(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    name = function.name().partition("::")[2].partition(".")[0]
    leaves = tree_leaves((args, kwargs))
    is_far = any(isinstance(leaf, Far) for leaf in leaves)
    asked = kwargs.get("device")
    goes_far = asked is not None and torch.device(asked) == FAR
    if is_far or goes_far:
        _look(name, args, kwargs, leaves, goes_far=goes_far)
    inner_kwargs = {**kwargs, **({"device": torch.device("cpu")} if asked is not None else {})}
    inner_args, inner_kwargs = tree_map(near, (tuple(args), inner_kwargs))
    made = function(*inner_args, **inner_kwargs)
    if not goes_far and (not is_far or asked is not None):
        return made
    if name == "copy_" and not isinstance(args[0], Far):
        return args[0]
    wrapped = tree_map(lambda out: Far(out) if isinstance(out, Tensor) else out, made)
    return return_and_correct_aliasing(function, args, dict(kwargs), wrapped)


def _look(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], leaves: Sequence[Any], *, goes_far: bool) -> None:
    """Count what an operation makes of the host. Raises RuntimeError as a GPU's would."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    hosts = [tensor for tensor in tensors if not isinstance(tensor, Far)]
    if name in ("_to_copy", "copy_"):
        source = args[0] if name == "_to_copy" else args[1]
        target_far = goes_far if kwargs.get("device") is not None else isinstance(args[0], Far)
        if isinstance(source, Far) and not target_far:
            _note("waits", "copy to the host")
        elif not isinstance(source, Far) and target_far:
            is_queued = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            is_fill = name == "copy_" and source.ndim == 0
            _note("uploads" if is_queued or is_fill else "waits", "copy to the device")
    elif name in READS:
        _note("waits", name.strip("_"))
    elif name in SIZE_BY_NUMBERS:
        _note("waits", name)
    elif name in HOST_INDEX:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype == torch.bool for index in indices):
            _note("waits", "index by a mask")
        if any(not isinstance(index, Far) for index in indices):
            _note("waits", "index on the host")
    elif any(tensor.ndim for tensor in hosts) and not name.startswith("_fused_"):
        raise RuntimeError(f"{name}: expected all tensors to be on one device, but found {FAR} and cpu")
    if name not in NO_LAUNCH:
        _note("launches", name)


def _note(kind: str, what: str) -> None:
    if Crossings.now is None:
        return
    counter: Counter[str] = getattr(Crossings.now, kind)
    counter[what if kind == "launches" else f"{what:22s} {_site()}"] += 1


def _site() -> str:
    """The innermost line of ours."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if any(home in file.resolve().parents for home in HOMES):
            return f"{file.name}:{frame.lineno} {frame.line}"
    return "torch"
