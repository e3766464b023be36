"""In a step the host waits for the device once an update, to know whether it was finite: counted on a simulated one."""

import warnings
from pathlib import Path

import pytest
import torch
from conftest import SETTINGS, small_config
from support.far_device import Crossings, counted, far_device, near
from support.method_matrix import OF_THE_SIGNAL

from diffdistill.training.trainer import Trainer

PATHS = {"edm": (), "vp_discrete": ("model.path={name: vp_discrete}", "model.predicts=v")}
NEEDED = {"msd": ("method.student_index=0",), "tsm": PATHS["vp_discrete"]}
CASES = [("edm", name) for name in ("dmd2", *OF_THE_SIGNAL)]  # these take no teacher on a discrete path
CASES += [("vp_discrete", name) for name in SETTINGS if name not in ("pretrain", *OF_THE_SIGNAL)]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An untrained one on each path."""
    places = {path: tmp_path_factory.mktemp("waits") / path for path in PATHS}
    for path, place in places.items():
        Trainer(small_config("pretrain", place, *PATHS[path], "train.steps=1"), quiet=True).run()
    return places


def crossings_of(method: str, run: Path, *overrides: str, teacher: Path | None) -> tuple[Crossings, int]:
    """What crossed in a run's third step, and how many updates are due in it: what is kept on the device is there."""
    overrides = (*NEEDED.get(method, ()), *overrides)
    with far_device():
        trainer = Trainer(small_config(method, run, *overrides, teacher=teacher), quiet=True)
        for _ in range(2):
            trainer.train_step()
        due = sum(update.is_due(trainer.step, trainer.images_seen) for update in trainer.method.updates)
        with counted() as crossings:
            trainer.train_step()
    return crossings, due


@pytest.mark.parametrize(("path", "method"), CASES)
def test_a_step_waits_once_an_update(path, method, teachers, tmp_path):
    crossings, due = crossings_of(method, tmp_path / "run", teacher=teachers[path])
    assert due > 0
    assert crossings.num_waits == due, crossings.table()
    assert crossings.uploads.total() <= 12, crossings.uploads


def test_a_pretraining_step_waits_once(tmp_path):
    crossings, due = crossings_of("pretrain", tmp_path / "run", teacher=None)
    assert crossings.num_waits == due == 1, crossings.table()


def test_the_simulated_device_sees_what_a_gpu_would_wait_for():
    with far_device() as device, counted() as crossings:
        there = torch.arange(4, device=device)
        assert crossings.num_waits == 0
        for wait in (
            there[0].item,
            there.tolist,
            there.cpu,
            lambda: bool((there > 1).all()),
            lambda: there[there > 1],
            lambda: there[torch.tensor([0])],
            there.nonzero,
            lambda: torch.bincount(there),
            lambda: torch.tensor([1.0], device=device),
            lambda: torch.zeros(3).to(device),
        ):
            before = crossings.num_waits
            wait()
            assert crossings.num_waits == before + 1, crossings.table()
        torch.zeros(3).to(device, non_blocking=True)
        assert crossings.uploads.total() == 1
        with pytest.raises(RuntimeError, match="on one device"):
            there + torch.ones(4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("path", "method"), CASES)
def test_a_step_on_a_gpu_waits_once_an_update(path, method, teachers, tmp_path):
    overrides = (*NEEDED.get(method, ()), "train.device=auto")
    trainer = Trainer(small_config(method, tmp_path / "run", *overrides, teacher=teachers[path]), quiet=True)
    for _ in range(2):
        trainer.train_step()
    assert trainer.device.type == "cuda"
    due = sum(update.is_due(trainer.step, trainer.images_seen) for update in trainer.method.updates)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{one.filename}:{one.lineno}" for one in told if "synchronizing" in str(one.message)]
    assert len(waits) == due, waits


def test_a_run_on_the_simulated_device_ends_as_one_on_the_cpu(teachers, tmp_path):
    def weights(run: str) -> dict[str, torch.Tensor]:
        trainer = Trainer(small_config("dmd2", tmp_path / run, teacher=teachers["vp_discrete"]), quiet=True)
        for _ in range(2):
            trainer.train_step()
        return {name: near(tensor) for name, tensor in trainer.players["generator"].state_dict().items()}

    with far_device():
        there = weights("far")
    for name, tensor in weights("near").items():
        assert torch.equal(tensor, there[name]), name
