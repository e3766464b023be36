"""The page of `scripts/quality.py`: tables of the records, curves of distance against CPU-seconds, what was not run."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from log_axes import INK, log_axes
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from quality_records import Measured
from quality_ring import RECORDS as RING_RECORDS
from quality_theory import TwoModes, compromise, levels, optimum
from quality_variants import VARIANTS

from diffdistill.eval.records.record import Record, read_records

ROOT = Path(__file__).parents[1]
LONGER = ROOT / "results" / "longer.jsonl"  # of `eval --against`: packaged configs at their steps, and at four times
PAGE = ROOT / "docs" / "what-decides-quality.md"
IMAGES = ROOT / "docs" / "images"
MARKS = ("<!-- quality: python scripts/quality.py page -->", "<!-- quality ends -->")
LONGER_MARKS = ("<!-- longer: python scripts/quality.py page -->", "<!-- longer end -->")
RING_MARKS = ("<!-- ring: python scripts/quality_ring.py, then quality.py page -->", "<!-- ring end -->")
OPTIMA_MARKS = ("<!-- optima: python scripts/quality.py page -->", "<!-- optima end -->")
LONG = "17,600 images"
NETWORKS = {"mlp": "A residual MLP of 0.65 million weights", "unet": "A U-Net of 0.31 million weights"}
METHODS = {"dmd2": "DMD2", "sid": "SiD", "sim": "SIM", "f_distill": "f-distill", "disback": "DisBack"}
COLOURS = ("#1f5fa8", "#c8372d", "#17705f", "#9a4a00", "#6a4c93", "#b5467c", "#6e7781")
COLUMNS, WIDTH, HEIGHT = 3, 3.6, 2.7


def write_page(records: Sequence[Measured]) -> list[Path]:
    """The tables between the page's marks, and a picture for each network. Returns the files."""
    text = PAGE.read_text(encoding="utf-8")
    made = {
        MARKS: tables(records),
        LONGER_MARKS: longer_table(read_records(LONGER)),
        OPTIMA_MARKS: optima(),
        RING_MARKS: ring_table(),
    }
    for marks, parts in made.items():
        before, rest = text.split(marks[0])
        after = rest.split(marks[1])[1]
        text = f"{before}{marks[0]}\n\n{''.join(parts)}{marks[1]}{after}"
    PAGE.write_text(text, encoding="utf-8")
    return [PAGE, *(_draw(network, of) for network, of in _by_network(records))]


def longer_table(records: Sequence[Record]) -> Iterator[str]:
    """A row a run, by its name (config, times its steps) and seed."""
    yield "| config | steps | seed | to the teacher | above the floor, 95 % | to the data | CPU-seconds |\n"
    yield "|---|---|---|---|---|---|---|\n"
    for record in sorted(records, key=lambda r: (r.name.partition(",")[0], _steps(r), r.seed or 0)):
        assert record.against is not None
        apart = record.against.metrics["fd-pixels"]
        spent = record.cost.train_cpu_seconds if record.cost else None
        cells = (
            record.name,
            f"{_steps(record):,}",
            str(record.seed),
            f"{apart.student.value:.3f}",
            f"{apart.excess.value:.3f} ({apart.excess.low:.3f} to {apart.excess.high:.3f})",
            f"{record.metrics['fd-pixels'].mean:.3f}",
            f"{spent:.0f}" if spent else "",
        )
        yield f"| {' | '.join(cells)} |\n"
    yield "\n"


def _steps(record: Record) -> int:
    return (record.cost.train_steps if record.cost else None) or 0


def optima() -> Iterator[str]:
    """The closed forms' numbers: a restricted student's variance, the data's share, and a critic that lags."""
    law, gan = TwoModes(), levels(0.03, 6, count=40)
    weights = (0.03, 0.2, 1.0)
    yield (
        "| matching's levels | alone | "
        + " | ".join(f"with the GAN at {w:g}" for w in weights)
        + " |\n|---|---|---|---|---|\n"
    )
    for greatest in (4, 6, 20):
        matching = levels(0.03, greatest, count=40)
        found = [optimum(law, matching, gan if w else None, weight=w) for w in (0.0, *weights)]
        yield f"| 0.03 to {greatest} | {' | '.join(f'{v:.3f}' for v in found)} |\n"
    yield f"| none, the GAN alone | {optimum(law, None, gan):.3f} | | | |\n\n"
    variances = (0.01, 0.1, 1.0, 4.0)
    yield "| GAN's weight, pixels | " + " | ".join(f"variance {v:g}" for v in variances) + " |\n|---|---|---|---|---|\n"
    for weight, pixels in ((0.2, 64), (0.03, 64), (0.003, 64), (0.003, 12288)):
        yield f"| {weight:g}, {pixels:,} | {' | '.join(f'{_share(v, weight, pixels):.2f}' for v in variances)} |\n"
    yield "\n"


def ring_table() -> Iterator[str]:
    """Where students end whose teacher is not the data."""
    rows = [json.loads(line) for line in RING_RECORDS.read_text().splitlines()]
    weights = sorted({row["gan_weight"] for row in rows})
    teachers = ", ".join(f"{radius:.3f}" for radius in dict.fromkeys(row["teacher"] for row in rows))
    yield f"Samples of the fitted teachers of two seeds: {teachers}; the data: {rows[0]['data']:.3f}.\n\n"
    yield f"| the GAN on the features of | start | {' | '.join(f'weight {weight:g}' for weight in weights)} |\n"
    yield f"|---|---|{'---|' * len(weights)}\n"
    for features, start in dict.fromkeys((row["features"], row["start"]) for row in rows):
        of = [row for row in rows if (row["features"], row["start"]) == (features, start)]
        told = ["; ".join(_way(row) for row in of if row["gan_weight"] == weight) for weight in weights]
        yield f"| {'the teacher' if features == 'teacher' else 'the fake score'} | {start} | {' | '.join(told)} |\n"


