"""The one decorator behind every configurable value, and the error that users see when a value is wrong."""

from collections.abc import Callable, Iterable
from dataclasses import field
from functools import wraps
from typing import Annotated, Any, TypeVar, Union, dataclass_transform

import pydantic
from pydantic import Field

from diffdistill.settings.faults import UserError, told
from diffdistill.settings.numbers import Fraction, NonNegative, Number, Positive, PositiveInt, Rates

__all__ = [
    "Fraction",
    "NonNegative",
    "Number",
    "Positive",
    "PositiveInt",
    "Rates",
    "UserError",
    "any_of",
    "field",
    "schema",
]

T = TypeVar("T")


def any_of(kinds: Iterable[type]) -> Any:
    """The type of a field that holds one of these schema classes, told apart by `name`."""
    return Annotated[Union[tuple(kinds)], Field(discriminator="name")]  # noqa: UP007


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def schema(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that refuses unknown keys and wrong types.

    The same checks hold for YAML and for direct construction in Python. Numbers are not guessed from strings,
    nor integers from booleans. The constructor raises UserError, a ValueError, in the words of the command line.
    """
    config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    decorate: Callable[[type[T]], Any] = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)
    made: Any = decorate(cls)
    construct = made.__init__

    @wraps(construct)
    def construct_or_tell(self: T, *args: Any, **settings: Any) -> None:
        # pydantic itself, where it reads a config, makes objects without it, and gathers the faults of them all.
        try:
            construct(self, *args, **settings)
        except pydantic.ValidationError as error:
            raise told(type(self), settings, error, origin=type(self).__name__, whole="") from None

    made.__init__ = construct_or_tell
    return made
