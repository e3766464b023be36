"""The distance to a teacher in records, on boards, cards and a run's page."""

import json
from dataclasses import replace
from pathlib import Path

import yaml
from support.made_records import MEASURED

from diffdistill.eval.board.files import to_cards, to_csv, to_markdown
from diffdistill.eval.board.leaderboard import Located, make_board
from diffdistill.eval.board.page import board_page
from diffdistill.eval.board.report import against_table
from diffdistill.eval.metrics.against import AboveFloor, EndPoints, Measured
from diffdistill.eval.records.record import Against, Record, append_record, parse_record, read_records
from diffdistill.settings.values import dump


def measured(value: float) -> Measured:
    return Measured(value=value, low=value - 0.01, high=value + 0.01)


AGAINST = Against(
    place="runs/teacher",
    sha256="0" * 64,
    protocol={"name": "against-pixels", "num_images": 6000},
    num_images=6000,
    seeds=(0, 6000),
    independent_seeds=(6000, 12000),
    metrics={
        "kid-pixels": AboveFloor(student=measured(0.003), floor=measured(0.0), excess=measured(0.003)),
        "fd-pixels": AboveFloor(student=measured(0.1622), floor=measured(0.0378), excess=measured(0.1244)),
    },
    end_points=EndPoints(same_noise=measured(0.2803), unrelated=0.577, count=1024),
    confidence=0.95,
    replicates=50,
)
STUDENT = replace(MEASURED, against=AGAINST)


def board(*records: Record):  # type: ignore[no-untyped-def]
    return make_board([Located(record, Path("records.jsonl"), number) for number, record in enumerate(records, 1)])


def test_a_record_keeps_what_it_was_measured_against(tmp_path: Path) -> None:
    append_record(tmp_path / "records.jsonl", STUDENT)
    assert read_records(tmp_path / "records.jsonl") == [STUDENT]


def test_a_record_of_before_loads_as_it_did() -> None:
    told = dump(MEASURED)
    del told["against"]
    found = parse_record(json.dumps(told), origin="x")
    assert found == MEASURED
    assert found.against is None


def test_boards_show_the_distance_and_its_floor_beside_each_other_and_rank_by_neither() -> None:
    made = board(STUDENT)
    (group,) = made.measured
    assert group.primary == "fd-pixels"
    assert group.metrics[-3:] == ("to-teacher-fd-pixels", "floor-fd-pixels", "same-noise-rms")
    text = to_markdown(made)
    assert "To teacher fd-pixels | floor fd-pixels | Same-noise RMS" in text
    assert "0.162 | 0.0378 | 0.280" in text
    page = board_page(made, title="x")
    assert "To teacher fd-pixels" in page
    assert "runs/teacher" in page
    assert "to-teacher-fd-pixels,0.1622" in to_csv(made)


def test_a_card_says_against_what() -> None:
    cards = to_cards(board(STUDENT))
    (index,) = (text for file, text in cards.items() if file.name == "model-index.yaml")
    metrics = yaml.safe_load(index)["model-index"][0]["results"][0]["metrics"]
    (one,) = (metric for metric in metrics if metric["type"] == "to-teacher-fd-pixels")
    assert one["value"] == 0.1622
    assert one["args"]["against"] == "runs/teacher"
    assert one["args"]["num_images"] == 6000


def test_of_two_measurements_of_a_model_the_one_with_a_distance_is_kept() -> None:
    for order in ((MEASURED, STUDENT), (STUDENT, MEASURED)):
        (entry,) = board(*order).measured[0].entries
        assert entry.scores["to-teacher-fd-pixels"].headline == 0.1622


def test_a_runs_page_shows_every_distance_with_its_interval() -> None:
    (table,) = against_table("records.jsonl", [MEASURED, STUDENT])
    assert table.origin == "records.jsonl: against its teacher"
    assert table.rows[1][:4] == ("a student", "runs/teacher", "6,000", "FD pixels")
    assert table.rows[1][4:] == ("0.1622 (0.1522 to 0.1722)", "0.0378", "0.1244 (0.1144 to 0.1344)")
    assert table.rows[2][3:5] == ("RMS of pixels, same noise", "0.2803 (0.2703 to 0.2903)")
    assert against_table("records.jsonl", [MEASURED]) == []
