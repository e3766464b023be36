"""Faults of real runs, injected into small ones at random moments: each must end as an undisturbed run, or stop with
the right message, with nothing lost beyond the last checkpoint.

python tests/fault_injection.py [--moments 10] [KIND ...]
    prints the table; without names it goes into docs/reliability.md.
"""

import argparse
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from conftest import small_config
from torch import Tensor

from diffdistill.commands.cli import main as command_line
from diffdistill.distillation.method import Batch, Draw, Loss, Players
from diffdistill.distributed import meeting
from diffdistill.methods.dmd2 import DMD2
from diffdistill.settings.values import dump_yaml
from diffdistill.storage.checkpoint import find_damage, list_checkpoints, load_checkpoint
from diffdistill.training import students
from diffdistill.training.config import RunConfig
from diffdistill.training.reports import trackers
from diffdistill.training.reports.log import Log
from diffdistill.training.trainer import Trainer

STEPS, EVERY = 10, 3
ROUNDING = 1e-5  # of the largest number, where the pieces of a batch change
PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: python tests/fault_injection.py -->", "<!-- faults end -->"
WRITING = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree")

Action = Callable[[], None]


def nothing() -> None:
    """Leave the run alone."""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Ended:
    """How a command ended.  code: of the exit, negative for a signal.  said: on its error stream."""

    code: int
    said: str


@dataclass
class Scene:
    """One run in a folder of its own.  whole: the end of an undisturbed one, by number of processes."""

    folder: Path
    teacher: Path
    whole: Mapping[int, Mapping[str, Tensor]]
    rng: random.Random
    overrides: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def config(self) -> RunConfig:
        return config_at(self.run, self.teacher, *self.overrides)

    def start(self, inject: Action = nothing, *options: str, count: int = 1) -> list[Ended]:
        """`diffdistill train` in `count` processes, each after `inject`."""
        return begin(self.config, inject, *options, count=count)()

    def go_on(self, *options: str, count: int = 1) -> None:
        for ended in self.start(nothing, "--resume", *options, count=count):
            assert ended.code == 0, f"--resume fails: {ended}"

    def newest(self) -> int:
        """The step of the newest checkpoint; 0 for none. All that are there must be whole."""
        found = list_checkpoints(self.run / "checkpoints")
        assert not [fault for one in found if (fault := find_damage(one))], "a checkpoint is not whole"
        return int(found[-1].name.removeprefix("step-")) if found else 0

    def nothing_lost(self) -> None:
        """All steps up to the last due checkpoint are kept: a step is reported before it is saved."""
        log = self.run / "metrics.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
        due = (max(steps, default=0) - 1) // EVERY * EVERY
        assert self.newest() >= due, f"step {max(steps, default=0)} was done, but {self.newest()} was kept"

    def ends_as_undisturbed(self, count: int = 1, rounding: float = 0.0) -> None:
        """Weights, averages and optimisers' states of the last step; bit for bit unless `rounding` is given."""
        found, expected = end_of(self.run), self.whole[count]
        size = max(float(t.abs().max()) for t in expected.values())
        assert found.keys() == expected.keys()
        bad = [n for n, t in expected.items() if float((found[n] - t).abs().max()) > rounding * size]
        assert not bad, f"{len(bad)} of {len(expected)} tensors differ from an undisturbed run's"


def config_at(run: Path, teacher: Path, *overrides: str) -> RunConfig:
    common = (f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "trackers=[]", "health=null")
    return small_config("dmd2", run, *common, *overrides, teacher=teacher)


def end_of(run: Path) -> dict[str, Tensor]:
    last = load_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    assert last.step == STEPS
    return {f"{group}.{name}": t for group, tensors in last.tensors.items() for name, t in tensors.items()}


