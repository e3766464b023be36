"""The digits board's script: its table is its page's, and its rows at more steps are runs that exist."""

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from diffdistill.eval.metrics.against import AboveFloor, Measured
from diffdistill.eval.records.record import Against, read_records
from diffdistill.training.config import find_config, load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def board() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("leaderboard")
    sys.path.remove(str(ROOT / "scripts"))


def test_the_pages_tables_are_those_of_the_records(board: ModuleType) -> None:
    assert "".join(board._tables(read_records(board.RECORDS))) in board.PAGE.read_text(encoding="utf-8")


def test_every_row_has_ten_times_its_steps_and_falls_to_their_end(board: ModuleType) -> None:
    for entry in board.BOARD:
        usual = load_config(find_config(entry.config), board.FOR_LONGER.get(entry.name, entry.overrides))
        longer = load_config(find_config(entry.config), board.longer(entry, 10).overrides)
        assert longer.train.steps == 10 * usual.train.steps
        if usual.ema is not None:
            assert longer.ema is not None
            assert longer.ema.halflife_images == 10 * usual.ema.halflife_images
        stored = {name: count for name in board.STORED if (count := getattr(usual.method, name, None))}
        assert {name: getattr(longer.method, name) for name in stored} == {n: 10 * k for n, k in stored.items()}
        method = replace(longer.method, **stored)
        assert replace(longer, method=method, train=usual.train, ema=usual.ema, more_emas=usual.more_emas) == usual


def test_a_second_row_is_of_the_same_run_by_a_shorter_average(board: ModuleType) -> None:
    [sid] = [entry for entry in board.BOARD if entry.name == "SiD"]
    entry = board.longer(sid, 10)
    config = load_config(find_config(entry.config), entry.overrides)
    assert config.ema is not None
    assert config.more_emas[board.SHORT] == replace(config.ema, halflife_images=17_600)
    assert entry.second == "SiD, EMA half-life 17,600 images"
    assert all(board.longer(e, 10).second is None for e in board.BOARD if e.name not in board.SHORTER)


def test_a_longer_table_is_one_of_its_own_and_says_the_distance_to_the_teacher(board: ModuleType) -> None:
    student = next(record for record in read_records(board.RECORDS) if record.name == "SiD, U-Net")
    at = {"student": 0.093, "floor": 0.038, "excess": 0.055}
    measured = AboveFloor(**{name: Measured(value=x, low=x - 0.01, high=x + 0.01) for name, x in at.items()})
    against = Against(
        place="teacher",
        protocol={},
        num_images=6000,
        seeds=(0, 6000),
        independent_seeds=(6000, 12000),
        metrics={"fd-pixels": measured},
        confidence=0.95,
        replicates=50,
    )
    long = replace(student, name=f"SiD, {board.longer_family(10)}", against=against)
    first, second = "".join(board._tables([student, long])).split(
        "The teacher: the same U-Net as above, at 10 times the steps."
    )
    assert first.count("| SiD |") == second.count("| SiD |") == 1
    assert "to the teacher" not in first
    assert "| to the teacher (its floor 0.038) |" in second
    assert second.rstrip().endswith(" | 1 | 0.093 |")


def test_a_longer_row_says_its_distance_to_digits_that_nothing_saw(board: ModuleType) -> None:
    record = next(record for record in read_records(board.RECORDS) if record.name == "Hyper-SD, 1 step, U-Net")
    name = f"Hyper-SD, 1 step, {board.longer_family(10)}"
    scores = replace(record.metrics["fd-pixels"], values=(0.777,), min=0.777, mean=0.777)
    unseen = replace(record, metrics={"fd-pixels": scores})
    records = [replace(record, name=name), replace(unseen, name=f"{name}, {board.UNSEEN}")]
    [_, *rows] = [line for line in "".join(board._tables(records)).splitlines() if line.startswith("| ")]
    assert [row.split("|")[-2].strip() for row in rows] == ["0.777"]
    assert rows[0].startswith("| Hyper-SD, 1 step |")
    assert "fd-pixels, test split" in "".join(board._tables(records))
    assert "test split" not in "".join(board._tables(records[:1]))


def test_no_record_names_a_place_of_the_machine_that_made_it() -> None:
    for file in sorted((ROOT / "results").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            found = re.findall(r'"(/[a-z]+/[^"]*)"', line)
            assert not found, f"{file.name}: {found}"
