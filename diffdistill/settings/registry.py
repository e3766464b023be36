"""What there is of each kind, by name: ours, and what others add by `register` or by an installed package.

One mechanism for methods, networks, data sets, families of pipelines, rewards and features. A package adds a class by
an entry point of the registry's group, whose name is the class's own; it is loaded when it is named or listed.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from diffdistill.settings.faults import OpenChoice, UserError, did_you_mean
from diffdistill.settings.schema import any_of

ABOVE = {
    "FAMILIES": "diffdistill.models.teachers.registry:FAMILIES",
    "find_family": "diffdistill.models.teachers.registry:find_family",
    "FEATURES": "diffdistill.eval.features.extractors:FEATURES",
    "load_extractor": "diffdistill.eval.features.extractors:load_extractor",
    "StudentEvaluator": "diffdistill.eval.evaluation.evaluator:StudentEvaluator",
}
"""What a lower wing takes from a higher one, and where it is."""

Item = TypeVar("Item")
Given = TypeVar("Given")


@cache
def load(place: str) -> Any:
    """What stands at "package.module:Name"; at "package.module:" its class whose `name` is the module's."""
    path, attribute = place.split(":")
    module = import_module(path)
    return getattr(module, attribute) if attribute else _namesake(module)


def _namesake(module: ModuleType) -> type:
    own = [item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__]
    named = [item for item in own if getattr(item, "name", None) == module.__name__.rpartition(".")[2]]
    if len(named) != 1:
        raise ImportError(f"{module.__name__}: must have one class with the name of its file, not {len(named)}")
    return named[0]


def modules_of(package: str) -> dict[str, str]:
    """Every module of a package, by its name and sorted, as the place of the class of that name. None is imported."""
    spec = find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or []
    names = sorted(found.name for found in iter_modules(folders) if not found.ispkg)
    return {name: f"{package}.{name}:" for name in names}


def from_above(name: str) -> Any:
    """One of `ABOVE`, imported now."""
    return load(ABOVE[name])


class Check(Protocol):
    """Why something is none of a kind, None if it is one."""

    def __call__(self, item: Any) -> str | None: ...