def begin(config: RunConfig, inject: Action, *options: str, count: int = 1) -> Callable[[], list[Ended]]:
    """Start a command in forked processes. Returns what waits for them."""
    context, folder = multiprocessing.get_context("fork"), Path(config.run).parent
    file = folder / "config.yaml"
    file.write_text(dump_yaml(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [folder / f"said-{rank}-{time.monotonic_ns()}" for rank in range(count)]
    arguments = ["train", str(file), *options]
    members = [
        context.Process(target=_command, args=(arguments, inject, output, rank, count, port))
        for rank, output in enumerate(outputs)
    ]
    for member in members:
        member.start()

    def wait() -> list[Ended]:
        for member in members:
            member.join(timeout=120)
            assert member.exitcode is not None, "it hangs"
        said = [output.read_text() if output.exists() else "" for output in outputs]
        assert not [text for text in said if "Traceback" in text], said
        return [Ended(int(member.exitcode or 0), text) for member, text in zip(members, said, strict=True)]

    return wait


def _command(arguments: list[str], inject: Action, output: Path, rank: int, count: int, port: int) -> None:
    # Not a stream in a buffer: what a killed process has said stays.
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
        os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(True)
    sys.argv = ["diffdistill", *arguments]
    inject()
    command_line()


def at_step(step: int, action: Action, rank: int = 0) -> Action:
    """An injection: the action, just before an iteration of one process."""

    def inject() -> None:
        train_step = Trainer.train_step

        def acting(self: Trainer, log: Log | None = None) -> None:
            if self.step == step and self.processes.rank == rank:
                action()
            train_step(self, log)

        Trainer.train_step = acting  # type: ignore[method-assign]  # in a process of its own

    return inject


def at_change(number: int, action: Action, folder: Path, *, name: str = "", lasts: bool = False) -> Action:
    """An injection: the action, just before the folder's files are opened for writing, renamed or removed for the
    `number`-th time; every time from there on where it lasts.  name: counts only what has it in its path."""

    def inject() -> None:
        seen = [0]

        def look(event: str, arguments: tuple[Any, ...]) -> None:
            is_writing = event in WRITING or (event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)))
            if is_writing and str(arguments[0]).startswith(str(folder)) and name in str(arguments[0]):
                seen[0] += 1
                if seen[0] == number or (lasts and seen[0] > number):
                    action()

        sys.addaudithook(look)

    return inject


def fails(error: OSError) -> Action:
    def action() -> None:
        raise error

    return action


def soon(action: Action, seconds: float) -> Action:
    """The action after a while, wherever the program is by then."""
    return lambda: threading.Timer(seconds, action).start()


def a_step(scene: Scene) -> int:
    return scene.rng.randrange(1, STEPS)


def killed(scene: Scene) -> None:
    """kill -9 between steps or during one"""
    (ended,) = scene.start(at_step(a_step(scene), soon(kill, scene.rng.uniform(0, 0.02))))
    assert ended.code in (-signal.SIGKILL, 0)
    scene.nothing_lost()
    scene.go_on()
    scene.ends_as_undisturbed()


def killed_while_saving(scene: Scene) -> None:
    """kill -9 of the writer, during a checkpoint"""
    when = soon(kill, scene.rng.uniform(0, 0.002)) if scene.rng.random() < 0.5 else kill
    (ended,) = scene.start(at_change(scene.rng.randrange(1, 25), when, scene.run / "checkpoints"))
    assert ended.code in (-signal.SIGKILL, 0)
    scene.nothing_lost()
    scene.go_on()
    scene.ends_as_undisturbed()


def one_of_two_killed(scene: Scene) -> None:
    """kill -9 of one process of two, then of the resumed run"""
    rank = scene.rng.randrange(2)
    ends = scene.start(at_step(a_step(scene), kill, rank), count=2)
    assert ends[rank].code == -signal.SIGKILL
    assert ends[1 - rank].code == 1
    assert "another process has exited" in ends[1 - rank].said
    scene.nothing_lost()
    scene.go_on(count=2)
    scene.ends_as_undisturbed(2)


def one_of_two_killed_at_the_start(scene: Scene) -> None:
    """kill -9 of one process of two during start-up, or soon after"""
    rank, seconds = scene.rng.randrange(2), scene.rng.uniform(0, 0.7)  # later the other can be at its end

    def inject() -> None:
        meeting.MEETING = timedelta(seconds=15)
        if os.environ["RANK"] == str(rank):
            soon(kill, seconds)()

    ends = scene.start(inject, count=2)
    assert ends[rank].code == -signal.SIGKILL
    assert ends[1 - rank].code == 1
    said = ("cannot connect", "did not come", "another process has exited")
    assert any(words in ends[1 - rank].said for words in said), ends[1 - rank].said
    scene.nothing_lost()
    scene.go_on(count=2)
    scene.ends_as_undisturbed(2)


