"""The rows of a long leaderboard that its page does not show at once, as data from which a script makes them.

A browser takes seconds to lay out ten thousand rows, each with its dialog. So of a long board the page has the first of
each table, and of the others what html/further.js needs: they come by a button, by the filters, and by sorting.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffdistill.eval.board.leaderboard import Board
from diffdistill.settings.values import dump

if TYPE_CHECKING:
    from markupsafe import Markup

MANY = 1000
"""Measured rows that a page shows at once; of more it shows the first AT_ONCE, or fewer of each of several tables."""
AT_ONCE = 500
AT_LEAST = 20


def rows_at_once(board: Board) -> int | None:
    """How many rows a measured table shows before it is asked for more; None for all."""
    if sum(len(group.entries) for group in board.measured) <= MANY:
        return None
    return max(AT_LEAST, AT_ONCE // len(board.measured))


def as_data(row: Any) -> dict[str, Any]:
    """A `page.Row` as html/further.js takes it: its line, and its dialog with the records but for their protocol."""
    return {
        "anchor": row.anchor,
        "name": row.name,
        "rank": row.rank,
        "method": row.method,
        "evaluations": row.bucket,
        "search": row.search,
        "subtitle": row.subtitle,
        "cells": [[c.text, c.value, c.spread, c.title, c.is_best, c.is_primary] for c in row.cells],
        "scores": row.scores,
        "notes": row.notes,
        "records": [[source.origin, _known(dump(source.record, without={"protocol"}))] for source in row.entry.sources],
    }


def embedded(tables: Mapping[str, Mapping[str, Any]]) -> "Markup":
    """JSON that may stand in a page's <script>, where no text in it ends the script."""
    from markupsafe import Markup

    text = json.dumps(tables, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def table_of(section: Mapping[str, Any], rows: Sequence[Any]) -> dict[str, Any]:
    """What the script needs of a measured table."""
    return {"name": section["name"], "protocol": section["protocol"], "rows": [as_data(row) for row in rows]}


def _known(told: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in told.items() if value is not None}
