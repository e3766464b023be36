"""curves.png: a run's losses, gradient norms and health signals against its steps, from metrics.jsonl alone."""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diffdistill.settings.reading import read_log
from diffdistill.storage.atomic import write_bytes_atomically
from diffdistill.training.reports.health import BANDS, Band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "curves.png"
CLOCKS = ("step", "images", "seconds", "cpu_seconds", "its_per_second")
MOST_COLUMNS = 4
PANEL_WIDTH, PANEL_HEIGHT = 3.3, 1.75  # inches, with what is around the axes
HEADING_HEIGHT = 0.34
DOTS_PER_INCH = 100
MOST_POINTS = 1500  # a longer series is drawn as means of neighbours
SMOOTHED_FROM = 40  # points from which a running mean is drawn over the raw values

INK, FAINT, GRID = "#24292f", "#6e7781", "#e7eaee"
HEALTHY, OUTSIDE = "#e0f2e1", "#c8372d"
COLOURS = {"losses": "#1f5fa8", "gradient norms": "#6a4c93", "health": "#17705f", "evaluation": "#9a4a00"}


@dataclass(frozen=True)
class Series:
    """steps: [N], ascending; values: [N], NaN where something was not finite."""

    steps: NDArray[np.float64]
    values: NDArray[np.float64]


def read_reports(file: FilePath) -> list[dict[str, float]]:
    """The numbers of each line of metrics.jsonl, by name; lines that are cut short, or no reports, are left out."""
    found = []
    for line in read_log(file).splitlines():
        try:
            report = json.loads(line)
            numbers = {name: float(value) for name, value in report.items() if isinstance(value, (int, float))}
        except (ValueError, OverflowError, AttributeError, RecursionError):
            continue
        if math.isfinite(numbers.get("step", math.nan)):
            found.append(numbers)
    return found


