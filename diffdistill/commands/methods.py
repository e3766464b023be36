"""The table of methods, and what other installed packages add."""

import sys
from typing import Any

from rich.table import Table

from diffdistill.data.registry import DATA
from diffdistill.distillation.method import METHODS
from diffdistill.distillation.rewards import REWARDS
from diffdistill.eval.features.extractors import FEATURES
from diffdistill.models.teachers.registry import FAMILIES
from diffdistill.networks.registry import NETWORKS
from diffdistill.settings.registry import Registry
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import Console

OTHER_KINDS: tuple[Registry[Any], ...] = (NETWORKS, DATA, FAMILIES, REWARDS, FEATURES)


def print_methods(console: Console) -> None:
    """Every method, then a line for each thing of another kind that others add, and for each that cannot be used."""
    table = Table(
        "method", "paper; players that are updated (every n iterations)", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    found, faults = METHODS.listed()
    others = METHODS.others()
    for name, kind in found.items():
        try:
            table.add_row(name, _row(kind, others.get(name)))
        except UserError as error:
            faults.append(" ".join(str(error).split()))
    console.print(table)
    for registry in OTHER_KINDS:
        usable, broken = registry.listed()
        faults += broken
        for name in usable.keys() - registry.own.keys():
            _say(console, f"{registry.kind} {name!r}, from {registry.others()[name]}")
    for fault in faults:
        _say(console, f"not usable: {fault}")


def _row(kind: type, origin: str | None) -> str:
    method: Any = kind()
    updates = ", ".join(f"{'+'.join(update.players)} ({update.every})" for update in method.updates)
    title = (sys.modules[kind.__module__].__doc__ or kind.__doc__ or "").strip().split("\n")[0]
    images = "needs real images" if method.needs_images else "no real images needed"
    return f"{title}{f' (from {origin})' if origin else ''}\n{updates}, {images}"


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
