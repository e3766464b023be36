"""How a run ends before its time. SIGINT and SIGTERM are a wish to stop after the current step, with all saved; so is
the end of the launcher that started it, however that ends.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath
from threading import Lock, Thread
from types import FrameType

from diffdistill.settings.launcher import this_rank
from diffdistill.settings.terminal import say

ON_STDIN = "DIFFDISTILL_LAUNCHER_ON_STDIN"
"""Set by a launcher that holds the other end of its children's standard input, and writes nothing there."""

GRACE_SECONDS = 120.0  # to save in, once the launcher is gone
LOOK_SECONDS = 0.5
STOPPING = b"\nstopping after this step; press again to stop at once, without saving\n"
ACCELERATE = {b"accelerate", b"accelerate-launch", b"accelerate.commands.launch", b"accelerate.commands.accelerate_cli"}
"""As they are called, the last two by `python -m`."""
_stops: list[list[int]] = []  # of the open `stop_signals`
_watching = Lock()


class TrainingError(RuntimeError):
    """Training cannot continue. The command line prints it without a traceback and exits with 1."""


class StopRequested(Exception):  # noqa: N818
    """SIGINT or SIGTERM arrived, and the work is saved. `exit_code` is 130 or 143."""

    def __init__(self, number: int, saved: str) -> None:
        """saved: where the work stopped, and what of it is kept."""
        super().__init__(f"stopped by {signal.Signals(number).name} {saved}")
        self.exit_code = 128 + number


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a second one stops at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        if this_rank() == 0:
            os.write(2, STOPPING)

    _stops.append(received)
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _stops.pop()  # lists are found by what they hold, not by which they are


def end_with_launcher() -> None:
    """From now on, when the launcher of this process ends (by its word, torchrun, `accelerate launch`), stop
    as by SIGTERM, and at once if that takes too long. Without one nothing is watched: a shell may end before its
    programs."""
    is_told = os.environ.pop(ON_STDIN, "") == "1"  # what this process starts has another standard input
    waits: list[Callable[[int], None]] = [_wait_for_stdin] if is_told else []
    if os.name == "posix" and ("TORCHELASTIC_RUN_ID" in os.environ or _is_accelerate(os.getppid())):
        waits.append(_wait_for_parent)
    if waits and _watching.acquire(blocking=False):  # once in a process
        for wait in waits:
            Thread(target=_end_after, args=(wait, os.getppid()), name="launcher", daemon=True).start()


def _is_accelerate(process: int) -> bool:
    """Whether a process is `accelerate launch`, which starts a single one without torchrun: by its command line, where
    Linux shows it. What accelerate sets in the environment, users and programs set as well; and a script that has
    accelerate in its name is a shell's, which may end before its programs."""
    try:
        words = FilePath(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[:4]  # python -m accelerate... launch
    except OSError:
        return False
    return any(os.path.basename(word) in ACCELERATE for word in words)


def _end_after(wait: Callable[[int], None], parent: int) -> None:
    wait(parent)
    say("the launcher has exited; stopping")
    if not any(_stops):  # the launcher may have handed on a signal before it went
        signal.raise_signal(signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(128 + signal.SIGTERM)


def _wait_for_stdin(_: int) -> None:
    while os.read(0, 1024):
        pass


def _wait_for_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
