"""Small panels of a run's numbers as SVG geometry: the line, its healthy band, what lies outside."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from diffdistill.eval.board.figures import Scale, Tick, compact
from diffdistill.training.reports.curves import SMOOTHED_FROM, Series, band_of, limits, running_mean, thinned
from diffdistill.training.reports.health import Band

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 300, 124, 40, 296, 8, 104
MOST_POINTS = 400  # of a line; more cannot be seen


@dataclass(frozen=True)
class Panel:
    """One number against steps.

    lines: SVG paths, the running mean last; band_box: (y, height) of the healthy band, cut to the panel.
    points: JSON of [x, y, step, value] for the cursor.  x_ticks: by clock: steps, images, time.
    """

    name: str
    label: str
    newest: str
    note: str
    band: Band | None
    is_ill: bool
    lines: tuple[str, ...]
    band_box: tuple[float, float] | None
    outside: tuple[tuple[float, float], ...]
    y_ticks: tuple[Tick, ...]
    x_ticks: dict[str, tuple[Tick, ...]]
    points: str

    width, height, left, right, top, bottom = WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM


def draw_panel(
    name: str, series: Series, clock: Callable[[float], tuple[float, float]], reports: Sequence[float]
) -> Panel:
    """clock: a step's images and seconds.  reports: all steps of the run that were reported, which all panels span."""
    band = band_of(name)
    steps, values = _thinned(series)
    finite = values[np.isfinite(values)]
    low, high = limits(finite, band) if len(finite) else (0.0, 1.0)
    across = Scale(float(min(reports)), float(max(*reports, min(reports) + 1)), LEFT + 4, RIGHT - 4)
    up = Scale(low, high, BOTTOM, TOP)
    if name.endswith("/gradient_norm") and len(finite) and finite.min() > 0 and finite.max() / finite.min() > 20:
        up = Scale.around([float(finite.min()), float(finite.max())], BOTTOM, TOP)
    lines = [values]
    if len(values) >= SMOOTHED_FROM and band is None:
        lines.append(running_mean(values))
    is_outside = (values < band.low) | (values > band.high) if band else np.zeros(len(values), bool)
    newest = float(series.values[-1])
    is_ill = not np.isfinite(newest) or (band is not None and not band.low <= newest <= band.high)
    places = [(across(x), _inside(up, y)) for x, y in zip(steps, values, strict=True)]
    known = zip(places, steps, values, strict=True)
    return Panel(
        name=name,
        label=name.removeprefix("health/").removeprefix("eval/").replace("/", " ").replace("_", " "),
        newest=f"{newest:.3g}" if np.isfinite(newest) else "not finite",
        note=f"healthy {band.low:g} to {band.high:g}" if band else "",
        band=band,
        is_ill=is_ill,
        lines=tuple(_path([across(x) for x in steps], [_inside(up, y) for y in line]) for line in lines),
        band_box=_band_box(band, up) if band else None,
        outside=tuple((x, y) for (x, y), out in zip(places, is_outside, strict=True) if out and y is not None),
        y_ticks=tuple(Tick(up(value), compact(value)) for value in up.ticks(3)),
        x_ticks={name: _ticks(across, clock, name) for name in ("steps", "images", "time")},
        points=json.dumps([[x, y, int(step), float(f"{value:.4g}")] for (x, y), step, value in known if y is not None]),
    )


def _thinned(series: Series) -> tuple["np.ndarray[tuple[int], np.dtype[np.float64]]", ...]:
    steps, values = thinned(series)
    stride = -(-len(steps) // MOST_POINTS)
    starts = np.arange(0, len(steps), stride)
    return steps[starts], np.add.reduceat(values, starts) / np.diff([*starts, len(values)])


def _inside(up: Scale, value: float) -> float | None:
    """A value's place, spikes cut off at the panel's edge; None where it is not finite."""
    if not np.isfinite(value) or (up.is_log and value <= 0):
        return None
    return min(BOTTOM, max(TOP, up(float(value))))


def _path(xs: Sequence[float], ys: Sequence[float | None]) -> str:
    """An SVG path that is interrupted where there is no value; a lone point is a short stroke."""
    parts, is_open = [], False
    for number, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if y is None:
            is_open = False
            continue
        is_alone = not is_open and (number + 1 == len(ys) or ys[number + 1] is None)
        parts.append(f"{'L' if is_open else 'M'}{x} {y}" + ("h0.01" if is_alone else ""))
        is_open = True
    return "".join(parts)


def _band_box(band: Band, up: Scale) -> tuple[float, float] | None:
    top, bottom = (min(BOTTOM, max(TOP, up(value))) for value in (band.high, band.low))
    return (round(top, 2), round(bottom - top, 2)) if bottom > top else None


def _ticks(across: Scale, clock: Callable[[float], tuple[float, float]], name: str) -> tuple[Tick, ...]:
    """The same places whatever the clock: round steps, and what had gone by then."""
    ticks = []
    for step in across.ticks(4):
        images, seconds = clock(step)
        time = (
            f"{seconds / 3600:.3g} h"
            if seconds >= 3600
            else f"{seconds / 60:.2g} min"
            if seconds >= 60
            else f"{seconds:.0f} s"
        )
        ticks.append(Tick(across(step), {"steps": compact(step), "images": compact(images), "time": time}[name]))
    return tuple(ticks)
