"""Students in groups of processes: one that fails starts again alone, or is named when all others are done."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from fault_injection import config_at

from diffdistill.distributed.stopping import StopRequested, TrainingError
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump_yaml
from diffdistill.storage.checkpoint import list_checkpoints, load_checkpoint
from diffdistill.training import students
from diffdistill.training.students import Group, command_of, plan_groups, train_students
from diffdistill.training.trainer import Trainer

Write = Callable[..., Path]


@pytest.fixture
def write(make_config: MakeConfig, tmp_path: Path) -> Write:
    def made(*overrides: str) -> Path:
        file = tmp_path / "msd.yaml"
        file.write_text(dump_yaml(make_config("msd", f"run={tmp_path / 'msd'}", "trackers=[]", *overrides)))
        return file

    return made


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`program(text)`: in place of training, Python that knows `index`, `start` and `gpus`."""

    def use(text: str) -> None:
        def command(config: Path, overrides: object, group: Group, processes_each: int, *, resume: bool) -> list[str]:
            head = f"import os, sys, time; index, start, resume = {group.index}, {group.starts + 1}, {resume}\n"
            return [sys.executable, "-c", head + "gpus = os.environ.get('CUDA_VISIBLE_DEVICES')\n" + text]

        monkeypatch.setattr(students, "command_of", command)

    return use


def test_a_student_that_fails_starts_again_and_the_others_do_not(write: Write, program: Callable[[str], None]) -> None:
    program("print('error: bad luck', start, resume); sys.exit(index == 1 and start < 3)")
    said: list[str] = []
    runs = train_students(write("method.num_students=3"), (), say=said.append)
    assert [run.name for run in runs] == ["student_index=0", "student_index=1", "student_index=2"]
    logs = [run.with_name(run.name + ".log").read_text().splitlines() for run in runs]
    assert [len(log) for log in logs] == [1, 3, 1]
    assert logs[1] == ["error: bad luck 1 False", "error: bad luck 2 True", "error: bad luck 3 True"]
    assert [line for line in said if "exited with" in line] == [
        "student 1 exited with 1; start 2: error: bad luck 1 False",
        "student 1 exited with 1; start 3: error: bad luck 2 True",
    ]


def test_a_student_that_never_gets_there_is_named_when_all_others_are_done(
    write: Write, program: Callable[[str], None]
) -> None:
    program("print('error: no such teacher'); time.sleep(0.5 * (index != 1)); sys.exit({0: 0, 1: 1, 2: 2}[index])")
    said: list[str] = []
    with pytest.raises(TrainingError, match="2 of 3 students failed:\n  student 1: error: no such teacher") as raised:
        train_students(write("method.num_students=3"), (), max_restarts=1, say=said.append)
    assert "student 2" in str(raised.value)
    assert "student 0: done" in said
    assert len([line for line in said if "start 2" in line]) == 1, "bad input is not tried again"


