"""The leaderboard: like is ranked with like only, every value is kept, and hostile names stay text."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from support.boards import EFFICIENCY, HOSTILE, draw_grid, located, measured, reported, written
from support.html_page import Page
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.eval.board import further
from diffdistill.eval.board.card_yaml import write_yaml
from diffdistill.eval.board.costs import cost_columns
from diffdistill.eval.board.figures import Given, Scale, compact, decimals_of, frontier, place_labels
from diffdistill.eval.board.files import file_names, to_cards, to_csv, to_markdown, write_leaderboard
from diffdistill.eval.board.leaderboard import REPORTED, Score, locate, make_board, make_group, read_board
from diffdistill.eval.board.page import board_page
from diffdistill.eval.records.record import Values
from diffdistill.settings.schema import UserError

THREE_SEEDS = [measured("student", distance, seed=seed) for seed, distance in enumerate((0.2, 0.3, 0.7))]


def test_models_are_ranked_by_distance_and_equal_ones_share_a_rank() -> None:
    group = make_group(located(*(measured(name, d) for name, d in [("c", 0.3), ("a", 0.1), ("b", 0.2), ("d", 0.2)])))
    assert [(entry.name, entry.rank) for entry in group.entries] == [("a", 1), ("b", 2), ("d", 2), ("c", 4)]


def test_a_model_without_the_distance_has_no_rank_and_comes_last() -> None:
    group = make_group(located(measured("none"), measured("some", 0.3)))
    assert [(entry.name, entry.rank) for entry in group.entries] == [("some", 1), ("none", None)]


def test_seeds_become_one_entry_with_their_mean_deviation_and_every_value() -> None:
    [entry] = make_group(located(*THREE_SEEDS)).entries
    score = entry.scores["fd-pixels"]
    assert entry.seeds == [0, 1, 2]
    assert score.values == (0.2, 0.3, 0.7)
    assert score.min == 0.2
    assert score.mean == score.headline == pytest.approx(0.4)
    assert score.std == pytest.approx((0.07) ** 0.5)  # (0.04 + 0.01 + 0.09) / 2
    assert score.spread == "seeds"


def test_the_deviation_of_one_seed_is_over_its_repeats() -> None:
    score = Score.of([(1.0, 3.0)])
    assert (score.headline, score.std, score.spread) == (2.0, pytest.approx(2**0.5), "repeats")


def test_a_protocol_that_reports_the_least_repeat_is_ranked_by_it() -> None:
    repeats = [measured("student", *values, seed=seed, protocol={"headline": "min"}) for seed, values in
               enumerate([(1.0, 2.0), (3.0, 5.0)])]  # fmt: skip
    score = make_group(located(*repeats)).entries[0].scores["fd-pixels"]
    assert (score.headline, score.mean, score.std) == (2.0, 2.75, pytest.approx(2**0.5))


def test_protocols_that_differ_are_two_tables_that_say_how() -> None:
    board = make_board(located(measured("a", 0.1), measured("b", 0.2, protocol={"nearest_k": 5})))
    assert [[(entry.name, entry.rank) for entry in group.entries] for group in board.measured] == [
        [("a", 1)],
        [("b", 1)],
    ]
    assert board.measured[0].differs == (("nearest_k", 3, 5),)


def test_unlike_records_are_refused_by_name_of_the_field() -> None:
    with pytest.raises(UserError, match=r"record 1 and .*record 2 cannot be ranked together: .* differ in nearest_k"):
        make_group(located(measured("a", 0.1), measured("b", 0.2, protocol={"nearest_k": 5})))


def test_measured_and_published_numbers_are_refused_in_one_ranking() -> None:
    one = measured("a", 0.1)
    other = reported("b", 0.2, protocol=one.protocol)
    with pytest.raises(UserError, match="one is measured, the other reported"):
        make_group(located(one, other))
    board = make_board(located(one, other))
    assert [entry.rank for group in board.reported for entry in group.entries] == [None]


def test_the_same_measurement_twice_counts_once() -> None:
    again = replace(measured("a", 0.1), notes="measured again")
    [entry] = make_group(located(measured("a", 0.1), again)).entries
    assert entry.scores["fd-pixels"].values == (0.1,)


def test_records_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UserError, match=r"record 1 and .*record 2: both are 'a' with seed 0, and they differ"):
        make_group(located(measured("a", 0.1), measured("a", 0.2)))


def test_a_model_sampled_in_one_step_and_in_four_is_two_entries() -> None:
    assert len(make_group(located(measured("a", 0.1), measured("a", 0.2, steps=4))).entries) == 2


def test_published_numbers_have_a_source_and_no_rank() -> None:
    board = make_board(locate(REPORTED))
    entries = [entry for group in board.reported for entry in group.entries]
    assert not board.measured
    assert all(entry.rank is None for entry in entries)
    assert all(entry.first.source and entry.first.source.url.startswith("https://") for entry in entries)
    found = {(g.task, g.protocol["evaluator"], e.name): e.scores["fid"].mean for g in board.reported for e in g.entries
             if "fid" in e.scores}  # fmt: skip
    assert found["ImageNet 64 x 64", "DMD2's scripts", "DMD2, with GAN"] == 1.51
    assert found["CIFAR-10, unconditional", "SiD's scripts (EDM's Inception)", "SiD"] == 1.923
    assert found["COCO 2014, zero-shot, 30,000 captions", "GigaGAN's scripts", "SiD-LSG, SD 1.5, guidance 1.5"] == 8.71


def test_latencies_of_two_devices_are_two_columns() -> None:
    records = [measured("a", 0.1, efficiency=replace(EFFICIENCY, device=device)) for device in ("x", "y")]
    latencies = [cost for cost in cost_columns(records) if cost.label == "ms"]
    assert [[cost.value(record) for record in records] for cost in latencies] == [[2.0, None], [None, 2.0]]


def test_markdown_keeps_names_in_their_cell() -> None:
    text = to_markdown(make_board(located(measured("a | b\n<b>*c*</b>", 0.1), reported("[x](y)", 2.0))))
    assert r"| 1 | a \| b &lt;b&gt;\*c\*&lt;/b&gt; | dmd2 |" in text
    assert r"\[x\](y)" in text
    assert "<b>" not in text


def test_csv_holds_every_value_and_no_formula() -> None:
    records = [replace(record, name="=1+1", notes="@SUM(A1)\n-2") for record in THREE_SEEDS]
    rows = list(csv.DictReader(io.StringIO(to_csv(make_board(located(*records))))))
    distance = next(row for row in rows if row["metric"] == "fd-pixels")
    assert [float(value) for value in distance["values"].split()] == [0.2, 0.3, 0.7]
    assert (distance["name"], distance["notes"], distance["seeds"], distance["rank"]) == (
        *("'=1+1", "'@SUM(A1) -2", "0 1 2", "1"),
    )


def test_a_model_card_takes_the_model_index(tmp_path: Path) -> None:
    cards = to_cards(make_board(located(*THREE_SEEDS)))
    metadata = cards[Path("cards/student/model-index.yaml")]
    [results] = [model_index_to_eval_results(yaml.safe_load(metadata)["model-index"])[1]]
    assert [(r.metric_type, r.metric_value) for r in results] == [("fd-pixels", pytest.approx(0.4)), ("recall", 0.5)]
    assert results[0].metric_args["values"] == [0.2, 0.3, 0.7]
    (tmp_path / "README.md").write_text(f"---\n{metadata}---\n# student\n")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.model_name == "student"
    assert card.data.eval_results[0].metric_value == pytest.approx(0.4)


def test_eval_results_are_read_back_by_the_hub_client() -> None:
    cards = to_cards(make_board(located(*THREE_SEEDS)))
    [text] = [text for file, text in cards.items() if ".eval_results" in file.parts]
    entries = parse_eval_result_entries(yaml.safe_load(text))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("digits-train", "digits-pixels/fd-pixels", pytest.approx(0.4)),
        ("digits-train", "digits-pixels/recall", 0.5),
    ]
    assert "std 0.264575 over seeds" in (entries[0].notes or "")


def test_file_names_stay_in_their_folder_and_apart() -> None:
    names = ["../../etc/passwd", "A b", "a B", "...", "", "ü"]
    found = file_names(names)
    assert found["../../etc/passwd"] == "etc-passwd"
    assert len({name.lower() for name in found.values()}) == len(names)
    assert all(name and "/" not in name and not name.startswith(".") for name in found.values())


def test_a_long_page_has_the_first_rows_and_data_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    board = make_board(located(*(measured(f"</script> {i}", 1.0 + i) for i in range(7))))
    whole = board_page(board, title="x")
    assert "further-rows" not in whole
    monkeypatch.setattr(further, "MANY", 6)
    monkeypatch.setattr(further, "AT_ONCE", 2)
    monkeypatch.setattr(further, "AT_LEAST", 1)
    page = board_page(board, title="x")
    assert page.count('<tr class="row') == page.count("<dialog") == 2
    [data] = re.findall(r'<script type="application/json" id="further-rows">(.*?)</script>', page)
    [table] = json.loads(data).values()
    assert [row["name"] for row in table["rows"]] == [f"</script> {i}" for i in range(2, 7)]
    assert [row["rank"] for row in table["rows"]] == [3, 4, 5, 6, 7]
    assert table["protocol"] == board.measured[0].protocol


def test_a_page_finds_best_and_scale_once_however_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    around = Scale.around

    def counting(values: Sequence[float], *places: float, room: float = 0.08) -> Scale:
        found.append(len(values))
        return around(values, *places, room=room)

    monkeypatch.setattr(Scale, "around", staticmethod(counting))
    counts = []
    for number in (3, 12):
        found.clear()
        board_page(make_board(located(*(measured(f"model {i}", 1.0 + i) for i in range(number)))), title="x")
        counts.append(len(found))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "text", ["plain", "a: b # c", " leading", "two\nlines\n", "x" * 300, "word " * 60, "yes", "1e3", "é", "\U0001f600"]
)
def test_cards_are_the_same_by_either_yaml_writer(text: str) -> None:
    """PyYAML's own Python writer, which the cards were first written by."""
    value = {text: [text, {"args": {"values": [1e-7, 1.0, 12], "note": text}}], "model-index": []}
    expected = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
    assert write_yaml(value) == expected