def _way(row: dict[str, float]) -> str:
    return f"{row['half_way']:.3f}, {row['end']:.3f}"


def _share(variance: float, weight: float, pixels: int) -> float:
    """How far from the teacher's variance to the data's, 1 % away, DMD2's fixed point lies."""
    of = (levels(0.03, 4), levels(0.03, 6))
    return 100 * (compromise(variance, 1.01 * variance, *of, weight=weight, pixels=pixels) / variance - 1)


def tables(records: Sequence[Measured]) -> Iterator[str]:
    """What stands between the marks."""
    for network, of in _by_network(records):
        teacher = next(record for record in of if record.run == "teacher")
        fd, precision, recall = teacher.quality
        yield f"### {NETWORKS[network]}\n\nThe teacher: {teacher.to_teacher:.3f} between two sets of its own samples "
        yield f"(the floor), {teacher.to_data:.3f} to the data; FD by protocol {fd:.3f}, precision {precision:.2f}, "
        yield f"recall {recall:.2f}.\n\n"
        for method, name in METHODS.items():
            if any(record.method == method for record in of):
                yield from _table(name, [record for record in of if record.method == method])
        yield f"![Distance to the teacher against CPU-seconds](images/{_picture(network).name})\n\n"
        missing = [v for v in VARIANTS[network] if not any(record.run == v.slug for record in of)]
        listed = "; ".join(f"{METHODS[v.method]}, {v.factor}: {v.name}" for v in missing)
        yield f"Planned but not run: {listed}.\n\n" if missing else ""


def _table(method: str, records: Sequence[Measured]) -> Iterator[str]:
    """A row a run, in the order of the records; of several seeds the mean, with least and greatest distance."""
    yield f"**{method}.**\n\n"
    yield f"| factor | variant | to the teacher: half-way, end | EMA of {LONG} | to the data | FD, precision, recall "
    yield "| CPU-seconds | seeds |\n|---|---|---|---|---|---|---|---|\n"
    for run in dict.fromkeys(record.run for record in records):
        own = [record for record in records if record.run == run and not record.average]
        ends, half = [r for r in own if r.is_last], [r for r in own if 2 * r.step == r.total_steps]
        longest = [r.to_teacher for r in records if r.run == run and r.average == LONG]
        quality = ", ".join(f"{fmean(r.quality[i] for r in ends):.2f}" for i in range(3))
        cells = (
            ends[0].factor,
            ends[0].variant,
            f"{_spread([r.to_teacher for r in half])}, {_spread([r.to_teacher for r in ends])}",
            _spread(longest),
            _spread([r.to_data for r in ends]),
            quality,
            f"{fmean(r.cpu_seconds for r in ends):.0f}",
            str(len(ends)),
        )
        yield f"| {' | '.join(cells)} |\n"
    yield "\n"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{fmean(values):.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


def _by_network(records: Sequence[Measured]) -> Iterator[tuple[str, list[Measured]]]:
    for network in NETWORKS:
        if of := [record for record in records if record.network == network]:
            yield network, of


def _picture(network: str) -> Path:
    return IMAGES / f"quality-{network}.png"


def _draw(network: str, records: Sequence[Measured]) -> Path:
    """A panel for each method's factor, the base in each."""
    teacher = next(record for record in records if record.run == "teacher")
    students = [record for record in records if record.run != "teacher" and not record.average]
    factors = list(dict.fromkeys((r.method, r.factor) for r in students if r.factor != "base"))
    columns = min(COLUMNS, len(factors))
    rows = -(-len(factors) // columns)
    figure = Figure(figsize=(columns * WIDTH, rows * HEIGHT), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, (method, factor) in zip(panels, factors, strict=False):
        base = [r for r in students if (r.method, r.factor) == (method, "base")]
        _draw_runs(panel, base, [INK])
        _draw_runs(panel, [r for r in students if (r.method, r.factor) == (method, factor)], COLOURS)
        panel.axhline(teacher.to_teacher, color=INK, linewidth=0.8, linestyle=":")
        panel.set_title(f"{METHODS[method]}: {factor}", fontsize=9, color=INK)
        log_axes(panel, label_size=7)
        panel.legend(fontsize=6, frameon=False)
    for panel in panels[len(factors) :]:
        panel.set_axis_off()
    figure.supxlabel("CPU-seconds of training", fontsize=8)
    figure.supylabel("distance to the teacher (dotted: its floor)", fontsize=8)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(_picture(network), dpi=110, metadata={"Software": None})
    return _picture(network)


def _draw_runs(panel: Axes, records: Sequence[Measured], colours: Sequence[str]) -> None:
    """A line a seed, one colour a run."""
    for number, run in enumerate(dict.fromkeys(record.run for record in records)):
        for seed in sorted({r.seed for r in records if r.run == run}):
            points = [r for r in records if (r.run, r.seed) == (run, seed)]
            label = points[0].variant if seed == 0 else None
            x, y = [r.cpu_seconds for r in points], [r.to_teacher for r in points]
            panel.plot(
                x, y, color=colours[number % len(colours)], marker="o", markersize=2.5, linewidth=1.2, label=label
            )