class Registry(Generic[Item]):
    """Everything of one kind by name.

    kind: as messages call it, "method".  own: this package's, each as "module:Name", imported when it is asked for.
    unlisted: those of ours that programs make and no one writes into a config.  group: of the entry points.
    check: of what others add.
    """

    def __init__(
        self, kind: str, own: Mapping[str, str], *, group: str, check: Check, unlisted: Mapping[str, str] | None = None
    ) -> None:
        self.kind, self.own, self.group, self.check = kind, own, group, check
        self.unlisted = unlisted or {}
        self._registered: dict[str, Item] = {}
        self._found: dict[str, Item] = {}

    def register(self, item: Given, *, name: str | None = None) -> Given:
        """Make `item` known to this process; a decorator, too.  name: default its own.

        Raises UserError if it is none of the kind, or the name is ours or another's.
        """
        name = name or _name_of(item)
        if name in self._ours:
            raise UserError(f"{self.kind} {name!r}: diffdistill uses this name; choose another")
        fault = self.check(item)
        if fault:
            raise UserError(f"{_title(item)}: cannot be a {self.kind}: {fault}")
        other = self._registered.get(name)
        if other is not None and other is not item and not _is_redefined(other, item):
            raise UserError(
                f"{self.kind} {name!r}: is registered already, as {_title(other)}; {_title(item)} needs another name"
            )
        self._registered[name] = item  # type: ignore[assignment]
        self._found.pop(name, None)
        return item

    def find(self, name: str) -> Item:
        """What has this name. Raises UserError where it is unknown, broken, or of two packages."""
        if name in self._ours:
            found: Item = load(self._ours[name])
            return found
        if name not in self._found:
            self._found[name] = self._of_others(name)
        return self._found[name]

    def names(self) -> list[str]:
        """Every name: ours, and those that others have added. Nothing is loaded."""
        return list(dict.fromkeys([*self.own, *self._registered, *self._points()]))

    def others(self) -> dict[str, str]:
        """What others have added: where each comes from, by name. Nothing is loaded."""
        installed = {name: " and ".join(map(_package, points)) for name, points in self._points().items()}
        return {name: _title(item) for name, item in self._registered.items()} | installed

    def listed(self) -> tuple[dict[str, Item], list[str]]:
        """Everything that can be loaded, and a line for each thing that cannot, or that has a name of ours."""
        found, faults = {}, []
        for name in self.names():
            try:
                found[name] = self.find(name)
            except UserError as error:
                faults.append(str(error))
        for point in entry_points(group=self.group):
            if point.name in self._ours:
                faults.append(
                    f"{self.kind} {point.name!r} of {_package(point)}: ignored: the name is diffdistill's own"
                )
        return found, faults

    @property
    def _ours(self) -> dict[str, str]:
        return {**self.own, **self.unlisted}

    def _points(self) -> dict[str, list[EntryPoint]]:
        """The entry points by name, but for those of our names."""
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            if point.name not in self._ours:
                found.setdefault(point.name, []).append(point)
        return found

    def _of_others(self, name: str) -> Item:
        points = self._points().get(name, [])
        if len(points) > 1:
            both = " and ".join(map(_package, points))
            raise UserError(f"{self.kind} {name!r}: two packages register it, {both}; uninstall one")
        loaded: list[Item] = [self._loaded(point) for point in points]
        registered = [self._registered[name]] if name in self._registered else []
        if loaded and registered and loaded != registered:
            raise UserError(
                f"{self.kind} {name!r}: is registered as {_title(registered[0])}, and {_package(points[0])} has another"
            )
        if not loaded and not registered:
            raise UserError(f"{self.kind} {name!r}: unknown{did_you_mean(name, self.names())}")
        return [*loaded, *registered][0]

    def _loaded(self, point: EntryPoint) -> Any:
        try:
            item = point.load()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"{self.kind} {point.name!r} of {_package(point)}: cannot be loaded: {reason}") from error
        fault = self.check(item)
        named = getattr(item, "name", point.name)
        if fault is None and named != point.name:
            fault = f"its name is {named!r}"
        if fault:
            raise UserError(f"{self.kind} {point.name!r} of {_package(point)}: cannot be used: {_title(item)} {fault}")
        return item


class NameOf:
    """The type of a setting that names one of a registry: `Annotated[str, NameOf("FAMILIES")]`, one of `ABOVE`."""

    def __init__(self, registry: str) -> None:
        self._registry = registry

    @property
    def registry(self) -> Registry[Any]:
        found: Registry[Any] = from_above(self._registry)
        return found

    @property
    def own(self) -> list[str]:
        return list(self.registry.own)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(core_schema.literal_schema(self.own))

    def _check(self, name: str) -> str:
        if name not in self.registry.own and name not in self.registry.names():
            *first, last = map(repr, self.registry.names())
            raise PydanticCustomError(
                "literal_error",
                "unknown",
                {"expected": f"{', '.join(first)} or {last}", "tag": name, "kind": self.registry.kind},
            )
        return name


