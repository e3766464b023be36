"""MSD's students side by side, each in a group of processes of its own: a fault of one is no other's."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

from diffdistill.distributed.stopping import ON_STDIN, StopRequested, TrainingError, stop_signals
from diffdistill.settings.limits import MAX_LINE_BYTES
from diffdistill.settings.links import open_plain, refuse_links
from diffdistill.settings.lock import holder_of
from diffdistill.settings.reading import read_log
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import say
from diffdistill.storage.checkpoint import list_checkpoints
from diffdistill.training.config import load_config

LOOK_SECONDS = 0.2
BAD_INPUT = 2  # the exit code after which another try would be no better

Say = Callable[[str], None]


@dataclass
class Group:
    """One student's processes.  run: its folder; what they say goes to the file beside it.  starts: so far.
    holder: the other process that writes in the folder, for which this one waits."""

    index: int
    run: FilePath
    starts: int = 0
    slot: int = 0
    process: "subprocess.Popen[bytes] | None" = None
    is_done: bool = False
    holder: str | None = None
    code: int | None = None

    @property
    def log(self) -> FilePath:
        return self.run.with_name(self.run.name + ".log")

    @property
    def last_words(self) -> str:
        lines = read_log(self.log, limit=MAX_LINE_BYTES).splitlines()
        return next((line for line in reversed(lines) if "error:" in line), lines[-1] if lines else "")


def train_students(
    config: FilePath,
    overrides: Sequence[str],
    *,
    processes_each: int = 1,
    max_restarts: int = 3,
    resume: bool = False,
    trusts_code: bool = False,
    say: Say = say,
) -> list[FilePath]:
    """Train all students of an MSD config, `<run>/student_index=<i>`, as many at once as there are GPUs for (all of
    them on CPUs). A student whose processes fail starts again from its newest checkpoint, up to `max_restarts` times.

    Returns the runs. Raises UserError before anything starts, and TrainingError at the end naming the students that
    did not get there. SIGINT and SIGTERM are handed on, and raise StopRequested. However this
    process ends, the students' save and end; a student whose folder another process holds waits for that.
    """
    groups = plan_groups(config, overrides, resume=resume)
    refuse_links(groups[0].run.parent)
    gpus = visible_gpus()
    if gpus and len(gpus) < processes_each:
        raise UserError(f"--processes-each {processes_each}: there are {len(gpus)} GPUs")
    at_once = min(len(gpus) // processes_each if gpus else len(groups), len(groups))

    def start(group: Group, slot: int) -> None:
        own = gpus[slot * processes_each : (slot + 1) * processes_each]
        again = resume or group.starts > 0
        command = command_of(config, overrides, group, processes_each, resume=again)
        _start(group, [*command, *(["--trust-code"] if trusts_code else [])], own, slot)

    with stop_signals() as stopping:
        _supervise(groups, start, at_once=at_once, max_restarts=max_restarts, stopping=stopping, say=say)
        if stopping:
            raise StopRequested(stopping[0], "with every student saved")
    failed = [group for group in groups if not group.is_done]
    if failed:
        listed = "".join(f"\n  student {group.index}: {group.last_words} ({group.log})" for group in failed)
        raise TrainingError(f"{len(failed)} of {len(groups)} students failed:{listed}\nresume with --resume")
    return [group.run for group in groups]


def plan_groups(config: FilePath, overrides: Sequence[str], *, resume: bool) -> list[Group]:
    """A group for each student. Raises UserError for another method, and for runs that are there already."""
    parsed = load_config(config, overrides)
    count = getattr(parsed.method, "num_students", None)
    if count is None:
        raise UserError(f"method.name = {parsed.method.name!r}: has a single student; use `diffdistill train`")
    groups = [Group(index, FilePath(parsed.run) / f"student_index={index}") for index in range(count)]
    for group in groups:
        if not resume and list_checkpoints(group.run / "checkpoints"):
            raise UserError(f"{group.run}: holds a run already; add --resume to continue it, or choose another `run`")
    return groups


def command_of(
    config: FilePath, overrides: Sequence[str], group: Group, processes_each: int, *, resume: bool
) -> list[str]:
    """The command line of one student; under torchrun if it has several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes_each}"]
    own = [f"run={group.run}", f"method.student_index={group.index}", *(["--resume"] if resume else [])]
    start = launcher if processes_each > 1 else []
    return [sys.executable, *start, "-m", "diffdistill", "train", str(config), *overrides, *own]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def _start(group: Group, command: Sequence[str], gpus: Sequence[str], slot: int) -> None:
    group.log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {ON_STDIN: "1"} | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
    with open_plain(group.log, "ab") as log:
        # A session of its own: Ctrl-C in the terminal reaches this process alone, which hands it on once. The pipe
        # closes with this process, SIGKILL included.
        group.process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.PIPE, env=environment, start_new_session=True
        )
    group.slot, group.starts = slot, group.starts + 1


def _supervise(
    groups: Sequence[Group],
    start: Callable[[Group, int], None],
    *,
    at_once: int,
    max_restarts: int,
    stopping: Sequence[int],
    say: Say,
) -> None:
    """Keep the slots busy until every group is done or has failed, or a signal has come and all have ended."""
    waiting, free, running = list(groups), list(range(at_once)), list[Group]()
    has_told = False
    while running or (waiting and not stopping):
        for group in list(waiting) if free and not stopping else ():
            if free and not _waits(group, say):
                waiting.remove(group)
                start(group, free.pop(0))
                running.append(group)
        if stopping and not has_told:
            has_told = True
            for group in running:
                if group.process:
                    group.process.terminate()
        time.sleep(LOOK_SECONDS)
        for group in [one for one in running if one.process and one.process.poll() is not None]:
            assert group.process is not None
            assert group.process.stdin is not None
            group.process.stdin.close()
            group.code = group.process.returncode
            running.remove(group)
            free.append(group.slot)
            group.is_done = group.code == 0
            can_go_on = not group.is_done and group.code != BAD_INPUT and group.starts <= max_restarts
            if group.code == BAD_INPUT and not stopping and _waits(group, say):
                group.starts -= 1
                waiting.insert(0, group)
            elif can_go_on and not stopping:
                say(f"student {group.index} exited with {group.code}; start {group.starts + 1}: {group.last_words}")
                waiting.insert(0, group)
            elif group.is_done:
                say(f"student {group.index}: done")


def _waits(group: Group, say: Say) -> bool:
    """Whether another process holds the student's folder: one of a launcher that was killed, say, which is saving."""
    before, group.holder = group.holder, holder_of(group.run)
    if group.holder and group.holder != before:
        say(f"student {group.index}: {group.run} is in use by another run ({group.holder}); waiting for it to end")
    return group.holder is not None
