"""What the trainer does for methods that ask for more than losses: followers, classes, statistics, earlier runs."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffdistill.data.order import DataOrder
from diffdistill.data.source import TensorImages
from diffdistill.diffusion.path import EDM
from diffdistill.distillation.method import Batch, Draw, Loss, Players, Problem, Update
from diffdistill.methods.dmd2 import DMD2
from diffdistill.settings.schema import UserError
from diffdistill.storage.checkpoint import list_checkpoints, load_checkpoint, select_group
from diffdistill.training.config import RunConfig
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def _follower(monkeypatch: pytest.MonkeyPatch) -> None:
    """DMD2 with a player that no update names: the generator as it was two steps before."""
    original = DMD2.players

    def players(self: DMD2, problem: Problem) -> dict[str, nn.Module]:
        made = original(self, problem)
        return made | {"earlier": deepcopy(made["generator"])}

    def after_step(self: DMD2, players: Players, stored: Mapping[str, Tensor], step: int) -> None:
        if step % 2 == 0:
            players.earlier.load_state_dict(players.generator.state_dict())

    monkeypatch.setattr(DMD2, "players", players)
    monkeypatch.setattr(DMD2, "after_step", after_step)


@pytest.mark.usefixtures("_follower")
def test_a_player_that_no_update_names_is_moved_by_the_method_alone(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config("dmd2"))
    start = deepcopy(trainer.assembly.plan.followers["earlier"].state_dict())
    trainer.train_step()
    after_one = deepcopy(trainer.assembly.plan.followers["earlier"].state_dict())
    trainer.train_step()
    after_two, generator = (
        trainer.assembly.plan.followers["earlier"].state_dict(),
        trainer.trained["generator"].state_dict(),
    )
    assert all(torch.equal(start[name], after_one[name]) for name in start)
    assert all(torch.equal(after_two[name], generator[name]) for name in start)
    assert any(not torch.equal(start[name], after_two[name]) for name in start)
    assert "earlier" not in trainer.assembly.optimizers
    assert not any(parameter.requires_grad for parameter in trainer.assembly.plan.followers["earlier"].parameters())


@pytest.mark.usefixtures("_follower")
def test_a_player_that_no_update_names_is_saved_and_restored(make_config: MakeConfig) -> None:
    config = make_config("dmd2", "train.steps=3")
    trainer = Trainer(config, quiet=True)
    trainer.run()
    resumed = Trainer(config, resume=True).assembly.plan.followers["earlier"].state_dict()
    kept = trainer.assembly.plan.followers["earlier"].state_dict()
    assert all(torch.equal(kept[name], resumed[name]) for name in kept)


def test_a_run_about_some_classes_sees_images_of_these_alone() -> None:
    labels = torch.arange(40) % 4
    source = TensorImages(labels.float().reshape(-1, 1, 1, 1), labels)
    order = DataOrder(source, 0, classes=(1, 3))
    seen = [order.take(first, 10, next_first=first + 10)[1] for first in (0, 10)]
    assert sorted(torch.cat(seen).tolist()) == [1] * 10 + [3] * 10  # type: ignore[arg-type]


def test_a_class_without_images_is_refused() -> None:
    source = TensorImages(torch.zeros(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UserError, match=r"no image of the classes \[7\]"):
        DataOrder(source, 0, classes=(7,))


def test_labels_are_drawn_from_the_classes_of_the_run_evenly() -> None:
    uniform = (torch.arange(9, dtype=torch.float64) + 0.5) / 9
    problem = Problem((1,), 10, EDM(), classes=(8, 2, 5))
    assert problem.label_of(uniform).tolist() == [8, 8, 8, 2, 2, 2, 5, 5, 5]


def test_all_classes_in_order_draw_as_no_choice_does() -> None:
    uniform = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen, free = Problem((1,), 10, EDM(), classes=tuple(range(10))), Problem((1,), 10, EDM())
    assert torch.equal(chosen.label_of(uniform), free.label_of(uniform))


def gathered(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """What every piece of the first step's batch was told about the whole."""
    told: list[Tensor | None] = []
    original = DMD2.fake_loss

    def statistics(self: DMD2, players: Players, draw: Draw, batch: Batch) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        return {"time": draw["fake t"]}

    def fake_loss(self: DMD2, players: Players, draw: Draw, batch: Batch) -> Loss:
        told.append(draw.get("all time"))
        return original(self, players, draw, batch)

    monkeypatch.setattr(DMD2, "statistics", statistics, raising=False)
    monkeypatch.setattr(DMD2, "fake_loss", fake_loss)
    critics = Update(("fake", "discriminator"), "fake_loss", statistics="statistics")
    monkeypatch.setattr(DMD2, "updates", (Update(("generator",), "generator_loss"), critics))
    Trainer(config).train_step()
    return told


