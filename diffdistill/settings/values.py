"""Values from YAML and back: every fault shown at once, by its dotted place."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from pathlib import Path as FilePath
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from diffdistill.settings.faults import UserError, listed, short, told
from diffdistill.settings.limits import MAX_CONFIG_BYTES, MAX_NESTING, faults_of
from diffdistill.settings.reading import read_text
from diffdistill.settings.text import why_not_utf8

T = TypeVar("T")


MAX_DIGITS = 64  # of a number in YAML; no setting takes more than 20, and base 60 takes the square of their number


def validate(kind: type[T], data: object, *, origin: str, is_saved: bool = False) -> T:
    """A nested dict as any schema class. Raises UserError naming every fault, sizes beyond all limits first.

    is_saved: whether the dict is our own `dump`; a name in it that nobody has any more is told as such.
    """
    _check_size(data, origin)
    try:
        return TypeAdapter(kind).validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise told(kind, data, error, origin=origin, is_saved=is_saved) from None


def _check_size(data: object, origin: str) -> None:
    faults = faults_of(data)
    if faults:
        raise listed(faults, origin=origin)


def dump(value: object, *, without: Set[str] = frozenset()) -> Any:
    """A schema value as plain JSON types.  without: fields that are left out."""
    return TypeAdapter(type(value)).dump_python(value, mode="json", exclude=set(without) or None)


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

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not read", mark)
        if self.depth > MAX_NESTING:
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_NESTING} deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

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
        _check_digits(node, "integer")
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> float:
        _check_digits(node, "number")
        return super().construct_yaml_float(node)


def _check_digits(node: Any, kind: str) -> None:
    if len(str(node.value)) > MAX_DIGITS:
        raise yaml.constructor.ConstructorError(None, None, f"the {kind} is too large", node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(file: str | FilePath) -> dict[str, Any]:
    """A YAML mapping. Raises UserError if the file is missing, unreadable or not a mapping."""
    try:
        text = read_text(file, limit=MAX_CONFIG_BYTES)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: {why_not_utf8(error)}") from None
    data = parse_yaml(text, origin=str(file))
    if not isinstance(data, dict):
        raise UserError(f"{file}: must be a mapping of settings, not {type(data).__name__}")
    return data


def parse_yaml(text: str, *, origin: str) -> Any:
    """Any YAML value. Raises UserError with the line, and on what is longer or deeper than anything that is read."""
    if len(text) > MAX_CONFIG_BYTES:
        raise UserError(f"{origin}: {len(text):,} characters; at most {MAX_CONFIG_BYTES:,} are read as YAML")
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"{origin}: not valid YAML: {error}") from None


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`data` with each `key.sub=value` set; values are read as YAML. Raises UserError on a malformed one."""
    data = json.loads(json.dumps(data, default=str))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip(". "):
            raise UserError(f"override {short(override)}: write key.sub=value")
        *parents, last = key.split(".")
        if len(parents) >= MAX_NESTING:
            raise UserError(f"override {short(override)}: nested more than {MAX_NESTING} deep")
        place = data
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UserError(f"override {short(override)}: {parent!r} is a value, not a group of settings")
        place[last] = parse_yaml(text, origin=f"override {short(override)}")
    return data


def texts(data: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested data, with its dotted place."""
    if isinstance(data, str):
        yield place, data
    elif isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from texts(value, f"{place}.{key}" if place else str(key))
