"""Values from YAML and back: every fault shown at once, by its dotted place."""

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path as FilePath
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from diffdistill.settings.schema import UserError

T = TypeVar("T")


MAX_BITS = 1024  # of an integer in YAML; no setting takes more than 63


MAX_SHOWN = 200  # characters of a value in a message


def validate(kind: type[T], data: object, *, origin: str) -> T:
    """A nested dict as any schema class. Raises UserError naming every fault."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        faults = [_describe(kind, data, fault) for fault in error.errors()]
        raise UserError(f"{origin}: {len(faults)} fault{'s' * (len(faults) > 1)}\n  " + "\n  ".join(faults)) from None


def dump(value: object) -> Any:
    """A schema value as plain JSON types."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def dump_yaml(value: object) -> str:
    """A schema value as YAML that `load_config` reads back."""
    return yaml.safe_dump(dump(value), sort_keys=False)


def differences(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted places at which two dumped values differ, with both."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{place}.{key}" if place else key)
    elif old != new:
        yield place, old, new


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 2e-4 as a number and refuses repeated keys, keys that are no text, and aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not read", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        repeated = sorted(key for key, count in Counter(str(key.value) for key, _ in node.value).items() if count > 1)
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"repeated key {repeated[0]!r}", node.start_mark)
        mapping = super().construct_mapping(node, deep)
        for key in mapping:
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} is not a name", node.start_mark)
        return mapping

    def construct_yaml_int(self, node: Any) -> int:
        number = super().construct_yaml_int(node)
        if number.bit_length() > MAX_BITS:
            raise yaml.constructor.ConstructorError(None, None, "the integer is too large", node.start_mark)
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(file: str | FilePath) -> dict[str, Any]:
    """A YAML mapping. Raises UserError if the file is missing, unreadable or not a mapping."""
    try:
        text = FilePath(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    data = parse_yaml(text, origin=str(file))
    if not isinstance(data, dict):
        raise UserError(f"{file}: must be a mapping of settings, not {type(data).__name__}")
    return data


def parse_yaml(text: str, *, origin: str) -> Any:
    """Any YAML value. Raises UserError with the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{origin}: not valid YAML: {error}") from None


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`data` with each `key.sub=value` set; values are read as YAML. Raises UserError on a malformed one."""
    data = json.loads(json.dumps(data, default=str))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip(". "):
            raise UserError(f"override {_short(override)}: write key.sub=value")
        *parents, last = key.split(".")
        place = data
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UserError(f"override {_short(override)}: {parent!r} is a value, not a group of settings")
        place[last] = parse_yaml(text, origin=f"override {_short(override)}")
    return data


def texts(data: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested data, with its dotted place."""
    if isinstance(data, str):
        yield place, data
    elif isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from texts(value, f"{place}.{key}" if place else str(key))


def _short(value: object) -> str:
    """A value as it is shown in a message."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _describe(kind: type, data: object, fault: Any) -> str:
    """One fault as `place = value: what is wrong; choices`."""
    place, holder, value = _walk(kind, data, fault["loc"])
    code, context = fault["type"], fault.get("ctx", {})
    shown = f" = {_short(value)}" if not isinstance(value, (dict, list, type(None))) else ""
    if code in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [f.name for f in fields(holder)] if is_dataclass(holder) else []
        return f"{place}: unknown key{did_you_mean(place.rpartition('.')[2], known)}"
    if code in ("missing", "missing_argument", "missing_keyword_only_argument", "union_tag_not_found"):
        return f"{place}: is required"
    if code == "union_tag_invalid":
        choices = re.findall(r"'([^']*)'", context["expected_tags"])
        return f"{place}.name = {context['tag']!r}: unknown{did_you_mean(context['tag'], choices)}"
    if code == "literal_error":
        return f"{place}{shown}: choose from {context['expected']}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{place}{shown}: {message[:1].lower() + message[1:]}"


def _walk(kind: Any, data: object, loc: Sequence[str | int]) -> tuple[str, Any, object]:
    """The dotted place of a fault, the schema class that holds it, and the value there."""
    place, holder, here = "", kind, data
    expected: Any = kind
    for step in loc:
        if isinstance(here, dict) and here.get("name") == step and step not in here:
            continue  # pydantic names the union's choice as a step of its own
        holder = _class_of(expected, here)
        hints = get_type_hints(holder, include_extras=True) if is_dataclass(holder) else {}
        expected = hints.get(str(step), _item_type(expected))
        place += f"[{step}]" if isinstance(step, int) else f".{step}" if place else str(step)
        try:
            here = here[step]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            here = None
    return place or "config", holder, here


def _class_of(expected: Any, here: object) -> Any:
    """The schema class meant by `here` among those that a type allows."""
    allowed = [kind for kind in _alternatives(expected) if is_dataclass(kind)]
    name = here.get("name") if isinstance(here, dict) else None
    named = [kind for kind in allowed if getattr(kind, "name", None) == name]
    return (named or allowed or [expected])[0]


def _alternatives(expected: Any) -> list[Any]:
    """The classes in a type: through Annotated, unions and None."""
    arguments = get_args(expected)[:1] if get_origin(expected) is Annotated else get_args(expected)
    inner = [kind for argument in arguments for kind in _alternatives(argument)]
    return inner or [expected]


def _item_type(expected: Any) -> Any:
    """What a dict or tuple holds, as far as schema classes go."""
    inside = [kind for kind in _alternatives(expected) if is_dataclass(kind)]
    return inside[0] if inside else Any


def did_you_mean(wrong: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(wrong), choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (choices: {', '.join(choices)})" if choices else hint
