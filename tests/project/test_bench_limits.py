"""scripts/bench_limits.py writes files that their readers read, as large as the limits allow."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from diffdistill.settings.limits import MAX_RECORDS_BYTES, MAX_ROWS, MAX_TABLE_BYTES

SCRIPTS = Path(__file__).parents[2] / "scripts"
ROWS = 1000
TABLES = ("prompts.txt", "emoji.txt", "prompts.csv", "prompts.jsonl", "captions.csv")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("bench_limits")
    sys.modules.pop("bench_limits", None)


def test_these_are_all_files(script: ModuleType) -> None:
    assert set(script.KINDS) == {*TABLES, "records.jsonl"}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_text_are_read_and_close_to_the_limits(script: ModuleType, name: str, tmp_path: Path) -> None:
    kind, file = script.KINDS[name], tmp_path / name
    file.write_text("".join(kind.write(ROWS)), encoding="utf-8")
    lines = file.read_bytes().count(b"\n")
    assert 0.99 * ROWS < lines <= ROWS
    assert 0.9 * ROWS * MAX_TABLE_BYTES / MAX_ROWS < file.stat().st_size <= ROWS * MAX_TABLE_BYTES / MAX_ROWS
    assert kind.read(file) == (1 if name == "captions.csv" else lines - name.endswith(".csv"))


def test_records_are_read_and_close_to_their_limit(script: ModuleType, tmp_path: Path) -> None:
    kind, file, limit = script.KINDS["records.jsonl"], tmp_path / "records.jsonl", MAX_RECORDS_BYTES / 60
    file.write_text("".join(kind.write(MAX_ROWS // 60)), encoding="utf-8")
    assert 0.99 * limit < file.stat().st_size <= limit
    assert kind.read(file) == len(file.read_text(encoding="utf-8").splitlines())
