"""Classes by name: "package.module:Class", imported when they are asked for."""

from functools import cache
from importlib import import_module
from typing import Any


@cache
def load(place: str) -> Any:
    """What stands at "package.module:Name"."""
    module, attribute = place.split(":")
    return getattr(import_module(module), attribute)
