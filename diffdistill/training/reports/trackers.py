"""Trackers: where else a run's numbers and pictures go, through accelerate's classes.

A tracker must never stop, slow or change a run. So each works in a thread of its own, behind a queue that the run
never waits for. One that is missing, raises, or does not answer is said once, without secrets, and left out.
"""

import difflib
import importlib
import json
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path as FilePath
from queue import Full, Queue
from threading import Lock, Thread
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import AfterValidator, Field, GetJsonSchemaHandler

from diffdistill.settings.limits import MAX_CHOSEN
from diffdistill.settings.terminal import hide_secrets

PROJECT = "diffdistill"
QUEUE_LENGTH = 1000  # reports that may wait
START_SECONDS = 120.0  # services give up on a login after 90
CALL_SECONDS = 60.0
CLOSE_SECONDS = 30.0  # for all of a run's trackers together
SHARED_MODULES = ("torch.utils.tensorboard", "matplotlib.figure", "matplotlib.backends.backend_agg")
"""What both the run and some trackers import: loaded before a thread can see one of them half loaded."""

LIBRARIES = {"tensorboard": "tensorboard", "tensorboardX": "tensorboard"}
"""Trackers by the module that has their threads, where that is not their name."""

Task = Callable[[Any], None]


def tracker_names() -> list[str]:
    """The trackers that the installed accelerate knows, those registered with it included."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return [str(name) for name in LOGGER_TYPE_TO_CLASS]


def _known(name: str) -> str:
    if name not in tracker_names():
        close = difflib.get_close_matches(name, tracker_names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown{hint} (choices: {', '.join(tracker_names())})")
    return name


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"name each tracker once, not {', '.join(names)}")
    return names


class _Choices:
    """The names in the JSON schema, looked up when one is made: accelerate takes long to import."""

    def __get_pydantic_json_schema__(self, schema: object, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "enum": tracker_names()}


TrackerName = Annotated[str, AfterValidator(_known), _Choices()]
TrackerNames = Annotated[tuple[TrackerName, ...], Field(max_length=MAX_CHOSEN), AfterValidator(_each_once)]


class Trackers:
    """All trackers of one run. No call waits for them but `close`, and that no longer than CLOSE_SECONDS."""

    def __init__(
        self,
        names: Sequence[str],
        folder: FilePath,
        *,
        start_step: int,
        settings: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """folder: the run's.  settings: its config, nested.  say: takes the one line about a tracker that is left
        out, from any thread."""
        for module in SHARED_MODULES if names else ():
            with suppress(ImportError):
                importlib.import_module(module)

        def starter(name: str) -> Callable[[], Any]:
            return lambda: _start(name, folder, start_step=start_step, settings=flat_settings(settings))

        self._all = [BackgroundTracker(name, starter(name), say) for name in names]
        self._hook = threading.excepthook
        if names:
            threading.excepthook = self._on_thread_error

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """The values of one report."""
        kept = dict(values)
        for tracker in self._all:
            tracker.give(lambda it: it.log(dict(kept), step=step))

    def picture(self, name: str, file: FilePath, step: int) -> None:
        """A PNG, for trackers that take images or files."""
        for tracker in self._all:
            tracker.give(lambda it: _give_picture(it, name, file, step))

    def close(self) -> None:
        """Let the trackers finish what they were given."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for tracker in self._all:
            tracker.give(None)
        for tracker in self._all:
            tracker.wait(deadline)
        if threading.excepthook == self._on_thread_error:
            threading.excepthook = self._hook

    def _on_thread_error(self, failed: threading.ExceptHookArgs) -> None:
        """A tracker's own thread has failed, where nobody else would say so but in a traceback."""
        frames = [frame for frame, _ in traceback.walk_tb(failed.exc_traceback)]
        modules = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
        names = {LIBRARIES.get(module, module) for module in modules}
        tracker = next((one for one in self._all if one.name in names), None)
        if tracker and failed.exc_value:
            tracker.fail(failed.exc_value)
        else:
            self._hook(failed)


