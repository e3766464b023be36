"""How a run ends before its time. SIGINT and SIGTERM are a wish to stop after the current step, with all saved."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath
from types import FrameType


class TrainingError(RuntimeError):
    """Training cannot go on. The command line prints it without a traceback and exits with 1."""


class StopRequested(Exception):  # noqa: N818
    """SIGINT or SIGTERM arrived, and the run is saved. `exit_code` is 130 or 143."""

    def __init__(self, number: int, step: int, folder: FilePath) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} at step {step}; saved: go on with --resume ({folder})"
        )
        self.exit_code = 128 + number


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a second one stops at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
