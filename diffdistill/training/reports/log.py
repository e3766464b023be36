"""What a run tells: a progress bar, metrics.jsonl, curves.png, and the trackers that its config names."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path as FilePath
from typing import Any, Protocol

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from diffdistill.settings.reading import lines_of_log, read_log
from diffdistill.settings.terminal import Console, hide_secrets
from diffdistill.storage.atomic import append_text, write_lines_atomically
from diffdistill.training.reports.curves import draw_curves
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
    def step(self, step: int) -> None: ...
    def report(self, step: int, images: int, values: Mapping[str, float]) -> None: ...
    def preview(self, step: int, file: FilePath) -> None: ...
    def note(self, message: str) -> None: ...
    def warn(self, message: str) -> None: ...
    def say(self, message: str) -> None: ...


class Silence:
    """Tells nothing: for all processes of a run but the first."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: object) -> None: ...
    def step(self, step: int) -> None: ...
    def report(self, step: int, images: int, values: Mapping[str, float]) -> None: ...
    def preview(self, step: int, file: FilePath) -> None: ...
    def note(self, message: str) -> None: ...
    def warn(self, message: str) -> None: ...
    def say(self, message: str) -> None: ...


class RunLog:
    """Reports of one run.

    folder: the run's.  start_step: lines of a killed run after this step are dropped, so that none stands twice.
    trackers: their names; settings: what they are told about the run.  cpu_began: of `time.process_time`, when the
    run's work began; what was prepared before the first step counts.
    """

    def __init__(
        self,
        folder: FilePath,
        *,
        title: str,
        start_step: int,
        num_steps: int,
        quiet: bool = False,
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
        self._title, self._num_steps, self._start_step = title, num_steps, start_step
        self._began, self._cpu_began = time.perf_counter(), cpu_began
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}", markup=False),
            console=self._console,
            disable=not self._is_live,
        )
        self._task = self._bar.add_task(title, total=num_steps, completed=start_step, speed="", losses="")
        self._trackers = Trackers(trackers, folder, start_step=start_step, settings=settings or {}, say=self.say)

    def __enter__(self) -> "RunLog":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._draw()
        self._trackers.close()

    def step(self, step: int) -> None:
        """One more iteration is done."""
        if self._is_live:
            self._bar.update(self._task, completed=step)

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
        losses = " ".join(f"{name} {value:.4g}" for name, value in values.items() if name.endswith("/loss"))
        if self._is_live:
            self._bar.update(self._task, completed=step, speed=f"{speed:.1f} it/s", losses=losses)
        elif not self._quiet:
            left = (self._num_steps - step) / max(speed, 1e-9)
            self.say(f"{self._title} {step}/{self._num_steps} {speed:.1f} it/s, {left:.0f} s left  {losses}")

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

    def _draw(self) -> None:
        """curves.png, if there is anything new to see. A picture that cannot be drawn is said once."""
        if not self._has_new_curves:
            return
        try:
            draw_curves(self.file.parent, title=self._title)
            self._has_new_curves = False
        except Exception as error:
            if not self._has_said_curves:
                self.say(f"curves.png cannot be drawn: {type(error).__name__}: {error}; the run goes on")
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