def test_each_piece_of_a_batch_is_told_the_statistics_of_all(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("train.global_batch_size=8", "optimizers={default: {lr: 1e-3}}")
    first, second = gathered(make_config("dmd2", *common, "train.micro_batch_size=4"), monkeypatch)
    assert first is not None
    assert second is not None
    assert first.shape == (8,)
    assert len(first.unique()) == 8
    assert torch.equal(first, second)


def test_a_whole_batch_needs_no_first_pass(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gathered(make_config("dmd2", "optimizers={default: {lr: 1e-3}}"), monkeypatch) == [None]


def test_a_run_can_start_from_the_players_of_another(make_config: MakeConfig) -> None:
    first = make_config("dmd2", "train.steps=2")
    Trainer(first, quiet=True).run()
    second = Trainer(make_config("dmd2", f"init={first.run}", f"teacher={first.teacher}"))
    left = load_checkpoint(list_checkpoints(Path(first.run) / "checkpoints")[-1]).tensors
    averaged, fake = select_group(left["ema"], "generator"), select_group(left["players"], "fake")
    assert all(torch.equal(value, averaged[name]) for name, value in second.trained["generator"].state_dict().items())
    assert all(torch.equal(value, fake[name]) for name, value in second.trained["fake"].state_dict().items())


def test_a_new_run_begins_with_what_was_prepared(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def initialise(self: DMD2, players: Players, stored: Mapping[str, Tensor]) -> None:
        for parameter in players.generator.parameters():
            parameter.fill_(float(stored["value"]))

    monkeypatch.setattr(DMD2, "prepare", lambda self, problem, seed: {"value": torch.tensor(0.25)})
    monkeypatch.setattr(DMD2, "initialise", initialise)
    trainer = Trainer(make_config("dmd2", "train.steps=1", "optimizers={default: {lr: 1e-30}}"), quiet=True)
    trainer.run()
    assert trainer.ema is not None
    for module in (trainer.trained["generator"], trainer.ema.module):
        assert all(torch.allclose(p, torch.full_like(p, 0.25)) for p in module.parameters())


def test_a_teacher_that_is_not_kept_is_gone_after_preparation(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def loss(self: DMD2, players: Players, draw: Draw, batch: Batch) -> Loss:
        asked.append("teacher" in players)
        return Loss(sum(p.sum() for p in players.generator.parameters()))  # type: ignore[arg-type]

    monkeypatch.setattr(DMD2, "keeps_teacher", False)
    monkeypatch.setattr(DMD2, "generator_loss", loss)
    monkeypatch.setattr(DMD2, "updates", (Update(("generator",), "generator_loss"),))
    monkeypatch.setattr(
        DMD2, "prepare", lambda self, problem, seed: {"seen": torch.tensor(problem.teacher is not None)}
    )
    config = make_config("dmd2", "train.steps=1", "optimizers={default: {lr: 1e-3}}", "train.preview_every=1")
    trainer = Trainer(config, quiet=True)
    trainer.run()
    assert bool(trainer.assembly.iteration.stored["seen"])
    assert asked == [False]
    assert trainer.plan.teacher is None
    assert Trainer(config, resume=True).plan.teacher_source == trainer.plan.teacher_source
