"""The page of `scripts/quality.py`."""

from collections.abc import Sequence
from pathlib import Path

from quality_records import Measured


def write_page(records: Sequence[Measured]) -> list[Path]:
    return []