def test_students_share_out_the_gpus_and_wait_for_their_turn(
    write: Write, program: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(students, "visible_gpus", lambda: ["0", "1", "2", "3", "4"])
    program("print(gpus, time.monotonic()); time.sleep(0.5); print(gpus, time.monotonic())")
    runs = train_students(write("method.num_students=3"), (), processes_each=2, say=lambda line: None)
    told = [run.with_name(run.name + ".log").read_text().split() for run in runs]
    assert [words[0] for words in told][:2] == ["0,1", "2,3"]
    assert told[2][0] in ("0,1", "2,3")
    before = next(words for words in told[:2] if words[0] == told[2][0])
    assert float(told[2][1]) >= float(before[3]), "two students had the same GPUs at the same time"
    with pytest.raises(UserError, match="--processes-each 6: there are 5 GPUs"):
        train_students(write(), (), processes_each=6)


def test_a_signal_is_handed_on_to_every_student(write: Write, program: Callable[[str], None], tmp_path: Path) -> None:
    program(
        "import signal; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(143)))\n"
        f"open(r'{tmp_path}/' + str(index), 'w').close(); time.sleep(60)"
    )

    def terminate() -> None:
        while not all((tmp_path / str(index)).exists() for index in range(2)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    said: list[str] = []
    with pytest.raises(StopRequested, match="stopped by SIGTERM with every student saved") as stopped:
        train_students(write(), (), say=said.append)
    assert stopped.value.exit_code == 143
    assert said == []
    assert [(tmp_path / "msd" / f"student_index={index}.log").read_text() for index in range(2)] == ["saved\n"] * 2


WRITER = """
import pathlib
from diffdistill.distributed.stopping import end_with_launcher, stop_signals
from diffdistill.settings.lock import locked
folder = pathlib.Path(os.environ["FOLDERS"]) / f"student_index={index}"
with locked(folder), stop_signals() as stopping:
    (folder / f"opened-{resume}").touch()
    end_with_launcher()
    while not stopping and not resume:
        time.sleep(0.01)
    time.sleep(1)  # to save
    print("saved", resume)
"""
"""A student that holds its folder until it is told to stop; one that goes on finds nothing left to do."""


def test_students_end_with_a_launcher_that_is_killed_and_its_successor_waits_for_them(
    write: Write, program: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folders = write(), [tmp_path / "msd" / f"student_index={index}" for index in range(2)]
    monkeypatch.setenv("FOLDERS", str(tmp_path / "msd"))
    for folder in folders:
        folder.mkdir(parents=True)
    program(WRITER)
    first = multiprocessing.get_context("fork").Process(target=train_students, args=(file, ()), daemon=True)
    first.start()
    while not all((folder / "opened-False").exists() for folder in folders):
        time.sleep(0.02)
    assert first.pid
    os.kill(first.pid, signal.SIGKILL)
    said: list[str] = []
    assert train_students(file, (), resume=True, say=said.append) == folders
    waits = [line for line in said if "is in use by another run (process " in line]
    assert [line.partition(":")[0] for line in waits] == ["student 0", "student 1"]
    assert [line for line in said if "exited with" in line] == []
    for folder in folders:
        log = folder.with_name(folder.name + ".log").read_text().splitlines()
        assert [line for line in log if line.startswith("saved")] == ["saved False", "saved True"]
        assert "the launcher has exited; stopping" in "\n".join(log)


TORCHRUN_WORKER = """
import os, pathlib, time
from diffdistill.distributed.stopping import end_with_launcher, stop_signals
place = pathlib.Path(os.environ["FOLDERS"]) / os.environ["RANK"]
with stop_signals() as stopping:
    end_with_launcher()
    place.write_text(str(os.getpid()))
    while not stopping:
        time.sleep(0.01)
    place.with_suffix(".saved").touch()
"""
"""A process that notes itself, and saves when it is told to stop."""


@pytest.mark.full
def test_processes_end_with_a_torchrun_that_is_killed(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(TORCHRUN_WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)]
    process = subprocess.Popen(launcher, env=os.environ | {"FOLDERS": str(tmp_path)})
    deadline = time.monotonic() + 120
    while not all((tmp_path / str(rank)).exists() for rank in range(2)) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while not all((tmp_path / f"{rank}.saved").exists() for rank in range(2)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all((tmp_path / f"{rank}.saved").exists() for rank in range(2)), "they train on"


LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[2:]]).wait()"
"""As `accelerate launch` starts a single process."""


def watch_after_kill(command: Sequence[object], folder: Path, number: signal.Signals, *, saves: bool) -> None:
    """Kill the launcher of a single process, which must then save, or go on until it is told to."""
    worker = folder / "worker.py"
    worker.write_text(TORCHRUN_WORKER)
    process = subprocess.Popen(
        [*map(str, command), str(worker)], env=os.environ | {"FOLDERS": str(folder), "RANK": "0"}
    )
    told = folder / "0"
    deadline = time.monotonic() + 120
    while not (told.exists() and told.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    process.wait()
    deadline = time.monotonic() + (20 if saves else 1.5)
    while not (folder / "0.saved").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (folder / "0.saved").exists() == saves
    if not saves:
        os.kill(int(told.read_text()), signal.SIGTERM)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says who started a process")
@pytest.mark.parametrize(
    ("name", "number", "saves"),
    [
        ("accelerate", signal.SIGKILL, True),
        ("accelerate-launch", signal.SIGTERM, True),
        ("nohup", signal.SIGKILL, False),
        ("accelerated.py", signal.SIGKILL, False),
    ],
)
def test_a_single_process_ends_with_accelerate_launch_and_with_nothing_else(
    name: str, number: signal.Signals, saves: bool, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(LAUNCHER)
    watch_after_kill([sys.executable, tmp_path / name, "launch"], tmp_path, number, saves=saves)


@pytest.mark.full
def test_a_single_process_ends_with_the_real_accelerate_launch(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--num_processes", "1", "--cpu"]
    watch_after_kill(command, tmp_path, signal.SIGKILL, saves=True)


def test_what_cannot_be_is_refused_before_anything_starts(write: Write, tmp_path: Path, quick_teacher: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(dump_yaml(config_at(tmp_path / "run", quick_teacher)))
    with pytest.raises(UserError, match="'dmd2': has a single student"):
        plan_groups(other, (), resume=False)
    file = write()
    (tmp_path / "msd" / "student_index=1" / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(UserError, match="student_index=1: holds a run already; add --resume"):
        plan_groups(file, (), resume=False)
    assert [group.index for group in plan_groups(file, (), resume=True)] == [0, 1]


def test_several_processes_are_started_by_torchrun() -> None:
    group = Group(2, Path("runs/msd/student_index=2"))
    alone = command_of(Path("msd.yaml"), ["train.steps=3"], group, 1, resume=False)
    assert alone[1:] == [
        "-m",
        "diffdistill",
        "train",
        "msd.yaml",
        "train.steps=3",
        "run=runs/msd/student_index=2",
        "method.student_index=2",
    ]
    four = command_of(Path("msd.yaml"), [], group, 4, resume=True)
    assert four[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    assert four[-1] == "--resume"


@pytest.mark.full
def test_students_in_two_processes_each_end_as_alone(write: Write, make_config: MakeConfig) -> None:
    runs = train_students(write(), (), processes_each=2, say=lambda line: None)
    for index, run in enumerate(runs):
        alone = make_config("msd", f"method.student_index={index}", "trackers=[]")
        Trainer(alone, quiet=True).run()
        ends = [load_checkpoint(list_checkpoints(Path(r) / "checkpoints")[-1]) for r in (run, alone.run)]
        for group, tensors in ends[1].tensors.items():
            for name, tensor in tensors.items():
                torch.testing.assert_close(ends[0].tensors[group][name], tensor, rtol=0, atol=1e-4)