def one_of_two_with_parts_killed(scene: Scene) -> None:
    """kill -9 of one process of two with sharded weights, during a step or a checkpoint"""
    scene.overrides = ("speed.shard=all",)
    rank, folder = scene.rng.randrange(2), scene.run / "checkpoints"
    in_step, number = (
        at_step(a_step(scene), kill, rank),
        scene.rng.randrange(1, 6),
    )  # of the files that one process opens
    inject = in_step if scene.rng.random() < 0.5 else at_change(number, kill, folder, name=f"shard-0000{rank + 1}")
    ends = scene.start(inject, count=2)
    assert ends[rank].code == -signal.SIGKILL
    assert ends[1 - rank].code == 1
    assert "another process has exited" in ends[1 - rank].said
    scene.nothing_lost()
    scene.go_on(count=scene.rng.randrange(1, 3))
    scene.ends_as_undisturbed(2, rounding=ROUNDING)


def terminated(scene: Scene) -> None:
    """SIGTERM: preemption with a grace period"""
    step = a_step(scene)
    (ended,) = scene.start(at_step(step, lambda: signal.raise_signal(signal.SIGTERM)))
    assert ended.code == 143
    assert f"stopped by SIGTERM at step {step + 1}; saved in " in ended.said
    assert "error:" not in ended.said
    assert scene.newest() == step + 1
    scene.go_on()
    scene.ends_as_undisturbed()


def interrupted_twice(scene: Scene) -> None:
    """Ctrl-C twice: at once, without saving"""

    def twice() -> None:
        signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)

    (ended,) = scene.start(at_step(a_step(scene), twice))
    assert ended.code == 130
    scene.nothing_lost()
    scene.go_on()
    scene.ends_as_undisturbed()


def disk_full_while_saving(scene: Scene) -> None:
    """disk full during a checkpoint: a file cannot grow beyond a random size"""
    limit = scene.rng.randrange(10_000, 100_000)  # metrics.jsonl stays below, the players' file does not
    (ended,) = scene.start(
        at_step(a_step(scene), lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)))
    )
    assert ended.code == 1
    assert "error: the disk is full" in ended.said
    scene.nothing_lost()
    scene.go_on()
    scene.ends_as_undisturbed()


def disk_full_while_logging(scene: Scene) -> None:
    """disk full for the log"""
    full = fails(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    (ended,) = scene.start(at_change(scene.rng.randrange(1, STEPS), full, scene.run, name="metrics.jsonl"))
    assert ended.code == 1
    assert "error: the disk is full" in ended.said
    scene.nothing_lost()
    scene.go_on()
    scene.ends_as_undisturbed()


def disk_full_for_the_cache(scene: Scene) -> None:
    """disk full while images are cached: an error of the system, or a file that cannot grow"""
    cache, limit = scene.folder / "cache", scene.rng.randrange(1000, 60_000)  # the prepared images take 64,128 bytes
    rng = np.random.default_rng(0)
    np.savez(
        scene.folder / "images.npz",
        images=rng.integers(0, 256, (1000, 8, 8, 1), np.uint8),
        labels=rng.integers(0, 10, 1000),
    )
    data = {"name": "npz", "path": str(scene.folder / "images.npz")}
    other = (f"data={json.dumps(data | {'cache': str(scene.folder / 'other')})}", f"run={scene.folder / 'undisturbed'}")
    scene.overrides = other
    scene.go_on()
    whole = end_of(scene.folder / "undisturbed")
    scene.overrides = (f"data={json.dumps(data | {'cache': str(cache)})}",)
    full = fails(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    number = scene.rng.randrange(1, 7)  # the lock, the folder, images, labels, meta, and their renaming
    too_large: Action = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))  # noqa: E731
    inject = at_change(number, full, cache, name="/.") if scene.rng.random() < 0.5 else too_large
    (ended,) = scene.start(inject)
    assert ended.code == 1
    assert ended.said.count("error: the disk is full") == 1
    assert "/images.npy'" in ended.said or inject is not too_large
    assert not [file for file in cache.rglob("*") if file.is_file() and file.suffix != ".lock"]
    assert not scene.run.exists()
    scene.go_on()
    scene.whole = {1: whole}
    scene.ends_as_undisturbed()


