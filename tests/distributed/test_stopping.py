"""A run that was stopped, killed or broken off, and resumed, equals one that was not, bit for bit."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffdistill.distillation.method import Batch, Draw, Loss, Players
from diffdistill.distributed.stopping import StopRequested, stop_signals
from diffdistill.methods.pretrain import Pretrain
from diffdistill.settings.values import dump_yaml
from diffdistill.storage.checkpoint import list_checkpoints, load_checkpoint
from diffdistill.training.config import RunConfig
from diffdistill.training.reports.log import RunLog
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]

# What keeps state or draws numbers: dropout, momenta, a warm-up and a decay, several steps, stored pairs.
PRETRAIN = (
    "model.network={name: unet, channels: [8, 16], dropout: 0.2}",
    "train.micro_batch_size=4",
    "optimizers.teacher={name: adamw, lr: 1e-3, betas: [0.9, 0.99], warmup_steps: 3, decay: linear}",
)
DMD2 = (
    "method.steps.later_ratios=[0.8]",
    "method.regression_weight=0.1",
    "method.regression_pairs=8",
    "method.regression_sampler={name: heun, num_steps: 2}",
    "optimizers.generator={name: sgd, lr: 1e-3, betas: [0.9, 0.999], decay: cosine}",
)
SLOWLY = """
import sys, time
import torch
from diffdistill.commands import cli
from diffdistill.training import trainer

torch.set_num_threads(1)
step = trainer.Trainer.train_step

def slow_step(self, log=None):
    step(self, log)
    time.sleep(0.04)

trainer.Trainer.train_step = slow_step
cli.main()
"""
"""The command line, slow enough that a signal arrives in the middle of a run."""


def last_tensors(run: str | Path) -> dict[str, Tensor]:
    """Players, averages and optimisers' states in the newest checkpoint."""
    checkpoint = load_checkpoint(list_checkpoints(Path(run) / "checkpoints")[-1])
    assert {"players", "ema", "optimizers"} <= checkpoint.tensors.keys()
    return {f"{group}.{name}": t for group, tensors in checkpoint.tensors.items() for name, t in tensors.items()}


