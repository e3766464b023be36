"""Networks beyond all sizes are refused while they are built: before the first weight of theirs is drawn."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from diffdistill.settings.limits import MAX_PARAMETERS, MAX_TENSORS
from diffdistill.settings.schema import UserError


@contextmanager
def limited_parameters(limit: int = MAX_PARAMETERS) -> Iterator[None]:
    """While open, modules may be made of so many parameters together, in at most MAX_TENSORS tensors. A layer's memory
    is asked for but not yet filled when its weights are counted.

    Raises UserError for more, and where there is no memory to ask for.  Not for several threads at once.
    """
    count = tensors = 0

    def add(module: nn.Module, name: str, param: nn.Parameter) -> None:
        nonlocal count, tensors
        count, tensors = count + param.numel(), tensors + 1
        if count > limit:
            raise UserError(f"network: more than {limit:,} parameters, in a {type(module).__name__} of it")
        if tensors > MAX_TENSORS:
            raise UserError(f"network: more than {MAX_TENSORS:,} tensors of parameters")

    handle = register_module_parameter_registration_hook(add)
    try:
        yield
    except RuntimeError as error:
        if not any(said in str(error) for said in ("allocate", "out of memory", "Storage size", "overflow", "numel")):
            raise
        raise UserError(f"network: cannot be made at this size: {' '.join(str(error).split())[:200]}") from None
    except MemoryError:
        raise UserError("network: cannot be made at this size: there is no memory for it") from None
    finally:
        handle.remove()