def read_only(scene: Scene) -> None:
    """the output folder becomes read-only, or is from the start"""
    refused = fails(OSError(errno.EROFS, os.strerror(errno.EROFS), str(scene.run)))
    (ended,) = scene.start(at_change(scene.rng.randrange(1, 40), refused, scene.run, lasts=True))
    assert ended.code in (0, 1, 2)  # 0 where nothing but the curves was left to write
    assert "Read-only file system" in ended.said
    scene.nothing_lost()
    scene.go_on()
    scene.ends_as_undisturbed()


def flipped_bit(scene: Scene) -> None:
    """a flipped bit in a checkpoint"""
    newest = _killed_after_two(scene)
    file = scene.rng.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    content[scene.rng.randrange(len(content))] ^= 1 << scene.rng.randrange(8)
    file.write_bytes(content)
    _refused_then_goes_back(scene, newest)


def missing_shard(scene: Scene) -> None:
    """a file of a checkpoint is missing"""
    newest = _killed_after_two(scene)
    scene.rng.choice(sorted(newest.iterdir())).unlink()
    _refused_then_goes_back(scene, newest)


def _killed_after_two(scene: Scene) -> Path:
    """A run that has been killed with two checkpoints or more; returns the newest."""
    scene.start(at_step(scene.rng.randrange(2 * EVERY, STEPS), kill))
    return list_checkpoints(scene.run / "checkpoints")[-1]


def _refused_then_goes_back(scene: Scene, damaged: Path) -> None:
    (ended,) = scene.start(nothing, "--resume")
    before = list_checkpoints(damaged.parent)[-2]
    assert ended.code == 2
    assert f"{damaged}: damaged" in ended.said
    assert f"the newest whole one before it is {before}" in ended.said
    scene.go_on(f"--checkpoint={before.name}")
    scene.ends_as_undisturbed()


def not_a_number(scene: Scene) -> None:
    """NaN or infinity in one loss, in one process of one or two"""
    step, bad = a_step(scene), scene.rng.choice([float("nan"), float("inf")])
    count = scene.rng.randrange(1, 3)
    rank = scene.rng.randrange(count)

    def poison() -> None:
        loss, calls = DMD2.fake_loss, [0]

        def poisoned(self: DMD2, players: Players, draw: Draw, batch: Batch) -> Loss:
            made, calls[0] = loss(self, players, draw, batch), calls[0] + 1
            return Loss(made.total * bad, made.logs, made.carry) if calls[0] == 1 else made

        DMD2.fake_loss = poisoned  # type: ignore[method-assign]

    ends = scene.start(at_step(step, poison, rank), count=count)
    assert {ended.code for ended in ends} == {0}
    assert f"step {step}, player fake: fake_loss (total = {bad})" in ends[0].said
    assert "this update is skipped" in ends[0].said
    assert (f"in process {rank}" in ends[0].said) == (count > 1)
    assert all(bool(t.isfinite().all()) for t in end_of(scene.run).values())
    reports = [json.loads(line) for line in (scene.run / "metrics.jsonl").read_text().splitlines()]
    assert [report["step"] for report in reports] == list(range(1, STEPS + 1))


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def out_of_memory(scene: Scene) -> None:
    """out of memory: the message includes the memory plan"""
    step = a_step(scene)
    (ended,) = scene.start(at_step(step, _out_of_memory))
    assert ended.code == 1
    assert f"out of memory at step {step}: CUDA out of memory. Tried to allocate 20.00 GiB." in ended.said
    assert "The plan: " in ended.said
    assert "train.micro_batch_size=4" in ended.said
    scene.nothing_lost()
    scene.go_on()
    scene.ends_as_undisturbed()


