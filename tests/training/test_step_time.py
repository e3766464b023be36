"""doctor times one micro-batch of each update and multiplies."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffdistill.commands import doctor_config
from diffdistill.commands.doctor_config import examine_config
from diffdistill.diffusion.threads import threads
from diffdistill.distillation.method import Update, first_with_all, phase_starts
from diffdistill.methods.sid import SiD
from diffdistill.training import step_time
from diffdistill.training.assembly import assemble
from diffdistill.training.config import RunConfig
from diffdistill.training.iteration import Iteration
from diffdistill.training.memory.prediction import _step, plan_memory, saved_growth
from diffdistill.training.plan import plan
from diffdistill.training.reports.progress import show_step_time
from diffdistill.training.step_time import StepTime, _scaled, _Timed, measure_step_time, one_micro_batch
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


def test_a_step_is_the_mean_of_the_runs_phases() -> None:
    updates = (Update((), "fake"), Update((), "generator", every=2, start=10, more_from_images=120))
    assert phase_starts(updates, batch_size=4) == [0, 10, 30]
    assert phase_starts(updates, batch_size=4, num_steps=30) == [0, 10]
    assert first_with_all(updates, batch_size=4) == 30
    assert first_with_all(updates, batch_size=4, start=9) == 10
    timed = StepTime(
        {"fake": 1.0, "generator": 8.0},
        {"fake": 0.0, "generator": 0.0},
        updates,
        num_micro_batches=1,
        earlier=((10, {"fake": 1.0}), (20, {"fake": 1.0, "generator": 4.0})),
        steps=40,
    )
    assert timed.step == pytest.approx((10 * 1.0 + 20 * (1 + 4 / 2) + 10 * (1 + 8 / 2)) / 40)


def test_a_gan_that_joins_later_is_measured_and_weighed(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, bool]] = []
    loss = SiD.generator_loss

    def noted(self: SiD, players: Any, draw: Any, batch: Any) -> Any:
        asked.append((len(draw["t"]), bool(draw["is_gan_on"])))
        return loss(self, players, draw, batch)

    monkeypatch.setattr(SiD, "generator_loss", noted)
    late = "method.gan_start_images=160", "method.gan_weight=0.01", "train.global_batch_size=16", "train.steps=40"
    assembly = assemble(plan(make_config("sid", *late), resume=None))
    timed = measure_step_time(assembly)
    assert {is_on for _, is_on in asked} == {False, True}
    assert [steps for steps, _ in timed.earlier] == [10]
    assert timed.steps == 40
    asked.clear()
    never = measure_step_time(assemble(plan(make_config("sid", *late, "train.steps=10"), resume=None)))
    assert not never.earlier
    assert {is_on for _, is_on in asked} == {False}, "a run that ends before does not pay for it"
    asked.clear()
    plan_memory(assembly.plan, assembly.iteration)
    assert {is_on for _, is_on in asked} == {True}, "memory is that of the dearest steps"


def clocks(*, each: float) -> Callable[[], float]:
    """A clock that goes on by `each` whenever it is asked."""
    ticks = itertools.count(0)
    return lambda: each * next(ticks)


def test_micro_batches_are_multiplied_and_warming_up_is_left_out(make_config: MakeConfig) -> None:
    config = make_config("dmd2", "train.global_batch_size=16", "train.micro_batch_size=2")
    assembly = assemble(plan(config, resume=None))
    ticks = itertools.chain([0], range(1, 1000, 100), itertools.count(1000))  # the first pass is slow
    timed = measure_step_time(assembly, budget=1e9, clock=lambda: float(next(ticks)), spent=clocks(each=1))
    assert timed.num_micro_batches == 8
    assert timed.num_measured == 2
    assert set(timed.micro_batches.values()) == {1.0}
    assert set(timed.after.values()) == {1.0}
    assert timed.reading == 1.0, "of each micro-batch, once a step for all updates"
    assert timed.step == 8 * 1.0 + sum((8 * 1.0 + 1.0) / update.every for update in timed.updates)


def test_of_a_slow_micro_batch_a_few_samples_are_timed_once(make_config: MakeConfig, losses: list[str]) -> None:
    assembly = assemble(plan(make_config("dmd2", "train.global_batch_size=8"), resume=None))
    timed = measure_step_time(assembly, budget=6.0, clock=clocks(each=100), spent=clocks(each=100))
    assert len(losses) == len(timed.updates)
    assert timed.num_measured == 2
    assert set(timed.micro_batches.values()) == {400.0}, "100 seconds of 2 of 8 samples"


def test_what_a_sample_adds_is_read_off_two_sizes() -> None:
    few, many = _Timed([0.0] * 2, {"loss": [9.0, 2.0]}), _Timed([0.0] * 2, {"loss": [9.0, 5.0]})
    assert _scaled(few, many, 8, 20) == {"loss": 2.0 + 0.5 * 18}
    assert _scaled(few, many, 20, 20) == {"loss": 5.0}
    assert _scaled(few, few, 2, 20) == {"loss": 20.0}
    cold = _Timed([0.0], {"loss": [9.0]})
    assert _scaled(cold, many, 8, 20) == {"loss": 12.5}, "of a pass that warmed up nothing can be read off"


def test_doctor_says_where_other_programs_take_the_cpu(make_config: MakeConfig) -> None:
    config = make_config("dmd2", "train.steps=100")
    updates = config.method.updates
    each = dict.fromkeys((update.loss for update in updates), 2.0)
    timed = StepTime(each, dict.fromkeys(each, 0.0), updates, 1, steps=100, num_measured=4, cpu_share=0.25)
    step, idle = timed.step, timed.step / 4
    told = doctor_config._time(config, timed, 4).text
    assert told.startswith(f"100 steps at {show_step_time(step)}")
    assert f"on an idle one {show_step_time(idle)}" in told
    assert "idle" not in doctor_config._time(config, replace(timed, cpu_share=0.95), 4).text
    assert "by 2 of its samples" in doctor_config._time(config, replace(timed, num_measured=2), 4).text


def test_a_config_is_counted_only_where_the_time_allows(
    make_config: MakeConfig, losses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("dmd2")
    monkeypatch.setattr(step_time, "own_seconds", lambda train: 0.0)
    assert "generator" in {finding.topic for finding in examine_config(config)}
    seconds = itertools.count(0, 3.0)
    monkeypatch.setattr(step_time, "own_seconds", lambda train: next(seconds))
    topics = {finding.topic for finding in examine_config(config)}
    assert "generator" not in topics
    assert {"memory (predicted)", "time (predicted)", "disk"} <= topics


def test_doctor_does_not_walk_through_a_large_batch(make_config: MakeConfig, losses: list[str]) -> None:
    config = make_config("dmd2", "train.steps=39000", "train.global_batch_size=2048", "train.micro_batch_size=2")
    said = {finding.topic: finding.text for finding in examine_config(config)}
    assert len(losses) < 40, "a step of it has 1024 micro-batches"
    assert said["time (predicted)"].startswith("39,000 steps at ")
    assert " times 1024" in said["time (predicted)"]
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
    assert first_with_all(updates, batch_size=4, num_steps=23) == 20
    assert first_with_all(updates, batch_size=4, num_steps=12) == 0
    late = (Update((), "a", every=5, start=8),)
    assert [first_with_all(late, batch_size=4, num_steps=n) for n in (20, 10, 5)] == [10, 5, 0]
    assert first_with_all((*late, Update((), "b", every=7, start=10)), batch_size=4, num_steps=10) == 5
    asked: list[int] = []
    make = Iteration.micro_batch

    def noted(self: Iteration, step: int, *rest: Any) -> Any:
        asked.append(step)
        return make(self, step, *rest)

    monkeypatch.setattr(Iteration, "micro_batch", noted)
    config = make_config(
        "rcm", "method.warmup=7", "method.fake_updates=2", "train.micro_batch_size=2", "train.steps=20"
    )
    said = {finding.topic: finding.text for finding in examine_config(config)}
    assert set(asked) <= {0, 8, 9}, "before the warm-up and after it, at a turn of both"
    assert {0, 8} <= set(asked)
    assert "as predicted" in said["fake"], "it steps as well where the step is counted"


def test_matching_that_begins_after_a_warm_up_needs_the_memory_that_it_needs_without_one(
    make_config: MakeConfig,
) -> None:
    found = []
    for warmup in (0, 100):
        assembly = assemble(plan(make_config("rcm", f"method.warmup={warmup}", "train.steps=200"), resume=None))
        found.append(saved_growth(assembly.plan, assembly.iteration)["generator_loss"].at(64))
    assert found[1] == pytest.approx(found[0], rel=0.2), "the calls before the one with a gradient are drawn"


def test_samples_that_belong_together_are_measured_together(make_config: MakeConfig) -> None:
    groups = "method.samples_per_condition=4", "train.global_batch_size=16", "train.num_threads=1"
    config = make_config("diversity", *groups)
    said = {finding.topic: finding.text for finding in examine_config(config)}
    assert "time (predicted)" in said
    assembly = assemble(plan(config, resume=None))
    timed = measure_step_time(assembly, budget=6.0, clock=clocks(each=100), spent=clocks(each=100))
    assert timed.num_measured == 8


def test_doctor_gives_the_threads_back_between_its_findings(make_config: MakeConfig) -> None:
    with threads(2):
        findings = examine_config(make_config("dmd2", "train.num_threads=1"))
        for _ in findings:
            assert torch.get_num_threads() == 2


def test_memory_is_of_a_step_that_the_run_reaches(make_config: MakeConfig) -> None:
    gan = ("method.gan_weight=0.01", "method.gan_start_images=40", "train.global_batch_size=4")
    reaches, ends_before = (plan(make_config("sid", *gan, f"train.steps={n}"), resume=None) for n in (11, 10))
    assert (_step(reaches), _step(ends_before)) == (10, 0)
