"""A tiny network is sampled on one CPU thread, by every command that samples, and torch's number comes back."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.method_matrix import origin, train
from torch import nn
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.threads import TINY, is_tiny, sampling_threads, threads
from diffdistill.export import verify
from diffdistill.inference.draw import sample_images
from diffdistill.models.load import _threads_of, load_model
from diffdistill.networks.unet import UNetConfig
from diffdistill.training.config import RunConfig
from diffdistill.training.iteration import Iteration
from diffdistill.training.trainer import Trainer

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-step student of digits."""
    home = tmp_path_factory.mktemp("threads")
    return train("sid", origin("mlp", "sid", home / "teacher"), home / "student")


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user who says nothing, on a machine where torch takes two threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with threads(2):
        yield


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The threads within denoisers' forward passes."""
    numbers: set[int] = set()
    forward = Denoiser.forward

    def noted(self: Denoiser, *parts: Any, **named: Any) -> Any:
        numbers.add(torch.get_num_threads())
        return forward(self, *parts, **named)

    monkeypatch.setattr(Denoiser, "forward", noted)
    return numbers


def denoiser(channels: tuple[int, ...] = (8, 8), num_threads: int | None = None) -> Denoiser:
    network = UNetConfig(channels=channels, attention=(False, False), head_channels=8)
    made = Denoiser(network.build(SHAPE, 0, 0.0), EDM(), "edm")
    made.run_with(num_threads=num_threads)
    return made


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    "command",
    [
        ("sample", "{run}", "--count", "2", "--teacher", "--out", "{out}.png"),
        ("sample", "{run}", "--count", "2", "--first-steps", "1", "--estimates", "--out", "{out}.png"),
        ("eval", "{run}", "--repeats", "1"),
    ],
    ids=["sample", "estimates", "eval"],
)
def test_a_command_samples_a_tiny_network_on_one_thread(
    command: tuple[str, ...], run: Path, tmp_path: Path, seen: set[int]
) -> None:
    done = CliRunner().invoke(app, [part.format(run=run, out=tmp_path / "out") for part in command])
    assert done.exit_code == 0, done.output
    assert seen == {1}
    assert torch.get_num_threads() == 2, "the process has its threads back"


@pytest.mark.usefixtures("two")
def test_an_export_samples_it_on_one_thread_and_is_checked_on_as_many(
    run: Path, tmp_path: Path, seen: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    start = verify.subprocess.run

    def noted(*parts: Any, **named: Any) -> Any:
        given.append(named["env"]["OMP_NUM_THREADS"])
        return start(*parts, **named)

    monkeypatch.setattr(verify.subprocess, "run", noted)
    test_a_command_samples_a_tiny_network_on_one_thread(("export", "{run}", "--out", "{out}"), run, tmp_path, seen)
    assert given == ["1"]


def test_the_users_number_stands(run: Path, seen: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with threads(2):
        sample_images(load_model(run), count=1)
    assert seen == {2}


@pytest.mark.usefixtures("two")
def test_the_runs_number_comes_before_the_size_and_torchs_before_both() -> None:
    assert sampling_threads(denoiser(), SHAPE) == 1
    assert sampling_threads(denoiser(num_threads=2), SHAPE) == 2
    assert sampling_threads(denoiser(num_threads=64), SHAPE) == 2
    assert sampling_threads(denoiser(num_threads=1), (1, 4096, 4096)) == 1


@pytest.mark.usefixtures("two")
def test_a_larger_network_keeps_all_threads() -> None:
    model = nn.Linear(1000, 1000, bias=False)
    assert is_tiny(model, (3, 25, 40)), TINY
    assert not is_tiny(model, (3, 25, 41))
    assert sampling_threads(model, (3, 25, 41)) == 2


@pytest.mark.usefixtures("two")
def test_a_run_keeps_its_number_for_who_samples_it(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config("pretrain", "train.num_threads=1", "train.steps=1")
    assert load_model(Trainer(config, quiet=True).run()).denoiser.runtime.num_threads == 1


@pytest.mark.usefixtures("two")
def test_training_in_a_program_gives_the_threads_back(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: set[int] = set()
    loss = Iteration.loss

    def noted(self: Iteration, *parts: Any) -> Any:
        numbers.add(torch.get_num_threads())
        return loss(self, *parts)

    monkeypatch.setattr(Iteration, "loss", noted)
    trainer = Trainer(make_config("dmd2", "train.num_threads=1", "train.steps=2"), quiet=True)
    assert torch.get_num_threads() == 2
    trainer.train_step()
    assert torch.get_num_threads() == 2
    trainer.run()
    assert torch.get_num_threads() == 2
    assert numbers == {1}


@pytest.mark.parametrize("config", [None, {}, {"train": [1]}, {"train": None}, {"train": {"num_threads": True}}])
def test_a_checkpoint_that_says_no_number_has_none(config: object) -> None:
    assert _threads_of({"config": config}) is None
    assert _threads_of({"config": {"train": {"num_threads": 3}}}) == 3


def test_no_number_leaves_what_others_set() -> None:
    before = torch.get_num_threads()
    try:
        with threads(None):
            torch.set_num_threads(3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
