"""Weights that are not finite are never saved, push out no good ones, and are not loaded."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from support.fleet import run_together
from torch import Tensor, nn

from diffdistill.distillation.method import Update
from diffdistill.distributed.stopping import TrainingError
from diffdistill.models.load import load_model
from diffdistill.settings.schema import UserError
from diffdistill.storage.checkpoint import Checkpoint, list_checkpoints, load_strictly, save_checkpoint
from diffdistill.storage.finite import find_dead
from diffdistill.training.config import RunConfig
from diffdistill.training.nonfinite import NonfiniteGuard
from diffdistill.training.trainer import Trainer


def names(config: RunConfig) -> list[int]:
    return [int(found.name[5:]) for found in list_checkpoints(Path(config.run) / "checkpoints")]


@pytest.mark.parametrize(("value", "is_dead"), [(1.0, False), (1e18, False), (1e20, True), (torch.nan, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_dead(value: float, is_dead: bool, dtype: torch.dtype) -> None:
    tensors = {"good": torch.ones(3), "one": torch.tensor([0.0, value], dtype=dtype), "count": torch.tensor([2**40])}
    assert find_dead(tensors) == (["one"] if is_dead else [])
    doubles = {str(number): torch.tensor([number, 1.0]).double() for number in (1e20, torch.inf, -torch.inf, torch.nan)}
    assert find_dead(doubles) == ["inf", "-inf", "nan"]
    assert find_dead({"none": torch.empty(0), "empty": torch.empty(3, device="meta")}) == []


@pytest.mark.parametrize("rate", ["1e20", "1e38"])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_destroying_rate_ends_no_run_as_done_and_saves_nothing(
    make_config: MakeConfig, rate: str, steps: int
) -> None:
    config = make_config("pretrain", f"train.steps={steps}", f"optimizers.teacher={{lr: {rate}}}")
    with pytest.raises(TrainingError, match="weights are not finite"):
        Trainer(config, quiet=True).run()
    assert names(config) == []


def test_a_run_whose_last_updates_were_skipped_is_not_done(make_config: MakeConfig) -> None:
    destroyed = make_config("pretrain", "train.steps=4", "optimizers.teacher={lr: 1e15}", "train.max_skips=50")
    for resume in (False, True):  # again with nothing left to do
        with pytest.raises(TrainingError, match=r"step 4: .* incomplete: its last .*teacher_loss \(3 in a"):
            Trainer(destroyed, quiet=True, resume=resume).run()


def test_one_update_that_is_skipped_at_the_end_is_said(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(make_config("pretrain", "train.steps=1", "trackers=[]"))
    passed = NonfiniteGuard.passed

    def skipped(self: NonfiniteGuard, update: Update) -> None:
        passed(self, update)
        self.skips[update.loss] = 1

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(NonfiniteGuard, "passed", skipped)
        trainer.run()
    assert "step 1: the last update was skipped: teacher_loss (1 in a row)" in capsys.readouterr().err


def test_good_checkpoints_stay_when_a_later_step_destroys_the_weights(make_config: MakeConfig) -> None:
    settings = ("train.checkpoint_every=1", "train.keep_checkpoints=2", "train.max_skips=50")
    config = make_config("pretrain", "train.steps=3", *settings)
    Trainer(config, quiet=True).run()
    assert names(config) == [2, 3]
    longer = make_config("pretrain", "train.steps=9", f"run={config.run}", *settings, "optimizers.teacher={lr: 1e20}")
    with pytest.raises(TrainingError, match=r"step 4: weights are not finite \(players: teacher\."):
        Trainer(longer, resume=True, quiet=True, allow_changes=True).run()
    assert names(config) == [2, 3]
    back = make_config("pretrain", "train.steps=5", f"run={config.run}", *settings)
    Trainer(back, resume=True, quiet=True, allow_changes=True).run()
    assert names(config) == [4, 5]


def test_nothing_is_rotated_away_while_updates_are_skipped(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(
        make_config("pretrain", "train.steps=8", "train.checkpoint_every=1", "train.keep_checkpoints=1"), quiet=True
    )
    name = trainer.method.updates[0].loss
    loss: Any = getattr(type(trainer.method), name)

    def broken(*arguments: Any, **more: Any) -> Any:
        found = loss(*arguments, **more)
        return replace(found, total=found.total * torch.nan) if 2 <= trainer.step < 6 else found

    monkeypatch.setattr(type(trainer.method), name, broken)
    kept = []
    real = save_checkpoint

    def saved(*arguments: Any, **options: Any) -> Path:
        found = real(*arguments, **options)
        kept.append(names(trainer.config))
        return found

    monkeypatch.setattr("diffdistill.training.trainer.save_checkpoint", saved)
    trainer.run()
    assert kept == [[1], [2], [2, 3], [2, 3, 4], [2, 3, 4, 5], [2, 3, 4, 5, 6], [7], [8]]


def dead_in_one(rank: int, config: RunConfig) -> str:
    trainer = Trainer(config, quiet=True)
    if trainer.processes.rank == rank:
        with torch.no_grad():
            next(trainer.trained["teacher"].parameters()).fill_(torch.nan)
    with pytest.raises(TrainingError) as raised:
        trainer.save()
    return str(raised.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_dead_weights_in_one_process_stop_all(make_config: MakeConfig, rank: int) -> None:
    config = make_config("pretrain", "train.steps=1")
    told = run_together(2, partial(dead_in_one, rank, config))
    assert all("weights are not finite" in text for text in told)
    assert names(config) == []


def test_one_nan_in_a_model_is_named_when_it_is_loaded(make_config: MakeConfig, tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    weights: dict[str, Tensor] = {**module.state_dict(), "weight": torch.tensor([[1.0, torch.nan], [0.0, 0.0]])}
    with pytest.raises(UserError, match="here: its weights are not finite: weight"):
        load_strictly(module, weights, origin="here")
    config = make_config("pretrain", "train.steps=1")
    done = Trainer(config, quiet=True)
    tensors = {group: dict(found) for group, found in done.assembly.state.tensors().items()}
    for group in ("players", "ema"):
        first = next(iter(tensors[group]))
        tensors[group][first] = torch.full_like(tensors[group][first], torch.nan)
    save_checkpoint(Path(config.run) / "checkpoints", Checkpoint(1, tensors, done._settings), keep=1)
    with pytest.raises(UserError, match="step-00000001: its weights are not finite"):
        load_model(config.run)
    with pytest.raises(UserError, match="step-00000001: its weights are not finite"):
        Trainer(make_config("dmd2", f"teacher={config.run}"), quiet=True)
    longer = make_config("pretrain", "train.steps=2", f"run={config.run}")
    with pytest.raises(UserError, match=r"step-00000001 \(teacher\): its weights are not finite"):
        Trainer(longer, resume=True, quiet=True).run()
