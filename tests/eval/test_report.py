"""The report of a run: what its folder says, drawn to scale, whatever state the folder is in."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.boards import HOSTILE, draw_grid, measured, written
from support.html_page import Page
from support.report_run import CONFIG, line
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.eval.board.panels import BOTTOM, TOP, Panel, draw_panel
from diffdistill.eval.board.report import (
    MOST_PREVIEWS,
    duration,
    read_clock,
    read_previews,
    read_scores,
    read_warnings,
    report_page,
    settings,
    tiles,
    write_report,
)
from diffdistill.eval.records.record import ModelRecord
from diffdistill.settings.schema import UserError
from diffdistill.training.reports.curves import Series
from diffdistill.training.reports.log import RunLog

WARNING = "step 150: fake_lag = 1.3 (healthy: 0 to 1.1): the fake score cannot follow. Try more fake_updates"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 200 steps, killed at 100 and resumed; the fake score lags at the end."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    reports = [
        line(step, seconds, **{"generator/loss": 1 / step, "health/fake_lag": lag, "eval/fd-pixels": 2.0})
        for step, seconds, lag in [(50, 10, 0.9), (100, 20, 1.0), (150, 11, 1.05), (200, 21, 1.3)]
    ]
    (folder / "metrics.jsonl").write_text("".join(reports) + '{"step": 201, "ima')
    (folder / "warnings.txt").write_text(WARNING + "\n")
    for step in (100, 200):
        draw_grid(folder / "previews" / f"step-{step:08d}.png")
    return folder


def panel(values: list[float], name: str = "health/fake_lag") -> Panel:
    steps = np.arange(1.0, 1 + len(values))
    return draw_panel(name, Series(steps, np.array(values)), lambda step: (step * 10, step * 60), list(steps))


def test_a_page_shows_all_parts_of_a_run(run: Path) -> None:
    page = Page(report_page(run))
    assert {part["id"] for part in page.of("section")} == {"curves", "previews", "settings"}
    assert len(page.of("figure")) == 3 + 2
    assert len(page.of("img")) == 2


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not the folder of a run: it has no config\.yaml"):
        write_report(tmp_path)


def test_a_run_that_has_not_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    assert {part["id"] for part in Page(report_page(tmp_path)).of("section")} == {"settings"}


def test_a_run_that_was_trained_has_a_page(quick_teacher: Path, tmp_path: Path) -> None:
    file = write_report(quick_teacher, tmp_path / "page.html")
    assert "step-00000010" in file.read_text()


def test_the_clock_goes_on_after_a_resume(run: Path) -> None:
    clock = read_clock(run / "metrics.jsonl")
    assert clock.seconds == (10, 20, 31, 41)
    assert clock.at(75) == (4800, 15)
    assert clock.at(25) == (1600, 5)


def test_the_tiles_say_how_far_the_run_is_and_how_it_is(run: Path) -> None:
    health = [panel([0.9, 1.3]), panel([0.5, 0.6], "health/diversity")]
    found = {
        what: (value, note)
        for what, value, note in tiles(run, {"train": {"steps": 400}}, read_clock(run / "metrics.jsonl"), health)
    }
    assert found["Steps"] == ("200", "of 400")
    assert found["Time"] == ("41 s", "4.88 steps per second")
    assert found["Healthy signals"] == ("1 of 2", "fake lag")


def test_a_point_outside_its_band_is_marked_at_its_place() -> None:
    drawn = panel([0.5, 1.0, 1.3])
    [(x, y)] = drawn.outside
    assert [x, y] == json.loads(drawn.points)[2][:2]
    assert drawn.is_ill
    assert drawn.band_box
    assert y < drawn.band_box[0]  # above the band, and y grows downwards
    assert not panel([0.5, 1.3, 1.0]).is_ill


def test_places_are_proportional_to_steps_and_values() -> None:
    points = json.loads(panel([0.0, 1.0, 3.0, 2.0], "generator/loss").points)
    (x0, y0, *_), (x1, y1, *_), (x2, y2, *_), (x3, y3, *_) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02) == pytest.approx(x3 - x2, abs=0.02)
    assert y0 - y2 == pytest.approx(3 * (y0 - y1), abs=0.05)
    assert TOP <= y2 < y3 < y1 < y0 <= BOTTOM


def test_a_number_that_was_not_finite_is_a_gap() -> None:
    drawn = panel([1.0, 2.0, math.nan, 3.0], "generator/loss")
    assert drawn.lines[0].count("M") == 2
    assert len(json.loads(drawn.points)) == 3
    assert "NaN" not in drawn.points
    assert panel([1.0, math.nan], "generator/loss").newest == "not finite"
    assert panel([math.nan, math.nan], "generator/loss").lines == ("",)


def test_a_long_run_is_drawn_with_few_points_and_its_mean() -> None:
    drawn = panel(list(np.random.default_rng(0).normal(size=10_000)), "generator/loss")
    assert len(drawn.lines) == 2
    assert len(json.loads(drawn.points)) <= 400


def test_the_clocks_share_their_places() -> None:
    drawn = panel([1.0, 2.0, 3.0, 4.0, 5.0])
    assert [tick.place for tick in drawn.x_ticks["steps"]] == [tick.place for tick in drawn.x_ticks["time"]]
    assert [tick.text for tick in drawn.x_ticks["images"]] == [
        f"{10 * int(tick.text)}" for tick in drawn.x_ticks["steps"]
    ]
    assert drawn.x_ticks["time"][0].text == "1 min"


def test_warnings_are_split_into_what_and_why(run: Path) -> None:
    assert read_warnings(run / "warnings.txt") == [
        ("step 150: fake_lag = 1.3 (healthy: 0 to 1.1)", "the fake score cannot follow. Try more fake_updates")
    ]


def test_many_previews_are_thinned_and_broken_ones_left_out(run: Path) -> None:
    for step in range(1, 60):
        draw_grid(run / "previews" / f"step-{step:08d}.png")
    (run / "previews" / "step-00000300.png").write_bytes(b"\x89PNG")
    found = read_previews(run / "previews", read_clock(run / "metrics.jsonl"))
    assert found[0].step == 1
    assert found[-1].step <= 200
    assert len(found) == MOST_PREVIEWS - 1


def test_only_records_of_this_run_are_shown(run: Path) -> None:
    mine = measured("mine", 0.1, 0.3, model=ModelRecord(source=str(run / "checkpoints" / "step-1")))
    written(run.parent, mine, measured("other", 0.2))
    [table] = read_scores(run)
    assert table.heads == ("name", "protocol", "fd-pixels", "recall")
    assert table.rows == (("mine", "digits-pixels", "0.2 ± 0.141", "0.5"),)


def test_the_demos_table_beside_the_run_is_shown(run: Path) -> None:
    (run.parent / "table.json").write_text(
        json.dumps([{"name": "student", "fd_pixels": 0.18729, "num_evaluations": 1}])
    )
    assert "0.1873" in report_page(run)
    (run.parent / "table.json").write_text("[1]")
    with pytest.raises(UserError, match=r"table\.json: must be a list of rows"):
        report_page(run)


def test_what_sounds_secret_is_not_in_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "swordfish-swordfish")
    config: dict[str, Any] = {"data": {"path": "https://user:hunter22@example.org", "key": "swordfish-swordfish"}}
    text = str(settings(config))
    assert "swordfish" not in text
    assert "hunter22" not in text


def test_hostile_texts_stay_texts(run: Path) -> None:
    (run / "config.yaml").write_text(
        CONFIG + f"teacher: {json.dumps(HOSTILE)}\nnotes: {json.dumps({HOSTILE: HOSTILE})}\n"
    )
    (run / "metrics.jsonl").write_text(line(1, 1, **{HOSTILE: 1.0}))
    (run / "warnings.txt").write_text(HOSTILE + "\n")
    (run / "table.json").write_text(json.dumps([{HOSTILE: HOSTILE}]))
    page = Page(report_page(run))
    assert len(page.of("script")) == 1
    assert all((image["src"] or "").startswith("data:image/") for image in page.of("img"))
    assert not {name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"}


@pytest.mark.parametrize("name", ["report.html", ".report.html.writing"])
def test_a_page_is_not_written_through_a_link_in_the_run_s_folder(run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (run / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name}: is a link to {tmp_path}/elsewhere"):
        write_report(run)
    assert (tmp_path / "elsewhere").read_text() == "precious"


HOSTILE_LINES = (
    *(b"9" * 5000, b"[" * 9000, b"[]", b"1", b"\xff\xfe", b'{"step": NaN}', b'{"step": "2"}', b'{"step": 1e999}', b"{"),
    b'{"step": 2, "images": 16, "seconds": null}',
    b'{"step": 2, "images": 16, "seconds": 1.0, "a/loss": ' + b"9" * 400 + b"}",
    b'{"step": ' + b"9" * 400 + b"}",
)


def test_hostile_lines_among_the_reports_are_left_out(run: Path) -> None:
    file = run / "metrics.jsonl"
    expected = read_clock(file)
    file.write_bytes(file.read_bytes() + b"".join(line + b"\n" for line in HOSTILE_LINES))
    assert read_clock(file) == expected
    report_page(run)
    with RunLog(run, title="", start_step=10**9, num_steps=10**9, quiet=True):
        pass
    assert read_clock(file) == expected


@pytest.mark.parametrize(("seconds", "text"), [(47.6, "48 s"), (216, "3 min 36 s"), (7500, "2 h 05 min")])
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_command_writes_into_the_runs_folder(run: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 0, done.output
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_the_command_refuses_what_is_no_run(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
    assert done.exit_code == 2
