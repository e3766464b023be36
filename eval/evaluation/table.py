"""Tables of an evaluation, and their rows for JSON."""

from collections.abc import Iterable, Mapping, Sequence

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from diffdistill.eval.evaluation.run import Evaluation
from diffdistill.eval.metrics.compare import Difference
from diffdistill.eval.metrics.settings import better, fact_of, metric_label
from diffdistill.eval.protocols.protocol import Protocol
from diffdistill.eval.records.record import Record
from diffdistill.settings.terminal import Console


def rows_of(evaluations: Sequence[Evaluation]) -> list[dict[str, str | int | float | None]]:
    """One flat row each: name, NFE, every metric (its headline value), milliseconds an image."""
    rows: list[dict[str, str | int | float | None]] = []
    for done in evaluations:
        record, sampler = done.record, done.record.sampler
        values = {name.replace("-", "_"): record.headline(name) for name in record.metrics}
        evaluations_each = sampler.num_evaluations if sampler else None
        row: dict[str, str | int | float | None] = {"name": record.name, "num_evaluations": evaluations_each}
        rows.append(row | values | _against_fields(record) | {"ms_per_image": done.ms_per_image})
    return rows


def _against_fields(record: Record) -> dict[str, str | int | float | None]:
    """The distance to a teacher and its floor, by metric."""
    if record.against is None:
        return {}
    found: dict[str, str | int | float | None] = {"against": record.against.place}
    for name, one in record.against.metrics.items():
        key = name.replace("-", "_")
        found |= {f"against_{key}": one.student.value, f"against_{key}_floor": one.floor.value}
    return found


def show_evaluations(evaluations: Sequence[Evaluation], console: Console) -> None:
    """One line a record, all of one protocol, or one a metric where that would be too wide; below it what is to be
    known about them."""
    names = list(evaluations[0].record.metrics)
    heads = ["name", "NFE", *map(metric_label, names), "ms / image"]
    rows = [heads, *(_cells(done, names) for done in evaluations)]
    title = _title(evaluations[0].record.protocol)
    table = _table(title, rows)
    wide = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.print(table if wide <= console.width else _table(title, zip(*rows, strict=True)))
    for note in dict.fromkeys(done.record.notes for done in evaluations if done.record.notes):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def show_against(records: Sequence[Record], console: Console) -> None:
    """How far each model is from the one that it was measured against; nothing where none was."""
    asked = [(record, record.against) for record in records if record.against]
    if not asked:
        return
    first = asked[0][1]
    heads = ["name", "metric", "distance", "floor", "distance - floor", f"{first.confidence:.0%} interval"]
    rows = [heads]
    for record, against in asked:
        for metric, one in against.metrics.items():
            values = (number(metric, measured.value) for measured in (one.student, one.floor, one.excess))
            interval = f"{number(metric, one.excess.low)} .. {number(metric, one.excess.high)}"
            rows.append([record.name, metric_label(metric), *values, interval])
    console.print(_table(f"against {first.place}: {first.num_images:,} images each, from independent noise", rows))
    for record, against in asked:
        ends = against.end_points
        if ends:
            same = ends.same_noise
            told = (
                f"{record.name}: from the same noise, pixels differ by {same.value:.3f} ({same.low:.3f} .. "
                f"{same.high:.3f}) of {ends.unrelated:.3f} between unrelated images, RMS over {ends.count:,} pairs"
            )
            console.print(told, markup=False, highlight=False, soft_wrap=True)


def show_differences(
    found: Mapping[str, Difference],
    names: tuple[str, str],
    protocol: Protocol,
    console: Console,
    *,
    confidence: float,
) -> None:
    """One line a metric, and who is better where the interval leaves out zero."""
    rows = [["metric", "A", "B", "A - B", f"{confidence:.0%} interval", "better"]]
    for name, one in found.items():
        values = (number(name, value) for value in (one.a, one.b, one.difference))
        rows.append(
            [metric_label(name), *values, f"{number(name, one.low)} .. {number(name, one.high)}", _winner(name, one)]
        )
    title = f"{protocol.name}: A = {names[0]}, B = {names[1]}, on the same noise and labels"
    console.print(_table(title, rows))


def number(metric: str, value: float) -> str:
    """As many digits as mean something."""
    fact = fact_of(metric)
    return f"{value:.{fact.decimals if fact else 3}f}"


def _winner(metric: str, one: Difference) -> str:
    if not one.is_clear or better(metric) == "unknown":
        return "not clear" if not one.is_clear else "unknown"
    return "A" if (one.difference < 0) == (better(metric) == "lower") else "B"


def _table(title: str, rows: Iterable[Sequence[str]]) -> Table:
    """Texts as they are, the first row as heads; nothing is cut off."""
    heads, *lines = rows
    table = Table(title=Text(title))
    for column, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if column else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def _cells(done: Evaluation, names: Sequence[str]) -> list[str]:
    record, sampler = done.record, done.record.sampler
    each = str(sampler.num_evaluations) if sampler and sampler.num_evaluations else "-"
    cost = "-" if sampler is None or done.ms_per_image is None else f"{done.ms_per_image:.3f}"
    return [record.name, each, *(_cell(record, name) for name in names), cost]


def _cell(record: Record, name: str) -> str:
    """The headline, and over repeats the deviation, with the mean that it is around."""
    values = record.metrics[name]
    shown, mean = number(name, record.headline(name)), number(name, values.mean)
    if values.std is None:
        return shown
    around = f"± {number(name, values.std)}"
    return f"{shown} {around}" if shown == mean else f"{shown} (mean {mean} {around})"


def _title(protocol: Mapping[str, object]) -> str:
    reference = protocol.get("reference")
    repeats, count = protocol["repeats"], protocol["num_images"]
    images = f"{count:,} images" if repeats == 1 else f"{repeats} x {count:,} images"
    against = f" against the {reference['split']} split" if isinstance(reference, dict) else ""
    return f"{protocol['name']}: {images}{against}"
