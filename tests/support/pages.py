"""The files that the documentation shows, by their titles."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def files_of(page: str) -> dict[str, str]:
    """Of a page of docs/."""
    return {title: block for _, title, block in FENCE.findall((ROOT / "docs" / page).read_text()) if title}
