"""What a run says while it runs: time left and speed first, at any width, and never long silent."""

import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from diffdistill.settings.terminal import Console
from diffdistill.training.config import RunConfig
from diffdistill.training.reports import log as log_module
from diffdistill.training.reports.log import RunLog
from diffdistill.training.reports.progress import (
    Heartbeat,
    Pace,
    in_words,
    make_bar,
    show_clock,
    show_speed,
)
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def paced(seconds: list[float], num_steps: int) -> tuple[Pace, Clock]:
    """A pace after steps that took so long."""
    clock = Clock()
    pace = Pace(0, num_steps, clock)
    for step, each in enumerate(seconds, 1):
        pace.begin(1)
        clock.now += each
        pace.finish(step)
    return pace, clock


def test_the_first_step_counts_only_while_there_is_no_other() -> None:
    assert paced([30.0], 10)[0].seconds_each == 30
    pace, clock = paced([30.0, 2.0, 4.0], 10)
    assert pace.seconds_each == 3
    assert pace.seconds_left == 21
    clock.now += 5  # of the fourth step
    assert pace.seconds_left == 16


def test_micro_batches_show_progress_before_the_first_step_is_done() -> None:
    clock = Clock()
    pace = Pace(0, 100, clock)
    pace.begin(256)
    assert pace.show() == "starting, 0/100"
    for _ in range(64):
        clock.now += 0.5
        pace.advance()
    assert pace.seconds_each == 128
    assert pace.show() == "3:32:48 left, 128 s/it, 0/100 (64/256 of a step)"


def test_the_whole_run_is_told_in_words_once_it_is_known_and_long() -> None:
    assert paced([4.0] * 2, 39_000)[0].total is None, "two steps are too few, eight seconds too short"
    assert paced([4.0] * 3, 39_000)[0].total == "39,000 steps at 4.0 s: 43 hours"
    assert paced([20.0], 1_000)[0].total == "1,000 steps at 20.0 s: 6 hours"
    assert paced([0.1] * 5, 2_000)[0].total is None, "a run of minutes needs no warning"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.196, "5.1 it/s"), (1.0, "1.0 it/s"), (4.0, "4.0 s/it"), (304.2, "304 s/it")]
)
def test_a_slow_step_is_told_in_seconds(seconds: float, shown: str) -> None:
    assert show_speed(seconds) == shown


@pytest.mark.parametrize(
    ("seconds", "clock", "words"),
    [
        (75, "0:01:15", "75 seconds"),
        (3725, "1:02:05", "62 minutes"),
        (156_000, "43:20:00", "43 hours"),
        (1_036_800, "12 days", "12 days"),
    ],
)
def test_times_are_written_in_the_unit_that_people_count_in(seconds: float, clock: str, words: str) -> None:
    assert show_clock(seconds) == clock
    assert in_words(seconds) == words


@pytest.mark.parametrize("width", [40, 80, 160])
def test_time_left_and_speed_stay_at_every_width(width: int) -> None:
    pace, _ = paced([4.0] * 3, 39_000)
    out = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    bar = make_bar(pace, "dmd2 runs/with/a/rather/long/name/of/its/own", out, is_live=True)
    bar.update(bar.task_ids[0], losses="generator/loss 0.1234 fake/loss 0.5678")
    (line,) = [text.rstrip() for text in render(bar.get_renderable(), width).splitlines() if text.strip()]
    assert line.startswith("43:19:48 left, 4.0 s/it, 3/39000")
    assert len(line) <= width
    assert ("generator/loss 0.1234" in line) == (width >= 80)


def render(what: object, width: int) -> str:
    out = Console(file=io.StringIO(), width=width, color_system=None)
    out.print(what)
    text: str = out.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_a_run_without_a_terminal_is_never_silent_for_long() -> None:
    beats: list[float] = []
    heart = Heartbeat(lambda: beats.append(time.monotonic()), seconds=0.05)
    heart.start()
    until = time.monotonic() + 5
    while len(beats) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    heart.stop()
    assert len(beats) >= 2
    silent = Heartbeat(beats.clear, seconds=60)
    silent.start()
    silent.stop()
    assert beats, "nothing was silent for a minute"


def test_a_slow_step_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "Heartbeat", lambda beat: Heartbeat(beat, seconds=0.01))
    with RunLog(tmp_path, title="dmd2 runs/x", start_step=0, num_steps=10) as log:
        log.begin(8)
        log.part()
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert any("0/10 (1/8 of a step)  dmd2 runs/x" in line for line in lines), lines


def test_losses_stand_in_one_order_the_students_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"fake/loss": 0.2, "generator/loss": 0.1, "discriminator/loss": 0.3, "fake/gradient_norm": 1.0}
    with RunLog(tmp_path, title="dmd2 runs/x", start_step=0, num_steps=4, first="generator") as log:
        log.report(1, 8, values)
        log.report(2, 16, dict(reversed(values.items())))
    first, second = capsys.readouterr().err.splitlines()
    for line in (first, second):
        assert line.endswith("dmd2 runs/x  generator/loss 0.1 discriminator/loss 0.3 fake/loss 0.2")
        assert " left, " in line.split("dmd2")[0]


def test_a_run_that_goes_on_says_from_which_step(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config("pretrain", "train.steps=2")
    Trainer(config).run()
    assert "goes on" not in capsys.readouterr().err
    longer = make_config("pretrain", "train.steps=3", f"run={config.run}")
    Trainer(longer, resume=True).run()
    assert f"{config.run}: resumed at step 2 of 3" in capsys.readouterr().err.splitlines()
    Trainer(longer, resume=True).run()
    assert f"{config.run}: finished, 3 steps" in capsys.readouterr().err.splitlines()
    Trainer(longer, resume=True, quiet=True).run()
    assert capsys.readouterr().err == ""


def test_every_micro_batch_of_every_update_is_counted(make_config: MakeConfig) -> None:
    parts: list[int] = []
    trainer = Trainer(make_config("dmd2", "train.steps=1", "train.global_batch_size=8", "train.micro_batch_size=2"))

    class Counted(log_module.Silence):
        def begin(self, parts_of_step: int) -> None:
            parts.append(parts_of_step)

        def part(self) -> None:
            parts.append(1)

    trainer.train_step(Counted())
    updates = [update for update in trainer.method.updates if update.is_due(0, 0)]
    assert len(updates) >= 2
    assert parts == [4 * len(updates)] + [1] * 4 * len(updates)
