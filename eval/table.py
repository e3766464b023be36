"""Tables of an evaluation for people, and their rows for JSON."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from diffdistill.eval.compare import Difference
from diffdistill.eval.protocol import Protocol
from diffdistill.eval.records import Record, Values, is_lower_better, metric_label
from diffdistill.eval.run import Evaluation


def rows_of(evaluations: Sequence[Evaluation]) -> list[dict[str, str | int | float | None]]:
    """One flat row each: name, evaluations, every metric (its headline value), milliseconds an image."""
    rows: list[dict[str, str | int | float | None]] = []
    for done in evaluations:
        record, sampler = done.record, done.record.sampler
        values = {name.replace("-", "_"): headline(record, values) for name, values in record.metrics.items()}
        evaluations_each = sampler.num_evaluations if sampler else None
        row: dict[str, str | int | float | None] = {"name": record.name, "num_evaluations": evaluations_each}
        rows.append(row | values | {"ms_per_image": done.ms_per_image})
    return rows


def headline(record: Record, values: Values) -> float:
    """The value that the record's protocol puts first: of the repeats' min or mean."""
    return values.min if record.protocol.get("headline") == "min" else values.mean


def show_evaluations(evaluations: Sequence[Evaluation], console: Console) -> None:
    """One line a record, all of one protocol; below it what is to be known about them."""
    protocol = evaluations[0].record.protocol
    table = Table(title=_title(protocol))
    table.add_column("name", overflow="fold")
    names = list(evaluations[0].record.metrics)
    for column in ("evaluations", *map(metric_label, names), "ms / image"):
        table.add_column(column, justify="right")
    for done in evaluations:
        record = done.record
        sampler = record.sampler
        each = str(sampler.num_evaluations) if sampler and sampler.num_evaluations else "-"
        cost = "-" if sampler is None or done.ms_per_image is None else f"{done.ms_per_image:.3f}"
        table.add_row(record.name, each, *(_cell(record, name) for name in names), cost)
    console.print(table)
    for note in dict.fromkeys(done.record.notes for done in evaluations if done.record.notes):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def show_differences(
    found: Mapping[str, Difference],
    names: tuple[str, str],
    protocol: Protocol,
    console: Console,
    *,
    confidence: float,
) -> None:
    """One line a metric, and who is better where the interval leaves out zero."""
    table = Table(title=f"{protocol.name}: A = {names[0]}, B = {names[1]}, on the same noise and labels")
    table.add_column("metric")
    for column in ("A", "B", "A - B", f"{confidence:.0%} interval"):
        table.add_column(column, justify="right")
    table.add_column("better")
    for name, one in found.items():
        values = (number(name, value) for value in (one.a, one.b, one.difference))
        better = ("A" if (one.difference < 0) == is_lower_better(name) else "B") if one.is_clear else "not clear"
        table.add_row(metric_label(name), *values, f"{number(name, one.low)} .. {number(name, one.high)}", better)
    console.print(table)


def number(metric: str, value: float) -> str:
    """As many digits as mean something."""
    return f"{value:.5f}" if metric.startswith("kid") else f"{value:.3f}"


def _cell(record: Record, name: str) -> str:
    values = record.metrics[name]
    shown = number(name, headline(record, values))
    return shown if values.std is None else f"{shown} (mean {number(name, values.mean)} ± {number(name, values.std)})"


def _title(protocol: Mapping[str, object]) -> str:
    reference = protocol.get("reference")
    repeats, count = protocol["repeats"], protocol["num_images"]
    images = f"{count:,} images" if repeats == 1 else f"{repeats} x {count:,} images"
    against = f" against the {reference['split']} split" if isinstance(reference, dict) else ""
    return f"{protocol['name']}: {images}{against}"
