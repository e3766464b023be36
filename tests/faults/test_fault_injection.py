"""Each injected fault once, at one moment; and the locks that keep two runs out of one folder."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import pytest
import torch
from conftest import MakeConfig
from fault_injection import KINDS, TESTED_ELSEWHERE, Scene, try_fault, undisturbed
from torch import Tensor

from diffdistill.distributed.stopping import TrainingError
from diffdistill.settings.lock import LOCK, hold, locked
from diffdistill.settings.schema import UserError
from diffdistill.training.memory.oom_retry import run_with_oom_retry, with_half

Whole = dict[int, Mapping[str, Tensor]]
every_kind = pytest.mark.parametrize("kind", [kind for kind, _ in KINDS], ids=[kind.__name__ for kind, _ in KINDS])
quick_kinds = [kind for kind, _ in KINDS if kind not in TESTED_ELSEWHERE]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, quick_teacher: Path) -> Whole:
    """The ends of undisturbed runs, by number of processes."""
    return undisturbed(tmp_path_factory.mktemp("whole"), quick_teacher)


@pytest.mark.parametrize("kind", quick_kinds, ids=[kind.__name__ for kind in quick_kinds])
def test_a_run_survives(kind: Callable[[Scene], None], tmp_path: Path, quick_teacher: Path, whole: Whole) -> None:
    try_fault(kind, 0, tmp_path, quick_teacher, whole)


@pytest.mark.full
@pytest.mark.parametrize("moment", [1, 2, 3])
@every_kind
def test_a_run_survives_at_any_moment(
    kind: Callable[[Scene], None], moment: int, tmp_path: Path, quick_teacher: Path, whole: Whole
) -> None:
    try_fault(kind, moment, tmp_path, quick_teacher, whole)


def test_a_lock_ends_with_its_run_and_names_its_holder(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(UserError, match=rf"another run writes to it \(process {os.getpid()} on "),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / f"{LOCK}-holder").read_text()


def test_a_lock_that_is_waited_for_is_had_once_it_is_free(tmp_path: Path) -> None:
    file, said = tmp_path / "lock", list[str]()
    with ExitStack() as first:
        first.enter_context(hold(file))
        other = Thread(target=lambda: said.extend(["got it"] if holds(file, lambda: said.append("waits")) else []))
        other.start()
        while not said:
            time.sleep(0.01)
        assert said == ["waits"]
    other.join(timeout=20)
    assert said == ["waits", "got it"]


def holds(file: Path, waiting: Callable[[], None]) -> bool:
    with hold(file, waiting) as has_locks:
        return has_locks


@pytest.mark.parametrize("is_there", [True, False])
def test_a_lock_is_not_taken_through_a_link(tmp_path: Path, is_there: bool) -> None:
    target = tmp_path / "precious"
    if is_there:
        target.write_text("all of it")
    (tmp_path / "lock").symlink_to(target)
    with pytest.raises(OSError, match=r"is a link to .*precious"), hold(tmp_path / "lock"):
        pass
    assert target.exists() == is_there
    assert not is_there or target.read_text() == "all of it"


def test_a_lock_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import pathlib, os, signal
from diffdistill.settings.lock import hold
held = hold(pathlib.Path({str(tmp_path / "lock")!r}))
held.__enter__()
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    with hold(tmp_path / "lock") as has_locks:
        assert has_locks


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", without)
    with locked(tmp_path), locked(tmp_path):
        pass


@pytest.mark.parametrize("name", [LOCK, "metrics.jsonl", "config.yaml"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_run_does_not_write_through_links(tmp_path: Path, name: str, is_there: bool) -> None:
    target, folder = tmp_path / "elsewhere", tmp_path / "run"
    folder.mkdir()
    if is_there:
        target.write_text("precious")
    (folder / name).symlink_to(target)
    with pytest.raises(UserError, match=f"{name}: is a link to {target}"), locked(folder):
        pass
    assert target.exists() == is_there
    assert not is_there or target.read_text() == "precious"


def test_half_a_micro_batch_shares_out_the_batch(make_config: MakeConfig) -> None:
    def halves(*overrides: str, num_processes: int = 1) -> list[int | None]:
        found, config = [], with_half(make_config("pretrain", *overrides), num_processes)
        while config:
            found.append(config.train.micro_batch_size)
            config = with_half(config, num_processes)
        return found

    assert halves() == [4, 2, 1]
    assert halves(num_processes=2) == [2, 1]
    assert halves("train.global_batch_size=12", "train.micro_batch_size=12") == [6, 3, 1]
    assert halves("train.micro_batch_size=1") == []


def test_a_run_that_never_fits_stops_when_there_is_nothing_left_to_halve(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("diffdistill.training.trainer.Trainer.train_step", too_much)
    config = make_config("pretrain", "train.on_out_of_memory=halve")
    with pytest.raises(TrainingError, match="out of memory at step 0"):
        run_with_oom_retry(config, quiet=True)
    said = [line.rpartition("=")[2] for line in capsys.readouterr().err.splitlines() if "goes on" in line]
    assert said == ["4", "2", "1"]
