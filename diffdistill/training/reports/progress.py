"""How far a run is, how fast, and how long it still takes, in words that fit 80 columns."""

import time
from collections.abc import Callable
from threading import Event, Thread

from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from diffdistill.settings.terminal import Console

SILENT_SECONDS = 30.0
"""The longest that a run says nothing where there is no bar."""
LONG_SECONDS = 600.0
"""A run that takes longer says at its beginning for how long."""
SURE_SECONDS = 10.0
BAR_WIDTH = 12

Clock = Callable[[], float]


class Pace:
    """Steps and micro-batches that are done, and the speed at which. The first step, which compiles and fills caches,
    counts only while there is no other."""

    def __init__(self, step: int, num_steps: int, clock: Clock = time.perf_counter) -> None:
        self.step, self.num_steps = step, num_steps
        self.part, self.parts = 0, 0
        self._clock, self._start = clock, step
        self._began = self._from = self._seen = clock()
        self._first = step

    def begin(self, parts: int) -> None:
        """A step begins, of so many micro-batches over all its updates."""
        self.part, self.parts = 0, parts

    def advance(self) -> None:
        """One more micro-batch is done."""
        self.part, self._seen = self.part + 1, self._clock()

    def finish(self, step: int) -> None:
        """This many steps are done."""
        self.step, self.part, self._seen = step, 0, self._clock()
        if self._first == self._start and step > self._start:
            self._first, self._from = step, self._seen

    @property
    def done(self) -> float:
        """Steps, with the part of the one that runs."""
        return self.step + (self.part / self.parts if self.parts else 0.0)

    @property
    def seconds_each(self) -> float | None:
        """Of a step; None while nothing is done."""
        for first, since in ((self._first, self._from), (self._start, self._began)):
            if self.done > first:
                return (self._seen - since) / (self.done - first)
        return None

    @property
    def seconds_left(self) -> float | None:
        each = self.seconds_each
        if each is None:
            return None
        return max((self.num_steps - self.done) * each - (self._clock() - self._seen), 0.0)

    @property
    def is_sure(self) -> bool:
        """Whether the speed is known well enough to speak of the whole run."""
        return self.step - self._start >= 3 or (self.done > self._start and self._clock() - self._began > SURE_SECONDS)

    @property
    def total(self) -> str | None:
        """The whole run in words, as in "39,000 steps at 4.0 s: 43 hours"; None where it is short, or not known yet."""
        each = self.seconds_each
        if each is None or not self.is_sure:
            return None
        left = self.num_steps - self._start
        return (
            f"{left:,} steps at {show_step_time(each)}: {in_words(left * each)}" if left * each > LONG_SECONDS else None
        )

    def show(self) -> str:
        """Time left, speed, steps, and the micro-batch where a step has many."""
        each, left = self.seconds_each, self.seconds_left
        known = f"{show_clock(left)} left, {show_speed(each)}" if each is not None and left is not None else "starting"
        inside = f" ({self.part}/{self.parts} of a step)" if self.part and self.parts > 1 else ""
        return f"{known}, {self.step}/{self.num_steps}{inside}"


class PaceColumn(ProgressColumn):
    """All of a run's bar in one line, cut at its right end where the terminal is narrow."""

    max_refresh = 0.25

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:
        filled = int(BAR_WIDTH * min(self._pace.done / max(self._pace.num_steps, 1), 1.0))
        bar = "━" * filled + "─" * (BAR_WIDTH - filled)
        shown = f"{self._pace.show()} {bar} {task.fields['losses']}  {task.description}"
        return Text(shown, no_wrap=True, overflow="ellipsis")


def make_bar(pace: Pace, title: str, console: Console, *, is_live: bool) -> Progress:
    """The bar of one run, with its one task; `losses` is a field."""
    bar = Progress(PaceColumn(pace), console=console, disable=not is_live, expand=True)
    bar.add_task(title, total=None, losses="")
    return bar


class Heartbeat:
    """Calls a function whenever nothing was said for `seconds`, in a thread of its own."""

    def __init__(self, beat: Callable[[], None], seconds: float = SILENT_SECONDS) -> None:
        self._beat, self._seconds = beat, seconds
        self._ended, self._said = Event(), time.monotonic()
        self._thread = Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        self._said = time.monotonic()
        self._thread.start()

    def note(self) -> None:
        """Something was said."""
        self._said = time.monotonic()

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(max(self._said + self._seconds - time.monotonic(), 0.01)):
            if time.monotonic() - self._said >= self._seconds:
                self.note()
                self._beat()


def show_speed(seconds: float) -> str:
    """Of a step: 5.1 it/s, or 4.0 s/it where it is slow."""
    return f"{1 / seconds:.1f} it/s" if 0 < seconds <= 1 else f"{show_step_time(seconds)}/it"


def show_step_time(seconds: float) -> str:
    """0.20 s, 4.0 s, 304 s."""
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def show_clock(seconds: float) -> str:
    """0:03:12; beyond four days, 12 days."""
    if seconds > 4 * 86400:
        return in_words(seconds)
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def in_words(seconds: float) -> str:
    """The greatest unit of which there are at least two: 90 seconds, 25 minutes, 43 hours, 12 days."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds"
