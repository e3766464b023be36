"""What is wrong with a setting, in the words that users see: its dotted place, its value, and the choices."""

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from diffdistill.settings.numbers import TAGS

MAX_SHOWN = 200  # characters of a value in a message
MAX_LISTED = 50  # faults in a message


class UserError(ValueError):
    """A fault in what the user gave. The command line prints it without a traceback and exits with 2."""


class OpenChoice(ABC):
    """In `Annotated[Any, ...]`: a schema class that is found by its name when a value is read."""

    @abstractmethod
    def class_of(self, name: object) -> type | None:
        """The class of this name, None where there is none that could be read."""


def told(
    kind: Any, data: object, error: ValidationError, *, origin: str, whole: str = "config", is_saved: bool = False
) -> UserError:
    """Every fault of `data`, which was read as `kind`.  whole: the place of a fault that is of no one setting.
    is_saved: whether it was right once, so that a name that is unknown is of a package that is missing.
    """
    faults = [_describe(kind, data, fault, whole, is_saved) for fault in error.errors()]
    return listed(faults, origin=origin)


def listed(faults: Sequence[str], *, origin: str) -> UserError:
    """The faults, each on a line of its own; of very many the first."""
    more = [f"and {len(faults) - MAX_LISTED:,} more"] if len(faults) > MAX_LISTED else []
    lines = "\n  ".join([*faults[:MAX_LISTED], *more])
    return UserError(f"{origin}: {len(faults)} fault{'s' * (len(faults) > 1)}\n  {lines}")


def short(value: object) -> str:
    """A value as it is shown in a message."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def did_you_mean(wrong: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(wrong), choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (choices: {', '.join(choices)})" if choices else hint


def nearest(wrong: str, choices: Sequence[str], count: int = 5) -> list[str]:
    """The choices that look most like what was written, the nearest first."""
    return difflib.get_close_matches(wrong, choices, n=count, cutoff=0.0)


def _describe(kind: Any, data: object, fault: Any, whole: str, is_saved: bool) -> str:
    """One fault as `place = value: what is wrong; choices`."""
    place, holder, value = _walk(kind, data, fault["loc"])
    place = place or whole
    code, context = fault["type"], fault.get("ctx", {})
    is_plain = not isinstance(value, (dict, list, type(None))) and not is_dataclass(value)
    shown = f" = {short(value)}" if place and is_plain else ""
    if code in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [f.name for f in fields(holder)] if is_dataclass(holder) else []
        return f"{place}: unknown key{did_you_mean(place.rpartition('.')[2], known)}"
    if code in ("missing", "missing_argument", "missing_keyword_only_argument", "union_tag_not_found"):
        return f"{place}: is required"
    if is_saved and "kind" in context:
        named = place if code == "literal_error" else f"{place}.name"
        return f"{named} = {context['tag']!r}: no installed package registers a {context['kind']} of this name"
    if code == "union_tag_invalid":
        choices = re.findall(r"'([^']*)'", context["expected_tags"])
        return f"{place}.name = {context['tag']!r}: unknown{did_you_mean(context['tag'], choices)}"
    if code == "unexpected_positional_argument":
        return f"{short(fault['input'])}: settings are given by name"
    if code == "literal_error":
        return f"{place}{shown}: choose from {context['expected']}"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{place}{shown}: {message}" if place else message


def _walk(kind: Any, data: object, loc: Sequence[str | int]) -> tuple[str, Any, object]:
    """The dotted place of a fault, the schema class that holds it, and the value there."""
    place, holder, here = "", kind, data
    expected: Any = kind
    for step in loc:
        if step in TAGS or (isinstance(here, dict) and here.get("name") == step and step not in here):
            continue  # pydantic names the union's choice as a step of its own
        holder = _class_of(expected, here)
        hints = get_type_hints(holder, include_extras=True) if is_dataclass(holder) else {}
        expected = hints.get(str(step), _item_type(expected, here))
        place += f"[{step}]" if isinstance(step, int) else f".{step}" if place else str(step)
        try:
            here = here[step]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            here = None
    return place, holder, here


def _class_of(expected: Any, here: object) -> Any:
    """The schema class meant by `here` among those that a type allows."""
    name = here.get("name") if isinstance(here, dict) else None
    allowed = [kind for kind in _alternatives(expected, name) if is_dataclass(kind)]
    named = [kind for kind in allowed if getattr(kind, "name", None) == name]
    return (named or allowed or [expected])[0]


def _alternatives(expected: Any, name: object) -> list[Any]:
    """The classes in a type: through Annotated, unions and None, and an open choice's of this name."""
    if get_origin(expected) is Annotated:
        inner, *marks = get_args(expected)
        chosen = [mark.class_of(name) for mark in marks if isinstance(mark, OpenChoice)]
        return chosen if any(chosen) else _alternatives(inner, name)
    found = [kind for argument in get_args(expected) for kind in _alternatives(argument, name)]
    return found or [expected]


def _item_type(expected: Any, here: object) -> Any:
    """What a dict or tuple holds, as far as schema classes go."""
    if get_origin(expected) is Annotated:
        return _item_type(get_args(expected)[0], here)
    if get_origin(expected) in (dict, list, tuple):
        return next((part for part in reversed(get_args(expected)) if part is not Ellipsis), Any)
    parts = [_item_type(part, here) for part in get_args(expected)]
    return next((part for part in parts if part is not Any), Any)