class BackgroundTracker:
    """One tracker in its thread. It is given up on the first error, or when it does not answer in time."""

    def __init__(self, name: str, start: Callable[[], Any], say: Callable[[str], None]) -> None:
        self.name = name
        self._say = say
        self._tasks: Queue[Task | None] = Queue(QUEUE_LENGTH)
        self._lock = Lock()
        self._is_given_up = False
        self._busy_since: float | None = time.monotonic()
        self._may_take = START_SECONDS
        self._thread = Thread(target=self._work, args=(start,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def give(self, task: Task | None) -> None:
        """Something to do, or None for the end. Returns at once."""
        since = self._busy_since
        if self._is_given_up:
            return
        if since is not None and time.monotonic() - since > self._may_take:
            self._give_up(f"has not answered for {self._may_take:g} s")
            return
        try:
            self._tasks.put_nowait(task)
        except Full:
            self._give_up(f"cannot keep up: {QUEUE_LENGTH} reports are waiting")

    def wait(self, deadline: float) -> None:
        """Until it has finished, but no longer than `deadline` on the monotonic clock."""
        if not self._is_given_up:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self._give_up(f"did not finish within {CLOSE_SECONDS:g} s of the run's end")

    def fail(self, error: BaseException) -> None:
        """Leave it out: a thread of its library has failed."""
        self._give_up(f"has failed: {_describe(error)}")

    def _work(self, start: Callable[[], Any]) -> None:
        tracker, failed = None, "cannot be started"
        try:
            tracker = start()
            failed = "has failed"
            while (task := self._next()) is not None:
                task(tracker)
            tracker.finish()
        except BaseException as error:  # a library that calls sys.exit in this thread is no reason to stop either
            self._give_up(f"{failed}: {_describe(error)}")
            if tracker is not None:
                with suppress(BaseException):
                    tracker.finish()

    def _next(self) -> Task | None:
        """The next task; None at the end, or once the tracker is given up."""
        self._busy_since = None
        task = self._tasks.get()
        self._may_take = CALL_SECONDS
        self._busy_since = time.monotonic()
        return None if self._is_given_up else task

    def _give_up(self, reason: str) -> None:
        with self._lock:
            if self._is_given_up:
                return
            self._is_given_up = True
        with suppress(Exception):
            self._say(hide_secrets(f"tracker {self.name} {reason}; the run continues without it"))


def flat_settings(settings: Mapping[str, Any], place: str = "") -> dict[str, str | int | float | bool]:
    """A nested config as dotted keys and plain values, as trackers want them; nothing that equals a secret."""
    found: dict[str, str | int | float | bool] = {}
    for key, value in settings.items():
        name = f"{place}.{key}" if place else str(key)
        if isinstance(value, Mapping):
            found |= flat_settings(value, name)
        elif isinstance(value, (bool, int, float)):
            found[name] = value
        elif value is not None:
            found[name] = hide_secrets(value if isinstance(value, str) else json.dumps(value))
    return found


def _start(name: str, folder: FilePath, *, start_step: int, settings: Mapping[str, Any]) -> Any:
    """accelerate's tracker of that name, started, with the run's settings."""
    run = "/".join(folder.parts[-2:])
    options: dict[str, dict[str, Any]] = {  # what each calls the run, and where its files go
        "tensorboard": {"purge_step": start_step + 1},
        "wandb": {"name": run, "dir": str(folder)},
        "trackio": {"name": run},
        "mlflow": {"run_name": run},
        "clearml": {"task_name": run},
        "swanlab": {"experiment_name": run, "logdir": str(folder / "swanlab")},
        "dvclive": {"dir": str(folder / "dvclive"), "dvcyaml": None, "save_dvc_exp": False},
    }
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    project = "tensorboard" if name == "tensorboard" else PROJECT  # for it, the folder's name
    place = [str(folder)] if kind.requires_logging_directory else []
    tracker = kind(project, *place, **options.get(name, {}))
    if hasattr(tracker, "start"):  # accelerate before 1.9 starts in the constructor
        tracker.start()
    tracker.store_init_configuration(dict(settings))
    return tracker


def _give_picture(tracker: Any, name: str, file: FilePath, step: int) -> None:
    """accelerate's classes take pictures in three shapes, MLflow takes a file, and some take none."""
    if not hasattr(tracker, "log_images"):
        if hasattr(tracker, "log_artifact"):
            tracker.log_artifact(str(file), name)
        return
    with Image.open(file) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    if tracker.name == "tensorboard":
        tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
    elif tracker.name in ("aim", "clearml"):
        tracker.log_images({name: pixels}, step=step)
    else:
        tracker.log_images({name: [pixels]}, step=step)


def _describe(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name} is not installed (pip install {error.name.partition('.')[0]})"
    first_line = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
