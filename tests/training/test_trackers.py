"""Trackers that fail in every way, secrets, and the curves that need no tracker."""

import errno
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking
from matplotlib.figure import Figure
from PIL import Image

from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import hide_secrets
from diffdistill.settings.values import dump_yaml
from diffdistill.training.config import RunConfig, json_schema, load_config
from diffdistill.training.reports import curves, log, trackers
from diffdistill.training.reports.curves import draw_curves, read_metrics, sections
from diffdistill.training.reports.health import BANDS
from diffdistill.training.reports.trackers import Trackers, flat_settings
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]

SECRET = "s3cret-0123456789"


class Recorder(tracking.GeneralTracker):
    """Keeps what it is given."""

    name = "recorder"
    requires_logging_directory = False
    main_process_only = False
    made: "list[Recorder]"

    def __init__(self, run_name: str, **_: object) -> None:
        super().__init__()
        self.told: list[tuple[str, Any, Any]] = [("start", run_name, None)]
        self.made.append(self)

    @property
    def tracker(self) -> object:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(("settings", values, None))

    def log(self, values: dict[str, Any], step: int | None = None, **_: object) -> None:
        self.told.append(("log", values, step))

    def log_images(self, values: dict[str, Any], step: int | None = None, **_: object) -> None:
        self.told.append(("images", values, step))

    def finish(self) -> None:
        self.told.append(("finish", None, None))


class Raiser(Recorder):
    name = "raiser"

    def log(self, values: dict[str, Any], step: int | None = None, **_: object) -> None:
        raise ConnectionError(f"no route to https://me:{SECRET}@host/?api_key={SECRET}")


class Hanger(Recorder):
    name = "hanger"
    release: threading.Event

    def log(self, values: dict[str, Any], step: int | None = None, **_: object) -> None:
        self.release.wait(30)


