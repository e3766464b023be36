"""The one decorator behind every configurable value, and the error that users see when a value is wrong."""

from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Annotated, Any, TypeVar, Union, dataclass_transform

import pydantic
from pydantic import Field

__all__ = ["Fraction", "NonNegative", "Positive", "PositiveInt", "Rates", "UserError", "any_of", "field", "schema"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Rates = tuple[Positive, ...]

T = TypeVar("T")


class UserError(ValueError):
    """A fault in what the user gave. The command line prints it without a traceback and exits with 2."""


def any_of(kinds: Iterable[type]) -> Any:
    """The type of a field that holds one of these schema classes, told apart by `name`."""
    return Annotated[Union[tuple(kinds)], Field(discriminator="name")]  # noqa: UP007


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def schema(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that refuses unknown keys and wrong types.

    The same checks hold for YAML and for direct construction in Python. Numbers are not guessed from strings,
    nor integers from booleans. Raises pydantic.ValidationError, a ValueError, from the constructor.
    """
    config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    decorate: Callable[[type[T]], Any] = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)
    made: type[T] = decorate(cls)
    return made
