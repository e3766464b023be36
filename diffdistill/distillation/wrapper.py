"""A method that holds another: it changes a part of the run, and the losses stay the other's."""

from itertools import takewhile
from typing import TYPE_CHECKING, Annotated, Any

from diffdistill.distillation.method import METHODS, Method
from diffdistill.settings.registry import OneOf


def methods_above(name: str) -> Any:
    """The type of `base` in the method `name`: of ours any that stands above it in the registry, of others' any.

    None holds itself, however deep.
    """
    above = list(takewhile(lambda other: other != name, METHODS.own))
    return Annotated[Any, OneOf(METHODS, above, holder=name)]


def default_base() -> Method:
    """DMD2 with its defaults."""
    return METHODS.find("dmd2")()


class Held:
    """A hook that is the held method's own: asked of a wrapper, its base answers."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, wrapper: "Wrapper | None", owner: type) -> Any:
        return self if wrapper is None else getattr(wrapper.base, self.name)


class Wrapper(Method):
    """A method with a field `base`, the method that it holds. What a wrapper does not define itself is the base's own
    answer, for every hook that `Method` has."""

    base: Method

    if TYPE_CHECKING:  # the abstract ones
        updates: Any
        student: Any
        needs_images: Any
        sampler: Any
        players: Any
        draw: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in vars(Method):
            if not name.startswith("_") and name not in vars(Wrapper):
                setattr(Wrapper, name, Held(name))
