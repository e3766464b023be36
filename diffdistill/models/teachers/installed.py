"""Classes of the libraries that are installed."""

from importlib import import_module
from typing import Any

from diffdistill.models.loading_bars import turn_off_loading_bars
from diffdistill.settings.schema import UserError


def diffusers_class(name: str, library: str = "diffusers") -> Any:
    """A class of diffusers, or of transformers, by its name. Raises UserError where the one installed lacks it."""
    module = import_module(library)
    turn_off_loading_bars()
    try:
        return getattr(module, name)
    except AttributeError:
        raise UserError(
            f"this family needs a newer {library}, which has {name}; {module.__version__} is installed"
        ) from None
