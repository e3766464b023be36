"""What befalls real runs, once each at one moment; and the locks that keep two runs out of one folder."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from accidents import KINDS, Scene, befall, undisturbed
from conftest import MakeConfig
from torch import Tensor

from diffdistill.distributed.stopping import TrainingError
from diffdistill.settings.lock import LOCK, locked
from diffdistill.settings.schema import UserError
from diffdistill.training.memory.oom_retry import run_with_oom_retry, with_half

Whole = dict[int, Mapping[str, Tensor]]
every_kind = pytest.mark.parametrize("kind", [kind for kind, _ in KINDS], ids=[kind.__name__ for kind, _ in KINDS])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, quick_teacher: Path) -> Whole:
    """The ends of undisturbed runs, by number of processes."""
    return undisturbed(tmp_path_factory.mktemp("whole"), quick_teacher)


@every_kind
def test_a_run_survives(kind: Callable[[Scene], None], tmp_path: Path, quick_teacher: Path, whole: Whole) -> None:
    befall(kind, 0, tmp_path, quick_teacher, whole)


@pytest.mark.full
@pytest.mark.parametrize("moment", [1, 2, 3])
@every_kind
def test_a_run_survives_at_any_moment(
    kind: Callable[[Scene], None], moment: int, tmp_path: Path, quick_teacher: Path, whole: Whole
) -> None:
    befall(kind, moment, tmp_path, quick_teacher, whole)


def test_a_lock_ends_with_its_run_and_names_its_holder(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(UserError, match=rf"another run is writing there \(process {os.getpid()} on "),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / LOCK).read_text()


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
    (folder / "checkpoints").symlink_to(tmp_path, target_is_directory=True)  # another disk, say
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