def out_of_memory_in_parts(scene: Scene) -> None:
    """out of memory in one of two processes with sharded weights"""
    scene.overrides, step, rank = ("speed.shard=all",), a_step(scene), scene.rng.randrange(2)
    ends = scene.start(at_step(step, _out_of_memory, rank), count=2)
    assert [ended.code for ended in ends] == [1, 1]
    assert f"out of memory at step {step}: CUDA out of memory. Tried to allocate 20.00 GiB." in ends[rank].said
    assert "train.micro_batch_size=2" in ends[rank].said
    assert "another process has exited" in ends[1 - rank].said
    scene.nothing_lost()
    scene.go_on(count=2)
    scene.ends_as_undisturbed(2, rounding=ROUNDING)


def out_of_memory_halved(scene: Scene) -> None:
    """out of memory with `on_out_of_memory: halve`: continues by itself"""
    scene.overrides = ("train.on_out_of_memory=halve",)
    large, step = scene.rng.choice([2, 4]), a_step(scene)  # images at a time that are too much

    def inject() -> None:
        train_step = Trainer.train_step

        def limited(self: Trainer, log: Log | None = None) -> None:
            if self.step >= step and (self.config.train.micro_batch_size or 8) >= large:
                _out_of_memory()
            train_step(self, log)

        Trainer.train_step = limited  # type: ignore[method-assign]

    (ended,) = scene.start(inject)
    assert ended.code == 0
    assert f"train.micro_batch_size={large // 2}" in ended.said
    scene.ends_as_undisturbed(rounding=ROUNDING)


def two_runs(scene: Scene) -> None:
    """two runs on one folder"""
    step, opened = a_step(scene), scene.folder / "opened"

    def pause() -> None:
        opened.touch()
        while opened.exists():
            time.sleep(0.01)

    first = begin(scene.config, at_step(step, pause))
    deadline = time.monotonic() + 60
    while not opened.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    (second,) = scene.start(nothing, "--resume")
    opened.unlink()
    assert second.code == 2
    assert "another run writes to it (process " in second.said
    assert [ended.code for ended in first()] == [0]
    scene.ends_as_undisturbed()


def changed_config(scene: Scene) -> None:
    """resume with a changed config"""
    scene.start(at_step(a_step(scene), kill))
    scene.overrides = ("optimizers.generator.lr=5e-4", "train.seed=1")
    if scene.newest():
        (ended,) = scene.start(nothing, "--resume")
        assert ended.code == 2
        assert "optimizers.generator.lr: was 0.0006, now 0.0005" in ended.said
        assert "train.seed: was 0, now 1" in ended.said
    scene.overrides = ()
    scene.go_on()
    scene.ends_as_undisturbed()


def tracker_down(scene: Scene) -> None:
    """a tracker that fails"""
    scene.overrides = ("trackers=[tensorboard]",)
    number = a_step(scene)

    class Failing:
        name = "tensorboard"

        def __init__(self) -> None:
            self.calls = 0

        def log(self, *_: object, **__: object) -> None:
            self.calls += 1
            if self.calls == number:
                raise ConnectionError("the server is down")

        def finish(self) -> None: ...

    def inject() -> None:
        trackers._start = lambda *_, **__: Failing()

    (ended,) = scene.start(inject)
    assert ended.code == 0
    assert (
        "tracker tensorboard has failed: ConnectionError: the server is down; the run continues without it"
        in ended.said
    )
    scene.ends_as_undisturbed()


def dead_weights(scene: Scene) -> None:
    """one step that destroys the weights, then non-finite losses"""

    def destroy() -> None:
        steps = torch.optim.Adam.step

        def huge(self: torch.optim.Adam, *arguments: Any) -> Any:
            torch.optim.Adam.step = steps  # type: ignore[method-assign]
            for group in self.param_groups:
                group["lr"] = 1e20
            return steps(self, *arguments)

        torch.optim.Adam.step = huge  # type: ignore[assignment, method-assign]

    (ended,) = scene.start(at_step(a_step(scene), destroy))
    assert ended.code == 1
    assert "weights are not finite" in ended.said
    scene.nothing_lost()
    scene.go_on()
    scene.ends_as_undisturbed()


def moved_teacher(scene: Scene) -> None:
    """the teacher is moved, or trained further, before a killed run is resumed"""
    shutil.copytree(scene.teacher, scene.folder / "teacher")
    scene.teacher = scene.folder / "teacher"
    scene.start(at_step(a_step(scene), kill))
    moved = scene.teacher.rename(scene.folder / "moved")
    if scene.newest() and scene.rng.random() < 0.5:
        longer = small_config("pretrain", moved, "train.steps=12")
        assert {ended.code for ended in begin(longer, nothing, "--resume")()} == {0}
    scene.teacher = moved
    scene.go_on()
    scene.ends_as_undisturbed()


