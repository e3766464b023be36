"""Networks without weights: built on the meta device, for weights to be put in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def empty_weights() -> Iterator[None]:
    """While open, modules are made with parameters on the meta device and with real buffers; nothing is drawn for them.

    It does what accelerate's `init_empty_weights` does, but leaves out the initialisation: torch would import its
    compiler to work out, for a tensor without numbers, that nothing is to be done. Not for several threads at once.
    """
    register = nn.Module.register_parameter

    def register_empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None:
            self._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        with _NothingToFill():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _NothingToFill(TorchFunctionMode):
    """Within it what fills a tensor in place (`normal_`, `zero_`, and the functions of torch.nn.init) leaves those on
    the meta device as they are."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            target = args[0] if args else (kwargs or {}).get("tensor")
            if getattr(target, "is_meta", False):
                return target
        return function(*args, **(kwargs or {}))
