"""The leaderboard's files are these, byte for byte: what makes it faster may change none of them."""

import hashlib
from datetime import UTC, datetime, tzinfo
from pathlib import Path

import pytest
from support.boards import EFFICIENCY, HOSTILE, measured, reported, written

from diffdistill.eval.board import pages
from diffdistill.eval.board.files import write_leaderboard
from diffdistill.eval.records.record import Record

GOLDEN = {
    "cards": "a8ab359db6881569853b2d97e5938903a17a48b1c19e67a1eb820e24808ba664",
    "leaderboard.csv": "b853fe3bc3837e0e0defcbd7f6a7de8b841a78ebf166a6b32d9d734e9e7f81fe",
    "leaderboard.html": "522f5c2a42de3a5a9f490189dc9be26a82f5324d276ee0d8265c96c1bb165ef4",
    "leaderboard.md": "716756a4c372a9089eb0fcb19785b81fe76959c323249807f84834458057c19d",
}
"""The SHA-256 of each page, and of all cards behind one another. Where a change is wanted, look at what it makes of
the pages, then write the new hashes here."""


def thirty() -> list[Record]:
    """Three protocols, seeds and repeats, equal ranks, missing scores and costs, hostile names, published numbers."""
    nearest, prompts = {"nearest_k": 5}, {"name": "prompts", "captions": True}
    return [
        *(measured("student", 0.2 + 0.1 * seed, seed=seed) for seed in range(3)),
        *(measured(f"student {n}", 0.1 * n, 0.1 * n + 0.03, steps=1 + n % 4, recall=0.05 * n) for n in range(1, 11)),
        measured("equal", 0.5, 0.53, recall=None),
        measured("no distance"),
        measured(HOSTILE, 1.5, method="sid", notes=HOSTILE),
        measured("with efficiency", 0.7, efficiency=EFFICIENCY),
        measured("with seeds of its own", 0.65, seed=None),
        *(measured(f"near {n}", 1.0 / n, protocol=nearest) for n in range(1, 6)),
        *(measured(f"texts {n}", 3.0 * n, protocol=prompts, seed=None) for n in range(1, 4)),
        *(reported(f"paper {n}", 2.0 + n / 7) for n in range(1, 4)),
        reported(HOSTILE, 1.25),
    ]


def hashes(folder: Path) -> dict[str, str]:
    """Of each file in a folder; those below it are one."""
    found: dict[str, bytes] = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = file.relative_to(folder)
        told = f"{name.as_posix()}\n".encode() if len(name.parts) > 1 else b""
        found[name.parts[0]] = found.get(name.parts[0], b"") + told + file.read_bytes()
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


class ThatDay(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "ThatDay":
        return cls(2026, 1, 1, tzinfo=UTC)


def test_thirty_records_become_these_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures: Pillow's versions encode them in their own ways."""
    monkeypatch.chdir(tmp_path)  # the pages name the records' file
    monkeypatch.setattr(pages, "datetime", ThatDay)
    monkeypatch.setattr(pages, "__version__", "0")
    records = written(Path(), *thirty())
    write_leaderboard([records], Path("board"), with_reported=False, say=lambda _: None)
    assert len(list(Path("board/cards").rglob("*.yaml"))) == 48
    assert hashes(Path("board")) == GOLDEN
