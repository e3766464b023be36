"""Geometry of the pages' pictures: scales, ticks, points and labels in SVG units, without any drawing library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CHARACTER_WIDTH, LABEL_HEIGHT = 6.4, 14.0  # of a label in 12 pixels, on average
LOG_FROM = 12.0  # ratio of the largest to the smallest value from which an axis is logarithmic


@dataclass(frozen=True)
class Scale:
    """Maps values low .. high to pixels first .. last, linearly or by logarithm."""

    low: float
    high: float
    first: float
    last: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        place = (self._of(value) - self._of(self.low)) / (self._of(self.high) - self._of(self.low))
        return round(self.first + place * (self.last - self.first), 2)

    def _of(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    @staticmethod
    def around(values: Sequence[float], first: float, last: float, *, room: float = 0.08) -> "Scale":
        """A scale with `room` (a share of the range) left on both sides; logarithmic where values lie far apart."""
        low, high = min(values), max(values)
        if low > 0 and high / low >= LOG_FROM:
            spread = (high / low) ** room
            return Scale(low / spread, high * spread, first, last, is_log=True)
        around = room * (high - low) or 0.2 * abs(high) or 1.0
        floor = 0.0 if 0 <= low < 0.5 * high else low - around
        return Scale(floor, high + around, first, last)

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` round values within the scale, ascending."""
        return _log_ticks(self.low, self.high, count) if self.is_log else _linear_ticks(self.low, self.high, count)


@dataclass(frozen=True)
class Tick:
    place: float
    text: str


@dataclass(frozen=True)
class Point:
    """One model of a plot. label: where its name stands, (x, y, anchor), or None where there is no room."""

    key: str
    name: str
    x: float
    y: float
    top: float
    bottom: float
    cost: float
    value: float
    label: tuple[float, float, str] | None


@dataclass(frozen=True)
class Plot:
    """Value against cost. frontier: the best that each cost buys, as an SVG path of steps.  choice: the cost's short
    name."""

    width: int
    height: int
    left: int
    bottom: int
    choice: str
    x_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    points: tuple[Point, ...]
    frontier: str


@dataclass(frozen=True)
class Given:
    """What a plot is made of: name, cost, value, and the value's smallest and largest."""

    key: str
    name: str
    cost: float
    value: float
    low: float
    high: float


def scatter(
    given: Sequence[Given], *, choice: str, x_title: str, is_lower_better: bool, width: int = 1080, height: int = 340
) -> Plot:
    """A plot of value against cost, cheap on the left. given: at least one."""
    left, bottom, top, right = 62, height - 46, 18, width - 24
    across = Scale.around([one.cost for one in given], left + 8, right, room=0.1)
    up = Scale.around([bound for one in given for bound in (one.low, one.high)], bottom, top, room=0.1)
    places = [(across(one.cost), up(one.value)) for one in given]
    labels = place_labels([(x, y, shorten(one.name)) for (x, y), one in zip(places, given, strict=True)], left, width)
    points = tuple(
        Point(one.key, shorten(one.name), x, y, up(one.high), up(one.low), one.cost, one.value, label)
        for one, (x, y), label in zip(given, places, labels, strict=True)
    )
    best = frontier(given, is_lower_better=is_lower_better)
    steps = "".join(f" H{across(one.cost)} V{up(one.value)}" for one in best[1:])
    path = f"M{across(best[0].cost)} {up(best[0].value)}{steps}" if steps else ""
    return Plot(
        width,
        height,
        left,
        bottom,
        choice,
        x_title,
        tuple(Tick(across(value), compact(value)) for value in across.ticks()),
        tuple(Tick(up(value), compact(value)) for value in up.ticks()),
        points,
        path,
    )


def frontier(given: Sequence[Given], *, is_lower_better: bool) -> list[Given]:
    """The points that no other equals or beats in both cost and value, cheapest first."""
    sign = 1 if is_lower_better else -1
    found: list[Given] = []
    for one in sorted(given, key=lambda one: (one.cost, sign * one.value)):
        if not found or sign * one.value < sign * found[-1].value:
            found.append(one)
    return found


def place_labels(
    points: Sequence[tuple[float, float, str]], left: float, width: float
) -> list[tuple[float, float, str] | None]:
    """Beside each point where neither a point nor an earlier label stands: right, left, above, below, or nowhere."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    labels: list[tuple[float, float, str] | None] = []
    for x, y, text in points:
        long = CHARACTER_WIDTH * len(text)
        choices = (
            (x + 11, y + 4, "start", x + 9),
            (x - 11, y + 4, "end", x - 11 - long),
            (x, y - 11, "middle", x - long / 2),
            (x, y + 20, "middle", x - long / 2),
        )
        for at, base, anchor, begin in choices:
            box = (begin, base - LABEL_HEIGHT + 3, begin + long, base + 3)
            if begin >= left and begin + long <= width and base > LABEL_HEIGHT and not _overlaps(box, taken):
                taken.append(box)
                labels.append((round(at, 2), round(base, 2), anchor))
                break
        else:
            labels.append(None)
    return labels


def shorten(text: str, length: int = 40) -> str:
    """One line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def compact(value: float) -> str:
    """A number for an axis or a cell of costs: 0.05, 12, 35k, 70.4M, 2.6B."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if suffix == "k" else size
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.4g}"


def decimals_of(values: Sequence[float]) -> int:
    """Digits after the point that show three figures of the smallest value that is not 0: 0 to 5."""
    sizes = [abs(value) for value in values if value]
    return min(5, max(0, 2 - math.floor(math.log10(min(sizes))))) if sizes else 0


def _overlaps(box: tuple[float, ...], taken: Sequence[tuple[float, ...]]) -> bool:
    return any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken)


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 2.5, 5, 10), key=lambda factor: abs(math.log(factor * power / rough)))
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= min(count, 3):
            break
    return inside[:: max(1, len(inside) // (count + 3))]
