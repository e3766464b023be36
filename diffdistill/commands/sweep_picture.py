"""sweep.png: samples of every run on the same noise side by side, and every number against the swept values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from diffdistill.data.pictures import GAP, tile
from diffdistill.inference.draw import sample_images
from diffdistill.models.load import load_model
from diffdistill.training.reports.curves import FAINT, HEALTHY, INK, OUTSIDE, band_of, save_figure, tidy
from diffdistill.training.reports.health import Band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 100
MOST_COLUMNS = 4
SHEET_WIDTH, SHEET_ROWS, MIN_SIDE = 342, 3, 32  # pixels, rows of samples, pixels
CELL_WIDTH, CAPTION_HEIGHT = 3.7, 0.5  # inches
PANEL_HEIGHT, TITLE_HEIGHT, HEADING_HEIGHT = 1.85, 0.45, 0.4
PALETTE = ("#1f5fa8", "#d1700f", "#17705f", "#a23b72", "#6a4c93", "#7a6a00", "#4f5d75", "#c8372d")
BEST = "#17702f"


@dataclass(frozen=True)
class Entry:
    """A run as it is shown. values: one for each key, a number or a text; numbers: empty for a run that is
    not done; sheet: its samples, if there are any."""

    caption: str
    note: str
    values: tuple[Any, ...]
    numbers: Mapping[str, float]
    sheet: Image.Image | None
    is_failed: bool
    is_best: bool


def sample_sheet(place: FilePath) -> Image.Image:
    """A few rows of samples from a run's folder; image i starts from the same noise in every run."""
    model = load_model(place)
    side = model.spec.image_shape[-1]
    shown = side * max(1, -(-MIN_SIDE // side))
    columns = max(3, SHEET_WIDTH // (shown + GAP))
    sheet = tile(sample_images(model, count=columns * SHEET_ROWS), columns=columns, min_side=MIN_SIDE)
    if sheet.width > SHEET_WIDTH:
        sheet = sheet.resize((SHEET_WIDTH, round(sheet.height * SHEET_WIDTH / sheet.width)), Image.Resampling.LANCZOS)
    return sheet


def draw_sweep(file: FilePath, entries: Sequence[Entry], *, keys: Sequence[str], title: str) -> FilePath:
    """Write the picture. keys: what was swept, the names of `Entry.values`."""
    from matplotlib.figure import Figure

    across = len({entry.values[-1] for entry in entries}) if len(keys) == 2 else len(entries)
    columns = across if across <= MOST_COLUMNS else MOST_COLUMNS
    panels = list(dict.fromkeys(name for entry in entries for name in entry.numbers))
    panel_columns = min(MOST_COLUMNS, max(columns, 3))
    sheet_height = max([entry.sheet.height for entry in entries if entry.sheet] or [MIN_SIDE]) / DOTS_PER_INCH
    cell_height = sheet_height + CAPTION_HEIGHT + 0.12
    rows, panel_rows = -(-len(entries) // columns), -(-len(panels) // panel_columns)
    width = CELL_WIDTH * panel_columns
    height = TITLE_HEIGHT + rows * cell_height + HEADING_HEIGHT + panel_rows * PANEL_HEIGHT
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    figure.text(0.2 / width, 1 - 0.2 / height, title, fontsize=11, weight="bold", color=INK, va="center")
    for number, entry in enumerate(entries):
        row, column = divmod(number, columns)
        _draw_cell(figure, entry, 0.2 + column * CELL_WIDTH, height - TITLE_HEIGHT - row * cell_height, sheet_height)
    top = height - TITLE_HEIGHT - rows * cell_height - HEADING_HEIGHT
    for number, name in enumerate(panels):
        row, column = divmod(number, panel_columns)
        box = (column * CELL_WIDTH + 0.6, top - (row + 1) * PANEL_HEIGHT + 0.45, CELL_WIDTH - 0.85, PANEL_HEIGHT - 0.75)
        axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
        draw_against(axes, name, entries, keys)
        if number == 0 and len(keys) > 1:
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(
                handles,
                labels,
                loc="upper left",
                bbox_to_anchor=(0.1 / width, (top + 0.3) / height),
                ncols=8,
                fontsize=8,
                frameon=False,
            )
    return save_figure(figure, file)


def draw_against(axes: "Axes", name: str, entries: Sequence[Entry], keys: Sequence[str]) -> None:
    """One number against the first key; a line for each combination of the others."""
    firsts = list(dict.fromkeys(entry.values[0] for entry in entries))
    places, is_log = spread(firsts)
    rest = list(dict.fromkeys(entry.values[1:] for entry in entries))
    for number, others in enumerate(rest):
        points = sorted(
            (places[firsts.index(entry.values[0])], entry.numbers.get(name, math.nan))  # a gap where a run has failed
            for entry in entries
            if entry.values[1:] == others
        )
        label = ", ".join(f"{key} = {value}" for key, value in zip(keys[1:], others, strict=True))
        colour = PALETTE[number % len(PALETTE)]
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=colour, markersize=4, label=label)
    if is_log:
        axes.set_xscale("log")
    band = healthy_band(name)
    low, high = axes.get_ylim()
    least = 0.02 * max(abs(low), abs(high))  # values that agree to a hundredth are drawn as such
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
        axes.set_ylim(low, high)
    if band:
        axes.axhspan(band.low, band.high, color=HEALTHY, linewidth=0, zorder=0)
        room = 0.6 * (high - low)
        axes.set_ylim(min(low, max(band.low, low - room)), max(high, min(band.high, high + room)))
    tidy(axes, name, f"healthy: {band.low:g} to {band.high:g}" if band else "")
    axes.set_xticks(
        places, [f"{value:g}" if isinstance(value, (int, float)) else shorten(str(value), 16) for value in firsts]
    )
    axes.minorticks_off()
    axes.set_xlabel(keys[0], fontsize=7.5, color=FAINT, labelpad=1)
    axes.margins(x=0.08)


def spread(values: Sequence[Any]) -> tuple[list[float], bool]:
    """Where values stand on an axis, and whether it is logarithmic: numbers to scale where that keeps them apart,
    anything else evenly."""
    numbers = [float(value) for value in values if isinstance(value, (int, float)) and np.isfinite(value)]
    evenly = [float(number) for number in range(len(values))]
    if len(numbers) < max(2, len(values)):
        return evenly, False
    if min(numbers) > 0 and max(numbers) / min(numbers) >= 8:
        return (numbers, True) if _are_apart(np.log(numbers)) else (evenly, False)
    return (numbers, False) if _are_apart(np.array(numbers)) else (evenly, False)


def shorten(text: str, length: int) -> str:
    """One line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def healthy_band(shown: str) -> Band | None:
    """The band of a number by the name under which it is shown."""
    return band_of("fake/accuracy" if shown == "fake accuracy" else f"health/{shown.replace(' ', '_')}")


def _are_apart(places: "np.ndarray[Any, Any]") -> bool:
    gaps = np.diff(np.sort(places))
    return bool(gaps.min() >= gaps.sum() / 12)


def _draw_cell(figure: "Figure", entry: Entry, left: float, top: float, sheet_height: float) -> None:
    """Caption, note and samples, in inches from the left and the bottom; samples pixel by pixel."""
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches()
    colour = OUTSIDE if entry.is_failed else BEST if entry.is_best else FAINT
    note = f"{entry.note}: the best" if entry.is_best else entry.note
    figure.text(left / width, (top - 0.13) / height, shorten(entry.caption, 54), fontsize=9, color=INK, va="center")
    figure.text(left / width, (top - 0.34) / height, shorten(note, 64), fontsize=7.5, color=colour, va="center")
    bottom = top - CAPTION_HEIGHT - sheet_height
    if entry.sheet is not None:
        pixels = np.asarray(entry.sheet.convert("RGB"))
        lift = sheet_height - entry.sheet.height / DOTS_PER_INCH
        figure.figimage(pixels, round(left * DOTS_PER_INCH), round((bottom + lift) * DOTS_PER_INCH), origin="upper")
    else:
        corner = (left / width, bottom / height)
        size = (SHEET_WIDTH / DOTS_PER_INCH / width, sheet_height / height)
        figure.add_artist(Rectangle(corner, *size, transform=figure.transFigure, facecolor="#f3f4f6", edgecolor="none"))
