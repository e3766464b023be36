"""Which families there are, and which of them a pipeline is of."""

from functools import cache
from typing import Any

from diffdistill.models.teachers.family import Family
from diffdistill.settings.registry import Registry, lacking, modules_of
from diffdistill.settings.schema import UserError


def _fault(item: Any) -> str | None:
    """Why a class is no family."""
    if not isinstance(item, type) or not issubclass(item, Family):
        return "does not inherit from Family"
    return lacking(item, "name", "pipelines", "network_classes")


FAMILIES: Registry[type[Family]] = Registry(
    "family",
    modules_of("diffdistill.models.teachers.families"),
    group="diffdistill.families",
    check=_fault,
)
"""Every family, by name: ours are the files of `families`."""


def find_family(name: str) -> Family:
    """The adapter of a family. Raises UserError for one that is not known."""
    return _made(FAMILIES.find(name))


@cache
def _made(kind: type[Family]) -> Family:
    return kind()


def detect_family(pipeline: object, *, origin: str) -> Family:
    """The family of a pipeline's class, `_class_name` of its model_index.json. Raises UserError if it is of none.

    Ours come first; only where none of them knows the class are others' loaded.
    """
    known = {name: family for family in map(find_family, FAMILIES.own) for name in _kinds(family)}
    faults: list[str] = []
    if isinstance(pipeline, str) and pipeline not in known and FAMILIES.others():
        others, faults = FAMILIES.listed()
        for family in map(_made, others.values()):
            known = dict.fromkeys(_kinds(family), family) | known
    if not isinstance(pipeline, str) or pipeline not in known:
        broken = "".join(f"; {fault}" for fault in faults)
        choices = ", ".join(known)
        raise UserError(f"{origin}: _class_name = {pipeline!r}: no family of teachers; choose from {choices}{broken}")
    return known[pipeline]


def _kinds(family: Family) -> tuple[str, ...]:
    """The classes of pipelines that a family reads."""
    return (*family.pipelines, *family.variants)