class Unstartable(Recorder):
    name = "unstartable"

    def __init__(self, run_name: str, **_: object) -> None:
        raise SystemExit(3)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The trackers above under their names; nothing waits long; what hangs is let go at the end."""
    for kind in (Recorder, Raiser, Hanger, Unstartable):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, kind.name, kind)
    monkeypatch.setattr(Recorder, "made", [], raising=False)
    monkeypatch.setattr(Hanger, "release", threading.Event(), raising=False)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.3)
    yield
    Hanger.release.set()


def run(config: RunConfig) -> Path:
    Trainer(config, quiet=True).run()
    return Path(config.run)


def test_the_names_are_those_of_accelerate() -> None:
    known = [str(name) for name in tracking.LOGGER_TYPE_TO_CLASS]
    assert trackers.tracker_names() == known
    assert json.loads(json_schema())["else"]["properties"]["trackers"]["items"]["enum"][: len(known) - 4] == known[:-4]


def test_tensorboard_alone_is_the_default(make_config: MakeConfig) -> None:
    assert make_config("pretrain").trackers == ("tensorboard",)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("[tensorbord]", "trackers[0] = 'tensorbord': unknown; did you mean 'tensorboard'? (choices: "),
        ("[wandb, wandb]", "trackers: name each tracker once, not wandb, wandb"),
        ("[1]", "trackers[0] = 1: input should be a valid string"),
    ],
)
def test_a_tracker_that_accelerate_does_not_know_is_refused_with_the_choices(
    make_config: MakeConfig, tmp_path: Path, value: str, fault: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(make_config("pretrain")))
    with pytest.raises(UserError) as caught:
        load_config(file, [f"trackers={value}"])
    assert fault in str(caught.value)


def test_a_tracker_gets_settings_numbers_and_previews(make_config: MakeConfig) -> None:
    folder = run(make_config("pretrain", "trackers=[recorder]", "train.steps=2", "train.preview_every=2"))
    (recorder,) = Recorder.made
    kinds = [kind for kind, _, _ in recorder.told]
    assert kinds == ["start", "settings", "log", "log", "images", "finish"]
    assert recorder.told[0][1] == trackers.PROJECT
    assert recorder.told[1][1]["method.name"] == "pretrain"
    assert [step for _, _, step in recorder.told[2:5]] == [1, 2, 2]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert recorder.told[3][1]["teacher/loss"] == lines[1]["teacher/loss"]
    preview = recorder.told[4][1]["preview"][0]
    assert preview.shape[:2] == Image.open(folder / "previews" / "step-00000002.png").size[::-1]


def test_tensorboard_gets_numbers_and_previews(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 30)
    folder = run(make_config("pretrain", "train.steps=2", "train.preview_every=2"))
    read = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in read.Scalars("teacher/loss")] == [1, 2]
    assert [event.step for event in read.Images("preview")] == [2]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raiser", "tracker raiser has failed: ConnectionError: no route to https://***@host/?api_key=***"),
        ("hanger", "tracker hanger did not finish within 0.3 s of the run's end"),
        ("unstartable", "tracker unstartable cannot be started: SystemExit: 3"),
        ("wandb", "tracker wandb cannot be started: the package wandb is not installed (pip install wandb)"),
    ],
)
def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    says: str,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    config = make_config("pretrain", f"trackers=[{name}, recorder]", "train.steps=6")
    began = time.monotonic()
    folder = run(config)
    assert time.monotonic() - began < 10
    said = capsys.readouterr().err
    assert said.count(f"tracker {name}") == 1
    assert f"{says}; the run continues without it" in said
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6
    works = next(made for made in Recorder.made if made.name == "recorder")
    assert [step for kind, _, step in works.told if kind == "log"] == [1, 2, 3, 4, 5, 6]
    written = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    assert all(SECRET.encode() not in content for content in [*written, said.encode()])


def test_a_full_disk_in_tensorboards_own_thread_is_one_line(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hook = threading.excepthook
    monkeypatch.setattr(RecordWriter, "write", full)
    folder = run(make_config("pretrain", "trackers=[tensorboard]", "train.steps=6"))
    said = capsys.readouterr().err
    disk = r"OSError: \[Errno 28\] No space left on device"  # its thread may be done before it is all there
    assert len(re.findall(f"tracker tensorboard (has failed|cannot be started): {disk}", said)) == 1
    assert "Traceback" not in said
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6
    assert threading.excepthook is hook


def test_a_thread_that_is_no_trackers_fails_as_threads_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    opened = Trackers(["tensorboard"], tmp_path, start_step=0, settings={}, say=print)
    other = threading.Thread(target=lambda: 1 // 0)
    other.start(), other.join()
    opened.close()
    assert [fault.exc_type for fault in seen] == [ZeroDivisionError]


def test_a_hanging_tracker_costs_the_run_no_time_and_its_queue_is_bounded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trackers, "QUEUE_LENGTH", 5)
    said: list[str] = []
    both = Trackers(["hanger"], tmp_path, start_step=0, settings={}, say=said.append)
    began = time.monotonic()
    for step in range(200):
        both.numbers(step, {"loss": 1.0})
    assert time.monotonic() - began < 0.5
    assert said == ["tracker hanger cannot keep up: 5 reports are waiting; the run continues without it"]
    both.close()
    assert time.monotonic() - began < 0.5, "one that is given up is not waited for"
    assert len(said) == 1


def test_a_tracker_that_does_not_answer_is_given_up_after_its_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trackers, "CALL_SECONDS", 0.05)
    said: list[str] = []
    one = Trackers(["hanger"], tmp_path, start_step=0, settings={}, say=said.append)
    one.numbers(1, {})
    time.sleep(0.3)
    one.numbers(2, {})
    assert said == ["tracker hanger has not answered for 0.05 s; the run continues without it"]


def test_secrets_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", "hf_abc/def+ghi")
    monkeypatch.setenv("PWD", "/the/working/folder")
    text = f"key {SECRET}, url hf_abc%2Fdef%2Bghi, token=xyz1 postgres://user:word@host/db, password: hunter2"
    hidden = hide_secrets(text)
    assert hidden == "key ***, url ***, token=*** postgres://***@host/db, password: ***"
    assert hide_secrets("/the/working/folder") == "/the/working/folder", "PWD sounds like a password and is none"
    assert flat_settings({"data": {"root": f"/x/{SECRET}", "size": 3, "flags": [1, 2], "none": None}}) == {
        "data.root": "/x/***",
        "data.size": 3,
        "data.flags": "[1, 2]",
    }


def test_what_a_run_and_a_tracker_both_import_is_loaded_before_the_threads_start(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from diffdistill.training.reports import trackers
seen = []
trackers.BackgroundTracker = lambda *_: seen.append([name for name in trackers.SHARED_MODULES if name in sys.modules])
trackers.Trackers([], Path("."), start_step=0, settings={}, say=print)
assert "matplotlib.figure" not in sys.modules, "without trackers nothing is loaded early"
trackers.Trackers(["wandb"], Path("."), start_step=0, settings={}, say=print)
assert seen == [list(trackers.SHARED_MODULES)], seen
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_resumed_run_may_have_other_trackers(make_config: MakeConfig) -> None:
    config = make_config("pretrain", "train.steps=1", "trackers=[]")
    folder = run(config)
    assert not (folder / "tensorboard").exists()
    again = make_config("pretrain", f"run={folder}", "train.steps=2", "trackers=[recorder]")
    Trainer(again, resume=True, quiet=True).run()
    assert [step for kind, _, step in Recorder.made[0].told if kind == "log"] == [2]


@pytest.fixture
def figures(drawn_curves: None, monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn from now on."""
    figures: list[Figure] = []
    save = curves.save_figure

    def keep(figure: Figure, file: Path) -> Path:
        figures.append(figure)
        return save(figure, file)

    monkeypatch.setattr(curves, "save_figure", keep)
    return figures


