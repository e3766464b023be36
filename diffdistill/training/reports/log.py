"""What a run tells: a progress bar, metrics.jsonl, curves.png, and the trackers that its config names."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path as FilePath
from typing import Any, Protocol

from torch import Tensor

from diffdistill.settings.reading import lines_of_log, read_log
from diffdistill.settings.terminal import Console, hide_secrets
from diffdistill.storage.atomic import append_text, write_lines_atomically
from diffdistill.training.reports.curves import draw_curves
from diffdistill.training.reports.progress import Heartbeat, Pace, make_bar
from diffdistill.training.reports.trackers import Trackers

METRICS = "metrics.jsonl"
WARNINGS = "warnings.txt"


class Meter:
    """Means of detached scalars between two reports; nothing is copied to the host before `means`."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value.detach(), count + 1)

    def means(self) -> dict[str, float]:
        """The means so far, and start anew."""
        found = {name: float(total) / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        return found


class Log(Protocol):
    """What a run tells. Used as a context, which ends with it."""

    def __enter__(self) -> "Log": ...
    def __exit__(self, *_: object) -> None: ...
    def begin(self, parts: int) -> None: ...
    def part(self) -> None: ...
    def step(self, step: int) -> None: ...
    def report(self, step: int, images: int, values: Mapping[str, float]) -> None: ...
    def preview(self, step: int, file: FilePath) -> None: ...
    def note(self, message: str) -> None: ...
    def warn(self, message: str) -> None: ...
    def say(self, message: str) -> None: ...
    def tell(self, message: str) -> None: ...


class Silence:
    """Tells nothing: for all processes of a run but the first."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: object) -> None: ...
    def begin(self, parts: int) -> None: ...
    def part(self) -> None: ...
    def step(self, step: int) -> None: ...
    def report(self, step: int, images: int, values: Mapping[str, float]) -> None: ...
    def preview(self, step: int, file: FilePath) -> None: ...
    def note(self, message: str) -> None: ...
    def warn(self, message: str) -> None: ...
    def say(self, message: str) -> None: ...
    def tell(self, message: str) -> None: ...


class RunLog:
    """Reports of one run.

    folder: the run's.  start_step: lines of a killed run after this step are dropped, so that none stands twice.
    first: the player whose losses are shown first.  trackers: their names; settings: what they are told about the run.
    cpu_began: of `time.process_time`, when the run's work began; what was prepared before the first step counts.
    """

    def __init__(
        self,
        folder: FilePath,
        *,
        title: str,
        start_step: int,
        num_steps: int,
        quiet: bool = False,
        first: str = "",
        trackers: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        cpu_began: float = 0.0,
    ) -> None:
        self.file = folder / METRICS
        self._drop_after(start_step)
        self._has_new_curves, self._has_said_curves = False, False
        self._console = Console(stderr=True)
        self._quiet = quiet
        self._is_live = self._console.is_terminal and not quiet
        self._title, self._start_step, self._first = title, start_step, first
        self._began, self._cpu_began = time.perf_counter(), cpu_began
        self._pace, self._has_told_total, self._losses = Pace(start_step, num_steps), False, ""
        self._bar = make_bar(self._pace, title, self._console, is_live=self._is_live)
        self._heart = Heartbeat(self._tell_progress)
        self._trackers = Trackers(trackers, folder, start_step=start_step, settings=settings or {}, say=self.say)

    def __enter__(self) -> "RunLog":
        self._bar.start()
        if not self._is_live and not self._quiet:
            self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._heart.stop()
        self._bar.stop()
        self._draw()
        self._trackers.close()

    def begin(self, parts: int) -> None:
        """An iteration of so many micro-batches begins, those of all its updates."""
        self._pace.begin(parts)

    def part(self) -> None:
        """One more micro-batch is done."""
        self._pace.advance()
        self._tell_total()

    def step(self, step: int) -> None:
        """One more iteration is done."""
        self._pace.finish(step)
        self._tell_total()

    def report(self, step: int, images: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, the same to the trackers, and the newest losses to the bar (or a plain line)."""
        seconds = time.perf_counter() - self._began
        speed = (step - self._start_step) / max(seconds, 1e-9)
        spent = time.process_time() - self._cpu_began
        clock = {"seconds": round(seconds, 3), "cpu_seconds": round(spent, 3), "its_per_second": round(speed, 3)}
        line = {"step": step, "images": images, **clock}
        append_text(self.file, json.dumps(line | dict(values)) + "\n")
        self._has_new_curves = True
        self._trackers.numbers(step, values)
        shown = sorted(name for name in values if name.endswith("/loss"))
        shown.sort(key=lambda name: not name.startswith(f"{self._first}/"))
        self._losses = " ".join(f"{name} {values[name]:.4g}" for name in shown)
        self._pace.finish(step)
        if self._is_live:
            self._bar.update(self._bar.task_ids[0], losses=self._losses)
        else:
            self._tell_progress()

    def preview(self, step: int, file: FilePath) -> None:
        """A new preview: to the trackers that take pictures. A good moment to draw the curves anew, too."""
        self._trackers.picture("preview", file, step)
        self._draw()

    def note(self, message: str) -> None:
        """A line of warnings.txt, once, of what has been said already."""
        file = self.file.parent / WARNINGS
        if message not in read_log(file).splitlines():
            append_text(file, hide_secrets(message) + "\n")

    def warn(self, message: str) -> None:
        """A warning for people, and a line of warnings.txt."""
        append_text(self.file.parent / WARNINGS, hide_secrets(message) + "\n")
        self.say(f"health: {message}")

    def say(self, message: str) -> None:
        """A line for people, above the bar."""
        self._console.print(hide_secrets(message), soft_wrap=True)
        self._heart.note()

    def tell(self, message: str) -> None:
        """A line for people who watch the run."""
        if not self._quiet:
            self.say(message)

    def _tell_progress(self) -> None:
        """A line where there is no bar."""
        self.tell(f"{self._pace.show()}  {self._title}  {self._losses}".rstrip())

    def _tell_total(self) -> None:
        """How long all of it will take, once that is known."""
        total = None if self._has_told_total else self._pace.total
        if total:
            self.tell(f"{self._title}: {total}")
        self._has_told_total = self._has_told_total or self._pace.is_sure

    def _draw(self) -> None:
        """curves.png, if there is anything new to see. A picture that cannot be drawn is said once."""
        if not self._has_new_curves:
            return
        try:
            draw_curves(self.file.parent, title=self._title)
            self._has_new_curves = False
        except Exception as error:
            if not self._has_said_curves:
                self.say(f"curves.png cannot be drawn: {type(error).__name__}: {error}; the run continues")
            self._has_said_curves = True

    def _drop_after(self, step: int) -> None:
        if self.file.exists():
            write_lines_atomically(self.file, _up_to(step, lines_of_log(self.file)))


def _up_to(step: int, lines: Iterable[str]) -> Iterator[str]:
    """Reports up to a step; what is none is left out: the last line of a killed run."""
    for line in lines:
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            if json.loads(line)["step"] <= step:
                yield line