class OneOf(OpenChoice):
    """The type of a setting that holds one of a registry's schema classes: `Annotated[Any, OneOf(registry)]`.

    own: those of ours that it may be; default all.  holder: a name that may not stand in it, however deep in `base`.
    """

    def __init__(
        self, registry: Registry[Any], own: Collection[str] | None = None, *, holder: str | None = None
    ) -> None:
        self.registry, self.holder = registry, holder
        self.own = list(registry.own if own is None else own)

    def names(self) -> list[str]:
        """Every name that it may be."""
        return [*self.own, *(name for name in self.registry.others() if name != self.holder)]

    def may_be(self, name: object) -> bool:
        """Whether a class of this name, where there is one, may stand here."""
        is_other = isinstance(name, str) and name not in self.registry.own and name != self.holder
        return name in self.own or is_other

    def class_of(self, name: object) -> type | None:
        try:
            return self.registry.find(name) if isinstance(name, str) and self.may_be(name) else None
        except UserError:
            return None

    def own_classes(self) -> list[type]:
        return [self.registry.find(name) for name in self.own]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_wrap_validator_function(
            self._read,
            core_schema.any_schema(),
            serialization=core_schema.plain_serializer_function_ser_schema(_dumped),
        )

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Of ours alone: an editor's schema is not that of one machine."""
        return handler(TypeAdapter(any_of(self.own_classes())).core_schema)

    def _read(self, value: Any, _: Any, info: Any) -> Any:
        read = self._object(value) if info.mode == "python" else self._mapping(value)
        inner = read
        while self.holder and (inner := getattr(inner, "base", None)) is not None:
            if inner.name == self.holder:
                raise _fault(f"{self.holder} stands within itself")
        return read

    def _object(self, value: Any) -> Any:
        kind, name = self.registry.kind, getattr(value, "name", None)
        if isinstance(value, type) or not is_dataclass(value):
            raise _fault(f"must be an object of a {kind}'s class")
        if isinstance(name, str) and self.may_be(name) and self.class_of(name) is type(value):
            return value
        title = _title(type(value))
        if name in self.registry.own:
            raise _fault(f"{title}: {name!r} is the name of diffdistill's own {kind}, and may not stand here")
        raise _fault(
            f"{title} is not registered; say diffdistill.register_{kind.replace(' ', '_')}({type(value).__name__}) "
            f"first, or install it as an entry point of {self.registry.group}"
        )

    def _mapping(self, value: Any) -> Any:
        if not isinstance(value, dict):
            raise _fault("Input should be an object")
        if "name" not in value:
            raise PydanticCustomError("union_tag_not_found", "is required")
        name = value["name"]
        if name not in self.own and name not in self.names() and name not in self.registry.unlisted:
            choices = ", ".join(map(repr, self.names()))
            raise PydanticCustomError(
                "union_tag_invalid", "unknown", {"tag": str(name), "expected_tags": choices, "kind": self.registry.kind}
            )
        try:
            kind: Any = self.registry.find(name)
        except UserError as error:
            raise _fault(str(error)) from error
        return kind.__pydantic_validator__.validate_json(json.dumps(value))


def schema_class(*needs: str, base: Callable[[], type] | None = None) -> Check:
    """The check of a class with `@schema` that has these attributes.  base: what it inherits from."""

    def check(item: Any) -> str | None:
        if not isinstance(item, type) or "__pydantic_validator__" not in vars(item):
            return "is no class with @schema"
        if base is not None and not issubclass(item, base()):
            return f"does not inherit from {base().__name__}"
        if not isinstance(getattr(item, "name", None), str):
            return 'has no name; give it one, as in name: Literal["mine"] = "mine"'
        return lacking(item, *needs)

    return check


def lacking(item: type, *needs: str) -> str | None:
    """What a class does not define of what it needs."""
    unwritten = set(getattr(item, "__abstractmethods__", ()))
    known = {*dir(item), *getattr(item, "__dataclass_fields__", ())} - unwritten
    absent = sorted({*unwritten, *needs} - known)
    return f"does not define {', '.join(absent)}" if absent else None


def _dumped(value: Any) -> Any:
    return type(value).__pydantic_serializer__.to_python(value, mode="json")


def _fault(message: str) -> PydanticCustomError:
    return PydanticCustomError("open_choice", "{message}", {"message": message})


def _name_of(item: object) -> str:
    return str(getattr(item, "name", getattr(item, "__name__", type(item).__name__)))


def _title(item: object) -> str:
    """A class or function as its module and name."""
    return f"{getattr(item, '__module__', '')}.{getattr(item, '__qualname__', type(item).__name__)}".lstrip(".")


def _is_redefined(old: object, new: object) -> bool:
    """Whether a cell of a notebook ran again."""
    return getattr(new, "__module__", "") == "__main__" and _title(old) == _title(new)


def _package(point: EntryPoint) -> str:
    """The package of an entry point, and its version."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