def test_the_curves_have_a_panel_for_every_loss_norm_and_health_signal(
    make_config: MakeConfig, figures: list[Figure]
) -> None:
    settings = ("train.preview_every=2", "health={every: 1, samples: 8}", "trackers=[]")
    folder = run(make_config("dmd2", "train.steps=4", *settings))
    assert len(figures) == 2, "one at each preview, and no third at the end, where nothing is new"
    panels = [axes.get_title(loc="left") for axes in figures[-1].axes]
    losses = ["generator loss", "generator matching", "generator field", "generator gan"]
    losses += ["fake loss", "fake denoising", "fake gan", "fake accuracy"]
    norms = [f"{player} gradient norm" for player in ("generator", "fake", "discriminator")]
    assert panels == [*losses, *norms, "mean drift", "std ratio", "diversity", "fake lag", "cosine"]
    assert [text.get_text() for text in figures[-1].texts][1:] == ["losses", "gradient norms", "health"]
    shaded = [axes.get_title(loc="left") for axes in figures[-1].axes if axes.patches]
    assert shaded == ["fake accuracy", "mean drift", "std ratio", "diversity", "fake lag", "cosine"]
    band = next(axes for axes in figures[-1].axes if axes.get_title(loc="left") == "diversity").patches[0]
    box = band.get_extents().transformed(band.axes.transData.inverted())  # type: ignore[union-attr]
    assert (round(box.y0, 6), round(box.y1, 6)) == (BANDS["diversity"].low, BANDS["diversity"].high)
    assert Image.open(folder / "curves.png").width == 4 * 330


def test_without_previews_the_curves_are_drawn_at_the_end(make_config: MakeConfig, drawn_curves: None) -> None:
    folder = run(make_config("pretrain", "trackers=[]", "train.steps=2"))
    assert list(sections(read_metrics(folder / "metrics.jsonl")).values()) == [
        ["teacher/loss"],  # teacher/denoising is all of it
        ["teacher/gradient_norm"],
    ]
    assert Image.open(folder / "curves.png").width == 2 * 330


def test_curves_outlive_numbers_that_are_not_finite_and_lines_cut_short(tmp_path: Path) -> None:
    reports = [{"step": n, "a/loss": float("nan") if n % 7 == 0 else n, "a/gradient_norm": n} for n in range(1, 4000)]
    text = "\n".join(json.dumps(report) for report in reports)
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 4000, "a/lo')
    assert draw_curves(tmp_path, title="x") == tmp_path / "curves.png"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a/loss": NaN}\n')
    assert draw_curves(tmp_path, title="x") == tmp_path / "curves.png"
    (tmp_path / "metrics.jsonl").write_text("")
    assert draw_curves(tmp_path, title="x") is None
    assert [file.name for file in tmp_path.iterdir() if "writing" in file.name] == []


def test_curves_that_cannot_be_drawn_are_said_once(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no font")

    monkeypatch.setattr(log, "draw_curves", refuse)
    run(make_config("pretrain", "trackers=[]", "train.steps=2", "train.preview_every=1"))
    assert capsys.readouterr().err.count("curves.png cannot be drawn: OSError: no font; the run continues") == 1
