"""The page of `scripts/leaderboard.py`: tables of the records, a picture of samples, FD against CPU-seconds."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from log_axes import INK, log_axes
from matplotlib.figure import Figure
from PIL import Image

from diffdistill.data.pictures import save_rows
from diffdistill.eval.records.record import Record, read_records
from diffdistill.settings.schema import schema
from diffdistill.settings.values import dump, validate

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results" / "digits.jsonl"
CURVES = ROOT / "results" / "digits-curves.jsonl"  # figures of its rows' students during training
STRIPS = ROOT / "results" / "strips"  # samples of each row of the first table, seed 0
PAGE = ROOT / "docs" / "digits-board.md"
PICTURE = ROOT / "docs" / "images" / "digits-board.png"
CURVES_PICTURE = PICTURE.with_name("digits-curves.png")
MARKS = ("<!-- digits board -->", "<!-- end of the digits board -->")
UNSEEN = "test split"  # of another record of a longer row, by digits-test-pixels
DRAWS, NUM_DRAWS = "other noises", 8  # of a third one: the protocol's on so many further draws of noises
IN_PICTURE, COLUMNS, SHOWN = "U-Net", 30, 10
FIGURES = ("fd-pixels", "precision", "recall")


@schema
class Point:
    """A student during training.  name: of its row, with the table's.  The figures are of protocol digits-pixels.

    cpu_seconds: of its training until `step`, with what it makes before and the evaluations.
    """

    name: str
    step: int
    cpu_seconds: float
    fd_pixels: float
    precision: float
    recall: float


def write_page() -> tuple[list[Path], list[str]]:
    """The page, its picture of samples and its curves. Returns the files, and the rows that have no samples."""
    records, points = read_records(RECORDS), read_points()
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    names = [f"{row}, {IN_PICTURE}" for row, _ in rows_of(records, IN_PICTURE)]
    missing = [name for name in names if not strip_of(name).exists()]
    parts = [
        before,
        MARKS[0],
        "\n\n",
        *tables(records),
        _draw([n for n in names if n not in missing]),
        *_curves(records, points),
    ]
    PAGE.write_text("".join([*parts, "\n", MARKS[1], after]), encoding="utf-8")
    return [PAGE, PICTURE, *([CURVES_PICTURE] if points else [])], missing


def slug(name: str) -> str:
    """A row's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def strip_of(name: str) -> Path:
    """Where a row's samples are kept."""
    return STRIPS / f"{slug(name)}.png"


def read_points() -> list[Point]:
    """All points of all curves, in order; none where there is no file."""
    lines = CURVES.read_text(encoding="utf-8").splitlines() if CURVES.exists() else []
    return [validate(Point, json.loads(line), origin=f"{CURVES}, line {i}") for i, line in enumerate(lines, start=1)]


def append_points(points: Sequence[Point]) -> None:
    """Add a whole curve at the end, so that none is half there."""
    with CURVES.open("a", encoding="utf-8") as out:
        out.write("".join(json.dumps(dump(point)) + "\n" for point in points))


def tables(records: Sequence[Record]) -> Iterator[str]:
    """The tables, one of each teacher and length."""
    ends = (re.search(rf", ({IN_PICTURE}, \d+ times the steps)$", record.name) for record in records)
    longer = {found[1] for found in ends if found}
    families = {IN_PICTURE: "a U-Net of 0.3 million weights", "MLP": "a residual MLP"}
    families |= {name: f"the same {name.replace(',', ' as above, at')}" for name in sorted(longer)}
    for family, title in families.items():
        rows = rows_of(records, family)
        if not rows:
            continue
        floor = _floor([record for _, found in rows for record in found])
        unseen = dict(rows_of(records, f"{family}, {UNSEEN}"))
        yield f"The teacher: {title}.\n\n"
        yield "| | NFE | fd-pixels | precision | recall | CPU-seconds | seeds |"
        yield f" to the teacher (its floor {floor:.3f}) |" if floor else ""
        yield " fd-pixels, test split |\n" if unseen else "\n"
        yield f"|---|---|---|---|---|---|---|{'---|' if floor else ''}{'---|' if unseen else ''}\n"
        for name, found in rows:
            first = found[0]
            nfe = first.sampler.num_evaluations if first.sampler else None
            numbers = [_spread([r.metrics[m].mean for r in found]) for m in FIGURES]
            spent = [r.cost.train_cpu_seconds for r in found if r.cost and r.cost.train_cpu_seconds]
            cost = f"{fmean(spent):.0f}" if spent else ""
            apart = [r.against.metrics["fd-pixels"].student.value for r in found if r.against]
            last = f" {_spread(apart)} |" if floor else ""
            if unseen:
                last += f" {_spread([r.metrics['fd-pixels'].mean for r in unseen.get(name, [])])} |"
            yield f"| {name} | {nfe} | {' | '.join(numbers)} | {cost} | {len(found)} |{last}\n"
        for name, found in rows:
            if notes := [record.notes.removeprefix("end points: ") for record in found if record.notes]:
                yield f"\n{name}, end points from guidance's, seed by seed: {'; '.join(notes)}.\n"
        yield "\n"
        yield from _draws(rows_of(records, f"{family}, {DRAWS}"))