def copies_beside(scene: Scene) -> None:
    """user copies beside the checkpoints of a killed run"""
    scene.start(at_step(scene.rng.randrange(EVERY, STEPS), kill))
    checkpoints = scene.run / "checkpoints"
    names = ["step-good", "step-00000040-backup", "step-40", "best-so-far"]
    for name in names:
        shutil.copytree(scene.rng.choice(list_checkpoints(checkpoints)), checkpoints / name)
    before = {name: sorted(file.name for file in (checkpoints / name).iterdir()) for name in names}
    scene.go_on()
    assert {name: sorted(file.name for file in (checkpoints / name).iterdir()) for name in names} == before
    assert [int(found.name[5:]) for found in list_checkpoints(checkpoints)] == [6, 9, 10]
    scene.ends_as_undisturbed()


PACED = """
import sys, time
from diffdistill.commands import cli
from diffdistill.training.trainer import Trainer
step = Trainer.train_step

def paced(self, log=None):
    time.sleep(0.3)
    step(self, log)

Trainer.train_step = paced
sys.argv[0] = "diffdistill"
cli.main()
"""
"""`diffdistill`, with time between its steps."""


def launcher_killed(scene: Scene) -> None:
    """kill -9 of the launcher of students, and an immediate restart"""
    common = (f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "trackers=[]", "health=null")
    settings = ("method.num_students=1", "train.num_threads=1", *common)  # rounding differs with the threads
    alone, run = scene.folder / "alone", scene.folder / "msd"
    assert {e.code for e in begin(small_config("msd", alone, *settings, teacher=scene.teacher), nothing)()} == {0}
    file, step = scene.folder / "msd.yaml", scene.rng.randrange(1, STEPS - 1)
    file.write_text(dump_yaml(small_config("msd", run, *settings, teacher=scene.teacher)))
    student = run / "student_index=0"
    command_of = students.command_of

    def slow(*arguments: Any, **options: Any) -> list[str]:
        python, _, _, *rest = command_of(*arguments, **options)
        return [python, "-c", PACED, *rest]

    def launch() -> None:
        students.command_of = slow
        students.train_students(file, (), say=lambda line: None)

    launcher = multiprocessing.get_context("fork").Process(target=launch, daemon=True)
    launcher.start()
    log, deadline = student / "metrics.jsonl", time.monotonic() + 300
    while (not log.exists() or len(log.read_text().splitlines()) < step) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert launcher.pid
    os.kill(launcher.pid, signal.SIGKILL)
    said: list[str] = []
    students.train_students(file, (), resume=True, say=said.append)
    words = student.with_name(student.name + ".log").read_text()
    assert "stopped by SIGTERM at step" in words, "the student trained on"
    assert not [line for line in said if "exited with" in line], said
    found, expected = end_of(student), end_of(alone)
    assert not [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)], "another end"


def different_configs(scene: Scene) -> None:
    """two processes with different settings, in a new or resumed run"""
    key, value, before = scene.rng.choice(
        [
            ("optimizers.generator.lr", "5e-4", "0.0006 in process 0, 0.0005 in process 1"),
            ("method.gan_weight", "0.05", "0.03 in process 0, 0.05 in process 1"),
            ("train.seed", "1", "0 in process 0, 1 in process 1"),
        ]
    )
    is_new = scene.rng.random() < 0.3
    if not is_new:
        scene.start(at_step(a_step(scene), kill), count=2)

    def inject() -> None:
        if os.environ["RANK"] == "1":
            sys.argv.append(f"{key}={value}")

    ends = scene.start(inject, *([] if is_new else ["--resume"]), count=2)
    assert [ended.code for ended in ends] == [2, 2]
    assert all(f"{key}: {before}" in ended.said for ended in ends)
    scene.go_on(count=2)
    scene.ends_as_undisturbed(2)


