"""One file out of many: the definitions that some code uses, copied from the source of this package and of others.

An exported model is then the very code that was trained, in a file that imports torch and diffusers alone.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path as FilePath
from typing import NamedTuple

from diffdistill import PLACES, attention
from diffdistill.export import substitutes
from diffdistill.models import loading_bars
from diffdistill.settings import schema, values

PACKAGE = "diffdistill"
SUBSTITUTES = substitutes.__name__
REPLACED = {
    (schema.__name__, "schema"): (SUBSTITUTES, "schema"),
    (schema.__name__, "field"): (SUBSTITUTES, "field"),
    (values.__name__, "validate"): (SUBSTITUTES, "validate"),
    (PACKAGE, "register_network"): (SUBSTITUTES, "register_network"),
    (PACKAGE, "register_family"): (SUBSTITUTES, "register_family"),
    (loading_bars.__name__, "turn_off_loading_bars"): (SUBSTITUTES, "turn_off_loading_bars"),
    (attention.__name__, "attention"): (SUBSTITUTES, "attention"),
    (attention.__name__, "reaching"): (SUBSTITUTES, "reaching"),
}
ALLOWED = sys.stdlib_module_names | {"torch", "diffusers"}


Packages = frozenset[str]
"""Whose definitions are copied: this package, and those that the model's own classes come from."""


class BundleError(RuntimeError):
    """The code cannot stand alone in one file."""


class Name(NamedTuple):
    """A definition at the top level of a module."""

    module: str
    name: str


@dataclass(frozen=True)
class Import:
    """How a module gets a name: `from module import name`, or `import module` where name is None."""

    module: str
    name: str | None

    def line(self, alias: str) -> str:
        if self.name is None:
            return f"import {self.module}" + (f" as {alias}" if alias != self.module.split(".")[0] else "")
        return f"from {self.module} import {self.name}" + (f" as {alias}" if alias != self.name else "")


@dataclass(frozen=True)
class Module:
    """A file's definitions and imports at its top level, by name."""

    text: str
    definitions: Mapping[str, ast.stmt]
    imports: Mapping[str, Import]


def bundle(header: str, imports: str, body: str, *, packages: Packages = frozenset({PACKAGE})) -> str:
    """A file that runs `body` without this package.

    header: its docstring and comments.  imports: lines `from diffdistill.x import y`, what `body` takes from here.
    packages: whose code is copied.
    Raises BundleError if any of it needs a package that is neither torch nor diffusers, or a name twice.
    """
    root = _parse(imports + body, "")
    definitions: dict[Name, ast.stmt] = {}
    outside: dict[str, str] = {}
    for name in _names(ast.parse(body), are_all=True):
        _collect(root, name, definitions, outside, packages)
    _check_names(definitions, outside)
    parts, before = [], ""
    for found in _in_order(definitions, packages):
        source = _source(_module(found.module), definitions[found])
        parts.append(source if found.module == before else f"# {found.module}\n\n\n{source}")
        before = found.module
    lines = ["from __future__ import annotations", "", *sorted(set(outside.values()))]
    return header + "\n".join(lines) + "\n\n" + "\n\n\n".join([*parts, "# The model\n\n\n" + body.strip()]) + "\n"


def _collect(
    module: Module, name: str, definitions: dict[Name, ast.stmt], outside: dict[str, str], packages: Packages
) -> None:
    """Add what `name` means in `module`, and all that its definition uses."""
    found = module.imports.get(name)
    if found is None:
        return  # a builtin, a local variable
    if found.module.split(".")[0] not in packages:
        if found.module.split(".")[0] not in ALLOWED:
            raise BundleError(f"{found.line(name)}: an exported file imports torch and diffusers only")
        outside[name] = found.line(name)
        return
    if found.name is None or found.name != name:
        raise BundleError(f"{found.line(name)}: only `from module import name` can be put into one file")
    _define(_origin(found.module, found.name), definitions, outside, packages)


def _define(name: Name, definitions: dict[Name, ast.stmt], outside: dict[str, str], packages: Packages) -> None:
    if name in definitions:
        return
    module = _module(name.module)
    node = definitions[name] = module.definitions[name.name]
    for used in _names(node, are_all=True):
        if used in module.definitions:
            _define(Name(name.module, used), definitions, outside, packages)
        else:
            _collect(module, used, definitions, outside, packages)


def _origin(module: str, name: str) -> Name:
    """Where a name that a module hands on is defined, or what stands in for it."""
    if (module, name) not in REPLACED and module == PACKAGE and name in PLACES:
        module, name = PLACES[name].split(":")
    module, name = REPLACED.get((module, name), (module, name))
    found = _module(module)
    if name in found.definitions:
        return Name(module, name)
    if name not in found.imports:
        raise BundleError(f"from {module} import {name}: a module cannot be put into a file")
    handed = found.imports[name]
    return _origin(handed.module, handed.name or name)


def _in_order(definitions: Mapping[Name, ast.stmt], packages: Packages) -> list[Name]:
    """Each behind what runs when it is defined: base classes, decorators, defaults, values."""
    done: dict[Name, None] = {}

    def visit(name: Name) -> None:
        if name in done:
            return
        module = _module(name.module)
        for used in _names(definitions[name], are_all=False):
            if used in module.definitions and used != name.name:
                visit(Name(name.module, used))
            elif used in module.imports and module.imports[used].module.split(".")[0] in packages:
                visit(_origin(module.imports[used].module, used))
        done[name] = None

    for name in sorted(definitions, key=lambda name: (name.module, definitions[name].lineno)):
        visit(name)
    return list(done)


def _check_names(definitions: Mapping[Name, ast.stmt], outside: Mapping[str, str]) -> None:
    owners: dict[str, str] = {}
    for name in definitions:
        other = owners.setdefault(name.name, name.module)
        if other != name.module or name.name in outside:
            raise BundleError(f"{name.name}: is defined in both {name.module} and {other}; rename one")


def _names(node: ast.AST, *, are_all: bool) -> Iterator[str]:
    """The names that code reads, without annotations, which never run.

    are_all: those inside functions too, which are read when they are called.
    """
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        if field == "body" and not are_all and isinstance(node, (ast.FunctionDef, ast.Lambda)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                _check_inner_import(child)
            elif isinstance(child, ast.Name):
                yield child.id
            elif isinstance(child, ast.AST):
                yield from _names(child, are_all=are_all)


def _check_inner_import(node: ast.Import | ast.ImportFrom) -> None:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    for name in names:
        if name.split(".")[0] not in ALLOWED:
            raise BundleError(f"import of {name} in a function: an exported file imports torch and diffusers only")


@cache
def _module(name: str) -> Module:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # "__main__" has none
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise BundleError(f"{name}: not a Python file that can be copied")
    return _parse(FilePath(spec.origin).read_text(encoding="utf-8"), spec.parent or "")


def _parse(text: str, package: str) -> Module:
    """package: what relative imports start from."""
    definitions: dict[str, ast.stmt] = {}
    imports: dict[str, Import] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            source = importlib.util.resolve_name(source, package) if node.level else source
            imports |= {alias.asname or alias.name: Import(source, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            imports |= {alias.asname or alias.name.split(".")[0]: Import(alias.name, None) for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            definitions[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            definitions |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return Module(text, definitions, imports)


def _source(module: Module, node: ast.stmt) -> str:
    """A definition as it is written, its decorators included."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return "\n".join(module.text.splitlines()[first - 1 : node.end_lineno])