def read_metrics(file: FilePath) -> dict[str, Series]:
    """Every logged number by name, in the order in which they first appear."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for report in read_reports(file):
        for name, value in report.items():
            if name not in CLOCKS:
                steps, values = found.setdefault(name, ([], []))
                steps.append(report["step"])
                values.append(value if math.isfinite(value) else np.nan)
    return {name: Series(np.array(steps), np.array(values)) for name, (steps, values) in found.items()}


def sections(metrics: Mapping[str, Series]) -> dict[str, list[str]]:
    """The panels, by heading: evaluation, losses (a player's own first, then its parts), gradient norms, health."""
    norms = [name for name in metrics if name.endswith("/gradient_norm")]
    health = [name for name in metrics if name.startswith("health/")]
    scores = [name for name in metrics if name.startswith("eval/")]
    rest = [name for name in metrics if name not in (*norms, *health, *scores)]
    players = list(dict.fromkeys(name.partition("/")[0] for name in rest))
    losses = sorted(rest, key=lambda name: (players.index(name.partition("/")[0]), not name.endswith("/loss")))
    parts = [name for name in losses if not _repeats_its_loss(name, metrics)]
    found = {"evaluation": scores, "losses": parts, "gradient norms": norms, "health": health}
    return {heading: names for heading, names in found.items() if names}


def band_of(name: str) -> Band | None:
    """The healthy band of a logged number, if it has one."""
    if name == "fake/accuracy":
        return BANDS["discriminator_accuracy"]
    return BANDS.get(name.removeprefix("health/")) if name.startswith("health/") else None


def draw_curves(folder: FilePath, *, title: str, metrics_file: str = "metrics.jsonl") -> FilePath | None:
    """Write curves.png into a run's folder. Returns the file, or None where nothing has been logged."""
    from matplotlib.figure import Figure

    metrics = read_metrics(folder / metrics_file)
    groups = sections(metrics)
    if not groups:
        return None
    columns = min(MOST_COLUMNS, max(2, *map(len, groups.values())))
    rows = sum(-(-len(names) // columns) for names in groups.values())
    height = rows * PANEL_HEIGHT + len(groups) * HEADING_HEIGHT + 0.45
    width = columns * PANEL_WIDTH
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    figure.text(0.25 / width, 1 - 0.2 / height, title, fontsize=11, weight="bold", color=INK, va="center")
    top = height - 0.45
    for heading, names in groups.items():
        figure.text(0.25 / width, (top - 0.16) / height, heading, fontsize=10, color=COLOURS[heading], va="center")
        top -= HEADING_HEIGHT
        for number, name in enumerate(names):
            row, column = divmod(number, columns)
            bottom = top - (row + 1) * PANEL_HEIGHT + 0.36
            box = (column * PANEL_WIDTH + 0.55, bottom, PANEL_WIDTH - 0.75, PANEL_HEIGHT - 0.62)
            axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
            draw_series(axes, name, metrics[name], colour=COLOURS[heading], is_log=heading == "gradient norms")
        top -= -(-len(names) // columns) * PANEL_HEIGHT
    return save_figure(figure, folder / CURVES)


def draw_series(axes: "Axes", name: str, series: Series, *, colour: str, is_log: bool) -> None:
    """One panel: name and newest value above, the healthy band shaded, values outside it marked."""
    steps, values = thinned(series)
    band = band_of(name)
    is_smoothed = len(steps) >= SMOOTHED_FROM and band is None
    is_sparse = len(steps) < 25
    axes.plot(
        steps,
        values,
        color=colour,
        linewidth=0.8 if is_smoothed or len(steps) > 200 else 1.3,
        alpha=0.3 if is_smoothed else 1,
        marker="o" if is_sparse else "",
        markersize=2.5,
    )
    if is_smoothed:
        axes.plot(steps, running_mean(values), color=colour, linewidth=1.4)
    finite = values[np.isfinite(values)]
    if band:
        outside = (values < band.low) | (values > band.high)
        axes.plot(steps[outside], values[outside], "o", color=OUTSIDE, markersize=3)
        axes.axhspan(band.low, band.high, color=HEALTHY, linewidth=0, zorder=0)
    if is_log and len(finite) and finite.min() > 0 and finite.max() / finite.min() > 20:
        axes.set_yscale("log")
        axes.minorticks_off()
    elif len(finite):
        axes.set_ylim(*limits(finite, band))
    newest = f"{series.values[-1]:.3g}" if np.isfinite(series.values[-1]) else "not finite"
    if band:
        newest += f"   healthy: {band.low:g} to {band.high:g}"
    is_ill = not np.isfinite(series.values[-1]) or (band and not band.low <= series.values[-1] <= band.high)
    label = name.removeprefix("health/").replace("/", " ").replace("_", " ")
    tidy(axes, label, newest, colour=OUTSIDE if is_ill else FAINT)
    axes.margins(x=0.02)


def tidy(axes: "Axes", label: str, note: str = "", *, colour: str = FAINT) -> None:
    """The look that every panel shares. label: above it on the left; note: on the right, in `colour`."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

    axes.set_title(label, loc="left", fontsize=8.5, color=INK, pad=4)
    axes.set_title(note, loc="right", fontsize=7.5, color=colour, pad=4)
    axes.grid(visible=True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7, colors=FAINT, length=2, width=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#c3c9d0")
    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 10_000 else f"{x:g}"))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))


def save_figure(figure: "Figure", file: FilePath) -> FilePath:
    """Write a PNG: the old one or the new one, never a part."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    write_bytes_atomically(file, buffer.getvalue())
    return file


def _repeats_its_loss(name: str, metrics: Mapping[str, Series]) -> bool:
    """Whether a part of a loss is all of it."""
    whole = metrics.get(f"{name.partition('/')[0]}/loss")
    return (
        whole is not None
        and not name.endswith("/loss")
        and np.array_equal(whole.values, metrics[name].values, equal_nan=True)
    )


def limits(values: NDArray[np.float64], band: Band | None) -> tuple[float, float]:
    """Where the axis ends: a few spikes do not flatten the rest, and a band's near edge stays in sight."""
    low, high = np.quantile(values, [0.01, 0.99]) if len(values) >= 50 else (values.min(), values.max())
    room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room
    if band:
        low, high = min(low, max(band.low, low - 4 * room)), max(high, min(band.high, high + 4 * room))
    return float(low), float(high)


def thinned(series: Series) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most MOST_POINTS points, each the mean of neighbours; a number that was not finite stays visible as a gap."""
    stride = -(-len(series.steps) // MOST_POINTS)
    if stride == 1:
        return series.steps, series.values
    starts = np.arange(0, len(series.steps), stride)
    counts = np.diff([*starts, len(series.steps)])
    return series.steps[starts], np.add.reduceat(series.values, starts) / counts


def running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over a twentieth of the run around each value, of what is finite there."""
    half = max(1, len(values) // 40)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: NDArray[np.float64] = (sums[high] - sums[low]) / (counts[high] - counts[low])
    return mean