def closed_pipe(scene: Scene) -> None:
    """the pipe of the run's output is closed"""

    def close() -> None:
        reads, writes = os.pipe()
        os.close(reads)
        os.dup2(writes, 1), os.dup2(writes, 2)

    (ended,) = scene.start(at_step(a_step(scene), close))
    assert ended.code == 0
    scene.ends_as_undisturbed()


KINDS: tuple[tuple[Callable[[Scene], None], str], ...] = (
    (killed, "resumed: equal"),
    (killed_while_saving, "all checkpoints intact; resumed: equal"),
    (one_of_two_killed, "the other reports it and stops; resumed on two: equal"),
    (one_of_two_killed_at_the_start, "the other reports it and stops within the start-up timeout; restarted: equal"),
    (one_of_two_with_parts_killed, "the other reports it and stops; resumed on one or two: equal within rounding"),
    (terminated, "saved at that step; resumed: equal"),
    (interrupted_twice, "resumed: equal"),
    (disk_full_while_saving, "reported; all checkpoints intact; resumed: equal"),
    (disk_full_while_logging, "reported; resumed: equal"),
    (disk_full_for_the_cache, "reported, with the file; nothing half written; restarted: equal"),
    (read_only, "reported; resumed once writable: equal"),
    (flipped_bit, "named, with the newest intact one; resumed from that: equal"),
    (missing_shard, "named, with the newest intact one; resumed from that: equal"),
    (not_a_number, "named; all processes skip the update; all numbers finite"),
    (out_of_memory, "reported, with the plan and what would fit; resumed: equal"),
    (out_of_memory_in_parts, "reported, with what would fit; the other stops; resumed: equal within rounding"),
    (out_of_memory_halved, "equal within float32's rounding"),
    (two_runs, "the second is refused; the first: equal"),
    (changed_config, "refused, with the changes; resumed unchanged: equal"),
    (tracker_down, "reported once; the run: equal"),
    (dead_weights, "reported and stopped; not saved, no checkpoint deleted; resumed: equal"),
    (moved_teacher, "resumed with its new path: equal"),
    (copies_beside, "neither used, counted nor removed; resumed: equal"),
    (launcher_killed, "its student saves and exits; the new launcher waits for it: equal"),
    (different_configs, "refused in both, with the difference; resumed with equal settings: equal"),
    (closed_pipe, "the run: equal"),
)
"""Each fault, and what must hold after it."""


TESTED_ELSEWHERE = (
    *(one_of_two_killed_at_the_start, dead_weights, moved_teacher, copies_beside),
    *(launcher_killed, different_configs, closed_pipe),
)
"""Faults that quicker tests of their own show as well, which `make test` does not try again."""


def undisturbed(folder: Path, teacher: Path) -> dict[int, Mapping[str, Tensor]]:
    """The ends of runs that nothing happens to, on one and two processes."""
    ends = {}
    for count in (1, 2):
        place = folder / f"undisturbed-{count}"
        place.mkdir()
        assert {e.code for e in begin(config_at(place / "run", teacher), nothing, count=count)()} == {0}
        ends[count] = end_of(place / "run")
    return ends


def try_fault(
    kind: Callable[[Scene], None], moment: int, folder: Path, teacher: Path, whole: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """One fault at one random moment, named by its number. Raises AssertionError if something does not hold."""
    place = folder / f"{kind.__name__}-{moment}"
    place.mkdir()
    kind(Scene(place, teacher, whole, random.Random(f"{kind.__name__} {moment}")))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("kinds", nargs="*")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines, failures = ["| fault | what must hold | held |", "|---|---|---|"], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher = folder / "teacher"
        Trainer(small_config("pretrain", teacher, "train.steps=10"), quiet=True).run()
        whole = undisturbed(folder, teacher)
        for kind, must_hold in KINDS:
            if options.kinds and kind.__name__ not in options.kinds:
                continue
            held = 0
            for moment in range(options.moments):
                try:
                    try_fault(kind, moment, folder, teacher, whole)
                    held += 1
                except AssertionError as error:
                    failures += 1
                    print(f"{kind.__name__}, moment {moment}: {error}", flush=True)
            lines.append(f"| {kind.__doc__} | {must_hold} | {held} of {options.moments} |")
            print(lines[-1], flush=True)
    if not options.kinds:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after, encoding="utf-8")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
