"""doctor times one micro-batch of each update and multiplies."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from diffdistill.commands.doctor import examine_config
from diffdistill.distillation.method import Update, first_with_all
from diffdistill.training.assembly import assemble
from diffdistill.training.config import RunConfig
from diffdistill.training.iteration import Iteration
from diffdistill.training.memory.prediction import saved_growth
from diffdistill.training.plan import plan
from diffdistill.training.step_time import StepTime, measure_step_time, one_micro_batch
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The losses that are computed, by name."""
    called: list[str] = []
    loss = Iteration.loss

    def counted(self: Iteration, update: object, micro: object) -> object:
        called.append(update.loss)  # type: ignore[attr-defined]
        return loss(self, update, micro)  # type: ignore[arg-type]

    monkeypatch.setattr(Iteration, "loss", counted)
    return called


def test_an_update_that_is_due_every_fifth_step_counts_a_fifth(make_config: MakeConfig) -> None:
    updates = plan(make_config("dmd2", "method.fake_updates=5"), resume=None).method.updates
    every = {update.loss: update.every for update in updates}
    assert sorted(every.values()) == [1, 5]
    timed = StepTime(dict.fromkeys(every, 2.0), dict.fromkeys(every, 1.0), updates, num_micro_batches=4)
    assert timed.step == 9 + 9 / 5


def test_micro_batches_are_multiplied_and_warming_up_is_left_out(make_config: MakeConfig) -> None:
    config = make_config("dmd2", "train.global_batch_size=16", "train.micro_batch_size=2")
    assembly = assemble(plan(config, resume=None))
    ticks = itertools.chain(
        [0, 0, 50, 50, 150, 250, 250, 350, 450], itertools.count(451)
    )  # two updates: the first pass is slow
    timed = measure_step_time(assembly, budget=1e9, clock=lambda: float(next(ticks)))
    assert timed.num_micro_batches == 8
    assert set(timed.micro_batches.values()) == {1.0}
    assert set(timed.after.values()) == {1.0}
    assert timed.reading == 1.0, "of each micro-batch, once a step for all updates"
    assert timed.step == 8 * 1.0 + sum((8 * 1.0 + 1.0) / update.every for update in timed.updates)


def test_a_slow_micro_batch_is_taken_once(make_config: MakeConfig, losses: list[str]) -> None:
    assembly = assemble(plan(make_config("dmd2"), resume=None))
    ticks = itertools.count(0, 100)
    timed = measure_step_time(assembly, budget=6.0, clock=lambda: float(next(ticks)))
    assert len(losses) == len(timed.updates)
    assert set(timed.micro_batches.values()) == {100.0}


def test_doctor_does_not_walk_through_a_large_batch(make_config: MakeConfig, losses: list[str]) -> None:
    config = make_config("dmd2", "train.steps=39000", "train.global_batch_size=2048", "train.micro_batch_size=2")
    said = {finding.topic: finding.text for finding in examine_config(config)}
    assert len(losses) < 40, "a step of it has 1024 micro-batches"
    assert said["time (predicted)"].startswith("39,000 steps at ")
    assert said["time (predicted)"].endswith(" times 1024")
    assert "3 checkpoints of " in said["disk"]
    assert "as predicted" in said["generator"]


def test_one_micro_batch_is_a_step_of_the_same_memory(make_config: MakeConfig, losses: list[str]) -> None:
    config = make_config("dmd2", "train.global_batch_size=64", "train.micro_batch_size=4")
    small = one_micro_batch(assemble(plan(config, resume=None)))
    assert small.plan.config.train == replace(config.train, global_batch_size=4)
    Trainer(small, quiet=True).train_step()
    assert len(losses) == len(small.plan.method.updates)


def test_an_update_is_measured_in_the_first_iteration_in_which_all_are_due(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = (Update((), "a", every=5), Update((), "b", every=2, start=12), Update((), "c", start_images=90))
    assert first_with_all(updates, batch_size=4) == 30
    assert first_with_all(updates[:2], batch_size=4) == 20
    assert first_with_all(updates[:1], batch_size=4) == 0
    asked: list[int] = []
    make = Iteration.micro_batch

    def noted(self: Iteration, step: int, *rest: Any) -> Any:
        asked.append(step)
        return make(self, step, *rest)

    monkeypatch.setattr(Iteration, "micro_batch", noted)
    config = make_config("rcm", "method.warmup=7", "method.fake_updates=2", "train.micro_batch_size=2")
    said = {finding.topic: finding.text for finding in examine_config(config)}
    assert set(asked) <= {8, 9}
    assert "as predicted" in said["fake"], "it steps as well where the step is counted"


def test_matching_that_begins_after_a_warm_up_needs_the_memory_that_it_needs_without_one(
    make_config: MakeConfig,
) -> None:
    found = []
    for warmup in (0, 100):
        assembly = assemble(plan(make_config("rcm", f"method.warmup={warmup}"), resume=None))
        found.append(saved_growth(assembly.plan, assembly.iteration)["generator_loss"].at(64))
    assert found[1] == pytest.approx(found[0], rel=0.2), "the calls before the one with a gradient are drawn"