def test_files_that_can_be_made_anew_are_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = written(tmp_path, measured("one"), measured("two"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("waited for the disk"))
    assert all(file.stat().st_size for file in write_leaderboard([records], tmp_path / "out"))


def test_hostile_texts_stay_texts() -> None:
    hostile = measured(
        HOSTILE,
        0.1,
        method=HOSTILE,
        notes=HOSTILE,
        protocol={"name": HOSTILE, HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]},
    )
    bad_link = reported(HOSTILE, 1.0)
    assert bad_link.source
    bad_link = replace(bad_link, source=replace(bad_link.source, url="javascript:alert(1)", title=HOSTILE))
    page = Page(board_page(make_board(located(hostile, bad_link)), title=HOSTILE))
    names = {name for _, attributes in page.tags for name in attributes}
    assert len(page.of("script")) == 1
    assert not page.of("img")
    assert not {name for name in names if name.startswith("on")}
    assert all((a.get("href") or "").startswith(("#", "data:")) for a in page.of("a") + page.of("link"))
    assert "49" not in page.texts["script"]


def test_the_page_allows_its_own_script_and_style_and_no_connection() -> None:
    page = Page(board_page(make_board(located(measured("a", 0.1))), title="Board"))
    [policy] = [m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    for kind, text in page.texts.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not [attributes for _, attributes in page.tags if "style" in attributes]


def test_every_entry_of_the_page_has_a_row_and_a_record() -> None:
    page = Page(board_page(make_board([*located(*THREE_SEEDS, measured("b", 0.1)), *locate(REPORTED)]), title="Board"))
    opened = {a["href"] for a in page.of("a") if (a.get("href") or "").startswith("#record-")}
    assert opened == {f"#{dialog['id']}" for dialog in page.of("dialog")}
    rows = [row for row in page.of("tr") if "row" in (row.get("class") or "").split()]
    assert len(rows) == len(page.of("dialog")) == 2 + len(locate(REPORTED))


def test_a_grid_is_embedded_pixel_by_pixel(tmp_path: Path) -> None:
    draw_grid(tmp_path / "grids" / "a.png")
    board = read_board([written(tmp_path, measured("a", 0.1, grid="grids/a.png"))], with_reported=False)
    sources = {image["src"] or "" for image in Page(board_page(board, title="Board")).of("img")}
    [data] = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert Image.open(io.BytesIO(data)).getcolors() == [(800, (0, 128, 128))]


def test_a_grid_that_is_missing_is_said_and_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    board = read_board([written(tmp_path, measured("a", 0.1, grid="gone.png"))], with_reported=False)
    assert not Page(board_page(board, title="Board", say=said.append)).of("img")
    assert said == [f"{tmp_path}/records.jsonl, record 1: images.grid = 'gone.png': no such file; the page omits it"]


@pytest.mark.parametrize("place", ["../secret.png", "link.png", "/etc/hostname", "a\0b.png"])
def test_a_grid_outside_the_records_folder_is_refused(place: str, tmp_path: Path) -> None:
    draw_grid(tmp_path / "secret.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    file = written(tmp_path / "in", measured("a", 0.1, grid=place))
    with pytest.raises(UserError, match=r"record 1: images\.grid = .*(lies outside|is not a file name)"):
        write_leaderboard([file], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_grid_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("<svg onload='alert(1)'/>")
    with pytest.raises(UserError, match=r"a\.png: no PNG, JPEG or WebP"):
        write_leaderboard([written(tmp_path, measured("a", 0.1, grid="a.png"))], tmp_path / "out")


def test_the_command_writes_every_file(tmp_path: Path) -> None:
    file = written(tmp_path, *THREE_SEEDS)
    done = CliRunner().invoke(app, ["leaderboard", str(file), "--out", str(tmp_path / "out"), "--title", "Ours"])
    assert done.exit_code == 0, done.output
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found >= {"leaderboard.html", "leaderboard.md", "leaderboard.csv", "cards/student/model-index.yaml"}
    assert "ImageNet 64 x 64" in (tmp_path / "out" / "leaderboard.html").read_text()


def test_the_command_can_leave_out_what_is_published(tmp_path: Path) -> None:
    file = written(tmp_path, *THREE_SEEDS)
    CliRunner().invoke(app, ["leaderboard", str(file), "--out", str(tmp_path / "out"), "--no-published"])
    assert "ImageNet" not in (tmp_path / "out" / "leaderboard.html").read_text()


def test_a_board_of_own_pictures_shows_nothing_published_unless_asked_and_says_what_is_judged(tmp_path: Path) -> None:
    file, page = written(tmp_path, measured("a", 0.1, protocol={"name": "own-1a2b"})), tmp_path / "out/leaderboard.html"
    CliRunner().invoke(app, ["leaderboard", str(file), "--out", str(tmp_path / "out")])
    assert "ImageNet" not in page.read_text()
    assert "<title>Leaderboard: own-1a2b</title>" in page.read_text()
    CliRunner().invoke(app, ["leaderboard", str(file), "--out", str(tmp_path / "out"), "--published"])
    assert "ImageNet" in page.read_text()


def test_a_broken_record_ends_the_command_with_2_and_no_file(tmp_path: Path) -> None:
    file = written(tmp_path, *THREE_SEEDS)
    file.write_text(file.read_text() + "{}\n")
    done = CliRunner().invoke(app, ["leaderboard", str(file), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_file_without_records_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no records"):
        read_board([tmp_path / "empty.jsonl"])


def test_the_frontier_is_what_each_cost_buys() -> None:
    points = [(1, 3.0), (2, 4.0), (3, 1.0), (3, 2.0), (9, 1.0), (10, 0.5)]
    given = [Given(str(n), str(n), cost, value, value, value) for n, (cost, value) in enumerate(points)]
    assert [(g.cost, g.value) for g in frontier(given, is_lower_better=True)] == [(1, 3.0), (3, 1.0), (10, 0.5)]
    assert [(g.cost, g.value) for g in frontier(given, is_lower_better=False)] == [(1, 3.0), (2, 4.0)]


@pytest.mark.parametrize(
    "values", [(0.1, 0.2), (0.001, 1000.0), (5.0, 5.0), (-3.0, 2.0), (0.0, 0.0), (1e-9, 2e-9), (1e6, 3e7)]
)
def test_a_scale_holds_its_values_and_has_ticks_inside(values: tuple[float, float]) -> None:
    scale = Scale.around(values, 0, 100)
    assert all(0 <= scale(value) <= 100 for value in values)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 12
    assert ticks == sorted(ticks)
    assert all(scale.low <= tick <= scale.high * (1 + 1e-9) + 1e-12 for tick in ticks)


def test_labels_never_cover_each_other() -> None:
    points = [(100.0 + 3 * n, 100.0 + (n % 3), f"model number {n}") for n in range(12)]
    labels = place_labels(points, 0, 1000)
    starts = {"start": 0.0, "end": 1.0, "middle": 0.5}
    boxes = []
    for (_, _, text), label in zip(points, labels, strict=True):
        if label:
            left = label[0] - starts[label[2]] * 6.4 * len(text)
            boxes.append((left, label[1] - 11, left + 6.4 * len(text), label[1] + 3))
    assert 1 <= len(boxes) < 12
    for number, a in enumerate(boxes):
        assert not [b for b in boxes[:number] if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]]


@pytest.mark.parametrize(
    ("number", "text"), [(0.05, "0.05"), (1050, "1050"), (70400, "70.4k"), (2.6e9, "2.6B"), (1e6, "1M"), (0, "0")]
)
def test_costs_are_written_short(number: float, text: str) -> None:
    assert compact(number) == text


def test_a_column_shows_three_figures_of_its_smallest_value() -> None:
    assert [decimals_of(values) for values in ([3.37, 0.063], [0.73, 0.0], [120.0], [1e-9], [0.0], [])] == [
        4,
        3,
        0,
        5,
        0,
        0,
    ]


def test_values_with_several_repeats_are_all_kept() -> None:
    record = replace(measured("a"), metrics={"fd-pixels": Values.of([1.0, 2.0])})
    assert make_group(located(record)).entries[0].scores["fd-pixels"].values == (1.0, 2.0)


def test_templates_and_published_numbers_are_installed_with_the_package() -> None:
    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    board = root / "eval" / "board"
    installed = {file for pattern in patterns["diffdistill.eval.board"] for file in board.glob(pattern)}
    assert installed >= {board / "reported.jsonl", *(board / "html").iterdir()}