def assert_same_end(first: str | Path, second: str | Path) -> None:
    one, other = last_tensors(first), last_tensors(second)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def reported_steps(run: str | Path) -> list[int]:
    return [json.loads(line)["step"] for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def run_until(config: RunConfig, monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Run in this process, and receive a signal during an iteration."""
    train_step = Trainer.train_step

    def interrupted(self: Trainer, log: RunLog | None = None) -> None:
        train_step(self, log)
        if self.step == step:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(StopRequested):
            Trainer(config, quiet=True).run()


class Forked:
    """A program in a copy of this process, which has imported everything already; as `subprocess.Popen` of it."""

    def __init__(self, program: str, arguments: list[str], errors: Path) -> None:
        self.errors = errors
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(program, arguments))
        self.process.start()

    def _run(self, program: str, arguments: list[str]) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(self.errors, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.argv = ["-c", *arguments]
        exec(program, {"__name__": "__main__"})

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)

    def communicate(self, timeout: float) -> tuple[None, str]:
        self.process.join(timeout)
        return None, self.errors.read_text()


def start_slowly(config: RunConfig, file: Path, *, is_forked: bool = True) -> "subprocess.Popen[str] | Forked":
    """`diffdistill train` in another process; returns once it has a checkpoint."""
    file.write_text(dump_yaml(config))
    process: subprocess.Popen[str] | Forked
    if is_forked:
        process = Forked(SLOWLY, ["train", str(file)], file.with_name("errors.txt"))
    else:
        command = [sys.executable, "-c", SLOWLY, "train", str(file)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 300
    while not list_checkpoints(Path(config.run) / "checkpoints"):
        assert process.poll() is None, process.communicate(timeout=60)[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


@pytest.mark.parametrize(("method", "settings"), [("pretrain", PRETRAIN), ("dmd2", DMD2)])
@pytest.mark.parametrize("step", [1, 3])  # odd steps lie between two generator updates
def test_stopping_and_resuming_changes_nothing(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    settings: tuple[str, ...],
    step: int,
) -> None:
    whole, config = (make_config(method, *settings, "train.steps=6") for _ in range(2))
    Trainer(whole, quiet=True).run()
    run_until(config, monkeypatch, step)
    assert [c.name for c in list_checkpoints(Path(config.run) / "checkpoints")] == [f"step-{step:08d}"]
    Trainer(config, resume=True, quiet=True).run()
    assert_same_end(whole.run, config.run)
    assert reported_steps(config.run) == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_sees_the_images_and_noise_that_come_next(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    teacher_loss = Pretrain.teacher_loss

    def noted(self: Pretrain, players: Players, draw: Draw, batch: Batch) -> Loss:
        seen.append((batch.images, draw["eps"]))
        return teacher_loss(self, players, draw, batch)

    monkeypatch.setattr(Pretrain, "teacher_loss", noted)
    settings = ("train.global_batch_size=500", "train.steps=4")  # an epoch ends within the third step
    Trainer(make_config("pretrain", *settings), quiet=True).run()
    whole = seen.copy()
    seen.clear()
    config = make_config("pretrain", *settings)
    run_until(config, monkeypatch, 1)
    Trainer(config, resume=True, quiet=True).run()
    assert len(seen) == len(whole) == 4
    assert all(
        torch.equal(a, b) for one, other in zip(whole, seen, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_a_resumed_run_keeps_the_teacher_that_it_began_with(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = f"run={tmp_path / 'teacher'}"
    Trainer(make_config("pretrain", place, "train.steps=2"), quiet=True).run()
    whole, config = (make_config("dmd2", f"teacher={tmp_path / 'teacher'}") for _ in range(2))
    Trainer(whole, quiet=True).run()
    run_until(config, monkeypatch, 1)
    Trainer(make_config("pretrain", place, "train.steps=3"), resume=True, quiet=True).run()
    Trainer(config, resume=True, quiet=True).run()
    assert_same_end(whole.run, config.run)


LONG = ("train.steps=40", "train.checkpoint_every=10", "train.preview_every=17")


class SignalBetweenTwoLooks(list[int]):
    """No signal has arrived when the loop first looks; one has at every later look."""

    def __init__(self) -> None:
        super().__init__([signal.SIGTERM])
        self.looks = 0

    def __bool__(self) -> bool:
        self.looks += 1
        return self.looks > 1


def test_what_is_said_to_be_saved_is_saved_whenever_the_signal_arrives(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("pretrain")
    monkeypatch.setattr("diffdistill.training.trainer.stop_signals", lambda: nullcontext(SignalBetweenTwoLooks()))
    with pytest.raises(StopRequested, match="saved") as stopped:
        Trainer(config, quiet=True).run()
    found = list_checkpoints(Path(config.run) / "checkpoints")
    assert found, str(stopped.value)
    assert f"at step {int(found[-1].name.removeprefix('step-'))};" in str(stopped.value)


@pytest.fixture(scope="module")
def undisturbed(make_config: MakeConfig) -> str:
    """The folder of a run that nothing happened to."""
    config = make_config("dmd2", *LONG)
    Trainer(config, quiet=True).run()
    return config.run


@pytest.mark.parametrize(("number", "code", "is_forked"), [(signal.SIGTERM, 143, True), (signal.SIGINT, 130, False)])
def test_a_signal_saves_says_so_and_loses_nothing(
    make_config: MakeConfig, undisturbed: str, tmp_path: Path, number: signal.Signals, code: int, is_forked: bool
) -> None:
    config = make_config("dmd2", *LONG)
    process = start_slowly(config, tmp_path / "config.yaml", is_forked=is_forked)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    stopped_at = int(list_checkpoints(Path(config.run) / "checkpoints")[-1].name.removeprefix("step-"))
    assert 10 <= stopped_at < 40
    said = errors.splitlines()
    assert said[-2].startswith(f"stopped by {number.name} at step {stopped_at}; saved in {config.run}")
    assert said[-1] == f"to resume: diffdistill train {tmp_path / 'config.yaml'} --resume"
    assert "stopping after this step; press again to stop at once, without saving" in said
    assert "error:" not in errors
    Trainer(config, resume=True, quiet=True).run()
    assert_same_end(undisturbed, config.run)


def test_a_kill_at_a_random_moment_loses_nothing(make_config: MakeConfig, undisturbed: str, tmp_path: Path) -> None:
    config = make_config("dmd2", *LONG, "train.checkpoint_every=3")
    delay = random.SystemRandom().uniform(0, 1)
    process = start_slowly(config, tmp_path / "config.yaml")
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, f"it ended before the kill after {delay:.3f} s"
    Trainer(config, resume=True, quiet=True).run()
    assert_same_end(undisturbed, config.run)
    assert reported_steps(config.run) == list(range(1, 41)), f"killed after {delay:.3f} s"


def test_a_run_killed_before_its_first_checkpoint_begins_anew(make_config: MakeConfig) -> None:
    whole, config = make_config("dmd2"), make_config("dmd2")
    folder = Path(config.run)
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    Trainer(config, resume=True, quiet=True).run()
    Trainer(whole, quiet=True).run()
    assert_same_end(whole.run, config.run)
    assert reported_steps(config.run) == [1, 2, 3, 4]


def test_going_back_to_an_earlier_checkpoint_leaves_the_later_ones_behind(make_config: MakeConfig) -> None:
    config = make_config("pretrain", "train.checkpoint_every=1", "train.keep_checkpoints=4")
    Trainer(config, quiet=True).run()
    shorter = make_config("pretrain", f"run={config.run}", "train.steps=3", "train.keep_checkpoints=1")
    newest = Trainer(shorter, resume="step-00000002", quiet=True).run()
    assert newest.name == "step-00000003"
    assert list_checkpoints(newest.parent) == [newest]
    assert reported_steps(config.run) == [1, 2, 3]


def test_signals_may_be_collected_within_one_another() -> None:
    with stop_signals() as outer:
        with stop_signals() as inner:
            pass
        signal.raise_signal(signal.SIGTERM)
    assert (outer, inner) == ([signal.SIGTERM], [])
