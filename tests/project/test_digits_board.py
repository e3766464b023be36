"""The digits board's script: its table is its page's, and its rows at more steps are runs that exist."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType

import pytest

from diffdistill.eval.metrics.against import AboveFloor, Measured
from diffdistill.eval.records.record import Against, Cost, Record, append_record, read_records
from diffdistill.training.config import find_config, load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def board() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("leaderboard")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def page(board: ModuleType) -> ModuleType:
    return sys.modules["leaderboard_page"]


def test_the_pages_tables_are_those_of_the_records(page: ModuleType) -> None:
    assert "".join(page.tables(read_records(page.RECORDS))) in page.PAGE.read_text(encoding="utf-8")


def test_every_row_has_ten_times_its_steps_and_falls_to_their_end(board: ModuleType) -> None:
    for entry in board.BOARD:
        usual = load_config(find_config(entry.config), board.FOR_LONGER.get(entry.name, entry.overrides))
        longer = load_config(find_config(entry.config), board.longer(entry, 10).overrides)
        assert longer.train.steps == 10 * usual.train.steps
        if usual.ema is not None:
            assert longer.ema is not None
            assert longer.ema.halflife_images == 10 * usual.ema.halflife_images
        stored = board.stored(usual.method)
        assert {name: getattr(longer.method, name) for name in stored} == {n: 10 * k for n, k in stored.items()}
        method = replace(longer.method, **stored)
        assert replace(longer, method=method, train=usual.train, ema=usual.ema, more_emas=usual.more_emas) == usual


def test_a_row_from_another_run_scales_both_and_starts_from_it(
    board: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [entry] = [board.longer(entry, 10) for entry in board.BOARD if entry.name == "SIM, from regression"]
    first = load_config(find_config(entry.first.config), entry.first.overrides)
    assert (first.method.name, first.train.steps, first.method.pairs) == ("regression", 4800, 32_000)
    trained: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(board, "_train", lambda row, run, given: trained.append((f"{row.name} {run.name}", given)))
    before, given = board._train_first(entry, 2, tmp_path, tmp_path / "teacher")
    assert trained == [(f"{entry.first.name} {before[0].name}", [f"teacher={tmp_path / 'teacher'}", "train.seed=2"])]
    assert given == [*trained[0][1], f"init={before[0]}"]
    assert before[0].parent == tmp_path
    [sid] = [entry for entry in board.BOARD if entry.name == "SiD"]
    assert board._train_first(sid, 2, tmp_path, tmp_path / "teacher") == ([], given[:2])


def test_a_row_is_measured_with_the_run_that_it_starts_from(
    board: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [entry] = [entry for entry in board.BOARD if entry.name == "SIM, from regression"]
    measured: list[list[str]] = []
    monkeypatch.setattr(board, "_train", lambda *_: None)
    monkeypatch.setattr(board, "_keep_strip", lambda *_: None)
    monkeypatch.setattr(board, "_measure", lambda *_, parts, **__: measured.append([run.name for run in parts]))
    board._row(entry, 7, tmp_path, board.IN_PICTURE, tmp_path / "teacher")
    assert measured == [[f"{entry.first.slug}-7", f"{entry.slug}-7"]]


def test_what_a_row_starts_from_is_part_of_its_cost(board: ModuleType, tmp_path: Path) -> None:
    for name, seconds in (("first", 700.0), ("own", 300.0)):
        (tmp_path / name / "checkpoints" / "step-00000020").mkdir(parents=True)
        reports = [{"step": 20, "images": 2, "cpu_seconds": seconds}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(report) + "\n" for report in reports))
    record = next(record for record in read_records(board.RECORDS) if record.name == "Hyper-SD, 1 step, U-Net")
    append_record(tmp_path / "own" / "eval.jsonl", replace(record, cost=Cost(train_steps=20)))
    assert board._sum([tmp_path / "first", tmp_path / "own"]).train_cpu_seconds == 1000
    [point] = board._points("SIM, from regression, U-Net", tmp_path / "own", [tmp_path / "first"])
    assert point.cpu_seconds == 1000


def test_a_second_row_is_of_the_same_run_by_a_shorter_average(board: ModuleType) -> None:
    [sid] = [entry for entry in board.BOARD if entry.name == "SiD"]
    entry = board.longer(sid, 10)
    config = load_config(find_config(entry.config), entry.overrides)
    assert config.ema is not None
    assert config.more_emas[board.SHORT] == replace(config.ema, halflife_images=17_600)
    assert entry.second == "SiD, EMA half-life 17,600 images"
    assert all(board.longer(e, 10).second is None for e in board.BOARD if e.name not in board.SHORTER)


def test_a_longer_table_is_one_of_its_own_and_says_the_distance_to_the_teacher(
    board: ModuleType, page: ModuleType
) -> None:
    student = next(record for record in read_records(page.RECORDS) if record.name == "SiD, U-Net")
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
    first, second = "".join(page.tables([student, long])).split(
        "The teacher: the same U-Net as above, at 10 times the steps."
    )
    assert first.count("| SiD |") == second.count("| SiD |") == 1
    assert "to the teacher" not in first
    assert "| to the teacher (its floor 0.038) |" in second
    assert second.rstrip().endswith(" | 1 | 0.093 |")


def test_a_longer_row_says_its_distance_to_digits_that_nothing_saw(board: ModuleType, page: ModuleType) -> None:
    record = next(record for record in read_records(page.RECORDS) if record.name == "Hyper-SD, 1 step, U-Net")
    name = f"Hyper-SD, 1 step, {board.longer_family(10)}"
    scores = replace(record.metrics["fd-pixels"], values=(0.777,), min=0.777, mean=0.777)
    unseen = replace(record, metrics={"fd-pixels": scores})
    records = [replace(record, name=name), replace(unseen, name=f"{name}, {page.UNSEEN}")]
    [_, *rows] = [line for line in "".join(page.tables(records)).splitlines() if line.startswith("| ")]
    assert [row.split("|")[-2].strip() for row in rows] == ["0.777"]
    assert rows[0].startswith("| Hyper-SD, 1 step |")
    assert "fd-pixels, test split" in "".join(page.tables(records))
    assert "test split" not in "".join(page.tables(records[:1]))


def test_a_longer_row_s_mean_over_other_noises_stands_beside_its_teacher_s(board: ModuleType, page: ModuleType) -> None:
    record = next(record for record in read_records(page.RECORDS) if record.name == "Hyper-SD, 1 step, U-Net")
    family = board.longer_family(10)

    def drawn(name: str, fd: float, recall: float, seed: int = 0) -> Record:
        values = {"fd-pixels": fd, "recall": recall, "precision": 0.5}
        metrics = {
            key: replace(record.metrics[key], values=(x, x), min=x, mean=x, std=0.0) for key, x in values.items()
        }
        return replace(record, name=f"{name}, {family}, {page.DRAWS}", metrics=metrics, seed=seed)

    records = [drawn("teacher", 0.14, 0.9), drawn("SiD", 0.13, 0.88), drawn("SiD", 0.15, 0.83, seed=1)]
    own = replace(record, name=f"SiD, {family}")
    *_, teacher, student = [line for line in "".join(page.tables([own, *records])).splitlines() if line[:2] == "| "]
    assert teacher == "| teacher | 0.140 | 0.500 | 0.900 | 1 | 1 | 1 |"
    assert student.startswith("| SiD | 0.140 (0.130 to 0.150) | 0.500 ")
    assert student.endswith(" | 0.855 (0.830 to 0.880) | 2 | 1.000 ± 0.000 | 0.950 ± 0.000 |")
    assert "noises" not in "".join(page.tables([own]))
    assert "noises" not in "".join(page.tables([own, *records[1:]])), "without the teacher's there is nothing beside"


def test_a_share_s_error_is_that_of_the_difference_over_common_draws(page: ModuleType) -> None:
    record = next(record for record in read_records(page.RECORDS) if record.name == "Hyper-SD, 1 step, U-Net")

    def drawn(*values: float) -> Record:
        spread = {"min": min(values), "mean": fmean(values), "std": stdev(values)}
        scores = replace(record.metrics["recall"], values=values, **spread)
        return replace(record, metrics={"recall": scores})

    teacher, twice = [drawn(1.0, 2.0, 3.0)], [drawn(2.0, 4.0, 6.0)]
    assert page._share(twice, teacher, "recall") == "2.000 ± 0.000", "what all draws share is no error"
    apart = [drawn(2.5, 3.5, 6.0)]  # 2, and 0.5, -0.5, 0: their deviation 0.5, over the root of 3 and the mean of 2
    assert page._share(apart, teacher, "recall") == "2.000 ± 0.144"
    assert page._share([drawn(2.5, 3.5, 6.0), drawn(1.5, 4.5, 6.0)], teacher, "recall") == "2.000 ± 0.000"


def test_what_a_row_makes_before_training_grows_with_its_steps_where_it_is_used(board: ModuleType) -> None:
    by_name = {entry.name: load_config(find_config(entry.config), entry.overrides).method for entry in board.BOARD}
    assert board.stored(by_name["DMD, with regression"]) == {"regression_pairs": 2000}
    assert board.stored(by_name["DMD2"]) == {}
    assert board.stored(by_name["regression on pairs"]) == {"pairs": 4000}
    assert board.stored(by_name["AGD, 18 steps"]) == {"trajectories": by_name["AGD, 18 steps"].trajectories}


def test_all_means_over_other_noises_are_of_the_same_noises(page: ModuleType) -> None:
    found = [r for r in read_records(page.RECORDS) if r.name.endswith(f", {page.DRAWS}")]
    own = next(r for r in read_records(page.RECORDS) if r.name == "SiD, U-Net").protocol
    assert found[0].protocol["repeats"] == page.NUM_DRAWS
    assert found[0].protocol["first_seed"] >= own["first_seed"] + own["num_images"]
    for record in found:
        assert record.protocol == found[0].protocol, record.name
    assert {r.environment.command for r in found if r.environment} == {"python scripts/leaderboard.py train"}


def test_a_curve_is_of_the_evaluations_on_the_way(
    board: ModuleType, page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = next(record for record in read_records(page.RECORDS) if record.name == "Hyper-SD, 1 step, U-Net")
    for step in (10, 20):
        append_record(tmp_path / "eval.jsonl", replace(record, cost=Cost(train_steps=step)))
    reports = [{"step": 10, "images": 1, "cpu_seconds": 1.5}, {"step": 20, "images": 2, "cpu_seconds": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(report) + "\n" for report in reports))
    monkeypatch.setattr(page, "CURVES", tmp_path / "curves.jsonl")
    assert page.read_points() == []
    points = board._points("Hyper-SD, 1 step, U-Net", tmp_path)
    page.append_points(points)
    assert page.read_points() == points
    assert [(point.step, point.cpu_seconds) for point in points] == [(10, 1.5), (20, 3.0)]
    assert points[0].fd_pixels == pytest.approx(record.metrics["fd-pixels"].mean, abs=1e-5)
    way = board._on_the_way(next(entry for entry in board.BOARD if entry.name == "SiD"))
    assert way == "eval={protocol: digits-pixels, every: 50}"


def test_no_record_names_a_place_of_the_machine_that_made_it() -> None:
    for file in sorted((ROOT / "results").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            found = re.findall(r'"(/[a-z]+/[^"]*)"', line)
            assert not found, f"{file.name}: {found}"