def _draws(rows: Sequence[tuple[str, list[Record]]]) -> Iterator[str]:
    """The rows by their means over further draws of noise, beside the teacher's; nothing where that has none."""
    if not rows or rows[0][0] != "teacher":
        return
    protocol = rows[0][1][0].protocol
    teacher = rows[0][1]
    yield f"Means over {protocol['repeats']} further draws of {protocol['num_images']:,} noises, of the students "
    yield "that were measured on them; ± the standard error over the draws, which all models share, not over seeds.\n\n"
    yield "| | fd-pixels | precision | recall | seeds | FD, of the teacher's | recall, of the teacher's |\n"
    yield "|---|---|---|---|---|---|---|\n"
    for name, found in rows:
        numbers = [_spread([r.metrics[key].mean for r in found]) for key in FIGURES]
        shares = ["1" if found is teacher else _share(found, teacher, key) for key in ("fd-pixels", "recall")]
        yield f"| {name} | {' | '.join(numbers)} | {len(found)} | {' | '.join(shares)} |\n"
    yield "\n"


def _share(found: Sequence[Record], teacher: Sequence[Record], key: str) -> str:
    """A row's mean as a share of the teacher's, with the standard error of that ratio over their common draws."""
    own, other = (
        [fmean(draw) for draw in zip(*(r.metrics[key].values for r in side), strict=True)] for side in (found, teacher)
    )
    share = fmean(own) / fmean(other)
    error = stdev(one - share * its for one, its in zip(own, other, strict=True)) / len(own) ** 0.5 / fmean(other)
    return f"{share:.3f} ± {error:.3f}"


def _floor(records: Sequence[Record]) -> float | None:
    """The teacher's own distance to itself, as the first record that has one measured it."""
    return next((r.against.metrics["fd-pixels"].floor.value for r in records if r.against), None)


def rows_of(records: Sequence[Record], family: str) -> list[tuple[str, list[Record]]]:
    """Each row's records, best first, the teacher above."""
    rows: dict[str, list[Record]] = {}
    for record in records:
        if record.name.endswith(f", {family}"):
            rows.setdefault(record.name.removesuffix(f", {family}"), []).append(record)
    return sorted(
        rows.items(), key=lambda row: (row[0] != "teacher", fmean(r.metrics["fd-pixels"].mean for r in row[1]))
    )


def _spread(values: Sequence[float]) -> str:
    """The mean, and least and greatest where there are several; nothing of none."""
    if not values:
        return ""
    return f"{fmean(values):.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


def _draw(names: Sequence[str]) -> str:
    """Write the picture of the first table's rows, in the table's order; gives its place in the page."""
    save_rows(PICTURE, {name.rpartition(", ")[0]: _images(name) for name in names}, min_side=48)
    return f"![Samples of the first table's rows, of seed 0 from the same noise]({PICTURE.relative_to(PAGE.parent)})\n"


def _images(name: str) -> torch.Tensor:
    """The first ten of a strip, [10, 1, 8, 8] in [-1, 1]."""
    strip = torch.from_numpy(np.array(Image.open(strip_of(name)))).float() / 127.5 - 1
    return strip.reshape(strip.shape[0], COLUMNS, -1).transpose(0, 1)[:SHOWN, None]


def _curves(records: Sequence[Record], points: Sequence[Point]) -> Iterator[str]:
    """Draw FD against CPU-seconds, a panel for each row; gives the picture's place in the page."""
    if not points:
        return
    teacher = next(r for r in records if r.name == f"teacher, {IN_PICTURE}").metrics[FIGURES[0]].mean
    names = {p.name: p.name.partition(f", {IN_PICTURE}")[0] for p in points}
    panels_of = sorted(set(names.values()), key=str.lower)
    rows = -(-len(panels_of) // 5)
    figure = Figure(figsize=(12.5, 1.9 * rows), layout="constrained")
    panels = figure.subplots(rows, 5, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, title in zip(panels, panels_of, strict=False):
        for name in (name for name, row in names.items() if row == title):
            own = [p for p in points if p.name == name]
            colour = "#c8372d" if "times" in name else "#1f5fa8"
            x, y = [p.cpu_seconds for p in own], [p.fd_pixels for p in own]
            panel.plot(x, y, color=colour, marker="o", markersize=2, linewidth=1.1)
        panel.axhline(teacher, color=INK, linewidth=0.8, linestyle=":")
        panel.set_title(title, fontsize=8, color=INK)
        log_axes(panel, label_size=6)
        panel.set_ylim(0.1, 4)
    for panel in panels[len(panels_of) :]:
        panel.set_axis_off()
    figure.supxlabel("CPU-seconds", fontsize=8)
    figure.supylabel("FD in pixels (dotted: the teacher's)", fontsize=8)
    figure.savefig(CURVES_PICTURE, dpi=110, metadata={"Software": None})
    place = CURVES_PICTURE.relative_to(PAGE.parent)
    yield f"\n![FD in pixels against CPU-seconds, evaluations included, a panel for each row]({place})\n"
